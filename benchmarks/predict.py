"""Predicts how long networks take on GPUs, from what their launches move and multiply.

``python benchmarks/predict.py`` writes docs/arithmetic.md. Nothing here is measured: the numbers of
the GPUs are stated below, those of the launches come from the code that makes them.

``python benchmarks/predict.py --json FILE`` writes what units inside a stage move on the emulator
beside what they have to, for `snv2 report`.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import snv2_kernels as snv2
from snv2_bench.cli.files import write_result
from snv2_bench.cli.results import new_result
from snv2_kernels import emulator
from snv2_kernels.gpu import launches as launches_of
from snv2_kernels.packing import GpuPlan
from snv2_kernels.testing import randomize_

if TYPE_CHECKING:
    from snv2_bench.cli.schema import Counted

PAGE = Path(__file__).parents[1] / "docs" / "arithmetic.md"
WIDTHS = ("x0_5", "x1_0", "x1_5", "x2_0")
BATCHES = (1, 8, 64, 512)
SIZE = 224
KIB = 1024


@dataclass(frozen=True)
class Gpu:
    name: str
    device: dict[str, int]  # snv2::Device
    memory: float  # bytes/s that a copy reaches
    l2: float  # bytes/s from L2 to all SMs
    l2_per_sm: float  # bytes/s into one
    multiply_adds: float  # per second: tensor cores, 16-bit, through mma.sync


GPUS = (
    Gpu(
        "H200",
        {
            "sms": 132, "shared_per_sm": 228 * KIB, "shared_per_cta": 227 * KIB,
            "reserved_per_cta": KIB, "l2_bytes": 50 * KIB * KIB, "cluster": 8,
        },
        memory=4.3e12, l2=5.5e12, l2_per_sm=64 * 1.75e9, multiply_adds=0.63 * 990e12 / 2,
    ),
    Gpu(
        "A100 80 GB",
        {
            "sms": 108, "shared_per_sm": 164 * KIB, "shared_per_cta": 163 * KIB,
            "reserved_per_cta": KIB, "l2_bytes": 40 * KIB * KIB, "cluster": 1,
        },
        memory=1.75e12, l2=4.5e12, l2_per_sm=64 * 1.41e9, multiply_adds=0.9 * 312e12 / 2,
    ),
)  # fmt: skip
LAUNCH = 1.3e-6  # seconds from one kernel of a graph to the next


@dataclass(frozen=True)
class Prediction:
    """Seconds, and what they come from; each launch takes the longest of its three."""

    launches: int
    map_bytes: int
    weight_bytes: int
    multiply_adds: int
    memory: float
    l2: float
    tensor: float
    total: float


def plan_of(width: str) -> GpuPlan:
    model = getattr(snv2.models, f"shufflenet_v2_{width}")().eval()
    fused = snv2.fuse(model)
    assert isinstance(fused, snv2.nn.ShuffleNetV2)
    plan = fused._pack("cuda-emulated", torch.float16, torch.device("cpu"))
    assert isinstance(plan, GpuPlan)
    return plan


def predict(plan: GpuPlan, batch: int, gpu: Gpu) -> Prediction:
    launches = launches_of(plan.words, batch, SIZE, SIZE, gpu.device)
    memory = l2 = tensor = kernels = 0.0
    for launch in launches:
        busy = min(launch["ctas"] / gpu.device["sms"], 1.0)  # part of the SMs
        maps = launch["read_bytes"] + launch["written_bytes"]
        times = (
            maps / gpu.memory,
            (maps + launch["weight_bytes"]) / min(gpu.l2, busy * gpu.device["sms"] * gpu.l2_per_sm),
            launch["multiply_adds"] / (gpu.multiply_adds * busy),
        )
        memory, l2, tensor = memory + times[0], l2 + times[1], tensor + times[2]
        kernels += max(times)
    count = sum(launch["launches"] for launch in launches)
    return Prediction(
        launches=count,
        map_bytes=sum(launch["read_bytes"] + launch["written_bytes"] for launch in launches),
        weight_bytes=sum(launch["weight_bytes"] for launch in launches),
        multiply_adds=sum(launch["multiply_adds"] for launch in launches),
        memory=memory,
        l2=l2,
        tensor=tensor,
        total=kernels + count * LAUNCH,
    )


HEAD = """# Arithmetic of the CUDA networks

What the launches of a whole network move and multiply, and how long that should take in float16 at
224 x 224. **Nothing on this page has been measured**; the last column waits for it. The page is
made by `python benchmarks/predict.py` from the same code that chooses tiles and launches kernels,
and a test says so when it is out of date.

Each launch is taken to last as long as the longest of three things, and a launch costs
{launch:.1f} us from one kernel of a CUDA graph to the next:

- *memory*: the bytes of maps that it reads and writes, as if all came from and went to memory;
- *L2*: those and the weights that each CTA reads, through L2; a grid of few CTAs gets no more than
  its SMs can take;
- *tensor*: its multiply-adds, with all padding and halo rows, on the SMs that it uses. Depthwise
  convolutions run beside the tensor cores and are counted here as if they were products.

What is left out, and will make real times longer: latency inside a CTA (loads, barriers, the steps
of a march that wait for each other), depthwise convolutions on the ordinary cores, a last wave that
does not fill the GPU. At batch 1 these are most of the time.

Assumed of the GPUs:

| | SMs | memory | L2 | L2 into one SM | 16-bit multiply-adds |
|---|---|---|---|---|---|
"""


def page() -> str:
    lines = [HEAD.format(launch=LAUNCH * 1e6).rstrip("\n")]
    for gpu in GPUS:
        lines.append(
            f"| {gpu.name} | {gpu.device['sms']} | {gpu.memory / 1e12:.2f} TB/s"
            f" | {gpu.l2 / 1e12:.1f} TB/s | {gpu.l2_per_sm / 1e9:.0f} GB/s"
            f" | {gpu.multiply_adds / 1e12:.0f} T/s |"
        )
    lines += [
        "",
        "Memory is what copies reach, of 4.8 and 2.04 TB/s; the products of `mma.sync` are taken",
        "to reach 63 % of the H200's 495 T/s and 90 % of the A100's 156; L2 figures are assumed.",
    ]
    plans = {width: plan_of(width) for width in WIDTHS}
    for gpu in GPUS:
        lines += [
            "",
            f"## {gpu.name}",
            "",
            "| width | batch | launches | maps, MB | weights, MB | G multiply-adds | launches, us"
            " | memory, us | L2, us | tensor, us | predicted, us | images/s | measured, us |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for width, plan in plans.items():
            for batch in BATCHES:
                p = predict(plan, batch, gpu)
                lines.append(
                    f"| {width.replace('_', '.')} | {batch} | {p.launches}"
                    f" | {p.map_bytes / 1e6:.1f} | {p.weight_bytes / 1e6:.1f}"
                    f" | {p.multiply_adds / 1e9:.2f} | {p.launches * LAUNCH * 1e6:.0f}"
                    f" | {p.memory * 1e6:.1f} | {p.l2 * 1e6:.1f} | {p.tensor * 1e6:.1f}"
                    f" | {p.total * 1e6:.0f} | {batch / p.total:,.0f} | |"
                )
    return "\n".join(lines) + "\n"


def _stage_counts(channels: int, units: int, size: int, dtype: torch.dtype) -> Counter[str]:
    stage = snv2.nn.Stage(*(snv2.nn.InvertedResidual(channels, channels, 1) for _ in range(units)))
    x = torch.randn(1, channels, size, size, dtype=dtype)
    randomize_(stage).eval().to(dtype)
    emulator.reset_counters()
    with torch.no_grad(), snv2.use_backend("cuda-emulated"):
        stage(x)
    return Counter(emulator.counters())


def counted(width: str, dtype: torch.dtype) -> list[Counted]:
    """What a unit inside each stage moves at batch 1: the emulator's count, what the launch is
    described as, and the least, its maps and weights."""
    plan = plan_of(width)
    rows: list[Counted] = []
    channels = getattr(snv2.models, f"shufflenet_v2_{width}")()._stage_out_channels[1:4]
    launches = launches_of(plan.words, 1, SIZE, SIZE)
    first = 1  # behind the stem
    for stage, (outputs, units) in enumerate(zip(channels, (4, 8, 4), strict=True)):
        size, half = SIZE >> 3 + stage, outputs // 2
        counts = _stage_counts(outputs, 3, size, dtype)
        counts.subtract(_stage_counts(outputs, 2, size, dtype))
        weights = 2 * half * half + 9 * half
        launch = launches[first + 1]
        first += units
        rows.append({
            "kernel": "unit", "shape": f"{width.replace('_', '.')}, stage {stage + 2}: "
            f"{outputs} x {size} x {size}",
            "dtype": str(dtype).removeprefix("torch."), "batch": 1,
            "least_bytes": (2 * half * size * size + weights) * dtype.itemsize,
            "described_bytes": launch["read_bytes"] + launch["written_bytes"]
            + launch["weight_bytes"],
            "counted_bytes": counts["global_load_bytes"] + counts["global_store_bytes"],
            "multiply_adds": weights * size * size,
        })  # fmt: skip
    return rows


def write_counts(path: str) -> None:
    result = new_result({"size": SIZE})
    result["gpu"] = [row for width in WIDTHS for row in counted(width, torch.float16)]
    write_result(result, path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--json"]:
        write_counts(sys.argv[2])
    else:
        PAGE.write_text(page())
