"""The results of ``snv2 bench``: one dictionary that the file, the table and the plot share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from snv2_kernels.cli.environment import commit, machine, peer_versions, versions
from snv2_kernels.cli.summary import CASE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from snv2_kernels.benchmarking import Measurement

__all__ = ["new_result", "rows_of", "table_of"]

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
        "rows": [],
    }


def rows_of(
    measurements: Iterable[Measurement], case: Sequence[Any], bound: float
) -> list[dict[str, Any]]:
    """The rows of one case: width, batch, dtype, threads. Times are of one call.

    ``speedup`` is eager's median over the peer's.
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
            "speedup": eager / m.median if eager and m.median else None,
        }
        for m in measurements
    ]


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """Rows of one case as a table."""
    table = Table(title=title, title_justify="left")
    table.add_column("peer")
    for heading in ("error", "median ms", "p10 - p90 ms", "vs eager"):
        table.add_column(heading, justify="right")
    if any(row["reason"] for row in rows):
        table.add_column("not measured because")
    for row in rows:
        cells = [row["peer"], "-" if row["error"] is None else f"{row['error']:.1e}"]
        if row["reason"] is None:
            percentiles = row["percentiles_ms"]
            cells.append(f"{row['median_ms']:.3f}")
            cells.append(f"{percentiles['p10']:.3f} - {percentiles['p90']:.3f}")
            cells.append("-" if row["speedup"] is None else f"{row['speedup']:.2f}x")
            table.add_row(*cells)
        else:
            table.add_row(*cells, "-", "-", "-", Text(row["reason"], style="yellow"))
    return table
