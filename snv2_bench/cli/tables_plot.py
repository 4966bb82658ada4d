"""Pictures of the paper's tables, made from the rows of a result."""

from __future__ import annotations

from typing import Any

from snv2_bench.peers import OURS

__all__ = ["plot_ratios"]

_PAPER = "the paper"


def plot_ratios(rows: list[dict[str, Any]], name: str, result: dict[str, Any], path: str) -> None:
    """One panel of bars for each scale or stage and number of threads: ratios where the paper has
    them too, else milliseconds.

    Args:
        rows: of one table.
        name: of the table.
        result: that the rows are of.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    panels: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row.get("column", ""), row["threads"]), []).append(row)
    most = max(len(panel) for panel in panels.values())
    figure = Figure(figsize=(5.2 * len(panels), 1.6 + 0.28 * most), layout="constrained")
    axes: list[Any] = figure.subplots(1, len(panels), squeeze=False).flatten().tolist()
    for ax, ((column, threads), panel) in zip(axes, panels.items(), strict=True):
        where = f"{threads} threads" if threads > 1 else "1 thread"
        title = [column] if column else []
        title += [where] if panel[0]["device"] == "cpu" else []
        ax.set_title(", ".join(title), fontsize=10)
        _bars(ax, panel)
    first = rows[0]
    base = "ShuffleNet v2 1.0x" if "model" in first else f'"{first["setting"]}"'
    what = f"speed, {base} run in the same way = 1" if _compared(rows) else "milliseconds"
    figure.suptitle(
        f"{name}: {what}\nbatch {first['batch']}, {result['machine']['device']}, "
        f"PyTorch {result['versions']['torch']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def _label(row: dict[str, Any]) -> str:
    return row["setting"] if "setting" in row else f"{row['model']} {row['size']}"


def _compared(rows: list[dict[str, Any]]) -> bool:
    return any(row["paper_per_s"] is not None for row in rows)


def _bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    labels = list(dict.fromkeys(map(_label, rows)))
    compared = _compared(rows)
    series: dict[str, dict[str, float]] = {}
    for row in rows:
        value = row["ratio"] if compared else row["median_ms"]
        if value is not None:
            series.setdefault(row["peer"], {})[_label(row)] = value
    if compared:
        series[_PAPER] = {_label(row): row["paper_ratio"] for row in rows if row["paper_ratio"]}
    colours = {_PAPER: "tab:orange", OURS[0]: "tab:green", OURS[1]: "tab:olive"}
    thickness = 0.8 / max(len(series), 1)
    for i, (peer, values) in enumerate(series.items()):
        colour = colours.get(peer, "tab:grey")
        places = [labels.index(label) + i * thickness for label in values]
        axes.barh(places, list(values.values()), thickness, label=peer, color=colour)
        for place, value in zip(places, values.values(), strict=True):
            axes.annotate(
                f"{value:.2f}" if compared else f"{value:.3g}", (value, place), xytext=(3, 0),
                textcoords="offset points", va="center", fontsize=7,
            )  # fmt: skip
    axes.set_yticks([at + 0.4 - thickness / 2 for at in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    if series:
        axes.legend(fontsize=7)
