"""The floor of this CPU, and where an engine's time goes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _cases import needs_bfloat16

import snv2_kernels as snv2
from snv2_bench.floor import Floor, least_bytes, measure_floor, multiply_adds
from snv2_bench.layers import layer_times
from snv2_kernels import _native
from snv2_kernels.runners import CpuRunner


@pytest.mark.parametrize("size", [(224, 224), (33, 47), (1, 1)])
@pytest.mark.parametrize("width", ["x0_5", "x2_0"])
def test_products_are_all_multiply_adds(width: str, size: tuple[int, int]) -> None:
    model = getattr(snv2.models, f"shufflenet_v2_{width}")().eval()
    engine = snv2.Engine(model, input_shape=(2, 3, *size))
    runner = engine._runner
    assert isinstance(runner, CpuRunner)
    products = runner.plan.products(*size)
    assert len({product.weights for product in products}) == len(products)
    expected = runner.plan.multiply_adds(*size)
    assert sum(product.multiply_adds for product in products) == expected
    assert multiply_adds(model, torch.empty(2, 3, *size)) == 2 * expected


def _engine(batch: int) -> tuple[snv2.Engine, torch.Tensor]:
    shape = (batch, 3, 64, 64)
    model = snv2.models.shufflenet_v2_x0_5().eval()
    return snv2.Engine(model, input_shape=shape), torch.randn(shape)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_layer_times(batch: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        engine, x = _engine(batch)
        layers, whole = layer_times(engine, x, calls=3)
    finally:
        torch.set_num_threads(before)
    steps = list(dict.fromkeys(layer.step for layer in layers))
    assert steps[:3] == ["stem", "stage2.0", "stage2.1"]
    assert steps[-2:] == ["stage4.3", "head"]
    assert len(steps) == 18
    assert sum(layer.multiply_adds for layer in layers) == engine.report().multiply_adds
    assert all(layer.milliseconds > 0 for layer in layers)
    assert sum(layer.milliseconds for layer in layers) <= whole
    # Nothing is counted any more
    engine(x)
    assert _native.stop_kernel_times() == {}


def test_a_product_that_begins_no_kernel_is_part_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, x = _engine(1)
    runner = engine._runner
    assert isinstance(runner, CpuRunner)
    stop = _native.stop_kernel_times

    def without_pw2() -> dict[int, Any]:
        times = stop()
        for step in runner.plan.steps:
            if step.main.pw2.weights > 0:
                del times[runner.plan.weights.data_ptr() + 4 * step.main.pw2.weights]
        return times

    monkeypatch.setattr(_native, "stop_kernel_times", without_pw2)
    layers, _ = layer_times(engine, x, calls=1)
    assert layers[1].kernel == "pw1 + dw + pw2"
    # x0.5's first unit of stride 2 at 64 x 64: 24 channels of 16 x 16 in, 24 of 8 x 8 out
    weights = 24 * 24 + 24 * 9 + 24 * 24
    assert layers[1].moved_bytes == 4 * (24 * 16 * 16 + 24 * 8 * 8 + weights)
    assert layers[-1].kernel == "conv5 + mean + fc"
    assert sum(layer.multiply_adds for layer in layers) == engine.report().multiply_adds


def test_layer_times_of_another_backend() -> None:
    engine: Any = SimpleNamespace(_runner=None)
    with pytest.raises(ValueError, match="engine: expected one of the cpu backend"):
        layer_times(engine, torch.empty(1, 3, 8, 8), calls=1)


def test_least_time() -> None:
    floor = Floor(1, "float32", 1e9, copy_bytes_per_s=1e8, cached_copy_bytes_per_s=1e9)
    assert floor.least_ms(2_000_000, 1_000_000) == 2
    assert floor.least_ms(1_000_000, 2_000_000) == 2
    network = snv2.models.shufflenet_v2_x0_5().half()
    x = torch.empty(2, 3, 8, 8, dtype=torch.float16)
    assert least_bytes(network, x) == 2 * (1_366_792 + 2 * 3 * 8 * 8)


ELEMENTS = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_floor(element: torch.dtype) -> None:
    before = torch.get_num_threads()
    floor = measure_floor(1, element)
    assert torch.get_num_threads() == before
    assert floor.threads == 1
    # No processor is outside of this (tiles of bfloat16 multiply 512 a cycle); a loop that the
    # compiler took away would be.
    assert 1e8 < floor.multiply_adds_per_s < 1e13
    assert 1e8 < floor.copy_bytes_per_s < 1e12
    assert 1e8 < floor.cached_copy_bytes_per_s < 1e13
    assert measure_floor(1, element) is floor
    assert f"torch.{floor.element}" == str(element)
