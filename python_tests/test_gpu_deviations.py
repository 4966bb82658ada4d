"""Units, stems and heads with other activations and windows than the paper's, on the CUDA kernels:
plans built by hand, no recognition takes part."""

from __future__ import annotations

import copy

import pytest
import torch
from _cases import DTYPES, assert_accurate, assert_same_specials, draw
from _plans import PAPER, GeneralUnit, Style, any_slopes, conv_bn, styled_unit, tell
from torch import Tensor, nn
from torch.nn import functional as F

from snv2_kernels import _native
from snv2_kernels.ops import run_plan
from snv2_kernels.packing import GpuPlanBuilder
from snv2_kernels.packing.units import IDENTITY, RELU, Activation, Gate, Layer, Unit, Unsupported
from snv2_kernels.testing import float64_reference, randomize_


def check(kind: str, units: nn.Sequential, x: Tensor, backend: str) -> None:
    randomize_(units).eval()
    builder = GpuPlanBuilder()
    tell(builder, x.shape[1], units)
    plan = builder.build(x.dtype, x.device)
    exact = float64_reference(units)(x)
    with torch.no_grad():
        eager = copy.deepcopy(units).to(x)(x)
    assert_accurate(kind, run_plan(x, plan, backend), eager, exact, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turn", range(9))
def test_any_activations(gpu_backend: str, turn: int, dtype: torch.dtype) -> None:
    """Each activation after each layer, in one turn or another."""
    units = nn.Sequential(styled_unit(1, 19, 10, turn), styled_unit(2, 13, 20, turn))
    check("stage", units, draw(2, 20, 9, 7, dtype=dtype), gpu_backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("window", [(3, 2), (3, 3), (5, 1), (5, 2), (7, 1), (9, 1)])
def test_any_windows(
    gpu_backend: str, window: tuple[int, int], stride: int, dtype: torch.dtype
) -> None:
    """Of maps larger and smaller than they are; the projection has another window."""
    windows = {"window": window[0], "dilation": window[1]}
    for shape in ((2, 16, 13, 9), (3, 16, 2, 1)):
        units = nn.Sequential(styled_unit(stride, 10, 8 * stride, 0, **windows, proj_window=5))
        check("unit", units, draw(*shape, dtype=dtype), gpu_backend)


def plan_of_one_layer(act: Activation, dtype: torch.dtype) -> tuple[nn.Module, GpuPlanBuilder]:
    """A unit of one channel whose convolutions and batch norms change nothing."""
    unit = GeneralUnit(1, 1, 1, 1, [0], [], 0, [0], Style((IDENTITY, IDENTITY, act) + 2 * (RELU,)))
    for conv, bn in (unit.pw1, unit.dw, unit.pw2):
        nn.init.dirac_(conv.weight)
        bn.eps = 0.0
    builder = GpuPlanBuilder()
    tell(builder, 1, nn.Sequential(unit.eval()))
    return unit, builder


@pytest.mark.parametrize("act", any_slopes(1), ids=lambda act: act.kind)
def test_an_activation_is_accurate(gpu_backend: str, act: Activation) -> None:
    """Within three units in the last place, wherever a result is no denormal number."""
    _, builder = plan_of_one_layer(act, torch.float32)
    sizes = torch.logspace(-30, 1.9, 500)
    x = torch.cat([sizes, -sizes, torch.linspace(-8, 8, 500)]).view(1, 1, 30, 50)
    x = x.to(torch.get_default_device())
    y = run_plan(x, builder.build(torch.float32, x.device), gpu_backend).double()
    exact = (
        act(x.double()) if act.kind != "prelu" else F.prelu(x.double(), act.slope.to(x).double())
    )
    assert ((y - exact).abs() <= 3 * 2**-24 * 2 * exact.abs() + 1e-36).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", any_slopes(1), ids=lambda act: act.kind)
def test_specials(gpu_backend: str, act: Activation, dtype: torch.dtype) -> None:
    _, builder = plan_of_one_layer(act, dtype)
    x = torch.zeros(1, 1, 4, 8, dtype=dtype)
    x[0, 0, 1, 1], x[0, 0, 1, 5], x[0, 0, 3, 3] = torch.inf, -torch.inf, torch.nan
    x = x.to(torch.get_default_device())
    y = run_plan(x, builder.build(dtype, x.device), gpu_backend)
    # What the depthwise convolution makes of them: zero times infinity.
    weight = torch.zeros(1, 1, 3, 3, dtype=dtype, device=x.device)
    weight[0, 0, 1, 1] = 1
    convolved = F.conv2d(x.float(), weight.float(), padding=1).to(dtype)
    slope = act.slope.to(x) if isinstance(act.slope, Tensor) else act.slope
    assert_same_specials(y, Activation(act.kind, slope)(convolved))


class Ends(nn.Module):
    """A stem and a head, with a unit between them that has other activations too."""

    def __init__(self, channels: int, width: int, features: int, turn: int) -> None:
        super().__init__()
        self.stem = conv_bn(channels, width, 3, 2)
        self.unit = styled_unit(2, width, width, turn)
        self.conv5 = conv_bn(2 * width, features)
        self.fc = nn.Linear(features, 10)
        self.after = any_slopes(width)[turn], any_slopes(features)[turn]

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.after
        x = self.unit(F.max_pool2d(_apply(first, self.stem(x)), 3, 2, 1))
        out: Tensor = self.fc(_apply(last, self.conv5(x)).mean([2, 3]))
        return out

    def tell(self, builder: GpuPlanBuilder) -> None:
        builder.add_stem(Layer(*self.stem, self.after[0]))
        self.unit.add_to(builder)
        builder.add_head(Layer(*self.conv5, self.after[1]), self.fc)


def _apply(act: Activation, x: Tensor) -> Tensor:
    slope = act.slope.to(x) if isinstance(act.slope, Tensor) else act.slope
    return Activation(act.kind, slope)(x)


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turn", range(1, 9))
def test_stem_and_head(gpu_backend: str, turn: int, dtype: torch.dtype, channels: int) -> None:
    model = randomize_(Ends(channels, 20, 37, turn)).eval()
    builder = GpuPlanBuilder()
    model.tell(builder)
    x = draw(2, channels, 29, 37, dtype=dtype)
    exact = float64_reference(model)(x)
    with torch.no_grad():
        eager = copy.deepcopy(model).to(x)(x)
    plan = builder.build(dtype, x.device)
    formats = [torch.contiguous_format, torch.channels_last]
    for memory_format in formats:
        y = run_plan(x.contiguous(memory_format=memory_format), plan, gpu_backend)
        assert_accurate("network", y, eager, exact, gpu_backend)


def test_what_the_paper_has_runs_its_own_kernels(gpu_backend: str) -> None:
    """They read no slopes, and a ring of three rows."""

    def shared(style: Style) -> int:
        builder = GpuPlanBuilder()
        unit = GeneralUnit(
            20, 1, 10, 10, list(range(10)), list(range(10, 20)), 0, list(range(20)), style
        )
        tell(builder, 20, nn.Sequential(unit.eval()))
        (launch,) = _native.describe_network(builder.build().words.numpy(), 1, 14, 14)
        return int(launch["shared_bytes"])

    assert shared(Style(window=5)) > shared(PAPER)
    assert shared(Style(window=5)) < shared(Style(window=5, dilation=2))


def test_what_is_not_covered() -> None:
    channels = list(range(8))
    unit = GeneralUnit(8, 1, 8, 8, channels, [], 0, channels).eval()
    pw1, dw, pw2 = Layer(*unit.pw1, RELU), Layer(*unit.dw, kernel=3), Layer(*unit.pw2, RELU)
    for branch, message in (
        ((pw1, dw, Gate(pw1, pw2), pw2), "squeeze-and-excite"),
        ((dw, pw1, dw, pw2), r"a branch of windows \[3, 1, 3, 1\]"),
        ((pw1, dw, Layer(*unit.pw2, Activation("sigmoid"))), "activation sigmoid"),
    ):
        builder = GpuPlanBuilder()
        builder.add_import(8)
        builder.add_unit(Unit(1, branch, channels, [], channels))
        with pytest.raises(Unsupported, match=message):
            builder.build()


def test_a_window_too_large_for_shared_memory_is_not_covered() -> None:
    builder = GpuPlanBuilder()
    tell(builder, 16, nn.Sequential(styled_unit(1, 20, 8, 0, window=15, dilation=8)).eval())
    plan = builder.build()
    device = _native.emulated_device()
    assert plan.covers(1, 9, 9, device)
    assert not plan.covers(1, 300, 300, device)
