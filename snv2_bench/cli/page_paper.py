"""What the page says of the paper's own tables, and of what GPU kernels move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from snv2_bench.cli import charts
from snv2_bench.cli.page_parts import (
    Fold,
    Section,
    count,
    groups_of,
    number,
    span,
    table_of,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snv2_bench.cli.schema import Result

__all__ = ["gpu", "guidelines", "table8"]


def guidelines(result: Result, name: str) -> Iterator[Section]:
    rows = result.get("guidelines", [])
    if not rows:
        return
    section = Section(f"{name}-guidelines", "The paper's guidelines")
    section.words.append(
        "Tables 1 to 4 of the paper measured here: how much a setting costs at equal multiply-adds "
        "(G1: unequal widths, G2: groups, G3: fragments, G4: element-wise operations), and the "
        "same question for ShuffleNet V2's units. A ratio is the speed beside the table's first "
        "setting run in the same way; the paper's are those of its own devices."
    )
    for key, group in groups_of(rows, ("table", "device", "batch", "threads")):
        table, device, batch, threads = key
        label = f"{table}, {device}, batch {batch}" + (f", threads {threads}" if threads else "")
        sizes: dict[int, list[Any]] = {}
        for (_, _), same in groups_of(group, ("setting", "peer")):
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
            text(row["table"]), text(row["setting"]),
            text(", ".join(map(str, row.get("channels") or []))), text(row["device"]),
            text(row["batch"]), text(row.get("threads")), text(row["peer"]),
            number(row["median_ms"], "{:.3f}"),
            span(row.get("percentiles_ms", {}), "{:.3f}"),
            number(row.get("speedup"), "{:.2f}x"),
            number(row["ratio"], "{:.2f}x"), number(row["paper_ratio"], "{:.2f}x"),
            number(row["paper_per_s"], "{:,.4g}"), text(row.get("reason") or ""),
        ]
        for row in rows
    ]  # fmt: skip
    headings = (
        "table", "setting", "channels", "device", "batch", "threads", "peer", "median, ms",
        "p10 - p90, ms", "beside eager", "ratio here", "ratio in the paper",
        "a second in the paper",
        "not measured because",
    )  # fmt: skip
    section.parts.append(
        table_of(
            "Guidelines beside the paper's numbers", headings, cells, "ratio here",
            ("table", "setting", "peer"),
        )
    )  # fmt: skip
    yield section


def table8(result: Result, name: str) -> Iterator[Section]:
    rows = result.get("table8", [])
    if not rows:
        return
    section = Section(f"{name}-table8", "The paper's Table 8")
    section.words.append(
        "Networks side by side as in the paper's Table 8. The paper's speeds are those of its own "
        "devices, so that ratios compare and speeds do not."
    )
    if any(row["per_s"] and row["multiply_adds"] for row in rows):
        section.aside.append(
            section.chart(
                charts.table8_chart(rows),
                "Images per second against multiply-adds for each network and way; the table has "
                "the numbers.",
                "Speed against multiply-adds.",
            )
        )
    cells = [
        [
            text(row["model"]), text(row["size"]), count(row["input"]),
            number(row["multiply_adds"] and row["multiply_adds"] / 1e6, "{:,.0f}"),
            text(row.get("threads")), text(row["peer"]), number(row["median_ms"], "{:.3f}"),
            number(row["per_s"], "{:,.4g}"), number(row.get("speedup"), "{:.2f}x"),
            number(row["ratio"], "{:.2f}x"),
            number(row["paper_per_s"], "{:,.4g}"), number(row["paper_ratio"], "{:.2f}x"),
            text(row.get("reason") or ""),
        ]
        for row in rows
    ]  # fmt: skip
    headings = (
        "model", "size", "input", "M multiply-adds", "threads", "peer", "median, ms", "images/s",
        "beside eager", "ratio here",
        "a second in the paper", "ratio in the paper", "not measured because",
    )  # fmt: skip
    section.beside.append(
        table_of(
            "Table 8 beside the paper's numbers", headings, cells, "median, ms",
            ("model", "size", "peer"),
        )
    )  # fmt: skip
    yield section


def gpu(result: Result, name: str) -> Iterator[Section]:
    rows = result.get("gpu", [])
    if not rows:
        return
    section = Section(f"{name}-gpu", "What the CUDA kernels move")
    section.words.append(
        "Counted by the emulator, which runs the kernels without a GPU: the same on every machine, "
        "and no measurement of time. The least is the maps and weights once. Counted is what all "
        "CTAs load and store; each reads the weights, all but the first from L2. Described is what "
        "the host code that launches a kernel says of it."
    )
    cells = [
        [
            text(row["kernel"]), text(row["shape"]), text(row["dtype"]), count(row["batch"]),
            number(row["multiply_adds"] / 1e6, "{:,.2f}"), count(row["least_bytes"]),
            count(row["described_bytes"]), count(row["counted_bytes"]),
            number(row["counted_bytes"] / row["least_bytes"], "{:.3f}x"),
        ]
        for row in rows
    ]  # fmt: skip
    headings = (
        "kernel", "shape", "dtype", "batch", "M multiply-adds", "least bytes", "described bytes",
        "counted bytes", "counted over least",
    )  # fmt: skip
    section.parts.append(
        table_of(
            "Bytes of global memory", headings, cells, "counted bytes",
            ("kernel", "shape", "dtype"),
        )
    )  # fmt: skip
    yield section
