"""Integers, lengths and extents that no network has, given to the ops themselves: an ordinary
exception that names the argument, and at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _cases import draw, plain_stage, small_network
from conftest import running_on
from torch import Tensor
from torch._subclasses import FakeTensorMode

import snv2_kernels as snv2
from snv2_kernels import _native, emulator, gpu
from snv2_kernels.graph.recipe import read_channels
from snv2_kernels.ops import operators

ERRORS = (RuntimeError, ValueError)
ABSURD = [-(1 << 63), -1, 1 << 24, 1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1]
SECONDS = pytest.mark.timeout(60)  # a loop over an absurd number ends there

pytestmark = SECONDS


@pytest.fixture(params=["cpu", "cuda-emulated", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A build's own checks are the same on a GPU."""
    with running_on(request.param) as name:
        yield name


def op_of(backend: str, suffix: str = "") -> Any:
    prefix = "gpu_network" if backend == "cuda-emulated" else "network"
    return getattr(operators(backend), prefix + suffix)


def packed(model: torch.nn.Module, backend: str, taps: tuple[str, ...] = ()) -> Any:
    fused = snv2.fuse(model)
    if backend == "cpu":
        return fused._cpu_plan(torch.float32, taps)
    make = fused._triton_plan if backend == "triton" else fused._gpu_plan
    return make(torch.float32, torch.device(torch.get_default_device()), taps)


# Results --------------------------------------------------------------------------------------


def test_what_one_result_is(backend: str) -> None:
    plan, x = packed(plain_stage([2], 8, 5), backend), draw(1, 5, 2, 2)
    *arrays, channels, halvings, classify = plan.arguments
    op = op_of(backend)
    for value in ABSURD:
        with pytest.raises(ERRORS, match=f"out_channels must be 8, as in plan, got {value}"):
            op(x, *arrays, value, halvings, classify)
        with pytest.raises(ERRORS, match=f"halvings must be 1, as in plan, got {value}"):
            op(x, *arrays, channels, value, classify)
    assert op(x, *plan.arguments).shape == (1, 8, 1, 1)


def test_what_several_results_are(backend: str) -> None:
    plan, x = packed(small_network(), backend, ("stage2",)), draw(1, 3, 9, 9)
    *arrays, channels, halvings, classify = plan.result_arguments
    op = op_of(backend, "_results")
    for value in ABSURD:
        for i in range(2):
            given = [value if k == i else c for k, c in enumerate(channels)]
            with pytest.raises(ERRORS, match=rf"channels\[{i}\] must be .*got {value}"):
                op(x, *arrays, given, halvings, classify)
            given = [value if k == i else times for k, times in enumerate(halvings)]
            with pytest.raises(ERRORS, match=rf"halvings\[{i}\] must be .*got {value}"):
                op(x, *arrays, channels, given, classify)
    for fewer in (channels, [], channels[:1], [*channels, 1]):
        for times in (halvings, [], halvings[:1], [*halvings, 1]):
            if (len(fewer), len(times)) != (2, 2):
                with pytest.raises(ERRORS, match=r"halvings must have|plan must have"):
                    op(x, *arrays, fewer, times, classify)


def test_results_of_fake_tensors(backend: str) -> None:
    """What traces the ops sees no plan."""
    plan = packed(small_network(), backend, ("stage2",))
    *arrays, channels, halvings, classify = plan.result_arguments
    one, several = op_of(backend), op_of(backend, "_results")
    with FakeTensorMode() as mode:
        x = torch.empty(1, 3, 9, 9)
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arrays]
        made = several(x, *fakes, channels, halvings, classify)
        assert [tuple(t.shape) for t in made] == plan.result_shapes(1, 9, 9)
        for value in [v for v in ABSURD if v != 1 << 24]:
            with pytest.raises(ERRORS, match=f"out_channels: expected .*got {value}"):
                one(x, *fakes, value, 3, False)
            with pytest.raises(ERRORS, match=f"halvings: expected .*got {value}"):
                one(x, *fakes, 8, value, False)
            with pytest.raises(ERRORS, match=rf"channels\[1\]: expected .*got {value}"):
                several(x, *fakes, [channels[0], value], halvings, classify)
            with pytest.raises(ERRORS, match=rf"halvings\[0\]: expected .*got {value}"):
                several(x, *fakes, channels, [value, halvings[1]], classify)
        with pytest.raises(ERRORS, match="halvings: expected 2 elements, as channels, got 1"):
            several(x, *fakes, channels, halvings[:1], classify)


def test_memory_that_is_too_small_for_triton(triton: Any) -> None:
    """Its kernels write wherever they are told to."""
    plan, x = packed(small_network(), "triton", ("stage2",)), draw(1, 3, 9, 9)
    memory = list(triton.network.allocate(plan.weights, plan.steps, 1, 9, 9).tensors)
    results = [x.new_empty(shape) for shape in plan.result_shapes(1, 9, 9)]
    good = [x, *plan.arrays, plan.step_words, memory, results, []]
    wrong: list[tuple[int, Any, str]] = [
        (0, draw(1, 3, 65, 65), r"memory\[0\] must be"),
        (0, draw(2, 3, 9, 9), "must be"),
        (0, x[0], "x must have 4 dimensions"),
        (0, x[:, :2], "x has 2 channels, too few"),
        (5, memory[:-1], "memory must be 6 tensors, got 5"),
        (6, results[:1], "results must be 2, got 1"),
        (6, [results[0][:, 1:], results[1]], r"results\[0\] must have shape"),
        (6, [results[0], results[1].half()], r"results\[1\] must be dense torch.float32"),
        (6, [results[0].repeat(2, 1, 1, 1)[::2].repeat(1, 1, 1, 2)[..., ::2], results[1]], "dense"),
        (7, [torch.ones(3)], "x must be uint8"),
    ]
    for i in range(len(memory)):
        if memory[i].numel():
            less = [t[:-1] if k == i else t for k, t in enumerate(memory)]
            wrong.append((5, less, rf"memory\[{i}\] must be"))
    op = operators("triton").network_out
    for i, value, message in wrong:
        with pytest.raises(ERRORS, match=message):
            op(*good[:i], value, *good[i + 1 :])
    pixels = torch.zeros(1, 3, 9, 9, dtype=torch.uint8)
    for affine in ([torch.ones(3)], 2 * [torch.ones(2)], 2 * [torch.ones(3, dtype=torch.float64)]):
        with pytest.raises(ERRORS, match="affine must be two float32 vectors of 3"):
            op(pixels, *good[1:7], affine)


# Maps without elements ------------------------------------------------------------------------

HUGE = 1 << 40


@pytest.mark.parametrize("shape", [(HUGE, 2, 0, 3), (HUGE, 0, 5, 7), (0, HUGE, 5, 7)], ids=str)
def test_cat_shuffle_of_nothing(backend: str, shape: tuple[int, ...]) -> None:
    x, ops = torch.empty(shape), operators(backend)
    n, c, h, w = shape
    assert ops.cat_shuffle(x, x).shape == (n, 2 * c, h, w)
    for half in ops.cat_shuffle_backward(x):
        assert half.shape == (n, c // 2, h, w)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(HUGE, 0, 5, 7), (0, 4, HUGE, 7), (0, 4, 5, HUGE)], ids=str)
def test_depthwise_of_nothing(backend: str, shape: tuple[int, ...], stride: int) -> None:
    """Whose parameters have gradients all the same."""
    n, c, h, w = shape
    x, ops = torch.empty(shape), operators(backend)
    parameters = torch.ones(c, 1, 3, 3), torch.ones(c), torch.ones(c)
    y = ops.dw_conv3x3(x, *parameters, stride)
    assert y.shape == (n, c, -(-h // stride), -(-w // stride))
    grads = ops.dw_conv3x3_backward(y, x, *parameters, stride)
    assert [g.shape for g in grads] == [x.shape, *(p.shape for p in parameters)]
    assert not any(g.any() for g in grads[1:])
    if stride == 2:
        return
    halves = [p[: c // 2].contiguous() for p in parameters]
    assert ops.split_dw_cat_shuffle(x, *halves).shape == shape
    grads = ops.split_dw_cat_shuffle_backward(x, x, *halves)
    assert not any(g.any() for g in grads[1:])


def test_channels_that_cannot_be_doubled(backend: str) -> None:
    x = torch.empty(0, 1 << 62, 1, 1)
    with pytest.raises((*ERRORS, TypeError)):
        operators(backend).cat_shuffle(x, x)


# Others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["columns", "rows_per_cta", "weights", "images", "stages"])
def test_tuning(name: str) -> None:
    tune = torch.ops.snv2_emulated.gpu_tune
    try:
        for value in (-1, -(1 << 63), 1 << 32, 1 << 62, (1 << 63) - 1):
            with pytest.raises(ERRORS, match=f"{name}: expected 0 to .*got {value}"):
                tune(**{name: value})
    finally:
        tune()


def test_devices() -> None:
    """A plan is described for any device, which its numbers may not be."""
    words = packed(small_network(), "cuda-emulated").words
    for name in emulator.device():
        for value in (-1, 1 << 60, (1 << 63) - 1):
            with pytest.raises(ValueError, match=f"{name}: expected"):
                gpu.launches(words, 3, 9, 9, {name: value})
    for size in [(1 << 31, 9, 9), (3, 1 << 40, 9), (3, 1 << 20, 1 << 20), (3, 9, -1), (-1, 9, 9)]:
        with pytest.raises(ValueError, match="x: "):
            gpu.workspace_bytes(words, *size)
    cpu = packed(small_network(), "cpu")
    with pytest.raises(ValueError, match="extents out of range"):
        _native.workspace_bytes(cpu.words.numpy(), cpu.weights.numel(), 3, 1 << 40, 9, 1)


@pytest.mark.parametrize("index", [-1, 1000, 1 << 40, -(1 << 63)])
def test_index_of_a_conformance_case(index: int) -> None:
    op, words = torch.ops.snv2_emulated.conformance, torch.zeros(32, dtype=torch.int32)
    with pytest.raises(ERRORS, match=f"index must be .*got {index}"):
        op(words, index)
    with FakeTensorMode() as mode, pytest.raises(ERRORS, match=f"index: expected .*got {index}"):
        op(mode.from_tensor(words), index)


def test_channels_of_a_recipe() -> None:
    with pytest.raises(ValueError, match="recipe: expected at most"):
        read_channels(f"0:{1 << 40}|0:{1 << 40}")
