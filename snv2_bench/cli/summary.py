"""How this package compares with the fastest of the others, from the rows of a result."""

from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING, Any, TypeVar, cast

from snv2_bench.cli.fitted import FittedTable
from snv2_bench.peers import OURS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from snv2_bench.cli.schema import Row, Summary, Versus

__all__ = [
    "CASE",
    "case_of",
    "cases_of",
    "label_of",
    "summary_of",
    "summary_table",
    "versus_line",
]

_C = TypeVar("_C", bound="Mapping[str, Any]")

# What a row shares with those that it is compared with.
CASE = ("width", "batch", "dtype", "threads")


def label_of(case: Sequence[Any]) -> str:
    """A case in words."""
    width, batch, dtype, threads = case
    return f"{width}, batch {batch}, {dtype}, {threads} thread{'s' if threads > 1 else ''}"


def case_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the row shares with those that it is compared with."""
    return tuple(row[key] for key in CASE)


def cases_of(rows: Iterable[_C]) -> Iterator[tuple[tuple[Any, ...], list[_C]]]:
    """The rows case by case."""
    for case, group in itertools.groupby(rows, key=case_of):
        yield case, list(group)


def _versus(rows: Sequence[Row]) -> dict[str, Any] | None:
    """One case; None if nothing of ours or nothing of the others was timed."""
    medians = {row["peer"]: row["median_ms"] for row in rows if row["median_ms"] is not None}
    others = {peer: median for peer, median in medians.items() if peer not in OURS}
    ours = {peer: medians[peer] for peer in OURS if peer in medians}
    if not others or not ours:
        return None
    fastest = min(others, key=others.__getitem__)
    paired = {row["peer"]: row["paired"].get(fastest, {}) for row in rows if row["peer"] in ours}
    return {
        "fastest_peer": fastest,
        "fastest_ms": others[fastest],
        "speedup": {peer: others[fastest] / median for peer, median in ours.items()},
        "paired": paired,
    }


def summary_of(rows: Sequence[Row]) -> Summary:
    """Every case beside its fastest peer, geometric means and minima over all cases.

    ``speedup`` is the median of the fastest peer over ours; peers are all that are not ours.
    ``paired`` is the same ratio round by round, at p10, p50 and p90.
    """
    cases = []
    for case, group in cases_of(rows):
        versus = _versus(group)
        if versus is not None:
            cases.append(dict(zip(CASE, case, strict=True)) | versus)
    speedups = {
        peer: [case["speedup"][peer] for case in cases if peer in case["speedup"]] for peer in OURS
    }
    return {
        "cases": cast("list[Versus]", cases),
        "geometric_mean": {k: statistics.geometric_mean(v) for k, v in speedups.items() if v},
        "minimum": {k: min(v) for k, v in speedups.items() if v},
    }


def _spread(paired: dict[str, float]) -> str:
    return f" ({paired['p10']:.2f} - {paired['p90']:.2f})" if paired else ""


def versus_line(rows: Sequence[Row]) -> str | None:
    """One case in a line, with p10 - p90 of the rounds; None where there is nothing to compare."""
    versus = _versus(rows)
    if versus is None:
        return None
    ours = ", ".join(
        f"{peer} {ratio:.2f}x{_spread(versus['paired'][peer])}"
        for peer, ratio in versus["speedup"].items()
    )
    return f"vs fastest peer ({versus['fastest_peer']}): {ours}"


def summary_table(summary: Summary) -> FittedTable:
    """The summary as a table."""
    table = FittedTable("speed against the fastest peer")
    table.add_texts(*CASE, "fastest peer")
    table.add_numbers("its median ms", *OURS)

    def ratios(speedup: dict[str, float]) -> list[str]:
        return [f"{speedup[peer]:.2f}x" if peer in speedup else "-" for peer in OURS]

    for case in summary["cases"]:
        cells = [*map(str, case_of(case)), case["fastest_peer"]]
        table.add_row(*cells, f"{case['fastest_ms']:.3f}", *ratios(case["speedup"]))
    table.add_section()
    blank = [""] * (len(CASE) + 1)
    table.add_row("geometric mean", *blank, *ratios(summary["geometric_mean"]))
    table.add_row("minimum", *blank, *ratios(summary["minimum"]))
    return table
