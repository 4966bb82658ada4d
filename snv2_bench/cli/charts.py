"""Charts of a result as SVG that stands inside a page.

Text stays text, and what is neither line nor bar has the colour of the page's text, so that one
picture serves light and dark pages. A chart is as wide as a phone, where a point of it is a pixel:
its text is readable there, and on a wide page charts stand side by side.
"""

from __future__ import annotations

import io
import math
import re
from typing import TYPE_CHECKING, Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, NullFormatter

from snv2_bench.cli.plot import draw_bars
from snv2_bench.cli.summary import CASE, label_of
from snv2_bench.peers import OURS
from snv2_bench.startup import PHASES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from matplotlib.axes import Axes

    from snv2_bench.cli.schema import Floor, Guideline, Kernel, Layers, Row, Startup, Table8

__all__ = [
    "bars_chart",
    "guideline_chart",
    "kinds_chart",
    "memory_chart",
    "ratios_chart",
    "roofline_chart",
    "startup_chart",
    "steps_chart",
    "svg",
    "table8_chart",
    "throughput_chart",
]

_INK = "#010203"  # replaced by the colour of the text around
_WIDTH = 5.0  # inches: 360 points
_TEXT = 12.5  # points
_BAR, _NAME, _GAP = 13.0, 18.0, 8.0  # points that a bar, a name above bars, a gap below are high
# Okabe and Ito's colours, which differ to every eye, on white as on black.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a000", "#8a8f98")
_MARKERS = "osD^vPX*"
_MARGIN = 8.0  # points beside bars, where half of the axis' first number stands
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "snv2", "text.parse_math": False, "font.size": _TEXT,
    "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK,
    "ytick.color": _INK, "axes.facecolor": "none", "figure.facecolor": "none",
    "legend.framealpha": 0, "axes.spines.top": False, "axes.spines.right": False,
    "legend.handlelength": 1.2, "legend.columnspacing": 1.2, "legend.borderpad": 0,
}  # fmt: skip


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element, its ids made unique by ``name``."""
    with mpl.rc_context(_STYLE), io.StringIO() as text:
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(_INK, "currentColor")
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", drawn)
    drawn = re.sub(r"(\d\.\d{2})\d+", r"\1", drawn)  # a hundredth of a point is enough
    return re.sub(r"\n\s*", "\n", drawn)


def _logarithmic(*axes: Any) -> None:
    """Ticks as numbers, without exponents."""
    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def _colours(names: Iterable[str]) -> dict[str, str]:
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(dict.fromkeys(names))}


def _legend(axes: Axes, columns: int) -> None:
    """A legend above the axes, with room of its own."""
    axes.figure.legend(loc="outside upper left", ncols=columns)


def _groups(
    names: Sequence[str], bars: int, columns: int = 1
) -> tuple[list[Axes], np.ndarray[Any, Any]]:
    """Axes in points for groups of bars, each below its name, which may be as long as the chart.

    Returns:
        The axes, one for each column, and where the middle of each group's first bar is.
    """
    pitch = _NAME + _BAR * bars + _GAP
    lines = math.ceil(len(names) / columns)
    height = pitch * lines + _GAP
    size = (_WIDTH * columns, (height + 5.5 * _TEXT) / 72)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=_MARGIN / 72))
    panels = figure.subplots(1, columns, squeeze=False)[0]
    tops = pitch * (np.arange(len(names)) % lines)
    for index, (name, top) in enumerate(zip(names, tops, strict=True)):
        axes = panels[index // lines]
        axes.annotate(name, (0, top + _NAME - 3), xycoords=axes.get_yaxis_transform(), va="bottom")
    for axes in panels:
        axes.set_ylim(height, -_GAP)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    return panels.tolist(), tops + _NAME + _BAR / 2


def _write_ratios(
    axes: Axes, ratios: Iterable[float], places: Iterable[float], ends: Iterable[float]
) -> None:
    """Ratios as text behind the ends of their bars; nothing for NaN."""
    for ratio, place, end in zip(ratios, places, ends, strict=True):
        if not np.isnan(ratio):
            axes.annotate(
                f"{ratio:.2f}x", (end, place), xytext=(4, 0), textcoords="offset points",
                va="center",
            )  # fmt: skip


def ratios_chart(cases: Sequence[Mapping[str, Any]], columns: int = 1) -> Figure:
    """Ours against the fastest other in every case of a summary."""
    with mpl.rc_context(_STYLE):
        names = [f"{label_of([c[k] for k in CASE])}, vs {c['fastest_peer']}" for c in cases]
        panels, places = _groups(names, len(OURS), columns)
        longest = 1.0
        lines = math.ceil(len(cases) / columns)
        for number, peer in enumerate(OURS):
            ratios = np.array([case["speedup"].get(peer, np.nan) for case in cases])
            spread = [
                [case["paired"].get(peer, {}).get(p, ratio) for p in ("p10", "p90")]
                for case, ratio in zip(cases, ratios, strict=True)
            ]
            low, high = np.array(spread).T
            error = np.clip([ratios - low, high - ratios], 0, None)
            colour = {"engine": _COLOURS[2], "fused": _COLOURS[4]}[peer]
            at = places + _BAR * number
            longest = np.nanmax([longest, *(ratios + error[1])])
            for column, axes in enumerate(panels):
                here = slice(column * lines, (column + 1) * lines)
                axes.barh(
                    at[here], ratios[here], _BAR - 2, xerr=error[:, here], color=colour,
                    ecolor=_INK, capsize=2, label="" if column else peer,
                )  # fmt: skip
                _write_ratios(axes, ratios[here], at[here], (ratios + error[1])[here])
        for axes in panels:
            axes.axvline(1, color=_INK, linewidth=1, linestyle=":", alpha=0.6)
            axes.set_xlim(0, 1.2 * longest)  # the numbers need room
            axes.set_xlabel("times as fast as the fastest other way")
        _legend(panels[0], 2)
    return cast("Figure", panels[0].figure)


def bars_chart(rows: Sequence[Row]) -> Figure:
    """Milliseconds of one case."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(0.8 + 0.3 * len(rows))
        draw_bars(axes, rows, ink=_INK, size=_TEXT, room=1.9)
        axes.tick_params("y", length=0)
        axes.locator_params("x", nbins=5)
        axes.set_xlabel("ms (median; whiskers p10 to p90)")
    return figure


def throughput_chart(rows: Sequence[Row]) -> Figure:
    """Images a second against the batch."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(4.8)
        for number, (peer, colour) in enumerate(_colours(row["peer"] for row in rows).items()):
            timed = [row for row in rows if row["peer"] == peer and row["images_per_s"]]
            axes.plot(
                [row["batch"] for row in timed], [row["images_per_s"] or 0 for row in timed],
                marker=_MARKERS[number % len(_MARKERS)], color=colour, label=peer,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("batch")
        axes.set_ylabel("images/s")
        _legend(axes, 2)
    return figure


def _stack(
    axes: Axes, places: Sequence[float], parts: Mapping[str, Sequence[float]], height: float = 0.8
) -> None:
    """Horizontal bars of parts."""
    start = np.zeros(len(places))
    for (name, values), colour in zip(parts.items(), _COLOURS, strict=False):
        axes.barh(places, values, height, left=start, color=colour, label=name)
        start = start + np.array(values)
    _legend(axes, 3 if len(parts) > 4 else 2)


def _names(axes: Axes, names: Sequence[str]) -> None:
    """Short names at the left of bars at 0, 1, 2..., the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params("y", length=0)
    axes.invert_yaxis()


def kinds_chart(cases: Sequence[Layers]) -> Figure:
    """What share of an engine's time each kind of kernel takes, case by case."""
    kinds = dict.fromkeys(kernel["kernel"] for case in cases for kernel in case["kernels"])
    wholes = [sum(kernel["ms"] for kernel in case["kernels"]) for case in cases]
    parts = {
        kind: [
            100 * sum(k["ms"] for k in case["kernels"] if k["kernel"] == kind) / whole
            for case, whole in zip(cases, wholes, strict=True)
        ]
        for kind in kinds
    }
    with mpl.rc_context(_STYLE):
        names = [label_of([case[k] for k in CASE]) for case in cases]  # type: ignore[literal-required]
        (axes,), places = _groups(names, 1)
        _stack(axes, places.tolist(), parts, _BAR)
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of the engine's time")
    return cast("Figure", axes.figure)


def steps_chart(kernels: Sequence[Kernel]) -> Figure:
    """The floor of each step and what it takes beyond that."""
    steps = list(dict.fromkeys(kernel["step"] for kernel in kernels))
    parts: dict[str, list[float]] = {"floor": [], "beyond the floor": []}
    for step in steps:
        taken = sum(k["ms"] for k in kernels if k["step"] == step)
        least = min(taken, sum(k["floor_ms"] for k in kernels if k["step"] == step))
        parts["floor"].append(least)
        parts["beyond the floor"].append(taken - least)
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(1.0 + 0.25 * len(steps))
        _stack(axes, range(len(steps)), parts)
        _names(axes, steps)
        axes.locator_params("x", nbins=5)
        axes.set_xlabel("ms")
    return figure


def roofline_chart(cases: Sequence[Layers], floor: Floor) -> Figure:
    """Every kernel under the peaks of the machine: rate against multiply-adds for each byte."""
    kernels = [
        k
        for case in cases
        for k in case["kernels"]
        if k["multiply_adds"] and k["moved_bytes"] and k["ms"] > 0
    ]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(5.4)
        intensity = [k["multiply_adds"] / k["moved_bytes"] for k in kernels]
        span = np.geomspace(min(intensity, default=0.1) / 2, max(intensity, default=100) * 2, 200)
        peak = floor["multiply_adds_per_s"] / 1e9
        for rate, style, name in (
            (floor["cached_copy_bytes_per_s"] / 1e9, "-", "copies in caches"),
            (floor["copy_bytes_per_s"] / 1e9, "--", "copies through memory"),
        ):
            roof = np.minimum(peak, rate * span)
            axes.plot(span, roof, style, color=_INK, label=f"{name}: {rate:.0f} GB/s")
        for number, (kind, colour) in enumerate(_colours(k["kernel"] for k in kernels).items()):
            of_kind = [k for k in kernels if k["kernel"] == kind]
            axes.plot(
                [k["multiply_adds"] / k["moved_bytes"] for k in of_kind],
                [k["multiply_adds"] / k["ms"] / 1e6 for k in of_kind],
                _MARKERS[number % len(_MARKERS)], color=colour, markersize=5, alpha=0.7, label=kind,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        _logarithmic(axes.xaxis, axes.yaxis)
        axes.set_xlabel("multiply-adds for each byte that has to be moved")
        axes.set_ylabel("G multiply-adds/s")
        axes.annotate(f"peak: {peak:.0f} G/s", (span[-1], peak), xytext=(0, 4),
                      textcoords="offset points", ha="right")  # fmt: skip
        _legend(axes, 2)
    return figure


def startup_chart(rows: Sequence[Startup]) -> Figure:
    """Seconds to the first result, by phase."""
    rows = [row for row in rows if row["median_ms"] is not None]
    parts = {p: [row["phases_ms"].get(p, 0) / 1e3 for row in rows] for p in PHASES}
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(1.2 + 0.3 * len(rows))
        _stack(axes, range(len(rows)), parts)
        _names(axes, [row["peer"] for row in rows])
        axes.set_xlabel("seconds")
    return figure


def memory_chart(rows: Sequence[Startup]) -> Figure:
    """Resident memory beyond PyTorch and the model."""
    known = [(row["peer"], row["memory_mb"]) for row in rows if row["memory_mb"]]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(1.1 + 0.42 * len(known))
        places = np.arange(len(known))
        for shift, field, name, colour in (
            (-0.2, "to_first_result", "up to the first result", _COLOURS[1]),
            (0.2, "calls", "in later calls", _COLOURS[0]),
        ):
            values = [memory[field] or 0 for _, memory in known]  # type: ignore[literal-required]
            axes.barh(places + shift, values, 0.4, color=colour, label=name)
        _names(axes, [peer for peer, _ in known])
        axes.locator_params("x", nbins=5)
        axes.set_xlabel("MB")
        _legend(axes, 2)
    return figure


def guideline_chart(rows: Sequence[Guideline]) -> Figure:
    """Ratios of one table at one size on one device beside the paper's, setting by setting."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    series: dict[str, dict[str, float | None]] = {}
    for row in rows:
        if row["paper_ratio"] is not None:
            series.setdefault("paper", {})[row["setting"]] = row["paper_ratio"]
        series.setdefault(row["peer"], {})[row["setting"]] = row["ratio"]
    with mpl.rc_context(_STYLE):
        (axes,), places = _groups(settings, len(series))
        for number, (name, ratios) in enumerate(series.items()):
            lengths = [ratios.get(setting) or math.nan for setting in settings]
            colour = _COLOURS[-1] if name == "paper" else _COLOURS[number % 7]
            at = places + _BAR * number
            axes.barh(at, lengths, _BAR - 2, color=colour, label=name)
            _write_ratios(axes, lengths, at, lengths)
        axes.axvline(1, color=_INK, linewidth=1, linestyle=":", alpha=0.6)
        axes.margins(x=0.15)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"speed beside {settings[0]}")
        _legend(axes, 3)
    return cast("Figure", axes.figure)


def table8_chart(rows: Sequence[Table8]) -> Figure:
    """Speed against multiply-adds; a marker for each peer, a colour for each model."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(5.4)
        timed = [row for row in rows if row["per_s"] and row["multiply_adds"]]
        markers = {
            p: _MARKERS[i % 8] for i, p in enumerate(dict.fromkeys(r["peer"] for r in timed))
        }
        for model, colour in _colours(row["model"] for row in timed).items():
            for peer, marker in markers.items():
                found = [row for row in timed if (row["model"], row["peer"]) == (model, peer)]
                if found:
                    axes.plot(
                        [(row["multiply_adds"] or 0) / 1e6 for row in found],
                        [row["per_s"] or 0 for row in found],
                        marker, color=colour, label=f"{model}, {peer}",
                    )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        _logarithmic(axes.xaxis, axes.yaxis)
        axes.set_xlabel("million multiply-adds")
        axes.set_ylabel("images/s")
        _legend(axes, 1)
    return figure
