"""What the CUDA kernels of units and networks move and how they are launched: counted by the
emulator or told by the host code, so the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from _cases import WIDTHS, draw, network

import snv2_kernels as snv2
from snv2_kernels import _native, cuda_kernels
from snv2_kernels.packing import GpuPlan
from snv2_kernels.testing import randomize_

CPU = torch.device("cpu")
HALVES = {"x0_5": (24, 48, 96), "x1_0": (58, 116, 232), "x1_5": (88, 176, 352)}
HALVES["x2_0"] = (122, 244, 488)
SIZES = (28, 14, 7)
# Width and stage, channels of the main half, extent, and a batch that one SM takes long for.
STAGES = [
    pytest.param(half, size, 16 if stage > 0 else 8, id=f"{width}-stage{stage + 2}")
    for width, halves in HALVES.items()
    for stage, (half, size) in enumerate(zip(halves, SIZES, strict=True))
]


@pytest.fixture
def one_sm() -> Iterator[None]:
    """An emulated GPU so small that a small batch is a large one."""
    before = _native.emulated_device()
    _native.set_emulated_device(sms=1)
    yield
    _native.set_emulated_device(**before)


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
    _native.reset_emulator_counters()
    with torch.no_grad(), snv2.use_backend("cuda-emulated"):
        stage(x)
    return _native.emulator_counters()


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
    maps = batch * 2 * half * size * size * dtype.itemsize
    weights = (2 * half * half + 9 * half) * dtype.itemsize
    moved = unit["global_load_bytes"] + unit["global_store_bytes"]
    assert moved <= 1.15 * (maps + weights), f"{moved / (maps + weights):.3f} of the least"
    assert unit["global_store_bytes"] == maps // 2
    assert unit["bank_conflicts"] <= 0.05 * unit["shared_accesses"]


@pytest.mark.usefixtures("one_sm")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("half", "size"), [(58, 28), (116, 14), (232, 7)])
def test_unit_in_other_dtypes(half: int, size: int, dtype: torch.dtype) -> None:
    batch = 8
    unit = inner_unit(half, size, batch, dtype)
    maps = batch * 2 * half * size * size * dtype.itemsize
    weights = (2 * half * half + 9 * half) * dtype.itemsize
    moved = unit["global_load_bytes"] + unit["global_store_bytes"]
    assert moved <= 1.15 * (maps + weights), f"{moved / (maps + weights):.3f} of the least"
    assert unit["bank_conflicts"] <= 0.05 * unit["shared_accesses"]


@pytest.mark.parametrize("width", WIDTHS)
def test_network_is_nineteen_launches(width: str) -> None:
    """The stem, sixteen units, the features and the linear layer; DESIGN asks for at most 20."""
    fused = snv2.fuse(network("snv2", width))
    assert isinstance(fused, snv2.nn.ShuffleNetV2)
    plan = plan_of(fused, torch.float16)
    launches = _native.describe_network(plan.words.numpy(), 1, 224, 224)
    assert sum(launch["launches"] for launch in launches) == 19
    # More images than the GPU takes at once go in chunks, the linear layer does not.
    chunks = _native.describe_network(plan.words.numpy(), 1024, 224, 224)
    assert [launch["launches"] for launch in chunks] == [4] * 18 + [1]


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
@pytest.mark.parametrize(
    ("half", "size"),
    [(h, s) for hs in HALVES.values() for h, s in zip(hs[:2], SIZES[:2], strict=True)],
)
def test_two_ctas_of_stages_2_and_3_fit_an_sm(half: int, size: int, batch: int) -> None:
    plan = plan_of(stage_of(half, 3), torch.float16)
    device = _native.emulated_device()
    _, unit, _ = _native.describe_network(plan.words.numpy(), batch, size, size)[-3:]
    assert 2 * (unit["shared_bytes"] + device["reserved_per_cta"]) <= device["shared_per_sm"]
    build = cuda_kernels.read_build()
    if build is None:
        pytest.skip("the CUDA library is not built: registers are not known")
    kernels = [
        kernel
        for kernel in build.kernels
        if "unit_kernel" in kernel.kernel and kernel.arch == "sm_90" and "half" in kernel.kernel
    ]
    inner = [kernel for kernel in kernels if kernel.min_ctas == 2]  # those at the edges have one
    assert inner
    for kernel in inner:
        fits = cuda_kernels.occupancy(
            "sm_90", registers=kernel.registers, threads=256, shared=unit["shared_bytes"]
        )
        assert fits.ctas >= 2, kernel


def test_counters_agree_with_what_is_described() -> None:
    half, size, batch, dtype = 58, 14, 3, torch.float16
    plan = plan_of(stage_of(half, 3), dtype)
    launches = _native.describe_network(plan.words.numpy(), batch, size, size)
    unit = launches[2]
    counts = inner_unit(half, size, batch, dtype)
    assert counts["ctas"] == unit["ctas"]
    assert counts["global_store_bytes"] == unit["written_bytes"]
    # Beside maps and weights a CTA reads the tables.
    tables = 4 * 2 * half * unit["ctas"]
    described = unit["read_bytes"] + unit["weight_bytes"] + tables
    assert counts["global_load_bytes"] == described
