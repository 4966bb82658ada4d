"""A picture of what ``snv2 bench`` measured, made from its JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snv2_bench.cli.summary import cases_of, label_of
from snv2_bench.peers import OURS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snv2_bench.cli.schema import Result, Row

__all__ = ["check_plot_path", "draw_bars", "plot"]

_COLUMNS = 2


def check_plot_path(path: str) -> None:
    """Find out before the run whether a plot can be drawn into a file of that name.

    Raises:
        ValueError: if matplotlib is missing or does not know the ending.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError('needs matplotlib: pip install "snv2_kernels[bench]"') from None
    endings = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(path).suffix[1:].lower() not in endings:
        raise ValueError(f"{path}: expected an ending out of {', '.join(endings)}")


def plot(result: Result, path: str) -> None:
    """One panel of bars for each combination of width, batch, dtype and threads.

    Args:
        result: what ``snv2 bench --json`` writes.
        path: of the picture; its ending says in which format.
    """
    from matplotlib.figure import Figure

    groups = list(cases_of(result.get("rows", [])))
    columns = min(_COLUMNS, len(groups))
    lines = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(6.4 * columns, 0.8 + 2.8 * lines), layout="constrained")
    panels: list[Any] = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for axes, (case, rows) in zip(panels, groups, strict=False):
        axes.set_title(label_of(case), fontsize=10)
        draw_bars(axes, rows)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    machine, settings = result["machine"], result["settings"]
    figure.suptitle(
        f"ShuffleNet V2, {settings['size']} x {settings['size']}: median and p10 to p90 in "
        f"milliseconds\n{machine['cpu']}, PyTorch {result['versions']['torch']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def draw_bars(
    axes: Any, rows: Sequence[Row], ink: str = "black", size: float = 8, room: float = 1.4
) -> None:
    """Bars of the peers of one case: medians, and whiskers from p10 to p90.

    Args:
        axes: where to draw.
        rows: of the case.
        ink: colour of the whiskers.
        size: of the numbers behind the bars, in points.
        room: what the axes span over the longest bar; the numbers stand in the rest.
    """
    peers = [row["peer"] for row in rows]
    medians = [row["median_ms"] or 0.0 for row in rows]
    colours = ["tab:green" if row["peer"] in OURS else "tab:grey" for row in rows]
    spread: list[list[float]] = [[], []]
    for row, median in zip(rows, medians, strict=True):
        percentiles = row["percentiles_ms"]
        spread[0].append(median - percentiles.get("p10", median))
        spread[1].append(percentiles.get("p90", median) - median)
    axes.barh(peers, medians, xerr=spread, color=colours, ecolor=ink, capsize=2)
    axes.invert_yaxis()
    longest = max((end + over for end, over in zip(medians, spread[1], strict=True)), default=0)
    axes.set_xlim(0, room * longest or 1)
    for position, (row, median) in enumerate(zip(rows, medians, strict=True)):
        label = f"{median:,.2f}" if row["reason"] is None else "not measured"
        if row["speedup"] is not None:
            label += f" ({row['speedup']:.2f}x)"
        axes.annotate(
            label, (median + spread[1][position], position), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=size,
        )  # fmt: skip
