"""Drop-in units, stages and SplitDepthwiseShuffle against the plain modules."""

from __future__ import annotations

import copy

import pytest
import torch
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
    plain_stage,
    run_fused,
    threads,
    unit_pair,
)
from conftest import KERNELS, each_in_turn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.testing import float64_reference, max_error, randomize_

Shape = tuple[int, int, int, int]

# Stride, channels of the output, shape of the input.
UNITS: list[tuple[int, int, Shape]] = [
    # those of the networks, all widths and stages
    *((1, c, (1, c, 28, 28)) for c in (48, 116, 176, 244)),
    *((1, c, (1, c, 14, 14)) for c in (96, 232, 352, 488)),
    *((1, c, (1, c, 7, 7)) for c in (192, 464, 704, 976)),
    *((2, c, (1, 24, 56, 56)) for c in (48, 116, 176, 244)),
    *((2, 2 * c, (1, c, 28, 28)) for c in (48, 116, 176, 244)),
    *((2, 2 * c, (1, c, 14, 14)) for c in (96, 232, 352, 488)),
    # odd ones
    (1, 58, (3, 58, 15, 9)),
    (1, 58, (1, 58, 1, 1)),
    (1, 2, (2, 2, 13, 13)),
    (1, 34, (3, 34, 1, 7)),
    (1, 58, (0, 58, 7, 7)),
    (2, 58, (3, 29, 15, 9)),
    (2, 58, (1, 24, 13, 13)),
    (2, 34, (2, 1, 1, 1)),
    (2, 2, (1, 17, 2, 9)),
    (2, 58, (0, 29, 7, 7)),
]
SPLITS: list[Shape] = [
    (3, 116, 28, 28),
    (1, 464, 7, 7),
    (3, 58, 15, 9),
    (2, 2, 1, 1),
    (0, 58, 7, 7),
    (2, 34, 3, 33),
]
# Channels of the input, strides, channels of the outputs, shape of the input.
STAGES = {
    "stage2-x0_5": ([2, 1, 1, 1], 48, (1, 24, 28, 28)),
    "stage4-x1_0": ([2, 1, 1, 1], 464, (3, 232, 14, 14)),
    "stride1-only": ([1, 1, 1], 58, (3, 58, 15, 9)),
    "two-stride2": ([2, 1, 2, 1], 34, (2, 17, 13, 15)),
    "stage3-x1_0": ([2] + 7 * [1], 232, (1, 116, 28, 28)),
    "batch0": ([2, 1], 34, (0, 17, 13, 15)),
}


def check(
    kind: str, module: nn.Module, plain: nn.Module, x: Tensor, backend: str = "cpu"
) -> Tensor:
    """One fused call that is as right as the plain module."""
    exact = float64_reference(plain)(x.contiguous())
    with torch.no_grad(), snv2.use_backend(backend):
        out, eager = run_fused(module, x), plain(x)
    assert_accurate(kind, out, eager, exact, backend)
    assert keeps_format(out, x if x.is_contiguous() or is_channels_last(x) else out)
    return out


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.supports("eval", "unit")
@each_in_turn("case, dtype, memory_format", UNITS, MAPS)
def test_unit(
    backend: str,
    case: tuple[int, int, Shape],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    stride, oup, shape = case
    plain, unit = unit_pair(stride, shape[1], oup)
    x = draw(*shape, dtype=dtype, memory_format=memory_format)
    check("unit", unit.to(dtype), plain.to(dtype), x, backend)


@drawn
@given(
    stride=st.sampled_from([1, 2]),
    inp=st.integers(1, 70),
    half=st.integers(1, 40),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 30)),
    layout=st.sampled_from(MAPS),
    count=st.sampled_from([1, 2, 5]),
)
@pytest.mark.on_triton(0)
def test_drawn_units(
    backend: str,
    stride: int,
    inp: int,
    half: int,
    shape: tuple[int, int, int],
    layout: tuple[torch.dtype, torch.memory_format],
    count: int,
) -> None:
    dtype, memory_format = layout
    inp = 2 * half if stride == 1 else inp
    plain, unit = unit_pair(stride, inp, 2 * half)
    n, h, w = shape
    x = draw(n, inp, h, w, dtype=dtype, memory_format=memory_format)
    with threads(count):
        check("unit", unit.to(dtype), plain.to(dtype), x, backend)


@pytest.mark.supports("eval", "split")
@each_in_turn("shape, dtype, memory_format", SPLITS, MAPS)
def test_split_depthwise_shuffle(
    backend: str, shape: Shape, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    module = randomize_(snv2.nn.SplitDepthwiseShuffle(shape[1])).eval().to(dtype)
    assert list(module.state_dict())[:3] == ["dw.weight", "bn.weight", "bn.bias"]
    x = draw(*shape, dtype=dtype, memory_format=memory_format)
    plain = copy.deepcopy(module)
    with torch.no_grad(), snv2.use_backend("reference"):
        eager, exact = plain(x), plain.double()(x.double())
    with torch.no_grad(), snv2.use_backend(backend):
        out = run_fused(module, x)
    assert_accurate("op", out, eager, exact, backend)
    assert keeps_format(out, x)


@pytest.mark.supports("eval", "stage")
@each_in_turn("case, dtype, memory_format", list(STAGES), MAPS)
def test_stage(
    backend: str, case: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    strides, oup, shape = STAGES[case]
    plain = plain_stage(strides, oup, shape[1]).to(dtype)
    stage = snv2.fuse(plain)
    assert type(stage) is snv2.nn.Stage
    check("stage", stage, plain, draw(*shape, dtype=dtype, memory_format=memory_format), backend)


def test_stage_constructor() -> None:
    stage = snv2.nn.Stage(snv2.nn.InvertedResidual(8, 20, 2), snv2.nn.InvertedResidual(20, 20, 1))
    randomize_(stage).eval()
    plain = plain_stage([2, 1], 20, 8)
    assert list(stage.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(stage.state_dict())
    check("stage", stage, plain, draw(2, 8, 9, 9))
    with pytest.raises(TypeError, match=r"units\[1\].*Conv2d"):
        snv2.nn.Stage(snv2.nn.InvertedResidual(8, 8, 1), nn.Conv2d(8, 8, 1))


@pytest.mark.parametrize(
    ("case", "count", "memory_format"),
    in_turn(["stage3-x1_0", "stage4-x1_0", "two-stride2"], [2, 3, 8], FORMATS),
    ids=case_id,
)
def test_threads(case: str, count: int, memory_format: torch.memory_format) -> None:
    strides, oup, shape = STAGES[case]
    plain = plain_stage(strides, oup, shape[1])
    stage = snv2.fuse(plain)
    for batch in (1, 2, 5):
        x = draw(batch, *shape[1:], memory_format=memory_format)
        with threads(count), torch.no_grad():
            out = check("stage", stage, plain, x)
            assert all(torch.equal(stage(x), out) for _ in range(3))


@each_in_turn("stride, view, dtype, memory_format", [1, 2], list(VIEWS), MAPS, backends=KERNELS)
@pytest.mark.on_triton(3)
def test_views(
    backend: str, stride: int, view: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    plain, unit = unit_pair(stride, 34, 34)
    x = VIEWS[view](3, 34, 9, 11, dtype=dtype, memory_format=memory_format)
    before = x.clone()
    check("unit", unit.to(dtype), plain.to(dtype), x, backend)
    assert torch.equal(x, before)


@each_in_turn("stride, value, dtype", [1, 2], SPECIALS, DTYPES)
@pytest.mark.on_triton(2)
def test_special_values(backend: str, stride: int, value: float, dtype: torch.dtype) -> None:
    plain, unit = unit_pair(stride, 34, 34)
    plain, unit = plain.to(dtype), unit.to(dtype)
    for position in ((0, 30, 0, 0), (1, 3, 8, 10), (1, 33, 4, 5), (2, 17, 0, 10)):
        x = draw(3, 34, 9, 11, dtype=dtype)
        with snv2.use_backend(backend), torch.no_grad():
            clean = unit(x)
            x[position] = value
            out = unit(x)
        # On some processors oneDNN's bfloat16 gives more NaNs than the formula has.
        with torch.backends.mkldnn.flags(enabled=False):
            eager = plain(x)
        assert eager.isfinite().logical_not().any()
        assert_same_specials(out, eager)
        others = [i for i in range(3) if i != position[0]]
        assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("stride", [1, 2])
def test_large_float16_activations_do_not_overflow_on_the_way(stride: int) -> None:
    """The kernels keep float32 between the layers, so they are right where eager overflows."""
    plain, unit = unit_pair(stride, 34, 34)
    for module in (plain, unit):
        module.branch2[0].weight.data *= 1000
        module.branch2[3].weight.data *= 1e-3
        module.branch2[1].running_mean.zero_()
        module.eval()
    x = draw(1, 34, 9, 9) * 100
    exact = float64_reference(plain.half())(x.half())
    with torch.no_grad():
        out, eager = unit.half()(x.half()), plain(x.half())
    assert not eager.isfinite().all()
    assert max_error(out, exact) < 4 * torch.finfo(torch.float16).eps
