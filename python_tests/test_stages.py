"""Units of some stages in one launch of clusters (csrc/cuda/stages.h): the same bits as a launch
for each unit, and a launch each where that cannot be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from _cases import draw
from _ptx import NAME as PTX_NAME
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels import gpu
from snv2_kernels.models import ShuffleNetV2, shufflenet_v2_x0_5, shufflenet_v2_x1_0
from snv2_kernels.ops import OPERATORS
from snv2_kernels.testing import randomize_

WHERE_THEY_FIT = 2
HALF, BF16 = torch.float16, torch.bfloat16


@contextlib.contextmanager
def stages(backend: str, asked: int = WHERE_THEY_FIT) -> Iterator[None]:
    OPERATORS[backend].gpu_tune(stages=asked)
    try:
        yield
    finally:
        OPERATORS[backend].gpu_tune()


def lively(make: Callable[..., nn.Module]) -> nn.Module:
    return randomize_(make(num_classes=10)).eval()


def narrow() -> ShuffleNetV2:
    """Widths that fill no tile, and stages of one unit and of three."""
    return ShuffleNetV2([1, 3, 1], [8, 36, 56, 104, 64], num_classes=10)


def kernels_of(model: nn.Module, batch: int, size: int, dtype: torch.dtype = HALF,
               device: dict[str, int] | None = None) -> list[str]:  # fmt: skip
    fused = snv2.fuse(model)
    plan = fused._gpu_plan(dtype, torch.device("cpu"))
    return [launch["kernel"] for launch in gpu.launches(plan.words, batch, size, size, device)]


# Pairs of networks, images and dtypes: clusters of 2, 3, 5, 6 and 8 CTAs, the last of them with
# fewer rows than the others (72, 168), and odd maps (129).
@pytest.mark.parametrize(
    ("make", "batch", "size", "dtype"),
    [
        (shufflenet_v2_x0_5, 2, 64, HALF),
        (shufflenet_v2_x0_5, 1, 72, BF16),
        (shufflenet_v2_x0_5, 1, 129, HALF),
        (shufflenet_v2_x0_5, 1, 168, BF16),
        (shufflenet_v2_x1_0, 1, 64, BF16),
        (narrow, 3, 96, HALF),
        (narrow, 1, 256, BF16),
    ],
)
def test_results_are_those_of_a_launch_for_each_unit(
    gpu_backend: str, make: Callable[..., nn.Module], batch: int, size: int, dtype: torch.dtype
) -> None:
    model = lively(make) if make is not narrow else randomize_(narrow()).eval()
    fused = snv2.fuse(model).to(dtype)
    x = draw(batch, 3, size, size, dtype=dtype)
    with torch.no_grad():
        expected = fused(x)
        with stages(gpu_backend):
            assert torch.equal(fused(x), expected)
    with stages("cuda-emulated"):  # whose library plans
        assert "stages" in kernels_of(model, batch, size, dtype)


def test_nan_and_infinity_stay_where_they_are(gpu_backend: str) -> None:
    """Zero weights do not spread them: of padded channels, rows and depths."""
    fused = snv2.fuse(randomize_(narrow()).eval()).half()
    x = draw(2, 3, 96, 96, dtype=HALF)
    x[0, :, 5, 7], x[1, 0, 80, 2] = torch.nan, torch.inf
    with torch.no_grad():
        expected = fused(x)
        with stages(gpu_backend):
            found = fused(x)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_images_of_bytes(gpu_backend: str) -> None:
    model = lively(shufflenet_v2_x0_5)
    image = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    results = []
    for asked in (0, WHERE_THEY_FIT):
        with stages(gpu_backend, asked):
            normalize = (0.5,) * 3, (0.2,) * 3
            engine = snv2.Engine(model, (2, 3, 64, 64), dtype=HALF, normalize=normalize)
            results.append(engine(image).clone())
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("model", "size", "dtype", "device"),
    [
        (shufflenet_v2_x0_5, 64, torch.float32, {}),
        (shufflenet_v2_x0_5, 64, HALF, {"cluster": 1}),
        (shufflenet_v2_x0_5, 64, HALF, {"shared_per_cta": 64 << 10}),
        (shufflenet_v2_x1_0, 512, HALF, {}),
    ],
    ids=["float32", "no clusters", "little memory", "large images"],
)
def test_what_does_not_fit_is_a_launch_for_each_unit(
    model: Callable[[], nn.Module], size: int, dtype: torch.dtype, device: dict[str, int]
) -> None:
    with stages("cuda-emulated"):
        kernels = kernels_of(model(), 1, size, dtype, device or None)
    assert "stages" not in kernels
    assert len(kernels) == 1 + 16 + 2


def test_taps_end_a_run_of_units(gpu_backend: str) -> None:
    """A map that is a result is written by its own launch."""
    model = lively(shufflenet_v2_x0_5)
    x = draw(1, 3, 64, 64, dtype=HALF)
    outs = []
    for asked in (0, WHERE_THEY_FIT):
        with stages(gpu_backend, asked):
            engine = snv2.Engine(model, x.shape, dtype=HALF, taps=["stage3"])
            scores, maps = engine(x)
            outs.append((scores.clone(), maps["stage3"].clone()))
    assert all(torch.equal(*pair) for pair in zip(*outs, strict=True))


def test_the_faster_way_is_chosen() -> None:
    """One launch for few images, which wait for each other's launches; for many a launch each."""
    model = shufflenet_v2_x1_0()
    with stages("cuda-emulated", 1):
        few, many = (kernels_of(model, batch, 224) for batch in (1, 256))
    assert few == ["stem", "stages", "features", "linear"]
    assert len(many) == 19


def test_clusters_are_no_larger_than_the_devices() -> None:
    """The last map of eight rows takes four CTAs of two then."""
    plan = snv2.fuse(narrow())._gpu_plan(HALF, torch.device("cpu"))
    with stages("cuda-emulated"):
        found = [gpu.launches(plan.words, 1, 256, 256, {"cluster": most}) for most in (8, 4)]
    clusters = [k["cluster"] for ks in found for k in ks if k["kernel"] == "stages"]
    assert clusters[0] == 8
    assert clusters[1:] == [4] * len(clusters[1:])


def test_ptx_agrees_whatever_the_order_of_warps(gpu_backend: str) -> None:
    """And of what is under way: copies and stores arrive as early and as late as they may."""
    if gpu_backend != PTX_NAME:
        pytest.skip("orders are drawn by the interpreter of PTX")
    fused = snv2.fuse(lively(shufflenet_v2_x0_5)).half()
    x = draw(1, 3, 64, 64, dtype=HALF)

    def run(seed: int) -> Tensor:
        OPERATORS[PTX_NAME].set_seed(seed)
        with torch.no_grad():
            out: Tensor = fused(x)
        return out

    try:
        expected = run(0)
        with stages(PTX_NAME):
            for seed in range(4):
                assert torch.equal(run(seed), expected), seed
    finally:
        OPERATORS[PTX_NAME].set_seed(0)
