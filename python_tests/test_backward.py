"""The gradients' kernels against the formulas' own, and against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from _cases import (
    FORMATS,
    MAPS,
    SPECIALS,
    VIEWS,
    assert_same_specials,
    case_id,
    draw,
    drawn,
    in_turn,
    keeps_format,
    ops_called,
    threads,
)
from conftest import OP_BACKENDS, each_in_turn, each_of
from hypothesis import given
from hypothesis import strategies as st
from test_ops import OPS, THREADED, Op, Shape, each_op, parameters
from torch import Tensor

from snv2_kernels import emulator
from snv2_kernels.backends import DEVICES
from snv2_kernels.ops import operators
from snv2_kernels.testing import max_error

SPLIT = OPS[-1]
SHAPES: list[Shape] = [
    (3, 58, 28, 28),
    (2, 232, 7, 7),
    (2, 24, 56, 56),
    (3, 29, 15, 9),
    (1, 58, 1, 1),
    (2, 37, 1, 9),
    (1, 17, 15, 1),
    (1, 16, 2, 33),
]

each_format = pytest.mark.parametrize("memory_format", FORMATS)
backend = each_of(OP_BACKENDS)


def gradients(function: Callable[..., Tensor], args: list[Tensor], grad: Tensor) -> list[Tensor]:
    args = [t.detach().requires_grad_() for t in args]
    return list(torch.autograd.grad(function(*args), args, grad))


def check(op: Op, backend: str, args: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The rule: at most 1.5 times eager's error plus one unit in the last place."""
    ours = gradients(partial(op, backend=backend), args, grad)
    eager = gradients(op.formula, args, grad)
    exact = gradients(op.formula, [t.double() for t in args], grad.double())
    # numpy, which the interpreter adds up with, makes one long chain of a tile's pixels.
    units = 4 if backend == "triton" and DEVICES["triton"] == "cpu" else 1
    for actual, plain, expected in zip(ours, eager, exact, strict=True):
        assert actual.dtype == plain.dtype
        assert actual.shape == plain.shape
        eps = torch.finfo(actual.dtype).eps
        allowed = 1.5 * max_error(plain, expected) + units * eps
        error = max_error(actual, expected)
        assert error <= allowed, f"{error / eps:.2f} eps, {allowed / eps:.2f} allowed"
    return ours


def check_dense(
    op: Op, backend: str, shape: Shape, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    args = op.arguments(shape, dtype, draw, memory_format=memory_format)
    out = op.formula(*args)
    grad = draw(*out.shape, dtype=dtype, memory_format=memory_format, seed=7)
    ours = check(op, backend, args, grad)
    assert all(keeps_format(g, x) for g, x in zip(ours[: op.maps], args, strict=False))


@each_in_turn("op, shape, dtype, memory_format", OPS, SHAPES, MAPS, backends=OP_BACKENDS)
@pytest.mark.on_triton(3)
def test_kernels(
    backend: str, op: Op, shape: Shape, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    check_dense(op, backend, shape, dtype, memory_format)


@pytest.mark.parametrize("shape", [(1, 2, 130, 170), (1, 3, 3, 8200)], ids=str)
@each_format
@each_op
def test_maps_that_do_not_fit_in_a_tile(
    op: Op, shape: Shape, memory_format: torch.memory_format
) -> None:
    """Parameters' sums are over too few channels here for the rule, which is for the largest."""
    for name in ("cpu", "cuda-emulated"):
        args = op.arguments(shape, torch.float32, draw, memory_format=memory_format)
        grad = draw(*op.formula(*args).shape, memory_format=memory_format, seed=7)
        exact = gradients(op.formula, [t.double() for t in args], grad.double())
        ours = gradients(partial(op, backend=name), args, grad)
        assert all(max_error(g, e) < 2e-6 for g, e in zip(ours, exact, strict=True))


@drawn
@given(
    op=st.sampled_from(OPS),
    shape=st.tuples(st.integers(1, 3), st.integers(20, 70), st.integers(1, 24), st.integers(1, 40)),
    layout=st.sampled_from(MAPS[2:]),
)
@pytest.mark.parametrize("name", ["cpu", "cuda-emulated"])
def test_drawn_sizes(
    name: str, op: Op, shape: Shape, layout: tuple[torch.dtype, torch.memory_format]
) -> None:
    dtype, memory_format = layout
    args = op.arguments(shape, dtype, draw, memory_format=memory_format)
    grad = draw(*op.formula(*args).shape, dtype=dtype, memory_format=memory_format, seed=7)
    exact = gradients(op.formula, [t.double() for t in args], grad.double())
    ours = gradients(partial(op, backend=name), args, grad)
    for actual, expected in zip(ours, exact, strict=True):
        eps = 32 * 2**-23 if actual.dtype == torch.float32 else torch.finfo(dtype).eps
        assert max_error(actual, expected) <= eps


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["cpu", "cuda-emulated"])
@each_op
def test_views(name: str, op: Op, view: str) -> None:
    """Of x, and of the gradient; that of sum() is one number everywhere."""
    for of_x, of_grad in ((view, None), (None, view)):
        make = VIEWS[of_x] if of_x else draw
        args = op.arguments((3, 21, 9, 11), torch.float32, make)
        shape = op.formula(*args).shape
        grad = VIEWS[of_grad](*shape) if of_grad else draw(*shape, seed=7)
        before = [t.clone() for t in (*args, grad)]
        check(op, name, args, grad)
        assert all(map(torch.equal, (*args, grad), before))  # inputs are only read


@each_format
@each_op
def test_no_images(backend: str, op: Op, memory_format: torch.memory_format) -> None:
    args = op.arguments((0, 29, 7, 7), torch.float32, draw, memory_format=memory_format)
    grads = gradients(partial(op, backend=backend), args, op.formula(*args))
    assert [g.shape for g in grads] == [t.shape for t in args]
    assert not any(g.abs().sum() for g in grads)


@each_format
def test_relu_passes_no_gradient_at_zero_and_any_for_nan(
    backend: str, memory_format: torch.memory_format
) -> None:
    """As threshold_backward: at zero there is none, of what is not a number there is all."""
    x = draw(1, 6, 3, 4, memory_format=memory_format)
    x[0, 3], x[0, 4], x[0, 5] = 0.0, 0.0, float("nan")
    args = [x, torch.ones(3, 1, 3, 3), torch.ones(3), torch.tensor([0.0, 1.0, 0.0])]
    args = [t.to(x.device) for t in args]
    grad = draw(1, 6, 3, 4, memory_format=memory_format, seed=7)
    ours = gradients(partial(SPLIT, backend=backend), args, grad)
    eager = gradients(SPLIT.formula, args, grad)
    assert not ours[0][0, 3].any()
    assert ours[0][0, 4:].all()
    assert max_error(ours[0], eager[0]) < 1e-6
    for actual, expected in zip(ours[1:], eager[1:], strict=True):
        assert_same_specials(actual, expected)


@each_in_turn(
    "op, value, memory_format", OPS, SPECIALS, FORMATS,
    backends=OP_BACKENDS,
)  # fmt: skip
@pytest.mark.on_triton(3)
def test_special_values(
    backend: str, op: Op, value: float, memory_format: torch.memory_format
) -> None:
    """In a corner, and inside, of x and of the gradient."""
    for of_grad in (False, True):
        args = op.arguments((2, 5, 5, 6), torch.float32, draw, memory_format=memory_format)
        grad = draw(*op.formula(*args).shape, memory_format=memory_format, seed=7)
        target = grad if of_grad else args[0]
        target[0, -1, 0, 0] = target[1, -2, -1, -1] = target[0, -3, 1, 2] = value
        ours = gradients(partial(op, backend=backend), args, grad)
        eager = gradients(op.formula, args, grad)
        for actual, expected in zip(ours, eager, strict=True):
            assert torch.equal(actual.isfinite(), expected.isfinite())
            keep = expected.isfinite()
            assert max_error(actual[keep], expected[keep]) < 1e-5


@pytest.mark.parametrize(
    ("op", "shape", "memory_format", "count"),
    in_turn(OPS, [(3, 58, 28, 28), (1, 5, 70, 60), (40, 20, 7, 7)], THREADED),
    ids=case_id,
)
def test_threads_change_nothing(
    op: Op, shape: Shape, memory_format: torch.memory_format, count: int
) -> None:
    args = op.arguments(shape, torch.float32, draw, memory_format=memory_format)
    grad = draw(*op.formula(*args).shape, memory_format=memory_format, seed=7)
    expected = gradients(partial(op, backend="cpu"), args, grad)
    with threads(count):
        actual = gradients(partial(op, backend="cpu"), args, grad)
    assert all(map(torch.equal, actual, expected))


@each_op
@pytest.mark.on_triton(3)
def test_no_formula_runs(backend: str, op: Op) -> None:
    args = op.arguments((2, 5, 6, 7), torch.float32, draw)
    grad = draw(*op.formula(*args).shape)
    called = ops_called(gradients, partial(op, backend=backend), args, grad)
    assert sum(name.endswith(f"::{op.name}_backward") for name in called) == 1
    assert not any("conv" in name for name in called if name.startswith("aten::"))


@each_op
@pytest.mark.on_triton(1)
def test_third_derivatives(backend: str, op: Op) -> None:
    results = []
    for function, dtype in ((partial(op, backend=backend), torch.float32), (op.formula, None)):
        args = op.arguments((1, 3, 4, 5), torch.float32, draw)
        args = [t.to(dtype or torch.float64).requires_grad_() for t in args]
        grads = torch.autograd.grad(function(*args).pow(3).sum(), args, create_graph=True)
        for _ in range(2):
            total = sum(g.square().sum() for g in grads)
            grads = torch.autograd.grad(total, args, create_graph=True)
        results.append(grads)
    assert all(max_error(a, e) < 1e-4 for a, e in zip(*results, strict=True))


# Traffic --------------------------------------------------------------------------------------


def _traffic(function: Callable[[], object]) -> float:
    """Sectors that the emulated GPU moves, as a multiple of the least bytes."""
    emulator.reset_counters()
    function()
    counted = emulator.counters()
    moved = 32 * (counted["global_load_sectors"] + counted["global_store_sectors"])
    least: int = counted["minimum_load_bytes"] + counted["minimum_store_bytes"]
    return moved / least


# Channels-last blocks read pixels around them again, and 32 channels are seldom whole sectors.
@pytest.mark.parametrize(
    ("channels", "size", "contiguous", "channels_last", "dtype"),
    [
        (116, 28, 1.05, 1.6, torch.bfloat16),
        (232, 14, 1.05, 1.4, torch.float32),
        (464, 7, 1.2, 1.4, torch.float16),
    ],
)
def test_traffic(
    channels: int, size: int, contiguous: float, channels_last: float, dtype: torch.dtype
) -> None:
    ops = operators("cuda-emulated")
    weights = parameters(channels // 2, torch.float32)
    for memory_format, allowed in (
        (torch.contiguous_format, contiguous),
        (torch.channels_last, channels_last),
    ):
        x, grad = (
            draw(8, channels, size, size, dtype=dtype, memory_format=memory_format, seed=i)
            for i in range(2)
        )
        split = _traffic(partial(ops.split_dw_cat_shuffle_backward, grad, x, *weights))
        assert split <= allowed, f"{split:.3f} of the least, {memory_format}"
        assert _traffic(partial(ops.cat_shuffle_backward, grad)) <= 1.02


@pytest.mark.gpu
def test_emulated_gradients_are_the_gpus(gpu: None) -> None:
    """But for multiply-adds, which are a compiler's choice."""
    args = SPLIT.arguments((3, 58, 14, 14), torch.float16, draw)
    grad = draw(*args[0].shape, dtype=torch.float16, seed=7)
    ours = gradients(partial(SPLIT, backend="cuda"), args, grad)
    emulated = gradients(
        partial(SPLIT, backend="cuda-emulated"), [t.cpu() for t in args], grad.cpu()
    )
    assert all(max_error(a.cpu(), e) < 1e-3 for a, e in zip(ours, emulated, strict=True))
