"""What the page of ``snv2 report`` says: sections of words, tables and charts made from results."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snv2_bench.cli import charts
from snv2_bench.cli.page_paper import gpu, guidelines, table8
from snv2_bench.cli.page_parts import (
    Cell,
    Fold,
    Section,
    Table,
    Tile,
    case_cells,
    count,
    groups_of,
    number,
    span,
    table_of,
    text,
)
from snv2_bench.cli.summary import CASE, case_of, cases_of, label_of
from snv2_bench.floor import Floor
from snv2_bench.peers import GPU_PEERS, INT8_PEERS, OURS, PEERS
from snv2_bench.startup import PHASES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from snv2_bench.cli.schema import Floor as FloorRow
    from snv2_bench.cli.schema import Layers, Result, Row

__all__ = ["NAMES", "sections_of", "words_of"]

NAMES = {"fused": "snv2.fuse", "engine": "snv2.Engine"}
_CURVE = 3  # batches that make one


def _where(result: Result) -> str:
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['usable_cores']} cores, {machine['isa']}"


# Summary --------------------------------------------------------------------------------------


def _beside_eager(result: Result, peer: str) -> float | None:
    rows = result.get("rows", [])
    ratios = [row["speedup"] for row in rows if row["peer"] == peer and row["speedup"]]
    return statistics.geometric_mean(ratios) if ratios else None


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
            f"{NAMES[peer]} is {mean:.2f} times as fast as the fastest other way "
            f"to run the network ({'geometric mean, ' if len(timed) > 1 else ''}{beaten}): from "
            f"{low['speedup'][peer]:.2f} ({label_of(case_of(low))}, against {low['fastest_peer']}) "
            f"to {high['speedup'][peer]:.2f} ({label_of(case_of(high))}, against "
            f"{high['fastest_peer']})."
        )
        eager = _beside_eager(result, peer)
        if eager is not None:
            said[-1] += f" Against eager PyTorch it is {eager:.2f} times."
        shares = [
            row["floor_share"]
            for row in result.get("rows", [])
            if row["peer"] == peer and row["floor_share"]
        ]
        if shares:
            said[-1] += (
                f" The floor, the least that this machine could take, is {min(shares):.0%} "
                f"to {max(shares):.0%} of its time, in the middle case "
                f"{statistics.median(shares):.0%}."
            )
    return said


def _summary(result: Result, name: str) -> Iterator[Section]:
    cases = result.get("summary", {}).get("cases", [])
    if not cases:
        return
    section = Section(f"{name}-summary", "Who is faster")
    section.words += [
        f"On {_where(result)}, PyTorch {result['versions']['torch']}:",
        *words_of(result),
    ]
    if result["interrupted"]:
        section.words.append("The run was interrupted; cases may be missing.")
    means = ", ".join(
        f"{peer} {ratio:.2f}" for peer, ratio in result["summary"]["geometric_mean"].items()
    )
    for peer, ratio in result["summary"]["geometric_mean"].items():
        section.tiles.append(Tile(f"{ratio:.2f}x", f"{NAMES[peer]} beside the fastest other way"))
        eager = _beside_eager(result, peer)
        if eager is not None:
            section.tiles.append(Tile(f"{eager:.2f}x", f"{NAMES[peer]} beside eager PyTorch"))
    section.aside.append(
        section.chart(
            charts.ratios_chart(cases),
            f"Bars of how many times as fast as the fastest other way ours are in {len(cases)} "
            f"cases; geometric means: {means}. The table below has all numbers.",
            "Ratio of medians; whiskers: p10 to p90 of the rounds' ratios. Above 1 ours is faster.",
        )
    )
    rows = []
    for case in cases:
        row = [*case_cells(case), text(case["fastest_peer"]), number(case["fastest_ms"], "{:.3f}")]
        for peer in OURS:
            row.append(number(case["speedup"].get(peer), "{:.2f}x"))
            row.append(span(case["paired"].get(peer, {}), "{:.2f}"))
        rows.append(row)
    headings = [*CASE, "fastest other", "its median, ms"]
    for peer in OURS:
        headings += [NAMES[peer], f"{NAMES[peer]}, p10 - p90"]
    section.beside.append(
        table_of(
            "Ours against the fastest other way, case by case", headings, rows,
            chief=NAMES["fused"], titles=CASE,
        )
    )  # fmt: skip
    yield section


# Sections of one result -----------------------------------------------------------------------


def _times(result: Result, name: str) -> Iterator[Section]:
    rows = result.get("rows", [])
    if not rows:
        return
    size = result["settings"].get("size")
    section = Section(f"{name}-times", "All times")
    section.words.append(
        f"ShuffleNet V2 on {size} x {size}. Ways take turns, one call each in random order; each "
        "timed call follows one that is not timed. Nothing is timed whose output was not checked "
        "against float64; of int8 the error is its rms over that of the scores. The floor is the "
        "longer of two times: that of the multiply-adds at the measured peak, and that of input "
        "and weights at the measured rate of copies in caches. "
        "p99 of fewer than 100 samples is about their maximum."
    )
    cells = [
        [
            *case_cells(row), text(row["peer"]), number(row["error"], "{:.1e}"),
            number(row["median_ms"], "{:.3f}"),
            span(row["percentiles_ms"], "{:.3f}"),
            number(row["percentiles_ms"].get("p99"), "{:.3f}"),
            number(row["images_per_s"], "{:,.1f}"), number(row["speedup"], "{:.2f}x"),
            number(row["floor_share"], "{:.0%}"), count(row["samples"]), text(row["reason"] or ""),
        ]
        for row in rows
    ]  # fmt: skip
    headings = (
        *CASE, "peer", "error", "median, ms", "p10 - p90, ms", "p99, ms", "images/s",
        "beside eager", "of floor", "samples", "not measured because",
    )  # fmt: skip
    section.parts.append(
        table_of("Every way in every case", headings, cells, "median, ms", ("peer",))
    )
    for key, group in groups_of(rows, ("width", "dtype", "threads")):
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


def _layers(result: Result, name: str) -> Iterator[Section]:
    cases = result.get("layers", [])
    if not cases:
        return
    section = Section(f"{name}-layers", "Where the engine's time goes")
    section.words.append(
        "Each kernel of snv2.Engine, timed in the run of the whole network. Bytes are the least "
        "that it has to move: the maps that it reads and writes, and its weights. "
        "A kernel's floor is the longer time of its multiply-adds and its bytes. "
        '"no kernel" is waiting for other threads and what runs between kernels.'
    )
    section.aside.append(
        section.chart(
            charts.kinds_chart(cases), _kinds_alt(cases), "Shares of the time by kind of kernel."
        )
    )
    section.beside.append(
        table_of(
            "By kind of kernel",
            (
                *CASE,
                "kernel",
                "ms",
                "of the time",
                "M multiply-adds",
                "MB",
                "of floor",
                "ms beyond",
            ),
            [row for case in cases for row in _added(case, "kernel")],
            "ms",
            ("kernel",),
        )
    )
    for floor in result.get("floor", []):
        shown = [case for case in cases if case["threads"] == floor["threads"]]
        if shown and len({f["element"] for f in result["floor"]}) == 1:
            section.parts.append(
                section.chart(
                    charts.roofline_chart(shown, floor),
                    f"Roofline: rates of the kernels of {len(shown)} cases under these peaks of "
                    f"{_floor_text(floor)}. The tables have the same numbers by kernel and step.",
                    f"Roofline, threads {floor['threads']}: every kernel of all such cases.",
                )
            )
    for case in cases:
        label = label_of(case_of(case))
        table = table_of(
            "By step",
            (*CASE, "step", "ms", "of the time", "M multiply-adds", "MB", "of floor", "ms beyond"),
            list(_added(case, "step")),
            "ms",
            ("step",),
        )
        chart = section.chart(
            charts.steps_chart(case["kernels"]),
            f"Bars of each step's floor and of what it takes beyond, {label}; the table has the "
            "numbers.",
            f"Floor and rest by step, {label}.",
        )
        section.parts.append(Fold(f"By step: {label}", [chart, table]))
    yield section


def _floor_text(floor: FloorRow) -> str:
    """The peaks in words, whatever else a later version may note of them."""
    known: dict[str, Any] = dict(floor)
    return str(Floor(**{field.name: known[field.name] for field in dataclasses.fields(Floor)}))


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
    for (value,), group in groups_of(case["kernels"], [key]):
        sums = {
            name: sum(kernel[name] for kernel in group)
            for name in ("ms", "floor_ms", "multiply_adds", "moved_bytes")
        }
        yield [
            *case_cells(case), text(value), number(sums["ms"], "{:.3f}"),
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
    section = Section(f"{name}-startup", "First result and memory")
    section.words.append(
        f"{label}, each way in processes of its own. The time is from before importing torch "
        "to the first result, with the export and conversion that a way needs, caches of compilers "
        "empty; "
        "making the model is left out, and so is importing snv2_kernels for the others. Memory is "
        "the peak of resident memory above what the process has with PyTorch, the model and the "
        "input: while the way is made and called once, and in later calls."
    )
    timed = [row for row in rows if row["median_ms"] is not None]
    if timed:
        alt = ", ".join(f"{row['peer']} {(row['median_ms'] or 0) / 1e3:.1f}" for row in timed)
        figure = charts.startup_chart(rows)
        section.aside.append(
            section.chart(
                figure, f"Seconds to the first result: {alt}.", "Time to the first result."
            )
        )
    known = [(row["peer"], row["memory_mb"]) for row in rows if row["memory_mb"]]
    if known:
        alt = ", ".join(f"{peer} {memory['to_first_result'] or 0:.0f}" for peer, memory in known)
        section.aside.append(
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
            text(row["peer"]), number(row["median_ms"] and row["median_ms"] / 1e3, "{:.2f}"),
            span({k: v / 1e3 for k, v in row["percentiles_ms"].items()}, "{:.2f}", "p0", "p100"),
            *(number(row["phases_ms"][p] / 1e3 if p in row["phases_ms"] else None, "{:.2f}")
              for p in phases),
            number(memory and memory["before"], "{:.0f}"),
            number(memory and memory["to_first_result"], "{:.0f}"),
            number(memory and memory["calls"], "{:.0f}"), count(row["samples"]),
            text(row["reason"] or ""),
        ])  # fmt: skip
    headings = (
        "peer", "first result, s", "least - most, s", *(f"{p}, s" for p in phases),
        "MB before", "MB to first result", "MB in calls", "processes", "not measured because",
    )  # fmt: skip
    section.parts.append(
        table_of(f"Start and memory, {label}", headings, cells, "first result, s", ("peer",))
    )
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
    rows_of_all = [row for _, result in files for row in result.get("rows", [])]
    floats = {row["peer"] for row in rows_of_all if row["dtype"] != "int8"}
    int8 = {row["peer"] for row in rows_of_all if row["dtype"] == "int8"}
    used: list[tuple[str, Callable[..., Any]]] = [
        *((name, make) for name, make in (PEERS | GPU_PEERS).items() if name in floats),
        *((f"{name}, int8", make) for name, make in INT8_PEERS.items() if name in int8),
    ]
    ways = [
        [Cell(name), Cell(re.sub(r":\w+:|`", "", inspect.getdoc(make) or ""))]
        for name, make in used
    ]
    if ways:
        section.parts.append(Table("The ways to run the network", ("peer", "what it is"), ways))
    return section


def sections_of(files: Sequence[tuple[str, Result]]) -> list[Section]:
    """All of the page: summaries of all files first, then what each file has, then its origin."""
    makers = (_summary, _times, _layers, _startup, guidelines, table8, gpu)
    made = []
    for make in makers:
        alike = [
            (section, path, result)
            for index, (path, result) in enumerate(files)
            for section in make(result, f"f{index}")
        ]
        for section, path, result in alike:
            if len(alike) > 1:
                section.title += f" ({Path(path).name}, {_where(result)})"
            made.append(section)
    return [*made, _origin(files)]
