"""What the page of ``snv2 report`` says: sections of words, tables and charts made from results."""

from __future__ import annotations

import inspect
import json
import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from snv2_kernels.cli import charts
from snv2_kernels.cli.summary import CASE, case_of, cases_of, label_of
from snv2_kernels.peers import OURS, PEERS
from snv2_kernels.startup import PHASES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from matplotlib.figure import Figure

    from snv2_kernels.cli.schema import Layers, Percentiles, Result, Row

__all__ = ["NAMES", "Cell", "Chart", "Fold", "Section", "Table", "number", "sections_of", "words_of"]

NAMES = {"fused": "snv2.fuse", "engine": "snv2.Engine"}
_CURVE = 3  # batches that make one


@dataclass(frozen=True)
class Cell:
    """What stands in a table, and what it is sorted by."""

    text: str
    order: float | str | None = None


@dataclass(frozen=True)
class Table:
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Chart:
    svg: str
    alt: str  # in its place for those who do not see it
    caption: str


@dataclass(frozen=True)
class Fold:
    """Details that open at a click."""

    title: str
    parts: Sequence[Table | Chart]


@dataclass
class Section:
    name: str  # unique on the page
    title: str
    words: list[str] = field(default_factory=list)
    parts: list[Table | Chart | Fold] = field(default_factory=list)

    def chart(self, figure: Figure, alt: str, caption: str) -> Chart:
        """A chart of this section; ids in it begin with the section's name."""
        self._charts = getattr(self, "_charts", 0) + 1
        return Chart(charts.svg(figure, f"{self.name}-{self._charts}"), alt, caption)


def number(value: float | None, form: str) -> Cell:
    """A number as ``form`` writes it, sorted by its value; a dash for None."""
    return Cell("–", -math.inf) if value is None else Cell(form.format(value), value)


def _text(value: object) -> Cell:
    return Cell("–" if value is None else str(value))


def _count(value: int | None) -> Cell:
    return number(value, "{:,}")


def _range(percentiles: Percentiles, form: str, low: str = "p10", high: str = "p90") -> Cell:
    if low not in percentiles or high not in percentiles:
        return number(None, form)
    text = f"{form.format(percentiles[low])} – {form.format(percentiles[high])}"
    return Cell(text, percentiles[low])


def _case(row: Mapping[str, Any]) -> list[Cell]:
    return [_text(row[key]) for key in CASE]


def _where(result: Result) -> str:
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['usable_cores']} cores, {machine['isa']}"


# Summary --------------------------------------------------------------------------------------


def words_of(result: Result) -> list[str]:
    """Who is faster and by how much, a sentence for each of ours."""
    summary = result.get("summary", {})
    cases = summary.get("cases", [])
    said = []
    for peer in OURS:
        timed = [case for case in cases if peer in case["speedup"]]
        if not timed:
            continue
        low = min(timed, key=lambda case: case["speedup"][peer])
        high = max(timed, key=lambda case: case["speedup"][peer])
        mean = statistics.geometric_mean(case["speedup"][peer] for case in timed)
        slower = sum(case["speedup"][peer] < 1 for case in timed)
        cases_word = f"{len(timed)} case{'s' if len(timed) > 1 else ''}"
        beaten = f"slower in {slower} of {cases_word}" if slower else f"faster in all {cases_word}"
        if len(timed) == 1:
            beaten = "slower" if slower else "faster"
        said.append(
            f"{NAMES[peer]} is {mean:.2f} times as fast as the fastest other way to run the network "
            f"({'geometric mean, ' if len(timed) > 1 else ''}{beaten}): from "
            f"{low['speedup'][peer]:.2f} ({label_of(case_of(low))}, against {low['fastest_peer']}) "
            f"to {high['speedup'][peer]:.2f} ({label_of(case_of(high))}, against "
            f"{high['fastest_peer']})."
        )
        eager = [
            r["speedup"] for r in result.get("rows", []) if r["peer"] == peer and r["speedup"]
        ]
        if eager:
            said[-1] += f" Against eager PyTorch it is {statistics.geometric_mean(eager):.2f} times."
        shares = [
            row["floor_share"]
            for row in result.get("rows", [])
            if row["peer"] == peer and row["floor_share"]
        ]
        if shares:
            said[-1] += (
                f" It is at {min(shares):.0%} to {max(shares):.0%} of the floor, "
                f"{statistics.median(shares):.0%} in the middle case."
            )
    return said


def _summary(result: Result, name: str) -> Iterator[Section]:
    cases = result.get("summary", {}).get("cases", [])
    if not cases:
        return
    section = Section(f"{name}-summary", f"Who is faster: {_where(result)}", words_of(result))
    if result["interrupted"]:
        section.words.append("The run was interrupted; cases may be missing.")
    means = ", ".join(
        f"{peer} {ratio:.2f}" for peer, ratio in result["summary"]["geometric_mean"].items()
    )
    section.parts.append(
        section.chart(
            charts.ratios_chart(cases),
            f"Bars of how many times as fast as the fastest other way ours are in {len(cases)} "
            f"cases; geometric means: {means}. The table below has all numbers.",
            "Ratio of medians, and p10 to p90 of the ratio in each round; right of 1 ours is faster.",
        )
    )
    rows = []
    for case in cases:
        row = [*_case(case), _text(case["fastest_peer"]), number(case["fastest_ms"], "{:.3f}")]
        for peer in OURS:
            row.append(number(case["speedup"].get(peer), "{:.2f}x"))
            row.append(_range(case["paired"].get(peer, {}), "{:.2f}"))
        rows.append(row)
    headings = [*CASE, "fastest other", "its median, ms"]
    for peer in OURS:
        headings += [NAMES[peer], f"{NAMES[peer]}: p10 – p90 of rounds"]
    section.parts.append(Table("Ours against the fastest other way, case by case", headings, rows))
    yield section


# Sections of one result -----------------------------------------------------------------------


def _times(result: Result, name: str) -> Iterator[Section]:
    rows = result.get("rows", [])
    if not rows:
        return
    size = result["settings"].get("size")
    section = Section(f"{name}-times", f"All times: {_where(result)}")
    section.words.append(
        f"ShuffleNet V2 on {size} x {size}. Ways take turns, one call each in random order; each "
        "timed call follows one that is not timed. Nothing is timed whose output was not checked "
        "against float64. The floor is the longer of two times: that of the multiply-adds at the "
        "measured peak, and that of input and weights at the measured rate of copies in caches."
    )
    cells = [
        [
            *_case(row), _text(row["peer"]), number(row["error"], "{:.1e}"),
            number(row["median_ms"], "{:.3f}"),
            _range(row["percentiles_ms"], "{:.3f}"),
            number(row["percentiles_ms"].get("p99"), "{:.3f}"),
            number(row["images_per_s"], "{:,.1f}"), number(row["speedup"], "{:.2f}x"),
            number(row["floor_share"], "{:.0%}"), _count(row["samples"]), _text(row["reason"] or ""),
        ]
        for row in rows
    ]  # fmt: skip
    headings = (
        *CASE, "peer", "error", "median, ms", "p10 – p90, ms", "p99, ms", "images/s", "beside eager",
        "of floor", "samples", "not measured because",
    )  # fmt: skip
    section.parts.append(Table("Every way in every case", headings, cells))
    for key, group in _groups(rows, ("width", "dtype", "threads")):
        if len({row["batch"] for row in group}) >= _CURVE:
            width, dtype, threads = key
            what = f"{width}, {dtype}, threads {threads}"
            section.parts.append(
                section.chart(
                    charts.throughput_chart(group),
                    f"Lines of images per second against the batch for each way, {what}; the table "
                    "above has all numbers.",
                    f"Throughput, {what}.",
                )
            )
    panels = [
        section.chart(charts.bars_chart(group), _bars_alt(group, label_of(case)), label_of(case))
        for case, group in cases_of(rows)
    ]
    section.parts.append(Fold("A chart for each case", panels))
    yield section


def _bars_alt(rows: Sequence[Row], label: str) -> str:
    timed = sorted((row["median_ms"], row["peer"]) for row in rows if row["median_ms"])
    return f"{label}, milliseconds: " + ", ".join(f"{peer} {ms:.2f}" for ms, peer in timed) + "."


def _groups(
    rows: Iterable[Mapping[str, Any]], keys: Sequence[str]
) -> Iterator[tuple[tuple[Any, ...], list[Any]]]:
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    yield from groups.items()


def _layers(result: Result, name: str) -> Iterator[Section]:
    cases = result.get("layers", [])
    if not cases:
        return
    section = Section(f"{name}-layers", f"Where the engine's time goes: {_where(result)}")
    section.words.append(
        "Each kernel of snv2.Engine, timed in the run of the whole network. Bytes are the least that "
        "it has to move: the maps that it reads and writes, and its weights. "
        "A kernel's floor is the longer time of its multiply-adds and its bytes. "
        '"no kernel" is waiting for other threads and what runs between kernels.'
    )
    section.parts.append(
        section.chart(
            charts.kinds_chart(cases), _kinds_alt(cases), "Shares of the time by kind of kernel."
        )
    )
    section.parts.append(
        Table(
            "By kind of kernel",
            (*CASE, "kernel", "ms", "of the time", "M multiply-adds", "MB", "of floor", "ms beyond"),
            [row for case in cases for row in _added(case, "kernel")],
        )
    )
    for floor in result.get("floor", []):
        shown = [case for case in cases if case["threads"] == floor["threads"]]
        if shown and len({f["element"] for f in result["floor"]}) == 1:
            section.parts.append(
                section.chart(
                    charts.roofline_chart(shown, floor),
                    f"Roofline with threads {floor['threads']}: rates of the kernels of "
                    f"{len(shown)} cases under a peak of {floor['multiply_adds_per_s'] / 1e9:.0f} G "
                    f"multiply-adds/s and copies of {floor['cached_copy_bytes_per_s'] / 1e9:.0f} GB/s "
                    f"in caches, {floor['copy_bytes_per_s'] / 1e9:.0f} GB/s through memory. "
                    "The tables have the same numbers by kernel and step.",
                    f"Roofline, threads {floor['threads']}: every kernel of every case with as many.",
                )
            )
    for case in cases:
        label = label_of(case_of(case))
        table = Table(
            label,
            (*CASE, "step", "ms", "of the time", "M multiply-adds", "MB", "of floor", "ms beyond"),
            list(_added(case, "step")),
        )
        chart = section.chart(
            charts.steps_chart(case["kernels"]),
            f"Bars of each step's floor and of what it takes beyond, {label}; the table has the "
            "numbers.",
            f"Floor and rest by step, {label}.",
        )
        section.parts.append(Fold(f"By step: {label}", [chart, table]))
    yield section


def _kinds_alt(cases: Sequence[Layers]) -> str:
    kernels = [kernel for case in cases for kernel in case["kernels"]]
    whole = sum(kernel["ms"] for kernel in kernels)
    kinds = dict.fromkeys(kernel["kernel"] for kernel in kernels)
    shares = (
        f"{kind} {sum(k['ms'] for k in kernels if k['kernel'] == kind) / whole:.0%}"
        for kind in kinds
    )
    return f"Stacked bars of shares of the time; over all cases: {', '.join(shares)}."


def _added(case: Layers, key: str) -> Iterator[list[Cell]]:
    whole = sum(kernel["ms"] for kernel in case["kernels"])
    for (value,), group in _groups(case["kernels"], [key]):
        sums = {
            name: sum(kernel[name] for kernel in group)
            for name in ("ms", "floor_ms", "multiply_adds", "moved_bytes")
        }
        yield [
            *_case(case), _text(value), number(sums["ms"], "{:.3f}"),
            number(sums["ms"] / whole, "{:.1%}"), number(sums["multiply_adds"] / 1e6, "{:.1f}"),
            number(sums["moved_bytes"] / 1e6, "{:.2f}"),
            number(sums["floor_ms"] / sums["ms"] if sums["ms"] else None, "{:.0%}"),
            number(sums["ms"] - sums["floor_ms"], "{:.3f}"),
        ]  # fmt: skip


def _startup(result: Result, name: str) -> Iterator[Section]:
    rows = result.get("startup", [])
    if not rows:
        return
    label = label_of(case_of(rows[0]))
    section = Section(f"{name}-startup", f"First result and memory: {_where(result)}")
    section.words.append(
        f"{label}, each way in processes of its own. The time is from before `import torch` to the "
        "first result, with the export and conversion that a way needs, caches of compilers empty; "
        "making the model is left out, and so is `import snv2_kernels` for the others. Memory is "
        "the peak of resident memory above what the process has with PyTorch, the model and the "
        "input: while the way is made and called once, and in later calls."
    )
    timed = [row for row in rows if row["median_ms"] is not None]
    if timed:
        alt = ", ".join(f"{row['peer']} {(row['median_ms'] or 0) / 1e3:.1f}" for row in timed)
        figure = charts.startup_chart(rows)
        section.parts.append(
            section.chart(figure, f"Seconds to the first result: {alt}.", "Time to the first result.")
        )
    known = [(row["peer"], row["memory_mb"]) for row in rows if row["memory_mb"]]
    if known:
        alt = ", ".join(f"{peer} {memory['to_first_result'] or 0:.0f}" for peer, memory in known)
        section.parts.append(
            section.chart(
                charts.memory_chart(rows),
                f"MB up to the first result: {alt}; the table has those of later calls.",
                "Peak of resident memory above that with PyTorch, model and input.",
            )
        )
    phases = list(PHASES)
    cells = []
    for row in rows:
        memory = row["memory_mb"]
        cells.append([
            _text(row["peer"]), number(row["median_ms"] and row["median_ms"] / 1e3, "{:.2f}"),
            _range({k: v / 1e3 for k, v in row["percentiles_ms"].items()}, "{:.2f}", "p0", "p100"),
            *(number(row["phases_ms"][p] / 1e3 if p in row["phases_ms"] else None, "{:.2f}")
              for p in phases),
            number(memory and memory["before"], "{:.0f}"),
            number(memory and memory["to_first_result"], "{:.0f}"),
            number(memory and memory["calls"], "{:.0f}"), _count(row["samples"]),
            _text(row["reason"] or ""),
        ])  # fmt: skip
    headings = (
        "peer", "first result, s", "least – most, s", *(f"{p}, s" for p in phases),
        "MB before", "MB to first result", "MB in calls", "processes", "not measured because",
    )  # fmt: skip
    section.parts.append(Table(f"Start and memory, {label}", headings, cells))
    yield section


def _guidelines(result: Result, name: str) -> Iterator[Section]:
    rows = result.get("guidelines", [])
    if not rows:
        return
    section = Section(f"{name}-guidelines", f"The paper's guidelines: {_where(result)}")
    section.words.append(
        "Tables 1 to 4 of the paper measured here: how much a setting costs at equal multiply-adds "
        "(G1: unequal widths, G2: groups, G3: fragments, G4: element-wise operations). A ratio "
        "is the speed beside the table's first setting; the paper's are those of its own devices."
    )
    for key, group in _groups(rows, ("table", "device", "batch", "threads")):
        table, device, batch, threads = key
        label = f"{table}, {device}, batch {batch}" + (f", threads {threads}" if threads else "")
        sizes: dict[int, list[Any]] = {}
        for (_, _), same in _groups(group, ("setting", "peer")):
            for place, row in enumerate(same):
                sizes.setdefault(place, []).append(row)
        panels = []
        for place, shown in sizes.items():
            first = shown[0].get("channels")
            what = f"{label}, from channels {first}" if first else f"{label}, size {place + 1}"
            panels.append(
                section.chart(
                    charts.guideline_chart(shown),
                    f"Bars of the speed of each setting beside the first, {what}, for each way and "
                    "the paper; the table has the numbers.",
                    what,
                )
            )
        section.parts.append(Fold(f"Charts: {label}", panels))
    cells = [
        [
            _text(row["table"]), _text(row["setting"]),
            _text(", ".join(map(str, row.get("channels") or []))), _text(row["device"]),
            _text(row["batch"]), _text(row.get("threads")), _text(row["peer"]),
            number(row["median_ms"], "{:.3f}"),
            _range(row.get("percentiles_ms", {}), "{:.3f}"),
            number(row["ratio"], "{:.2f}x"), number(row["paper_ratio"], "{:.2f}x"),
            number(row["paper_per_s"], "{:,.4g}"), _text(row.get("reason") or ""),
        ]
        for row in rows
    ]  # fmt: skip
    headings = (
        "table", "setting", "channels", "device", "batch", "threads", "peer", "median, ms",
        "p10 – p90, ms", "ratio here", "ratio in the paper", "a second in the paper",
        "not measured because",
    )  # fmt: skip
    section.parts.append(Table("Guidelines beside the paper's numbers", headings, cells))
    yield section


def _table8(result: Result, name: str) -> Iterator[Section]:
    rows = result.get("table8", [])
    if not rows:
        return
    section = Section(f"{name}-table8", f"The paper's Table 8: {_where(result)}")
    section.words.append(
        "Networks side by side as in the paper's Table 8. The paper's speeds are those of its own "
        "devices, so that ratios compare and speeds do not."
    )
    if any(row["per_s"] and row["multiply_adds"] for row in rows):
        section.parts.append(
            section.chart(
                charts.table8_chart(rows),
                "Images per second against multiply-adds for each network and way; the table has "
                "the numbers.",
                "Speed against multiply-adds.",
            )
        )
    cells = [
        [
            _text(row["model"]), _text(row["size"]), _count(row["input"]),
            number(row["multiply_adds"] and row["multiply_adds"] / 1e6, "{:,.0f}"),
            _text(row["peer"]), number(row["median_ms"], "{:.3f}"),
            number(row["per_s"], "{:,.4g}"), number(row["ratio"], "{:.2f}x"),
            number(row["paper_per_s"], "{:,.4g}"), number(row["paper_ratio"], "{:.2f}x"),
            _text(row.get("reason") or ""),
        ]
        for row in rows
    ]  # fmt: skip
    headings = (
        "model", "size", "input", "M multiply-adds", "peer", "median, ms", "images/s", "ratio here",
        "a second in the paper", "ratio in the paper", "not measured because",
    )  # fmt: skip
    section.parts.append(Table("Table 8 beside the paper's numbers", headings, cells))
    yield section


def _gpu(result: Result, name: str) -> Iterator[Section]:
    rows = result.get("gpu", [])
    if not rows:
        return
    section = Section(f"{name}-gpu", "What the CUDA kernels move")
    section.words.append(
        "Counted by the emulator, which runs the kernels without a GPU: the same on every machine, "
        "and no measurement of time. The least is the maps and weights once; described is what the "
        "host code that launches a kernel says of it."
    )
    cells = [
        [
            _text(row["kernel"]), _text(row["shape"]), _text(row["dtype"]), _count(row["batch"]),
            number(row["multiply_adds"] / 1e6, "{:,.2f}"), _count(row["least_bytes"]),
            _count(row["described_bytes"]), _count(row["counted_bytes"]),
            number(row["counted_bytes"] / row["least_bytes"], "{:.3f}x"),
        ]
        for row in rows
    ]  # fmt: skip
    headings = (
        "kernel", "shape", "dtype", "batch", "M multiply-adds", "least bytes", "described bytes",
        "counted bytes", "counted over least",
    )  # fmt: skip
    section.parts.append(Table("Bytes of global memory", headings, cells))
    yield section


# What was measured, and with what ---------------------------------------------------------------


def _origin(files: Sequence[tuple[str, Result]]) -> Section:
    section = Section("origin", "What produced these numbers")
    for path, result in files:
        facts: list[tuple[str, Any]] = [
            ("date", result["date"]), ("command", result["command"]), ("commit", result["commit"]),
            ("interrupted", "yes" if result["interrupted"] else "no"),
            *((f"machine: {name}", value) for name, value in result["machine"].items()),
            *((f"version: {name}", value) for name, value in result["versions"].items()),
            *((f"setting: {name}", value) for name, value in result["settings"].items()),
        ]  # fmt: skip
        for floor in result.get("floor", []):
            what = f"measured, threads {floor['threads']}, {floor['element']}: "
            for name, rate in floor.items():
                if isinstance(rate, float):
                    facts.append((what + name, f"{rate:.4g}"))
        rows = [
            [Cell(name), Cell(value if isinstance(value, str) else json.dumps(value))]
            for name, value in facts
        ]
        section.parts.append(Table(path, ("what", "value"), rows))
    used = {row["peer"] for _, result in files for row in result.get("rows", [])}
    ways = [
        [Cell(name), Cell((inspect.getdoc(make) or "").replace("`", ""))]
        for name, make in PEERS.items()
        if name in used
    ]
    if ways:
        section.parts.append(Table("The ways to run the network", ("peer", "what it is"), ways))
    return section


def sections_of(files: Sequence[tuple[str, Result]]) -> list[Section]:
    """All of the page: summaries of all files first, then what each file has, then its origin."""
    makers = (_summary, _times, _layers, _startup, _guidelines, _table8, _gpu)
    made = [
        section
        for make in makers
        for index, (_, result) in enumerate(files)
        for section in make(result, f"f{index}")
    ]
    return [*made, _origin(files)]
