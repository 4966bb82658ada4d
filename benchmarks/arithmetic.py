"""Predicts how long networks and ops take on GPUs, from what their launches execute and move.

Nothing here is measured: the numbers of the GPUs are stated below, bytes and cuts come from the
code that launches the kernels, executed instructions and the stalls of loops from arithmetic.json
(count.py). predict.py writes docs/arithmetic.md of it.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import snv2_kernels as snv2
from snv2_kernels.gpu import launches as launches_of
from snv2_kernels.packing import GpuPlan

DATA = Path(__file__).with_name("arithmetic.json")
WIDTHS = ("x0_5", "x1_0", "x1_5", "x2_0")
BATCHES = (1, 8, 64, 512)
SIZE = 224
KIB = 1024
WARP = 32


@dataclass(frozen=True)
class Gpu:
    name: str
    device: dict[str, int]  # snv2::Device
    clock: float  # of an SM, Hz, under load
    memory: float  # bytes/s that a copy reaches
    l2: float  # bytes/s from L2 to all SMs
    multiply_adds: float  # per second: tensor cores, 16-bit, through mma.sync

    @property
    def l2_per_sm(self) -> float:
        """Bytes/s into one SM, which takes 64 in a cycle."""
        return 64 * self.clock


GPUS = (
    Gpu(
        "H200",
        {
            "sms": 132, "shared_per_sm": 228 * KIB, "shared_per_cta": 227 * KIB,
            "reserved_per_cta": KIB, "l2_bytes": 50 * KIB * KIB, "cluster": 8,
        },
        clock=1.75e9, memory=4.3e12, l2=5.5e12, multiply_adds=0.63 * 990e12 / 2,
    ),
    Gpu(
        "A100 80 GB",
        {
            "sms": 108, "shared_per_sm": 164 * KIB, "shared_per_cta": 163 * KIB,
            "reserved_per_cta": KIB, "l2_bytes": 40 * KIB * KIB, "cluster": 1,
        },
        clock=1.41e9, memory=1.75e12, l2=4.5e12, multiply_adds=0.9 * 312e12 / 2,
    ),
)  # fmt: skip
LAUNCH = 1.3e-6  # seconds from one kernel of a graph to the next


def unit_cost(name: str) -> float:
    """Returns a constant of the estimate by which units are cut: in 16 bits, where it has two."""
    header = (Path(__file__).parents[1] / "csrc/cuda/unit_cost.h").read_text()
    sixteen_bits = r"sizeof\(T\) == 4 \? [\d.]+ : "
    pattern = rf"\b{name} = (?:{sixteen_bits})?([\d.]+)"
    found = re.search(pattern, header)
    assert found, f"unit_cost.h has no {name}"
    return float(found[1])


ISSUE = unit_cost("kIssue")  # instructions of an SM in a cycle: of four slots some stay empty
ALONE = unit_cost("kAlone")  # cycles of an instruction of a warp that is alone on its scheduler
LATENCY = unit_cost("kLatency")  # cycles that a CTA waits for L2 or memory

# Round trips to memory of a CTA that does not march, one after another: tables or weights, then
# what lies there.
ROUND_TRIPS = 2
THREADS_PER_SM = 2048
PRODUCTS = 16 * 8 * 16  # multiply-adds of an HMMA


# Fields of a launch that say how it is cut.
CUT = ("ctas", "threads", "columns", "cluster")


@dataclass(frozen=True)
class Terms:
    """Seconds that a launch would take if only one thing counted."""

    memory: float = 0.0
    l2: float = 0.0
    tensor: float = 0.0
    issue: float = 0.0
    latency: float = 0.0

    @property
    def each(self) -> tuple[float, ...]:
        return astuple(self)

    @property
    def longest(self) -> float:
        return max(self.each)

    def __add__(self, other: Terms) -> Terms:
        return Terms(*(a + b for a, b in zip(self.each, other.each, strict=True)))


@dataclass(frozen=True)
class Prediction:
    """Totals over a network's launches, and the seconds they should take: each its longest term."""

    launches: int
    map_bytes: int
    weight_bytes: int
    multiply_adds: int
    instructions: float  # of warps
    terms: Terms
    total: float


@functools.cache
def data() -> dict[str, Any]:
    """Returns what benchmarks/count.py counted."""
    content: dict[str, Any] = json.loads(DATA.read_text())
    return content


@functools.cache
def plan_of(width: str) -> GpuPlan:
    model = getattr(snv2.models, f"shufflenet_v2_{width}")().eval()
    fused = snv2.fuse(model)
    assert isinstance(fused, snv2.nn.ShuffleNetV2)
    plan = fused._pack("cuda-emulated", torch.float16, torch.device("cpu"))
    assert isinstance(plan, GpuPlan)
    return plan


def chunk_of(launches: list[dict[str, Any]], batch: int) -> int:
    """Returns the images that a network's launches take at once."""
    return -(-batch // int(launches[0]["launches"]))


def counted(width: str, images: int, gpu: Gpu) -> dict[str, Any]:
    """Returns the counts of a network's launches."""
    for row in data()["networks"]:
        if (row["gpu"], row["width"], row["images"]) == (gpu.name, width, images):
            return dict(row)
    raise LookupError(f"{DATA}: no {width} on {images} images, {gpu.name}; run make arithmetic")


def cycles_of_warp(kernel: str, executed: float, products: float) -> float:
    """Returns the cycles of a warp that is alone: for its HMMA what the kernel's loop takes for
    each (sass.py), for other instructions ALONE."""
    for loop in data()["loops"]:
        if (loop["kernel"], loop["loop"]) == (kernel, "product"):
            inside = products * loop["instructions"] / loop["done"]
            outside = max(executed - inside, 0) * ALONE
            return float(products * loop["cycles"] / loop["done"] + outside)
    return executed * ALONE


def ctas_of_sm(launch: dict[str, Any], gpu: Gpu) -> int:
    """Returns the CTAs of a launch that an SM has at once, by shared memory and threads."""
    device = gpu.device
    each = launch["shared_bytes"] + device["reserved_per_cta"]
    fit = min(device["shared_per_sm"] // each, THREADS_PER_SM // launch["threads"])
    return max(min(fit, -(-launch["ctas"] // device["sms"])), 1)


def latency_of(launch: dict[str, Any], executed: float, kernel: str, gpu: Gpu) -> float:
    """Returns the cycles from start to end of CTAs that wait for nothing but themselves."""
    if launch["cycles"] > 0:
        return float(launch["cycles"])
    waves = -(-launch["ctas"] // (gpu.device["sms"] * ctas_of_sm(launch, gpu)))
    warps = launch["launches"] * launch["ctas"] * launch["threads"] / WARP
    products = launch["multiply_adds"] / PRODUCTS
    chain = cycles_of_warp(kernel, executed / warps, products / warps) + ROUND_TRIPS * LATENCY
    return waves * chain * float(launch["launches"])


def terms_of(launch: dict[str, Any], executed: float, kernel: str, gpu: Gpu) -> Terms:
    sms = min(launch["ctas"], gpu.device["sms"])
    maps = launch["read_bytes"] + launch["written_bytes"]
    warps = ctas_of_sm(launch, gpu) * launch["threads"] / WARP
    return Terms(
        memory=maps / gpu.memory,
        l2=(maps + launch["weight_bytes"]) / min(gpu.l2, sms * gpu.l2_per_sm),
        tensor=launch["multiply_adds"] / (gpu.multiply_adds * sms / gpu.device["sms"]),
        issue=executed / (sms * min(ISSUE, warps / ALONE) * gpu.clock),
        latency=latency_of(launch, executed, kernel, gpu) / gpu.clock,
    )


def launches_with_terms(
    width: str, batch: int, gpu: Gpu
) -> list[tuple[dict[str, Any], float, Terms]]:
    """Returns each launch of a network, what it executes, and its terms."""
    launches = launches_of(plan_of(width).words, batch, SIZE, SIZE, gpu.device)
    images = chunk_of(launches, batch)
    row = counted(width, images, gpu)
    found = []
    for launch, count, kernel in zip(launches, row["instructions"], row["kernels"], strict=True):
        executed = count * batch / images  # of all chunks
        found.append((launch, executed, terms_of(launch, executed, kernel, gpu)))
    return found


def predict(width: str, batch: int, gpu: Gpu) -> Prediction:
    found = launches_with_terms(width, batch, gpu)
    launches = [launch for launch, _, _ in found]
    count = sum(launch["launches"] for launch in launches)
    return Prediction(
        launches=count,
        map_bytes=sum(launch["read_bytes"] + launch["written_bytes"] for launch in launches),
        weight_bytes=sum(launch["weight_bytes"] for launch in launches),
        multiply_adds=sum(launch["multiply_adds"] for launch in launches),
        instructions=sum(executed for _, executed, _ in found),
        terms=sum((terms for _, _, terms in found), Terms()),
        total=sum(terms.longest for _, _, terms in found) + count * LAUNCH,
    )


# Networks whose units are in one launch ---------------------------------------------------------

STAGES_BATCHES = BATCHES[:2]
WHERE_THEY_FIT = 2  # of Tuning::stages


def stages_of(width: str, batch: int, gpu: Gpu) -> list[dict[str, Any]]:
    """Returns the launches of a network whose units share one where they fit."""
    device = {**gpu.device, "stages": WHERE_THEY_FIT}
    return launches_of(plan_of(width).words, batch, SIZE, SIZE, device)


def predict_stages(row: dict[str, Any], batch: int) -> Prediction:
    """Returns what a network of count.py's rows should take, on a batch whose clusters run all at
    once: in the launch of the units the cycles of a CTA are those of a batch of one. The others
    are those of a network with a launch for each unit."""
    gpu = GPUS[0]
    launches = stages_of(row["width"], batch, gpu)
    assert [launch["kernel"] for launch in launches] == row["launches"]
    apart = counted(row["width"], batch, gpu)
    found = []
    for i, launch in zip((0, None, -2, -1), launches, strict=True):
        if i is None:
            executed, kernel = row["instructions"][1] * batch, row["kernels"][1]
            cut = {**launch, "cycles": row["cycles"]}
        else:
            executed, kernel, cut = apart["instructions"][i], apart["kernels"][i], launch
        found.append((launch, executed, terms_of(cut, executed, kernel, gpu)))
    return Prediction(
        launches=len(launches),
        map_bytes=sum(launch["read_bytes"] + launch["written_bytes"] for launch in launches),
        weight_bytes=sum(launch["weight_bytes"] for launch in launches),
        multiply_adds=sum(launch["multiply_adds"] for launch in launches),
        instructions=sum(executed for _, executed, _ in found),
        terms=sum((terms for _, _, terms in found), Terms()),
        total=sum(terms.longest for _, _, terms in found) + len(launches) * LAUNCH,
    )


def estimate_over_count(gpu: Gpu) -> tuple[float, float]:
    """Returns the least and the most, of networks, of the instructions that units are estimated to
    execute (unit_cost.h) over those that they do."""
    found = []
    for width in WIDTHS:
        for batch in BATCHES:
            units = [row for row in launches_with_terms(width, batch, gpu)
                     if row[0]["instructions"] > 0]  # fmt: skip
            estimated = sum(launch["instructions"] for launch, _, _ in units)
            found.append(estimated / sum(executed for _, executed, _ in units))
    return min(found), max(found)


# Ops ------------------------------------------------------------------------------------------

# Stages of x1.0: channels, and the extent of a map.
OP_MAPS = {2: (116, 28), 3: (232, 14), 4: (464, 7)}
OP_BATCH = 64

# Operators of these modules that launch a kernel in eager PyTorch; others make views or allocate.
EAGER_KERNELS = ("convolution", "native_batch_norm", "relu", "relu_", "cat", "clone")


class EagerLaunches(TorchDispatchMode):
    """Adds up eager PyTorch's kernels, each of which reads its arguments and writes its results."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in EAGER_KERNELS:
            moved = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.count += 1
            self.bytes += sum(t.nbytes for t in moved)
        return out


@dataclass(frozen=True)
class Case:
    """An op, or a unit alone, on OP_BATCH maps of a stage of x1.0."""

    what: str  # "split_dw_cat_shuffle", or "unit"
    stage: int
    dtype: str
    memory_format: str

    @property
    def type(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def channels(self) -> int:
        return OP_MAPS[self.stage][0]

    def input(self, device: str = "cpu") -> Tensor:
        channels, size = OP_MAPS[self.stage]
        x = torch.zeros(OP_BATCH, channels, size, size, dtype=self.type, device=device)
        return x.contiguous(memory_format=getattr(torch, self.memory_format))

    def eager(self) -> EagerLaunches:
        """Returns what eager PyTorch launches instead."""
        channels, x = self.channels, self.input("meta")
        module: nn.Module = _PlainSplit(channels)
        if self.what == "unit":
            module = snv2.models.InvertedResidual(channels, channels, 1)
        module.eval().to("meta", self.type)
        with torch.no_grad(), EagerLaunches() as found:
            module(x)
        return found

    def unit_plan(self) -> GpuPlan:
        unit = snv2.nn.InvertedResidual(self.channels, self.channels, 1).eval()
        plan = unit._pack("cuda-emulated", self.type, torch.device("cpu"))
        assert isinstance(plan, GpuPlan)
        return plan


class _PlainSplit(snv2.nn.SplitDepthwiseShuffle):
    forward = snv2.nn.SplitDepthwiseShuffle._plain


CASES = [
    Case(what, stage, dtype, memory_format)
    for what in ("split_dw_cat_shuffle", "unit")
    for stage in OP_MAPS
    for dtype in ("float16", "float32")
    for memory_format in ("contiguous_format", "channels_last")
]


@dataclass(frozen=True)
class OpPrediction:
    """Totals over a case's launches and their seconds, beside those of the eager sequence."""

    launches: int
    map_bytes: int  # its input once, its result once
    instructions: int  # of warps
    terms: Terms
    total: float
    eager_launches: int
    eager_bytes: int
    eager_total: float  # by bytes alone


def counted_case(case: Case) -> dict[str, Any]:
    """Returns the counts of an op or unit."""
    return next(row for row in data()["ops"] if case == Case(**row["case"]))


def predict_case(case: Case, gpu: Gpu) -> OpPrediction:
    row = counted_case(case)
    executed = sum(row["instructions"])
    _, size = OP_MAPS[case.stage]
    if case.what == "unit":
        launches = launches_of(case.unit_plan().words, OP_BATCH, size, size, gpu.device)
        terms = [
            terms_of(launch, *counts, gpu)
            for launch, *counts in zip(launches, row["instructions"], row["kernels"], strict=True)
        ]
    else:  # Its grid, which nobody describes, is taken to fill the GPU.
        slots = gpu.device["sms"] * ISSUE * gpu.clock
        chain = ROUND_TRIPS * LATENCY / gpu.clock
        moved = 2 * case.input().nbytes / gpu.memory
        terms = [Terms(memory=moved, issue=executed / slots, latency=chain)]
    eager = case.eager()
    return OpPrediction(
        launches=len(row["instructions"]),
        map_bytes=2 * case.input().nbytes,
        instructions=executed,
        terms=sum(terms, Terms()),
        total=sum(part.longest + LAUNCH for part in terms),
        eager_launches=eager.count,
        eager_bytes=eager.bytes,
        eager_total=eager.bytes / gpu.memory + eager.count * LAUNCH,
    )
