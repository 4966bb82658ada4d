"""The ops against their formulas, and against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from _cases import (
    DTYPES,
    FORMATS,
    MAPS,
    SPECIALS,
    VIEWS,
    assert_accurate,
    assert_same_specials,
    case_id,
    draw,
    drawn,
    in_turn,
    keeps_format,
    threads,
)
from conftest import OP_BACKENDS, each_in_turn, each_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels import _native
from snv2_kernels.testing import max_error, randomize_

Shape = tuple[int, int, int, int]


def shuffled(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b], 2).flatten(1, 2)


def depthwise(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride: int, relu: bool
) -> Tensor:
    y = F.conv2d(x, weight, None, stride, 1, 1, x.shape[1])
    y = y * scale[:, None, None] + shift[:, None, None]
    return (y.relu() if relu else y).to(x.dtype)


def split_depthwise(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return shuffled(a, depthwise(b, weight, scale, shift, 1, True))


@dataclass(frozen=True)
class Op:
    """An op beside its formula; C of a test's shape is the depthwise convolution's."""

    name: str
    formula: Callable[..., Tensor]
    options: dict[str, int | bool] = field(default_factory=dict)
    maps: int = 1
    multiplier: int = 1  # channels of x for each of C

    def __call__(self, *args: Tensor, backend: str | None = None) -> Tensor:
        out: Tensor = getattr(snv2.ops, self.name)(*args, **self.options, backend=backend)
        return out

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}{int(v)}" for k, v in self.options.items())])

    def arguments(
        self, shape: Shape, dtype: torch.dtype, make: Callable[..., Tensor], **kwargs: object
    ) -> list[Tensor]:
        n, c, h, w = shape
        maps = [
            make(n, c * self.multiplier, h, w, dtype=dtype, seed=i, **kwargs)
            for i in range(self.maps)
        ]
        return maps if self.maps == 2 else maps + parameters(c, dtype)


def parameters(channels: int, dtype: torch.dtype) -> list[Tensor]:
    conv = nn.Conv2d(channels, channels, 3, groups=channels, bias=False)
    bn = nn.BatchNorm2d(channels)
    randomize_(nn.Sequential(conv, bn), seed=channels)
    return [conv.weight.detach().to(dtype), *snv2.fold_bn(bn)]


def _depthwise_op(stride: int, relu: bool) -> Op:
    formula = partial(depthwise, stride=stride, relu=relu)
    return Op("dw_conv3x3", formula, {"stride": stride, "relu": relu})


OPS = [
    Op("cat_shuffle", shuffled, maps=2),
    _depthwise_op(1, False),
    _depthwise_op(1, True),
    _depthwise_op(2, False),
    _depthwise_op(2, True),
    Op("split_dw_cat_shuffle", split_depthwise, multiplier=2),
]
SHAPES: list[Shape] = [
    # those of the networks
    (1, 24, 28, 28),
    (3, 58, 28, 28),
    (1, 116, 14, 14),
    (2, 232, 7, 7),
    (1, 488, 7, 7),
    (1, 24, 56, 56),
    # odd ones
    (3, 29, 15, 9),
    (2, 58, 13, 13),
    (1, 58, 1, 1),
    (3, 1, 7, 7),
    (1, 1, 1, 1),
    (2, 3, 1, 9),
    (1, 17, 15, 1),
    (1, 16, 2, 33),
    (0, 29, 7, 7),
]

# Memory format, and number of threads.
THREADED = [(MAPS[i % 2][1], count) for i, count in enumerate([2, 3, 8, 8, 2, 3])]

each_op = pytest.mark.parametrize("op", OPS, ids=str)
each_format = pytest.mark.parametrize("memory_format", FORMATS)
backend = each_of(OP_BACKENDS)


def check(op: Op, backend: str, args: list[Tensor]) -> Tensor:
    out = op(*args, backend=backend)
    exact = op.formula(*(t.double().contiguous() for t in args))
    assert_accurate("op", out, op.formula(*args), exact)
    return out


def check_dense(
    op: Op, backend: str, shape: Shape, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    args = op.arguments(shape, dtype, draw, memory_format=memory_format)
    assert keeps_format(check(op, backend, args), args[0])


@pytest.mark.supports("eval")
@each_in_turn(
    "op, shape, dtype, memory_format", OPS, SHAPES, MAPS, backends=[*OP_BACKENDS, "reference"]
)
def test_kernels(
    backend: str, op: Op, shape: Shape, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    check_dense(op, backend, shape, dtype, memory_format)


@pytest.mark.parametrize(
    ("op", "shape", "memory_format", "count"),
    in_turn(
        OPS,
        [(3, 58, 28, 28), (1, 5, 70, 60), (5, 1, 80, 80)],
        THREADED,
    ),
    ids=case_id,
)
def test_threads_change_nothing(
    op: Op, shape: Shape, memory_format: torch.memory_format, count: int
) -> None:
    args = op.arguments(shape, torch.float32, draw, memory_format=memory_format)
    expected = op(*args, backend="cpu")
    with threads(count):
        assert torch.equal(op(*args, backend="cpu"), expected)


@drawn
@given(
    op=st.sampled_from(OPS),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 24), st.integers(1, 40)),
    layout=st.sampled_from(MAPS),
)
@pytest.mark.on_triton(0)
def test_drawn_sizes(
    backend: str, op: Op, shape: Shape, layout: tuple[torch.dtype, torch.memory_format]
) -> None:
    check_dense(op, backend, shape, *layout)


@each_in_turn("op, view, dtype, memory_format", OPS, list(VIEWS), MAPS, backends=OP_BACKENDS)
def test_views(
    backend: str, op: Op, view: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    args = op.arguments((3, 21, 9, 11), dtype, VIEWS[view], memory_format=memory_format)
    before = [t.clone() for t in args]
    out = check(op, backend, args)
    assert keeps_format(out, out)
    assert all(map(torch.equal, args, before))  # inputs are only read


@each_format
@pytest.mark.parametrize(
    ("name", "view", "dtype"),
    in_turn(["cpu", "cuda-emulated"], list(VIEWS), DTYPES),
    ids=case_id,
)
def test_depthwise_has_the_memory_format_of_torchs_convolution_on_the_cpu(
    name: str, view: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    op = OPS[1]
    args = op.arguments((3, 21, 9, 11), dtype, VIEWS[view], memory_format=memory_format)
    assert op(*args, backend=name).stride() == op.formula(*args).stride()


@pytest.mark.parametrize(("dtype", "memory_format"), MAPS, ids=case_id)
@each_op
def test_misaligned_memory(
    backend: str, op: Op, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    args = op.arguments((3, 32, 9, 16), dtype, VIEWS["misaligned"], memory_format=memory_format)
    check(op, backend, args)


@pytest.mark.parametrize("formats", [(0, 1), (1, 0)], ids=["cl-second", "cl-first"])
def test_cat_shuffle_of_two_memory_formats(backend: str, formats: tuple[int, int]) -> None:
    orders = [torch.contiguous_format, torch.channels_last]
    a, b = (draw(2, 21, 5, 7, memory_format=orders[i], seed=i) for i in formats)
    assert torch.equal(snv2.ops.cat_shuffle(a, b, backend=backend), shuffled(a, b))


def test_depthwise_dtypes_of_parameters(backend: str) -> None:
    """Parameters may be of x's dtype or float32."""
    x = draw(2, 21, 9, 11, dtype=torch.bfloat16)
    weight, scale, shift = parameters(21, torch.float32)
    for args in (
        (weight.bfloat16(), scale.bfloat16(), shift.bfloat16()),
        (weight, scale.bfloat16(), shift),
        (weight, scale, shift),
    ):
        out = snv2.ops.dw_conv3x3(x, *args, backend=backend)
        exact = depthwise(x.double(), *(t.double() for t in args), 1, False)
        assert out.dtype == torch.bfloat16
        assert max_error(out, exact) <= torch.finfo(torch.bfloat16).eps


@each_op
def test_float64_runs_the_reference(backend: str, op: Op) -> None:
    args = op.arguments((2, 21, 9, 11), torch.float64, draw)
    args = [t.double() for t in args]
    out = op(*args, backend=backend)
    assert out.dtype == torch.float64
    assert max_error(out, op.formula(*args)) < 1e-14


# Twice, so that each op has them in all maps.
@each_in_turn("op, value, dtype, memory_format", OPS, 2 * SPECIALS, MAPS, backends=OP_BACKENDS)
def test_special_values(
    backend: str, op: Op, value: float, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """In corners and inside, of channels that do not touch each other."""
    args = op.arguments((2, 21, 9, 11), dtype, draw, memory_format=memory_format)
    for position in ((0, 3, 0, 0), (1, 20, 4, 5), (1, 0, 8, 10)):
        for x in args[: op.maps]:
            x[position] = value
            x[position[0], position[1] + 21 * (op.multiplier - 1), 4, 7] = value
    eager, out = op.formula(*args), op(*args, backend=backend)
    assert eager.isfinite().logical_not().any()
    assert_same_specials(out, eager)
    keep = eager.isfinite()
    exact = op.formula(*(t.double() for t in args))
    assert_accurate("op", out[keep], eager[keep], exact[keep])


@each_op
def test_special_values_stay_inside_their_image_and_channel(backend: str, op: Op) -> None:
    """A kernel that computes more than it stores must not let it touch its neighbours."""
    clean = op.arguments((3, 21, 5, 9), torch.float32, draw)
    dirty = [t.clone() for t in clean]
    for x in dirty[: op.maps]:
        x[1] = float("nan")
    out, expected = op(*dirty, backend=backend), op(*clean, backend=backend)
    assert torch.equal(out[0::2], expected[0::2])


# Gradients ------------------------------------------------------------------------------------


@each_op
def test_gradcheck_in_float64(op: Op) -> None:
    args = [t.double().requires_grad_() for t in op.arguments((1, 2, 3, 4), torch.float64, draw)]
    assert torch.autograd.gradcheck(op, args)
    assert torch.autograd.gradgradcheck(op, args)


def _gradients(
    function: Callable[..., Tensor], args: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """First derivatives, and those of their squares, which mix all arguments."""
    args = [t.detach().clone().requires_grad_() for t in args]
    first = torch.autograd.grad(function(*args).square().sum(), args, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), args)
    return [g.detach() for g in first], list(second)


@pytest.mark.supports("grad")
@each_format
@each_op
@pytest.mark.on_triton(2)
def test_gradients_of_the_kernels(backend: str, op: Op, memory_format: torch.memory_format) -> None:
    args = op.arguments((2, 21, 9, 11), torch.float32, draw, memory_format=memory_format)
    ours = _gradients(partial(op, backend=backend), args)
    exact = _gradients(op.formula, [t.double() for t in args])
    eager = _gradients(op.formula, args)
    for order in range(2):
        for actual, plain, expected in zip(ours[order], eager[order], exact[order], strict=True):
            assert actual.dtype == torch.float32
            allowed = 1.5 * max_error(plain, expected) + 4 * torch.finfo(torch.float32).eps
            assert max_error(actual, expected) <= allowed


@each_op
@pytest.mark.on_triton(1)
def test_gradient_of_one_argument_only(backend: str, op: Op) -> None:
    args = op.arguments((2, 5, 6, 7), torch.float32, draw)
    for i in range(len(args)):
        wanted = [t.clone().requires_grad_(j == i) for j, t in enumerate(args)]
        grad, *rest = torch.autograd.grad(op(*wanted, backend=backend).sum(), [wanted[i]])
        (expected,) = torch.autograd.grad(op.formula(*wanted).sum(), [wanted[i]])
        assert not rest
        assert max_error(grad, expected) < 1e-6


@pytest.mark.supports("grad")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@each_op
@pytest.mark.on_triton(2)
def test_gradients_have_the_dtypes_of_their_arguments(
    backend: str, op: Op, dtype: torch.dtype
) -> None:
    args = [t.requires_grad_() for t in op.arguments((2, 5, 6, 7), dtype, draw)]
    op(*args, backend=backend).sum().backward()
    assert [t.grad.dtype for t in args] == [t.dtype for t in args]


def test_every_instruction_set_of_the_build_is_tested() -> None:
    assert "portable" in _native.available_cpu_isas()
