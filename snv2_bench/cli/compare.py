"""``snv2 compare``: how two results differ, and what of that is more than their spread."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from snv2_bench.cli.common import output
from snv2_bench.cli.files import read_result
from snv2_bench.cli.fitted import FittedTable
from snv2_bench.cli.summary import case_of, label_of
from snv2_bench.peers import OURS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from snv2_bench.cli.schema import Result

__all__ = ["Change", "Differences", "compare", "differences_of", "show_comparison"]

_FEWEST_SAMPLES = 5  # p10 to p90 of fewer is narrower than what a next run will give
_RATE_TOLERANCE = 0.05  # of the machine's own rates, from run to run

Key = tuple[str, str, str]  # section, case, peer


@dataclass(frozen=True)
class Change:
    """One median in both results."""

    key: Key
    before_ms: float
    after_ms: float
    verdict: str  # "faster", "slower", "within the spread" or why nothing can be said

    @property
    def ratio(self) -> float:
        """Above 1 where the second result is faster."""
        return self.before_ms / self.after_ms


@dataclass
class Differences:
    """What :func:`differences_of` found between two results."""

    changes: list[Change] = field(default_factory=list)
    only_before: list[Key] = field(default_factory=list)
    only_after: list[Key] = field(default_factory=list)
    setups: list[tuple[str, str, str]] = field(default_factory=list)  # what, before, after

    def geometric_means(self) -> dict[str, float]:
        """Of the ratios of each peer, and of all as ``all``."""
        peers: dict[str, list[float]] = {}
        for change in self.changes:
            peers.setdefault(change.key[2], []).append(change.ratio)
        means = {peer: statistics.geometric_mean(ratios) for peer, ratios in peers.items()}
        if self.changes:
            means["all"] = statistics.geometric_mean(c.ratio for c in self.changes)
        return means


def _timed(result: Result) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    """Whatever has a median, with a name that is the same in every result."""
    for row in result.get("rows", []):
        yield ("network", label_of(case_of(row)), row["peer"]), row
    for start in result.get("startup", []):
        yield ("first result", label_of(case_of(start)), start["peer"]), start
    for line in result.get("guidelines", []):
        where = [line["setting"], line["device"], f"batch {line['batch']}"]
        if line.get("channels"):
            where.append(f"channels {line['channels']}")
        if line.get("threads"):
            where.append(f"threads {line['threads']}")
        yield (line["table"], ", ".join(where), line["peer"]), line
    for net in result.get("table8", []):
        what = f"{net['model']} {net['size']}, {net['input']}"
        if net.get("threads"):
            what += f", threads {net['threads']}"
        yield ("Table 8", what, net["peer"]), net


def _medians(result: Result) -> dict[Key, Mapping[str, Any]]:
    return {key: row for key, row in _timed(result) if row["median_ms"] is not None}


def _verdict(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    ranges = []
    for row in (before, after):
        samples = row.get("samples")
        if samples is not None and samples < _FEWEST_SAMPLES:
            return f"{samples} sample{'s' if samples != 1 else ''}: too few to say"
        percentiles = row.get("percentiles_ms", {})
        if not {"p10", "p90"} <= percentiles.keys():
            return "no spread to compare with"
        ranges.append((percentiles["p10"], percentiles["p90"]))
    (low, high), (new_low, new_high) = ranges
    if new_high < low:
        return "faster"
    return "slower" if new_low > high else "within the spread"


def _setups(before: Result, after: Result) -> Iterator[tuple[str, str, str]]:
    """Differences of machine, versions, commit and settings, and of the machine's own rates."""
    for part in ("machine", "versions", "settings"):
        old: dict[str, Any] = dict(before[part])
        new: dict[str, Any] = dict(after[part])
        for name in dict.fromkeys([*old, *new]):
            a, b = old.get(name), new.get(name)
            if a != b and not (isinstance(a, float) and isinstance(b, float) and _close(a, b)):
                yield f"{part}: {name}", str(a), str(b)
    if before["commit"] != after["commit"]:
        yield "commit", str(before["commit"]), str(after["commit"])
    if before["interrupted"] != after["interrupted"]:
        yield "interrupted", str(before["interrupted"]), str(after["interrupted"])
    floors = [
        {(floor["threads"], floor["element"]): floor for floor in result.get("floor", [])}
        for result in (before, after)
    ]
    for which in floors[0].keys() & floors[1].keys():
        old, new = dict(floors[0][which]), dict(floors[1][which])
        for name in ("multiply_adds_per_s", "copy_bytes_per_s"):
            if not _close(old[name], new[name]):
                threads, element = which
                what = f"measured {name}, {element}, threads {threads}"
                yield what, f"{old[name]:.3g}", f"{new[name]:.3g}"


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= _RATE_TOLERANCE * max(a, b)


def differences_of(before: Result, after: Result) -> Differences:
    """Medians of both case by case, what only one has, and how the set-ups differ.

    A median counts as changed only if the ranges from p10 to p90 have nothing in common.
    """
    old, new = _medians(before), _medians(after)
    return Differences(
        changes=[
            Change(key, row["median_ms"], new[key]["median_ms"], _verdict(row, new[key]))
            for key, row in old.items()
            if key in new
        ],
        only_before=[key for key in old if key not in new],
        only_after=[key for key in new if key not in old],
        setups=list(_setups(before, after)),
    )


def show_comparison(before_path: str, after_path: str) -> None:
    """Print how two files differ.

    Raises:
        ResultError: if one is no result.
    """
    before, after = read_result(before_path), read_result(after_path)
    found = differences_of(before, after)
    console = output()
    console.print(
        f"A: {click.format_filename(before_path)}\nB: {click.format_filename(after_path)}"
    )
    if found.setups:
        table = FittedTable("measured differently")
        table.add_texts("", "A", "B")
        for setup in found.setups:
            table.add_row(*setup)
        console.print()
        console.print(table)
    for name, keys in (("A", found.only_before), ("B", found.only_after)):
        if keys:
            console.print(f"\nonly in {name}:")
        for key in keys:
            console.print(f"  {': '.join(key)}")
    console.print()
    if not found.changes:
        console.print("nothing was measured in both")
        return
    console.print(_table_of(found.changes))
    for peer, mean in found.geometric_means().items():
        name = f"{peer} (ours)" if peer in OURS else peer
        console.print(f"geometric mean, {name}: {mean:.3f}x")
    verdicts = [change.verdict for change in found.changes]
    console.print(
        f"{len(verdicts)} compared: {verdicts.count('faster')} faster, "
        f"{verdicts.count('slower')} slower, the others within p10 to p90 of each other or not to "
        "be told"
    )


def _table_of(changes: Iterable[Change]) -> FittedTable:
    table = FittedTable("A's median over B's: above 1 B is faster")
    table.add_texts("", "case", "peer")
    table.add_numbers("A ms", "B ms", "ratio")
    table.add_texts("")
    for change in changes:
        times = (f"{ms:.3f}" for ms in (change.before_ms, change.after_ms))
        table.add_row(*change.key, *times, f"{change.ratio:.2f}x", change.verdict)
    return table


@click.command()
@click.argument("before", type=click.Path(exists=True, dir_okay=False), metavar="A.json")
@click.argument("after", type=click.Path(exists=True, dir_okay=False), metavar="B.json")
def compare(before: str, after: str) -> None:
    """Say how two results of `snv2 bench` differ.

    A median counts as faster or slower only if the ranges from p10 to p90 have nothing in common.
    """
    show_comparison(before, after)
