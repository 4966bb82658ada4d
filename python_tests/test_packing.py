"""Folding, panels, and plans with any channel table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _cases import (
    FLOAT32_BOUNDS,
    WIDTHS,
    assert_accurate,
    draw,
    drawn,
    largest_error,
    needs_bfloat16,
    network,
)
from _plans import GeneralUnit, authors_units, general_units, tell
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels import _native
from snv2_kernels.ops import run_plan
from snv2_kernels.packing import Plan, PlanBuilder, fold_conv_bn
from snv2_kernels.packing.cpu_plan import PANEL, Step, pack_panels
from snv2_kernels.testing import float64_reference, max_error, randomize_

# fold_bn --------------------------------------------------------------------------------------


def norm(channels: int, **kwargs: Any) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(channels, **kwargs).eval()
    if bn.affine:
        return randomize_(bn)
    generator = torch.Generator().manual_seed(1)
    bn.running_mean = torch.randn(channels, generator=generator)
    bn.running_var = torch.rand(channels, generator=generator) + 0.1
    return bn


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.0], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_fold_bn(affine: bool, eps: float) -> None:
    bn = norm(29, affine=affine, eps=eps)
    scale, shift = snv2.fold_bn(bn)
    assert scale.shape == shift.shape == (29,)
    assert scale.dtype == shift.dtype == torch.float32
    assert not scale.requires_grad
    assert not shift.requires_grad
    x = draw(2, 29, 5, 7).double()
    out = x * scale.double()[:, None, None] + shift.double()[:, None, None]
    assert max_error(out, bn.double()(x).detach()) < 1e-7


def test_fold_bn_rounds_once() -> None:
    bn = norm(29)
    weight, bias, mean, var = (
        t.detach().double() for t in (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    )
    scale, shift = snv2.fold_bn(bn)
    exact = weight / (var + bn.eps).sqrt()
    torch.testing.assert_close(scale, exact.float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(shift, (bias - mean * exact).float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_fold_bn_dtypes(dtype: torch.dtype) -> None:
    scale, shift = snv2.fold_bn(norm(5).to(dtype))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert scale.dtype == shift.dtype == expected


def test_fold_bn_without_bias_or_weight() -> None:
    bn = norm(5)
    bn.bias = None
    scale, shift = snv2.fold_bn(bn)
    torch.testing.assert_close(shift, -bn.running_mean * scale)


def test_fold_bn_of_a_sync_batch_norm() -> None:
    bn = norm(5)
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(bn)
    assert all(map(torch.equal, snv2.fold_bn(sync), snv2.fold_bn(bn)))


def test_fold_bn_errors() -> None:
    with pytest.raises(ValueError, match=r"bn: .*running statistics"):
        snv2.fold_bn(nn.BatchNorm2d(5, track_running_stats=False))
    for wrong in (nn.ReLU(), nn.GroupNorm(1, 5), nn.Conv2d(1, 1, 1), 3, None):
        with pytest.raises(TypeError, match="bn: expected a BatchNorm2d, got"):
            snv2.fold_bn(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("groups", [1, 6])
def test_fold_conv_bn(groups: int, bias: bool) -> None:
    conv = randomize_(nn.Conv2d(6, 12, 3, groups=groups, bias=bias))
    bn = norm(12)
    weight, shift = fold_conv_bn(conv, bn)
    assert weight.dtype == shift.dtype == torch.float64
    x = draw(2, 6, 7, 7).double()
    folded = nn.functional.conv2d(x, weight.view(12, 6 // groups, 3, 3), shift, groups=groups)
    assert max_error(folded, bn.double()(conv.double()(x)).detach()) < 1e-14


# Panels ---------------------------------------------------------------------------------------


@drawn
@given(outputs=st.integers(1, 70), depth=st.integers(1, 40))
def test_pack_panels(outputs: int, depth: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, depth, dtype=torch.float64, generator=generator)
    bias = torch.randn(outputs, dtype=torch.float64, generator=generator)
    packed = pack_panels(weight.float(), bias)
    panels = -(-outputs // PANEL)
    assert packed.dtype == torch.float32
    assert packed.shape == (panels * (1 + depth) * PANEL,)
    rows = packed.view(panels, 1 + depth, PANEL)
    for o in range(panels * PANEL):
        column = rows[o // PANEL, :, o % PANEL]
        if o < outputs:
            assert torch.equal(column, torch.cat([bias[o : o + 1], weight[o]]).float())
        else:
            assert not column.any()


# Plans ----------------------------------------------------------------------------------------


def plan_of(channels: int, units: nn.Sequential, element: torch.dtype = torch.float32) -> Plan:
    builder = PlanBuilder()
    tell(builder, channels, units)
    return builder.build(element)


FEW_ELEMENTS = 512
ELEMENTS = [torch.float32, torch.bfloat16][: 1 + _native.cpu_has_bfloat16()]


def check_plan(channels: int, units: nn.Sequential, x: Tensor) -> None:
    randomize_(units).eval()
    plan = plan_of(channels, units)
    exact = float64_reference(units)(x)
    with torch.no_grad():
        eager = units(x)
    out = run_plan(x, plan, "cpu")
    # Of a handful of elements eager's error is one throw of the dice, and hypothesis looks for the
    # throws where it is near zero: there only the stated bound holds.
    assert max_error(out, exact) <= FLOAT32_BOUNDS["stage"] * torch.finfo(x.dtype).eps
    if out.numel() >= FEW_ELEMENTS:
        assert_accurate("stage", out, eager, exact)
    assert plan.in_channels == channels
    assert plan.output_shape(x.shape[0], *x.shape[2:]) == tuple(out.shape)
    assert plan.units == len(units)


@drawn
@given(
    case=general_units(),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 13), st.integers(1, 13)),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
def test_any_index_lists(
    isa: str,
    case: tuple[int, nn.Sequential],
    shape: tuple[int, int, int],
    memory_format: torch.memory_format,
) -> None:
    channels, units = case
    n, h, w = shape
    check_plan(channels, units, draw(n, channels, h, w, memory_format=memory_format))


def test_shuffle_at_the_input(isa: str) -> None:
    check_plan(*authors_units(), draw(2, 24, 15, 9))


def test_passthrough_is_exact() -> None:
    """What goes through untouched is not rounded, whatever its value."""
    unit = GeneralUnit(8, 1, 4, 4, [0, 1, 2, 3], [7, 6, 5, 4], 0, list(range(8)))
    plan = plan_of(8, randomize_(nn.Sequential(unit)).eval())
    x = draw(2, 8, 5, 5)
    x[:, 4:] *= 1e30
    x[0, 5, 2, 2] = float("nan")
    out = run_plan(x, plan, "cpu")
    torch.testing.assert_close(out[:, :4], x[:, [7, 6, 5, 4]], rtol=0, atol=0, equal_nan=True)
    assert out[:, 4:].isfinite().all()


def test_import_and_export() -> None:
    """A unit whose result nobody takes gives the map back."""
    unit = GeneralUnit(22, 1, 4, 4, [21], list(range(21)), 0, list(range(21)))
    units = randomize_(nn.Sequential(unit)).eval()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = draw(2, 22, 5, 7, dtype=dtype)
        for element in ELEMENTS if dtype == torch.bfloat16 else ELEMENTS[:1]:
            plan = plan_of(22, units, element)
            assert torch.equal(run_plan(x, plan, "cpu"), x[:, :21])
            cl = x.contiguous(memory_format=torch.channels_last)
            assert torch.equal(run_plan(cl, plan, "cpu"), x[:, :21])


# Plans for bfloat16 ---------------------------------------------------------------------------


def test_pack_panels_of_bfloat16() -> None:
    weight = torch.randn(18, 6, dtype=torch.float64)
    bias = torch.randn(18, dtype=torch.float64)
    rows = pack_panels(weight.to(torch.bfloat16), bias).view(2, 4, PANEL)
    assert torch.equal(rows[:, 0].flatten()[:18], bias.float())
    pairs = rows[:, 1:].contiguous().view(torch.bfloat16).view(2, 3, PANEL, 2)
    unpacked = pairs.permute(0, 2, 1, 3).reshape(32, 6)
    assert torch.equal(unpacked[:18], weight.to(torch.bfloat16))
    assert not unpacked[18:].any()


@pytest.mark.parametrize("width", WIDTHS)
def test_words_of_networks(width: str) -> None:
    """No word is read by two units, of which one would read half of it, and few planes stand
    twice."""
    model = snv2.fuse(network("snv2", width))
    assert isinstance(model, snv2.nn.ShuffleNetV2)
    builder = PlanBuilder()
    model._tell(builder)
    plan = builder.build(torch.bfloat16)
    tables = plan.words[_native.HEADER_WORDS + len(plan.steps) * _native.STEP_WORDS :].tolist()
    matrices = {matrix.weights: matrix for matrix in plan.matrices}
    seen: set[int] = set()  # in this buffer
    for step in plan.steps[1:]:
        main = step.main
        words = tables[main.in_table :][: main.in_channels]
        assert all(word % 2 == 0 for word in words)
        assert len({*words}) == len(words)
        assert not seen & {*words}
        seen = {*seen, *words} if not step.new_buffer else set()
        pw1, pw2 = matrices[main.pw1.weights], matrices[main.pw2.weights]
        assert main.mid_channels == pw1.rows
        assert pw1.columns <= 2 * main.in_channels <= pw1.columns + 8
        assert 0 <= main.out_channels - pw2.rows <= 8


@needs_bfloat16
@drawn
@given(
    case=general_units(),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 13), st.integers(1, 13)),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    data=st.data(),
)
def test_any_index_lists_in_bfloat16(
    case: tuple[int, nn.Sequential],
    shape: tuple[int, int, int],
    memory_format: torch.memory_format,
    data: st.DataObject,
) -> None:
    """As exact as the bound says, and a NaN goes where plain PyTorch lets it go: not into a product
    that reads the other plane of its word."""
    channels, units = case
    n, h, w = shape
    plan = plan_of(channels, randomize_(units).eval(), torch.bfloat16)
    x = draw(n, channels, h, w, dtype=torch.bfloat16, memory_format=memory_format)
    error = max_error(run_plan(x, plan, "cpu"), float64_reference(units)(x))
    assert error <= largest_error("stage", x.dtype, "cpu") * torch.finfo(x.dtype).eps
    for channel in data.draw(st.sets(st.integers(0, channels - 1), min_size=1, max_size=3)):
        x[-1, channel, h // 2, w // 2] = torch.nan
        with torch.no_grad():
            expected = units(x.float()).isnan()
        assert torch.equal(run_plan(x, plan, "cpu").isnan(), expected)


def test_format_of_a_plan() -> None:
    model = snv2.fuse(snv2.models.shufflenet_v2_x0_5().eval())
    plan = model.packed().weights(model, "cpu", torch.float32)
    assert plan.words.dtype == torch.int64
    assert plan.words[0] == _native.PLAN_MAGIC
    assert plan.words[1] == 1 + 16 + 1  # stem, units, head
    assert len(Step(0).words()) == _native.STEP_WORDS
    assert plan.weights.dtype == torch.float32
    assert plan.weights.is_contiguous()
    assert (plan.in_channels, plan.out_channels, plan.halvings) == (3, 1000, 5)
    assert plan.classify
