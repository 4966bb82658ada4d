"""The results of ``snv2 bench``: one dictionary that the file, the table and the plot share."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from snv2_kernels.cli.environment import commit, machine, peer_versions, versions
from snv2_kernels.cli.summary import CASE
from snv2_kernels.layers import Layer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from snv2_kernels.benchmarking import Measurement

__all__ = ["layer_rows_of", "layer_tables_of", "new_result", "rows_of", "table_of"]

_SCHEMA = 2


def new_result(settings: dict[str, Any]) -> dict[str, Any]:
    """A result without rows: where it was measured, with what, and how."""
    return {
        "schema": _SCHEMA,
        "machine": machine(),
        "versions": versions() | peer_versions(),
        "commit": commit(),
        "settings": settings,
        "interrupted": False,
        "floor": [],
        "rows": [],
        "layers": [],
    }


def rows_of(
    measurements: Iterable[Measurement], case: Sequence[Any], bound: float, least_ms: float
) -> list[dict[str, Any]]:
    """The rows of one case: width, batch, dtype, threads. Times are of one call.

    ``speedup`` is eager's median over the peer's, ``peak_share`` how much of the peak the
    median reaches: ``least_ms``, the time of the multiply-adds at that peak, over it.
    """
    measurements = list(measurements)
    eager = next((m.median for m in measurements if m.peer == "eager"), None)
    return [
        dict(zip(CASE, case, strict=True))
        | {
            "peer": m.peer,
            "error": m.error,
            "error_bound": bound,
            "reason": None if m.samples else m.reason or "interrupted before it was timed",
            "samples": len(m.samples),
            "median_ms": m.median,
            "percentiles_ms": m.percentiles(),
            "peak_share": least_ms / m.median if m.median else None,
            "speedup": eager / m.median if eager and m.median else None,
        }
        for m in measurements
    ]


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """Rows of one case as a table."""
    table = Table(title=title, title_justify="left")
    table.add_column("peer")
    for heading in ("error", "median ms", "p10 - p90 ms", "of peak", "vs eager"):
        table.add_column(heading, justify="right")
    if any(row["reason"] for row in rows):
        table.add_column("not measured because")
    for row in rows:
        cells = [row["peer"], "-" if row["error"] is None else f"{row['error']:.1e}"]
        if row["reason"] is None:
            percentiles = row["percentiles_ms"]
            cells.append(f"{row['median_ms']:.3f}")
            cells.append(f"{percentiles['p10']:.3f} - {percentiles['p90']:.3f}")
            cells.append(f"{row['peak_share']:.0%}")
            cells.append("-" if row["speedup"] is None else f"{row['speedup']:.2f}x")
            table.add_row(*cells)
        else:
            table.add_row(*cells, "-", "-", "-", "-", Text(row["reason"], style="yellow"))
    return table


def layer_rows_of(
    layers: Sequence[Layer], whole_ms: float, case: Sequence[Any], multiply_adds_per_s: float
) -> list[dict[str, Any]]:
    """The layers of one case, and what they leave of the time.

    ``loss_ms`` is what a layer takes beyond its multiply-adds at the peak.
    """
    rest = whole_ms - sum(layer.milliseconds for layer in layers)
    rows = []
    for layer in (*layers, Layer("outside", "no kernel", 0, rest)):
        loss = layer.milliseconds - layer.multiply_adds / multiply_adds_per_s * 1e3
        row = dict(zip(CASE, case, strict=True)) | dataclasses.asdict(layer)
        rows.append(row | {"loss_ms": loss})
    return rows


def layer_tables_of(rows: list[dict[str, Any]], title: str) -> Iterator[Table]:
    """Layer rows of one case, added up for each kind of kernel and for each step."""
    whole = sum(row["milliseconds"] for row in rows)
    for key in ("kernel", "step"):
        table = Table(title=f"engine, {title}: by {key}", title_justify="left")
        table.add_column(key)
        for heading in ("ms", "of the time", "of peak", "ms beyond it"):
            table.add_column(heading, justify="right")
        for name in dict.fromkeys(row[key] for row in rows):
            members = [row for row in rows if row[key] == name]
            taken, lost = (sum(row[k] for row in members) for k in ("milliseconds", "loss_ms"))
            share = f"{1 - lost / taken:.0%}" if taken else "-"
            table.add_row(name, f"{taken:.3f}", f"{taken / whole:.1%}", share, f"{lost:.3f}")
        yield table
