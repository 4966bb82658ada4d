"""The rows of a result, and the tables that show them."""

from __future__ import annotations

import datetime
import shlex
import statistics
import sys
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rich.text import Text

from snv2_bench.benchmarking import percentiles_of
from snv2_bench.cli.environment import commit, machine, peer_versions, versions
from snv2_bench.cli.files import SCHEMA
from snv2_bench.cli.fitted import FittedTable
from snv2_bench.cli.summary import CASE
from snv2_bench.layers import Layer
from snv2_bench.peers import OURS
from snv2_bench.startup import PHASES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from snv2_bench.benchmarking import Measurement
    from snv2_bench.cli.schema import Kernel, Layers, Result, Row, Startup
    from snv2_bench.floor import Floor
    from snv2_bench.startup import FirstResult

__all__ = [
    "layers_of",
    "layers_tables_of",
    "new_result",
    "rows_of",
    "startup_of",
    "startup_table_of",
    "table_of",
]

_T = TypeVar("_T")


def new_result(settings: dict[str, Any]) -> Result:
    """A result without rows: where it is measured, with what, and how."""
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["snv2", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions() | peer_versions(),
        "commit": commit(),
        "settings": settings,
        "interrupted": False,
    }


def _maybe(value: _T | None, show: Callable[[_T], str]) -> str:
    return "-" if value is None else show(value)


def _in_case(case: Sequence[Any], rest: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(CASE, case, strict=True)) | rest


def rows_of(
    measurements: Iterable[Measurement], case: Sequence[Any], bound: float, floor_ms: float | None
) -> list[Row]:
    """The rows of one case: width, batch, dtype, threads; the floor is known of a CPU."""
    measurements = list(measurements)
    eager = next((m.median for m in measurements if m.peer == "eager"), None)
    _, batch, _, _ = case
    rows = []
    for m in measurements:
        others = [other for other in measurements if other is not m and other.samples]
        row = {
            "peer": m.peer,
            "error": m.error,
            "error_bound": bound,
            "reason": None if m.samples else m.reason or "interrupted before it was timed",
            "samples": len(m.samples),
            "median_ms": m.median,
            "percentiles_ms": m.percentiles(),
            "images_per_s": batch / m.median * 1e3 if m.median else None,
            "floor_share": floor_ms / m.median if floor_ms and m.median else None,
            "speedup": eager / m.median if eager and m.median else None,
            "paired": {o.peer: m.paired(o) for o in others} if m.samples and m.peer in OURS else {},
        }
        rows.append(cast("Row", _in_case(case, row)))
    return rows


def table_of(rows: list[Row], title: str) -> FittedTable:
    """Rows of one case as a table."""
    table = FittedTable(title)
    table.add_texts("peer")
    of_int8 = any(row["dtype"] == "int8" for row in rows)
    headings = (
        "rms error" if of_int8 else "error",
        "median ms",
        "p10 - p90 ms",
        "p99 ms",
        "images/s",
        "of floor",
        "vs eager",
    )
    table.add_numbers(*headings)
    if any(row["reason"] for row in rows):
        table.add_texts("not measured because")
    for row in rows:
        cells = [row["peer"], _maybe(row["error"], "{:.1e}".format)]
        if row["reason"] is None:
            percentiles = row["percentiles_ms"]
            cells.append(_maybe(row["median_ms"], "{:.3f}".format))
            cells.append(f"{percentiles['p10']:.3f} - {percentiles['p90']:.3f}")
            cells.append(f"{percentiles['p99']:.3f}")
            cells.append(_maybe(row["images_per_s"], "{:.1f}".format))
            cells.append(_maybe(row["floor_share"], "{:.0%}".format))
            cells.append(_maybe(row["speedup"], "{:.2f}x".format))
            table.add_row(*cells)
        else:
            blank = ["-"] * (len(headings) - 1)
            table.add_row(*cells, *blank, Text(row["reason"], style="yellow"))
    return table


def layers_of(
    layers: Sequence[Layer], whole_ms: float, case: Sequence[Any], floor: Floor
) -> Layers:
    """The layers of one case, and what they leave of the time."""
    rest = whole_ms - sum(layer.milliseconds for layer in layers)
    kernels: list[Kernel] = [
        {
            "step": layer.step,
            "kernel": layer.kernel,
            "multiply_adds": layer.multiply_adds,
            "moved_bytes": layer.moved_bytes,
            "ms": layer.milliseconds,
            "floor_ms": floor.least_ms(layer.multiply_adds, layer.moved_bytes),
        }
        for layer in (*layers, Layer("outside", "no kernel", 0, 0, rest))
    ]
    return cast("Layers", _in_case(case, {"kernels": kernels}))


def layers_tables_of(layers: Layers, title: str) -> Iterator[FittedTable]:
    """The layers of one case, added up for each kind of kernel and for each step."""
    whole = sum(kernel["ms"] for kernel in layers["kernels"])
    for key in ("kernel", "step"):
        table = FittedTable(f"engine, {title}: by {key}")
        table.add_texts(key)
        table.add_numbers("ms", "of the time", "of floor", "ms beyond it")
        rows = cast("list[dict[str, Any]]", layers["kernels"])
        for name in dict.fromkeys(row[key] for row in rows):
            members = [row for row in rows if row[key] == name]
            taken, least = (sum(row[k] for row in members) for k in ("ms", "floor_ms"))
            share = f"{least / taken:.0%}" if taken else "-"
            table.add_row(
                name, f"{taken:.3f}", f"{taken / whole:.1%}", share, f"{taken - least:.3f}"
            )
        yield table


def startup_of(results: Sequence[FirstResult], peer: str, case: Sequence[Any]) -> Startup:
    """One peer's fresh processes; phases and memory are those of the median one."""
    timed = sorted((r for r in results if r.reason is None), key=lambda r: r.total_ms)
    middle = timed[(len(timed) - 1) // 2] if timed else None
    totals = [r.total_ms for r in timed]
    row = {
        "peer": peer,
        "reason": None if timed else results[-1].reason,
        "samples": len(timed),
        "median_ms": statistics.median_low(totals) if totals else None,
        "percentiles_ms": percentiles_of(totals, (0, 50, 100)),
        "phases_ms": middle.phases_ms if middle else {},
        "memory_mb": middle.memory_mb if middle else None,
    }
    return cast("Startup", _in_case(case, row))


def startup_table_of(rows: Sequence[Startup], title: str) -> FittedTable:
    """Seconds to the first result and resident memory, a line for each peer."""
    table = FittedTable(f"first result in a fresh process, {title}")
    table.add_texts("peer")
    phases = [p for p in PHASES if any(p in row["phases_ms"] for row in rows)]
    table.add_numbers("seconds", *phases, "MB to first result", "MB in calls")
    if any(row["reason"] for row in rows):
        table.add_texts("not measured because")
    for row in rows:
        memory = row["memory_mb"]
        table.add_row(
            row["peer"],
            _maybe(row["median_ms"], lambda ms: f"{ms / 1e3:.2f}"),
            *(_maybe(row["phases_ms"].get(p), lambda ms: f"{ms / 1e3:.2f}") for p in phases),
            _maybe(memory and memory["to_first_result"], "{:.0f}".format),
            _maybe(memory and memory["calls"], "{:.0f}".format),
            *([Text(row["reason"], style="yellow")] if row["reason"] else []),
        )
    return table
