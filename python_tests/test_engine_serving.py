"""An engine behind traffic: clones for other threads, and calls of fewer images than it holds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from _cases import DTYPES, draw, small_network, threads
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.onnx.model import OnnxModel

SHAPE = (3, 3, 37, 45)
TAPS = ("stage3", "stage2")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(seed: int = 0) -> Tensor:
    """uint8 [N, H, W, C]."""
    n, c, h, w = SHAPE
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (n, h, w, c), generator=generator, device="cpu")
    return image.to(torch.get_default_device(), torch.uint8)


def parts(out: Any) -> list[Tensor]:
    """Scores and maps of an engine with taps."""
    scores, maps = out
    return [scores, *maps.values()]


def copies(out: Any) -> list[Tensor]:
    return [t.clone() for t in parts(out)]


def all_equal(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(map(torch.equal, got, expected))


# Clones ---------------------------------------------------------------------------------------


def test_clone_shares_the_weights_and_no_buffer(kernels: str) -> None:
    """A clone that packs again would double memory; one that shared a map would mix images."""
    engine = snv2.Engine(small_network(), SHAPE, taps=TAPS)
    expected = copies(engine(draw(*SHAPE)))
    out = engine(draw(*SHAPE))
    twin = engine.clone()
    assert [a.data_ptr() for a in twin._runner.arrays] == [
        a.data_ptr() for a in engine._runner.arrays
    ]
    own = [
        {t.data_ptr() for t in (e.input, *e._runner.results, *e._runner.workspace) if t.numel() > 0}
        for e in (engine, twin)
    ]
    assert not own[0] & own[1]
    twin(draw(*SHAPE, seed=1))
    assert all_equal(parts(out), expected)
    assert all_equal(parts(twin(draw(*SHAPE))), expected)
    assert twin.report() == engine.report()


@pytest.mark.on_triton(0)
def test_clone_has_the_options_of_its_engine(kernels: str) -> None:
    engine = snv2.Engine(small_network(), SHAPE, dtype=torch.float16, normalize=(MEAN, STD))
    twin = engine.clone()
    assert (twin.dtype, twin.input_shape) == (engine.dtype, engine.input_shape)
    assert torch.equal(twin(pixels()), engine(pixels()))


def test_clones_run_at_once() -> None:
    """Each thread's engine gives that thread's images, made while the first was in use, too."""
    first = snv2.Engine(small_network(), SHAPE)
    images = [draw(*SHAPE, seed=seed) for seed in range(8)]
    with threads(1):
        expected = [first(x).clone() for x in images]

    def serve(_: int) -> bool:
        torch.set_num_threads(1)
        engine = first.clone()
        return all(
            torch.equal(engine(x), scores)
            for _ in range(20)
            for x, scores in zip(images, expected, strict=True)
        )

    with threads(1), ThreadPoolExecutor(3) as pool:
        served = [pool.submit(serve, i) for i in range(3)]
        for _ in range(20):
            assert torch.equal(first(images[0]), expected[0])
        assert all(future.result() for future in served)


# Fewer images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.on_triton(1)
def test_fewer_images(kernels: str, n: int, dtype: torch.dtype) -> None:
    engine = snv2.Engine(small_network(), SHAPE, dtype=dtype, taps=TAPS)
    fitting = snv2.Engine(small_network(), (n, *SHAPE[1:]), dtype=dtype, taps=TAPS)
    whole, x = draw(*SHAPE, dtype=dtype), draw(*SHAPE, dtype=dtype, seed=1)[:n]
    expected = copies(engine(whole))
    for strided in (x, x.contiguous(memory_format=torch.channels_last)):
        assert all_equal(parts(engine(strided)), parts(fitting(x)))
    # What came between left nothing behind.
    assert all_equal(parts(engine(whole)), expected)


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.on_triton(1)
def test_fewer_images_of_bytes(kernels: str, n: int) -> None:
    engine = snv2.Engine(small_network(), SHAPE, normalize=(MEAN, STD))
    expected = engine(pixels()).clone()[:n]
    engine.input.copy_(pixels(1))
    engine.input[:n].copy_(pixels()[:n])
    assert torch.equal(engine(engine.input[:n]), expected)
    assert torch.equal(engine(pixels()[:n]), expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_fewer_images_fit_the_memory_of_more(count: int) -> None:
    """Images go side by side where there is one for each thread, else one after another."""
    model, x = small_network(), draw(6, 3, 37, 45)
    with threads(count):
        engine = snv2.Engine(model, (6, 3, 37, 45))
        for n in range(7):
            assert torch.equal(engine(x[:n]), snv2.Engine(model, (n, 3, 37, 45))(x[:n]))


def test_fewer_images_allocate_nothing() -> None:
    engine = snv2.Engine(small_network(), SHAPE)
    x = draw(*SHAPE)[:2]
    first = engine(x)
    with torch.profiler.profile(profile_memory=True) as profile:
        second = engine(x)
    assert second.data_ptr() == first.data_ptr()
    assert sum(abs(event.cpu_memory_usage) for event in profile.events()) == 0


def test_fewer_images_of_a_model_with_ends() -> None:
    """What runs before and after the network gets just these images."""
    model = OnnxModel(nn.BatchNorm2d(3), small_network(), nn.Softmax(1)).eval()
    engine = snv2.Engine(model, SHAPE)
    x = draw(*SHAPE)
    with torch.no_grad():
        assert torch.equal(engine(x[:2]), snv2.fuse(model)(x[:2]))
