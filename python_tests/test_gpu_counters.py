"""What the CUDA kernels of units and networks move and how they are launched: counted by the
emulator or told by the host code, so the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _cases import WIDTHS, draw, network
from _deviations import ConvBn, DeviantUnit, Shortcut, SqueezeExcite
from _deviations import plan_of as deviant_plan
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels import cuda_kernels, emulator, gpu
from snv2_kernels.ops import run_plan
from snv2_kernels.packing import GpuPlan
from snv2_kernels.testing import randomize_

CPU = torch.device("cpu")
HALVES = {"x0_5": (24, 48, 96), "x1_0": (58, 116, 232), "x1_5": (88, 176, 352)}
HALVES["x2_0"] = (122, 244, 488)
SIZES = (28, 14, 7)
SLOW = ("x1_5", "x2_0")
# Width and stage, channels of the main half, extent, and a batch that one SM takes long for.
STAGES = [
    pytest.param(
        half, size, 16 if stage > 0 else 8, id=f"{width}-stage{stage + 2}",
        marks=[pytest.mark.slow] if width in SLOW else [],
    )
    for width, halves in HALVES.items()
    for stage, (half, size) in enumerate(zip(halves, SIZES, strict=True))
]  # fmt: skip


@pytest.fixture
def one_sm() -> Iterator[None]:
    """An emulated GPU so small that a small batch is a large one."""
    before = emulator.device()
    emulator.set_device(sms=1)
    yield
    emulator.set_device(**before)


def planes_bytes(batch: int, channels: int, height: int, width: int, dtype: torch.dtype) -> int:
    """A map between steps, whose rows are padded to 8 pixels."""
    return batch * channels * height * (-(-width // 8) * 8) * dtype.itemsize


def stage_of(half: int, units: int) -> snv2.nn.Stage:
    stage = snv2.nn.Stage(*(snv2.nn.InvertedResidual(2 * half, 2 * half, 1) for _ in range(units)))
    return randomize_(stage).eval()


def plan_of(module: snv2.nn.Stage | snv2.nn.ShuffleNetV2, dtype: torch.dtype) -> GpuPlan:
    plan = module._pack("cuda-emulated", dtype, CPU)
    assert isinstance(plan, GpuPlan)
    return plan


def counted(half: int, units: int, size: int, batch: int, dtype: torch.dtype) -> dict[str, int]:
    stage = stage_of(half, units).to(dtype)
    x = draw(batch, 2 * half, size, size, dtype=dtype)
    emulator.reset_counters()
    with torch.no_grad(), snv2.use_backend("cuda-emulated"):
        stage(x)
    return emulator.counters()


def inner_unit(half: int, size: int, batch: int, dtype: torch.dtype) -> dict[str, int]:
    """What one unit inside a stage adds to the counters."""
    more, fewer = (counted(half, units, size, batch, dtype) for units in (3, 2))
    return {name: count - fewer[name] for name, count in more.items()}


@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize(("half", "size", "batch"), STAGES)
def test_unit_inside_a_stage_moves_its_map_once(half: int, size: int, batch: int) -> None:
    dtype = torch.float16
    unit = inner_unit(half, size, batch, dtype)
    assert unit["launches"] == 1
    maps = planes_bytes(batch, 2 * half, size, size, dtype)
    weights = (2 * half * half + 9 * half) * dtype.itemsize
    moved = unit["global_load_bytes"] + unit["global_store_bytes"]
    assert moved <= 1.15 * (maps + weights), f"{moved / (maps + weights):.3f} of the least"
    assert unit["global_store_bytes"] == maps // 2
    assert unit["bank_conflicts"] <= 0.05 * unit["shared_accesses"]


@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize(
    ("half", "size", "batch", "dtype"),
    [(58, 28, 4, torch.bfloat16), (116, 14, 8, torch.float32)],
)
def test_unit_in_other_dtypes(half: int, size: int, batch: int, dtype: torch.dtype) -> None:
    unit = inner_unit(half, size, batch, dtype)
    maps = planes_bytes(batch, 2 * half, size, size, dtype)
    weights = (2 * half * half + 9 * half) * dtype.itemsize
    moved = unit["global_load_bytes"] + unit["global_store_bytes"]
    assert moved <= 1.15 * (maps + weights), f"{moved / (maps + weights):.3f} of the least"
    assert unit["bank_conflicts"] <= 0.05 * unit["shared_accesses"]


# Pieces of units ------------------------------------------------------------------------------


def pairs_unit(half: int, *gate: SqueezeExcite | Shortcut) -> DeviantUnit:
    """ShuffleNetV2+'s "Xception" block, with a gate behind it or not."""
    pair = [ConvBn(half, half, 3), ConvBn(half, half, act="hardswish")]
    return DeviantUnit(2 * half, [*pair, *pair, *pair, *gate])


def counted_deviant(units: list[DeviantUnit], x: Tensor) -> dict[str, int]:
    module = randomize_(nn.Sequential(*units)).eval()
    plan = deviant_plan(("cuda-emulated", x.dtype), module, x.shape[1])
    emulator.reset_counters()
    run_plan(x, plan, "cuda-emulated")
    return emulator.counters()


def less(more: dict[str, int], fewer: dict[str, int]) -> dict[str, int]:
    return {name: count - fewer[name] for name, count in more.items()}


@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize(("half", "size", "batch"), [(58, 28, 2), (128, 14, 4), (256, 7, 8)])
def test_pieces_move_their_maps_once(half: int, size: int, batch: int) -> None:
    x = draw(batch, 2 * half, size, size, dtype=torch.float16)
    pieces = less(*(counted_deviant([pairs_unit(half) for _ in range(n)], x) for n in (3, 2)))
    assert pieces["launches"] == 3
    maps = 3 * planes_bytes(*x.shape, x.dtype)
    weights = 3 * (half * half + 9 * half) * x.itemsize
    moved = pieces["global_load_bytes"] + pieces["global_store_bytes"]
    assert moved <= 1.15 * (maps + weights), f"{moved / (maps + weights):.3f} of the least"
    assert pieces["global_store_bytes"] == maps // 2
    assert pieces["bank_conflicts"] <= 0.05 * pieces["shared_accesses"]


@pytest.fixture
def small_device() -> Iterator[None]:
    """An emulated GPU without clusters, whose SMs hold few planes."""
    before = emulator.device()
    emulator.set_device(sms=1, cluster=1, shared_per_sm=40 << 10, shared_per_cta=39 << 10)
    yield
    emulator.set_device(**before)


def described_gate(unit: DeviantUnit, x: Tensor) -> dict[str, Any]:
    n, channels, h, w = x.shape
    plan = deviant_plan(("cuda-emulated", x.dtype), nn.Sequential(unit), channels)
    launches = gpu.launches(plan.words, n, h, w)
    (gate,) = (launch for launch in launches if launch["kernel"] == "gate")
    return gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("device", "reads"), [("one_sm", 1), ("small_device", 2)], ids=["held", "read-twice"]
)
def test_gate_moves_its_map(
    request: pytest.FixtureRequest, device: str, reads: int, dtype: torch.dtype
) -> None:
    """Once in each direction where its planes fit in shared memory, else it reads them twice."""
    request.getfixturevalue(device)
    half, batch = 64, 4
    x = draw(batch, 2 * half, 21, 20, dtype=dtype)
    gated = pairs_unit(half, SqueezeExcite(half))
    gate = less(*(counted_deviant([unit], x) for unit in (gated, pairs_unit(half))))
    assert gate["launches"] == 1
    map_bytes = planes_bytes(*x.shape, dtype) // 2
    # The weights for each image, and once more in biases and tables.
    weights = batch * 2 * half * (half // 4) * x.itemsize
    assert gate["global_store_bytes"] == map_bytes
    assert gate["global_load_bytes"] >= reads * map_bytes + weights
    assert gate["global_load_bytes"] <= 1.1 * (reads * map_bytes + weights)
    assert gate["bank_conflicts"] <= 0.05 * gate["shared_accesses"]
    described = described_gate(gated, x)
    assert described["ctas"] == gate["ctas"]
    assert described["written_bytes"] == gate["global_store_bytes"]
    table = 4 * half * batch
    assert described["read_bytes"] + described["weight_bytes"] + table == gate["global_load_bytes"]


@pytest.mark.parametrize("device", ["one_sm", "small_device"])
def test_shortcut_reads_its_planes_once(request: pytest.FixtureRequest, device: str) -> None:
    """Behind squeeze-and-excite it adds that and a table; alone it also writes its map."""
    request.getfixturevalue(device)
    half, batch = 64, 4
    x = draw(batch, 2 * half, 21, 20, dtype=torch.float16)
    map_bytes, table = planes_bytes(*x.shape, x.dtype) // 2, 4 * half * batch
    gates = SqueezeExcite(half), Shortcut(half), SqueezeExcite(half, adds_source=True)
    gated, added, both = (pairs_unit(half, gate) for gate in gates)
    behind = less(counted_deviant([both], x), counted_deviant([gated], x))
    assert behind["launches"] == behind["ctas"] == behind["global_store_bytes"] == 0
    assert behind["global_load_bytes"] == map_bytes + table
    alone = less(counted_deviant([added], x), counted_deviant([pairs_unit(half)], x))
    assert alone["launches"] == 1
    assert alone["global_store_bytes"] == map_bytes
    assert alone["global_load_bytes"] == 2 * (map_bytes + table)
    described = described_gate(added, x)
    assert described["read_bytes"] == 2 * map_bytes
    assert described["written_bytes"] == map_bytes
    assert described["weight_bytes"] == described["multiply_adds"] == 0
    more, fewer = described_gate(both, x), described_gate(gated, x)
    assert more["read_bytes"] - fewer["read_bytes"] == map_bytes
    assert more["written_bytes"] == fewer["written_bytes"] == map_bytes


def test_pieces_are_counted_as_they_are_described() -> None:
    """Of each kind: both strides, with and without each part."""
    branch = [ConvBn(20, 17), ConvBn(17, 17, 3, 2), SqueezeExcite(17), ConvBn(17, 9)]
    branch += [ConvBn(9, 9, 5), ConvBn(9, 9, 3)]
    unit = DeviantUnit(20, branch, 2, [ConvBn(20, 20, 3, 2), ConvBn(20, 6)])
    x = draw(2, 20, 12, 10, dtype=torch.float16)
    counts = counted_deviant([unit], x)
    plan = deviant_plan(("cuda-emulated", x.dtype), nn.Sequential(unit), 20)
    launches = gpu.launches(plan.words, 2, 12, 10)
    names = [launch["kernel"] for launch in launches]
    assert names == [
        "copy", "piece stride 2", "piece stride 2", "gate", "piece stride 1", "piece stride 1",
        "export",
    ]  # fmt: skip
    assert counts["launches"] == len(launches)
    assert counts["ctas"] == sum(launch["ctas"] for launch in launches)
    assert counts["global_store_bytes"] == sum(launch["written_bytes"] for launch in launches)


def test_launches_of_units() -> None:
    def launches(*branch: ConvBn | SqueezeExcite) -> int:
        """That a unit in a stage takes."""
        place = "cuda-emulated", torch.float16
        stages = [nn.Sequential(*(DeviantUnit(20, branch) for _ in range(n))) for n in (3, 2)]
        more, fewer = (len(deviant_plan(place, stage, 20).steps) for stage in stages)
        return more - fewer

    pair = [ConvBn(10, 10, 3), ConvBn(10, 10)]
    gate = SqueezeExcite(10)
    assert launches(ConvBn(10, 10), *pair) == 1
    assert launches(ConvBn(10, 10), *pair, gate) == 2
    assert launches(*pair, *pair) == 2  # ShuffleNet V2*
    assert launches(*pair, *pair, *pair) == 3  # ShuffleNetV2+'s Xception block
    assert launches(*pair, *pair, *pair, gate) == 4
    assert launches(ConvBn(10, 10), pair[0], gate, pair[1]) == 3


@pytest.mark.parametrize("width", WIDTHS)
def test_network_is_nineteen_launches(width: str) -> None:
    """The stem, sixteen units, the features and the linear layer; DESIGN asks for at most 20."""
    fused = snv2.fuse(network("snv2", width))
    assert isinstance(fused, snv2.nn.ShuffleNetV2)
    plan = plan_of(fused, torch.float16)
    launches = gpu.launches(plan.words, 1, 224, 224)
    assert sum(launch["launches"] for launch in launches) == 19
    # More images than the GPU takes at once go in chunks, the linear layer does not.
    chunks = gpu.launches(plan.words, 1024, 224, 224)
    assert [launch["launches"] for launch in chunks] == [4] * 18 + [1]


@pytest.mark.parametrize(
    "width", [pytest.param(w, marks=[pytest.mark.slow] if w in SLOW else []) for w in HALVES]
)
def test_stores_of_one_image_are_whole_sectors(width: str) -> None:
    """At batch 1, where CTAs have the fewest rows: at most a tenth more than the bytes fill."""
    fused = snv2.fuse(network("snv2", width))
    assert isinstance(fused, snv2.nn.ShuffleNetV2)
    plan = plan_of(fused, torch.float16)
    emulator.reset_counters()
    run_plan(draw(1, 3, 224, 224, dtype=torch.float16), plan, "cuda-emulated")
    counts = emulator.counters()
    least = counts["minimum_store_bytes"]
    assert least <= 32 * counts["global_store_sectors"] <= 1.1 * least


# A stage and batch of one step a CTA, where half of the warps have half of what all of them do.
EIGHT_WARPS = (122, 28, 8)


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
@pytest.mark.parametrize(
    ("half", "size"),
    [(h, s) for hs in HALVES.values() for h, s in zip(hs[:2], SIZES[:2], strict=True)],
)
def test_an_sm_has_sixteen_warps_of_stages_2_and_3(half: int, size: int, batch: int) -> None:
    """In one CTA or two: of fewer, each waits too long alone."""
    plan = plan_of(stage_of(half, 3), torch.float16)
    device = emulator.device()
    _, unit, _ = gpu.launches(plan.words, batch, size, size)[-3:]
    ctas = device["shared_per_sm"] // (unit["shared_bytes"] + device["reserved_per_cta"])
    least = 256 if (half, size, batch) == EIGHT_WARPS else 512
    assert ctas * unit["threads"] >= least
    build = cuda_kernels.read_build()
    if build is None:
        pytest.skip("the CUDA library is not built: registers are not known")
    kernels = [
        kernel
        for kernel in build.kernels
        if "unit_kernel" in kernel.kernel and kernel.arch == "sm_90" and "half" in kernel.kernel
    ]
    inner = [kernel for kernel in kernels if kernel.max_threads == 512]  # others are at the edges
    assert inner
    for kernel in inner:
        fits = cuda_kernels.occupancy(
            "sm_90",
            registers=kernel.registers,
            threads=unit["threads"],
            shared=unit["shared_bytes"],
        )
        assert fits.ctas * unit["threads"] >= least, kernel


def test_counters_agree_with_what_is_described() -> None:
    half, size, batch, dtype = 58, 14, 3, torch.float16
    plan = plan_of(stage_of(half, 3), dtype)
    launches = gpu.launches(plan.words, batch, size, size)
    unit = launches[2]
    counts = inner_unit(half, size, batch, dtype)
    assert counts["ctas"] == unit["ctas"]
    assert counts["global_store_bytes"] == unit["written_bytes"]
    # Beside maps and weights a CTA reads the tables.
    tables = 4 * 2 * half * unit["ctas"]
    described = unit["read_bytes"] + unit["weight_bytes"] + tables
    assert counts["global_load_bytes"] == described


def test_maps_that_fit_in_narrow_steps_alone() -> None:
    """In float32: parts of a row below the usual width, or rows convolved one by one."""
    fused = snv2.fuse(network("snv2", "x1_5"))
    assert isinstance(fused, snv2.nn.ShuffleNetV2)
    for plan, shape in [
        (plan_of(fused, torch.float32), (1, 768, 768)),
        (plan_of(stage_of(232, 3), torch.float32), (16, 28, 80)),
    ]:
        assert all(launch["ctas"] > 0 for launch in gpu.launches(plan.words, *shape))


def test_results_in_narrow_steps() -> None:
    stage = stage_of(352, 3)
    x = draw(1, 704, 3, 48, dtype=torch.float32)
    with torch.no_grad():
        expected = nn.Sequential(*stage)(x)
        with snv2.use_backend("cuda-emulated"):
            torch.testing.assert_close(stage(x), expected, rtol=1e-4, atol=1e-4)
