"""What an engine does beyond fuse(): taps, bytes for pixels, a buffer to bind to, its report."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _cases import (
    DTYPES,
    assert_accurate,
    draw,
    network,
    on_the_default_device,
    ops_called,
    plain_and_input,
    plain_stage,
    run_fused,
    runs_fused,
    small_network,
    unit_pair,
)
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels import emulator, gpu
from snv2_kernels.testing import float64_reference, max_error

SHAPE = (2, 3, 37, 45)
STAGES = ("stage2", "stage3", "stage4")
# torchvision's.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def maps_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The maps after each stage, by the plain modules."""
    maps = {}
    with torch.no_grad():
        x = model.maxpool(model.conv1(x))
        for name in STAGES:
            x = maps[name] = getattr(model, name)(x)
    return maps


# Taps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("taps", [("stage3",), ("stage4", "stage2"), STAGES], ids=str)
@pytest.mark.on_triton(1)
def test_taps(kernels: str, taps: tuple[str, ...], dtype: torch.dtype) -> None:
    model, x = small_network().to(dtype), draw(*SHAPE, dtype=dtype)
    engine = snv2.Engine(model, SHAPE, taps=taps)
    out, maps = engine(x)
    assert list(maps) == list(taps)
    eager, exact = maps_of(model, x), maps_of(small_network().to(dtype).double(), x.double())
    for name in taps:
        assert_accurate("network", maps[name], eager[name], exact[name], kernels)
        assert maps[name].is_contiguous()
    assert torch.equal(out, snv2.Engine(model, SHAPE)(x))


def test_taps_come_from_the_same_launches(kernels: str) -> None:
    plain, tapped = (
        snv2.Engine(small_network(), SHAPE, taps=taps).report() for taps in ((), STAGES)
    )
    assert [k.kernel for k in plain.kernels] == [k.kernel for k in tapped.kernels]
    assert plain.workspace_bytes == tapped.workspace_bytes
    assert plain.output_bytes < tapped.output_bytes
    assert tapped.op_calls == 1


@pytest.mark.on_triton(0)
def test_taps_are_overwritten_by_the_next_call(kernels: str) -> None:
    engine = snv2.Engine(small_network(), SHAPE, taps=["stage2"])
    _, first = engine(draw(*SHAPE))
    before = first["stage2"].clone()
    _, second = engine(draw(*SHAPE, seed=1))
    assert second["stage2"].data_ptr() == first["stage2"].data_ptr()
    assert not torch.equal(first["stage2"], before)


@pytest.mark.parametrize("taps", [("stage5",), ("conv5",), "stage2x", (None,), ("stage2", 3)])
def test_taps_that_do_not_fit(taps: Any) -> None:
    with (
        snv2.use_backend("cuda-emulated"),
        pytest.raises(ValueError, match="taps: expected names among stage2, stage3, stage4, got"),
    ):
        snv2.Engine(small_network(), SHAPE, taps=taps)


def test_taps_of_a_stage() -> None:
    with (
        snv2.use_backend("cuda-emulated"),
        pytest.raises(ValueError, match="taps: expected none for a stage or unit, got 'stage2'"),
    ):
        snv2.Engine(plain_stage([2, 1], 34, 21), (1, 21, 9, 9), taps=("stage2",))


# Bytes ----------------------------------------------------------------------------------------


def photograph(n: int = 2, h: int = 37, w: int = 45, seed: int = 0) -> Tensor:
    """uint8 [N, H, W, 3]."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, h, w, 3), generator=generator, device="cpu")
    return pixels.to(torch.get_default_device(), torch.uint8)


def normalized(image: Tensor) -> Tensor:
    """As torchvision does it, in float64."""
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (MEAN, STD))
    return ((image.double() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.on_triton(1)
def test_normalize(kernels: str, dtype: torch.dtype) -> None:
    model, image = small_network(), photograph()
    engine = snv2.Engine(model, SHAPE, dtype=dtype, normalize=(MEAN, STD))
    assert engine.input.dtype == torch.uint8
    assert tuple(engine.input.shape) == (2, 37, 45, 3)
    assert engine.input_shape == SHAPE
    pixels = normalized(image)
    with torch.no_grad():
        eager = small_network().to(dtype)(pixels.to(dtype))
    exact = float64_reference(model)(pixels)
    assert_accurate("network", engine(image), eager, exact, kernels)


def test_normalize_of_every_byte(kernels: str) -> None:
    """The network's pixels are torch's, up to their last place."""
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    image = image.contiguous()
    model, shape = small_network(), (1, 3, 16, 16)
    x = normalized(image).float()
    expected = snv2.Engine(model, shape)(x).clone()
    out = snv2.Engine(model, shape, normalize=(MEAN, STD))(image)
    assert max_error(out, expected) < 1e-6


@pytest.mark.on_triton(0)
@pytest.mark.parametrize("options", [{}, {"taps": ("stage2",)}], ids=["alone", "taps"])
def test_normalize_any_strides(kernels: str, options: dict[str, Any]) -> None:
    engine = snv2.Engine(small_network(), SHAPE, normalize=(MEAN, STD), **options)
    image = photograph()
    first = engine(image)
    expected = (first[0] if options else first).clone()
    for other in (
        image.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        photograph(4)[::2].copy_(image),
        photograph(w=48)[:, :, 2:47].copy_(image),
    ):
        out = engine(other)
        assert torch.equal(out[0] if options else out, expected)
    assert torch.equal(image, photograph())


def test_a_call_with_bytes_allocates_nothing() -> None:
    engine = snv2.Engine(small_network(), SHAPE, dtype=torch.float16, normalize=(MEAN, STD))
    image = photograph()
    engine(image)
    with torch.profiler.profile(profile_memory=True) as profile:
        engine(image)
    assert sum(abs(event.cpu_memory_usage) for event in profile.events()) == 0


@pytest.mark.parametrize(
    ("normalize", "message"),
    [
        ((MEAN,), r"normalize: expected \(mean, std\) of 3 finite numbers each, std > 0, got"),
        ((MEAN, STD[:2]), "normalize: expected"),
        ((MEAN, (0.1, 0.0, 0.1)), "normalize: expected"),
        ((MEAN, (0.1, -0.1, 0.1)), "normalize: expected"),
        (((0.0, float("nan"), 0.0), STD), "normalize: expected"),
        (((0.0, "a", 0.0), STD), "normalize: expected"),
        ((0.5, 0.2), "normalize: expected"),
        (3, "normalize: expected"),
    ],
    ids=["one", "two-std", "zero", "negative", "nan", "text", "numbers", "int"],
)
@pytest.mark.parametrize("backend_name", ["cpu", "cuda-emulated"])
def test_normalize_that_does_not_fit(backend_name: str, normalize: Any, message: str) -> None:
    with snv2.use_backend(backend_name), pytest.raises(ValueError, match=message):
        snv2.Engine(small_network(), SHAPE, normalize=normalize)


def test_normalize_of_a_unit() -> None:
    with pytest.raises(ValueError, match="normalize: only a whole network takes images"):
        snv2.Engine(unit_pair(2, 3, 8)[0], SHAPE, normalize=(MEAN, STD))


def test_normalize_of_many_channels() -> None:
    model = small_network()
    model.conv1[0] = nn.Conv2d(5, 8, 3, 2, 1, bias=False).eval()
    with pytest.raises(ValueError, match="normalize: expected at most 4 channels"):
        snv2.Engine(model, (1, 5, 9, 9), normalize=((0.5,) * 5, (0.5,) * 5))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            lambda: draw(*SHAPE),
            ValueError,
            r"x: expected shape \(2, 37, 45, 3\) or .* got \(2, 3, 37",
        ),
        (lambda: photograph().float(), TypeError, "x: expected torch.uint8, got torch.float32"),
        (lambda: photograph()[0], ValueError, r"x: expected shape \(2, 37, 45, 3\)"),
        (lambda: None, TypeError, "x: expected a torch.Tensor"),
    ],
    ids=["map", "float", "rank", "None"],
)
def test_image_that_does_not_fit(
    kernels: str, x: Any, error: type[Exception], message: str
) -> None:
    engine = snv2.Engine(small_network(), SHAPE, normalize=(MEAN, STD))
    with pytest.raises(error, match=message):
        engine(x())


# The buffer of the input ----------------------------------------------------------------------


@pytest.mark.on_triton(0)
def test_input_buffer(kernels: str) -> None:
    engine = snv2.Engine(small_network(), SHAPE)
    assert tuple(engine.input.shape) == SHAPE
    assert engine.input.is_contiguous()
    x = draw(*SHAPE)
    expected = engine(x).clone()
    engine.input.copy_(draw(*SHAPE, seed=1))
    assert not torch.equal(engine(engine.input), expected)
    engine.input.copy_(x)
    assert torch.equal(engine(engine.input), expected)
    if kernels == "cuda":
        assert "aten::copy_" in ops_called(engine, x)
        assert ops_called(engine, engine.input) == []


# Report ---------------------------------------------------------------------------------------


def test_report_of_the_cpu_backend_has_no_launches() -> None:
    report = snv2.Engine(small_network(), SHAPE).report()
    assert (report.kernels, report.launches, report.graph) == ((), 0, False)
    assert "launches" not in str(report)


@pytest.mark.parametrize("dtype", DTYPES)
def test_report_of_launches(gpu_backend: str, dtype: torch.dtype) -> None:
    model = on_the_default_device(network("snv2", "x1_0"))
    batch = 64  # so large that few CTAs begin or end inside an image, where rows are read twice
    report = snv2.Engine(model, (batch, 3, 224, 224), dtype=dtype).report()
    assert report.backend == gpu_backend
    assert report.graph == (gpu_backend == "cuda")
    # One for the stem, one for each unit, two for the head.
    assert report.launches == len(report.kernels) == 1 + 16 + 2
    assert [k.step for k in report.kernels] == [*range(18), 17]
    size = torch.finfo(dtype).bits // 8
    elements = 1280_000  # that the table in docs/design.md counts
    moved = (report.read_bytes + report.written_bytes) / (batch * size)
    # The branches of a unit of stride 2 read their input each, and so do parts of the head. Rows of
    # 28, 14 and 7 pixels are padded by a seventh.
    assert elements < moved < 1.5 * 8 / 7 * elements
    assert report.weight_read_bytes > 0.7 * report.weight_bytes
    for kernel in report.kernels:
        assert kernel.ctas > 0
        assert kernel.threads % 32 == 0
        assert 0 <= kernel.shared_bytes <= emulator.device()["shared_per_cta"]
    text = str(report)
    assert f"launches    {report.launches}" in text
    for kernel in report.kernels:
        assert kernel.kernel in text


def test_device_decides_how_kernels_are_cut() -> None:
    """Without a GPU: the launches for one that is described."""
    model = snv2.fuse(network("snv2", "x1_0"))
    plan = model._gpu_plan(torch.float16, torch.device("cpu"))
    words = plan.words
    small = {"sms": 84, "shared_per_sm": 100 << 10, "shared_per_cta": 99 << 10, "cluster": 1}
    launches = [gpu.launches(words, 8, 224, 224, device) for device in (None, small)]
    assert all(k["shared_bytes"] <= 99 << 10 for k in launches[1])
    assert launches[0] != launches[1]
    with pytest.raises(ValueError, match="device: it has no 'warps'"):
        gpu.launches(words, 1, 224, 224, {"warps": 1})
    before = emulator.device()
    with emulated_device(**small):
        assert emulator.device() == {**before, **small}
        assert gpu.launches(words, 8, 224, 224) == launches[1]
    assert emulator.device() == before


@contextlib.contextmanager
def emulated_device(**fields: int) -> Iterator[None]:
    before = emulator.device()
    emulator.set_device(**fields)
    try:
        with snv2.use_backend("cuda-emulated"), torch.no_grad():
            yield
    finally:
        emulator.set_device(**before)


@pytest.mark.parametrize(
    "fields", [{"sms": 2, "l2_bytes": 1 << 16}, {"images": 2}, {"cluster": 1}], ids=str
)
def test_results_do_not_depend_on_the_device(fields: dict[str, int]) -> None:
    model, x = small_network(), draw(5, 3, 37, 45)
    with emulated_device():
        expected = snv2.fuse(model)(x)
    with emulated_device(**fields):
        assert max_error(run_fused(snv2.fuse(model), x), expected) < 1e-6


def test_maps_that_are_too_wide_for_a_device() -> None:
    """The fused path does not cover them, so they run plain."""
    plain, unit = unit_pair(1, 58, 58)
    wide, narrow = draw(1, 58, 3, 200), draw(1, 58, 3, 4)
    with emulated_device(shared_per_sm=32 << 10, shared_per_cta=32 << 10):
        assert not runs_fused(unit, wide)
        assert torch.equal(unit(wide), plain(wide))
        assert runs_fused(unit, narrow)
        with pytest.raises(ValueError, match=r"input_shape: \(1, 58, 3, 200\) does not run fused"):
            snv2.Engine(plain, tuple(wide.shape))
    with emulated_device():
        assert runs_fused(unit, wide)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))])
def test_copies_of_an_engine(how: Callable[[snv2.Engine], snv2.Engine]) -> None:
    """A copy has memory of its own, and gives the same to the bit."""
    model, x = plain_and_input("network")
    engine = snv2.Engine(model, tuple(x.shape), taps=("stage3",))
    scores, maps = engine(x)
    copied = how(engine)
    copied(torch.zeros_like(x))
    again, maps_again = copied(x)
    assert torch.equal(again, scores)
    assert torch.equal(maps_again["stage3"], maps["stage3"])
    assert again.data_ptr() != scores.data_ptr()


def test_engine_refuses_hooks_of_the_model() -> None:
    model, x = plain_and_input("unit-s1")
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
    with pytest.raises(ValueError, match="forward pre-hooks"):
        snv2.Engine(model, tuple(x.shape))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_shape": 5}, TypeError, r"input_shape: expected \[N, C, H, W\], got 5"),
        ({"taps": 0}, TypeError, "taps: expected names of stages, got 0"),
        ({"device": torch.zeros(2)}, TypeError, "device: expected a torch.device or its name"),
        ({"input_shape": (1, 3, 1 << 70, 8)}, ValueError, "EB for the input alone"),
        ({"input_shape": (1 << 40, 3, 64, 64)}, RuntimeError, r"input_shape: .*memory.* \d+ bytes"),
    ],
)
def test_arguments_of_wrong_types(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        snv2.Engine(plain_and_input("network")[0], **options)
