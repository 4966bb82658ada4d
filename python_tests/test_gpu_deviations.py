"""Units, stems and heads with other activations and windows than the paper's, on the CUDA kernels:
plans built by hand, no recognition takes part."""

from __future__ import annotations

import copy

import pytest
import torch
from _cases import (
    DTYPES,
    FORMATS,
    assert_accurate,
    assert_same_specials,
    case_id,
    draw,
    in_turn,
)
from _deviations import ConvBn, DeviantUnit, Shortcut, SqueezeExcite, plan_of
from _plans import PAPER, GeneralUnit, Style, any_slopes, conv_bn, styled_unit, tell
from torch import Tensor, nn
from torch.nn import functional as F

from snv2_kernels import emulator, gpu
from snv2_kernels.ops import OPERATORS, run_plan
from snv2_kernels.packing import GpuPlanBuilder
from snv2_kernels.packing.units import IDENTITY, RELU, Activation, Layer, Unsupported
from snv2_kernels.runners import WORKSPACE_SLACK
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


@pytest.mark.parametrize(("turn", "dtype"), in_turn(range(9), DTYPES), ids=case_id)
def test_any_activations(gpu_backend: str, turn: int, dtype: torch.dtype) -> None:
    """Each activation after each layer, in one turn or another."""
    units = nn.Sequential(styled_unit(1, 19, 10, turn), styled_unit(2, 13, 20, turn))
    check("stage", units, draw(2, 20, 9, 7, dtype=dtype), gpu_backend)


@pytest.mark.parametrize(
    ("window", "stride", "dtype"),
    in_turn([(3, 2), (3, 3), (5, 1), (5, 2), (7, 1), (9, 1)], [1, 2], DTYPES),
    ids=case_id,
)
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


@pytest.mark.parametrize(
    ("turn", "channels", "dtype"), in_turn(range(1, 9), [3, 1], DTYPES), ids=case_id
)
def test_stem_and_head(gpu_backend: str, turn: int, channels: int, dtype: torch.dtype) -> None:
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
        (launch,) = gpu.launches(builder.build().words, 1, 14, 14)
        return int(launch["shared_bytes"])

    assert shared(Style(window=5)) > shared(PAPER)
    assert shared(Style(window=5)) < shared(Style(window=5, dilation=2))


# Pieces ---------------------------------------------------------------------------------------


def pieces_of(stride: int) -> DeviantUnit:
    """All kinds of pieces; at stride 1 its passthrough leaves with the result."""
    inp = 20 if stride == 2 else 12
    branch = [
        ConvBn(inp, 17), ConvBn(17, 17, 3, stride), SqueezeExcite(17, "silu", "hardsigmoid"),
        ConvBn(17, 9), ConvBn(9, 9, 5, 1, 2), ConvBn(9, 11, act="prelu"), SqueezeExcite(11),
    ]  # fmt: skip
    projection = [ConvBn(20, 20, 3, 2), ConvBn(20, 6)] if stride == 2 else []
    return DeviantUnit(20, branch, stride, projection)


def shortcut_of_all() -> DeviantUnit:
    """Without the shortcut it would read the caller's map as it is."""
    branch = [ConvBn(20, 17), ConvBn(17, 17, 3), ConvBn(17, 20, act="identity")]
    gate = SqueezeExcite(20, after="relu", adds_source=True)
    return DeviantUnit(20, [*branch, gate], passthrough=False)


MADE_OF_PIECES = {
    "stride-1": lambda: pieces_of(1), "stride-2": lambda: pieces_of(2), "shortcut": shortcut_of_all
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "memory_format", "dtype"),
    in_turn(list(MADE_OF_PIECES), FORMATS, DTYPES),
    ids=case_id,
)
def test_pieces_between_the_callers_maps(
    gpu_backend: str, kind: str, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    unit = randomize_(MADE_OF_PIECES[kind]()).eval()
    plan = plan_of((gpu_backend, dtype), nn.Sequential(unit), 20)
    x = draw(3, 20, 7, 9, dtype=dtype).contiguous(memory_format=memory_format)
    exact, y = float64_reference(unit)(x), run_plan(x, plan, gpu_backend)
    with torch.no_grad():
        eager = unit.to(x)(x)
    assert y.is_contiguous(memory_format=memory_format)
    assert_accurate("stage", y, eager, exact, gpu_backend)


@pytest.mark.parametrize("shortcut", [False, True], ids=["plain", "shortcut"])
def test_results_of_pieces_on_the_way(gpu_backend: str, shortcut: bool) -> None:
    behind = [Shortcut(9, "prelu")][:shortcut]
    units = nn.Sequential(pieces_of(2), DeviantUnit(17, [ConvBn(9, 9, 3), ConvBn(9, 9), *behind]))
    units.append(DeviantUnit(17, [ConvBn(9, 9), ConvBn(9, 9, 3), ConvBn(9, 9), *behind]))
    randomize_(units).eval()
    x, builder = draw(2, 20, 9, 7), GpuPlanBuilder()
    builder.add_import(20)
    for unit in units:
        unit.add_to(builder)
        builder.add_result()
    plan = builder.build(x.dtype, x.device)
    size = gpu.workspace_bytes(plan.words, 2, 9, 7, gpu.current_device(x.device))
    results = [x.new_empty(shape) for shape in plan.result_shapes(2, 9, 7)]
    memory = x.new_empty(size + WORKSPACE_SLACK, dtype=torch.uint8)
    OPERATORS[gpu_backend].gpu_network_out(x, *plan.arrays, memory, results, [], [])
    assert len(results) == 3
    for i, result in enumerate(results):
        part = units[: i + 1]
        with torch.no_grad():
            assert_accurate("stage", result, part(x), float64_reference(part)(x), gpu_backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_convolution_alone_spreads_no_specials(gpu_backend: str, dtype: torch.dtype) -> None:
    """From one channel to others: no identity matrix is multiplied."""
    unit = randomize_(DeviantUnit(20, [ConvBn(12, 12, 3)])).eval()
    x = draw(1, 20, 6, 5, dtype=dtype)
    x[0, unit.main[3], 2, 2], x[0, unit.main[5], 4, 4] = torch.nan, torch.inf
    y = run_plan(x, plan_of((gpu_backend, dtype), nn.Sequential(unit), 20), gpu_backend)
    with torch.no_grad():
        assert_same_specials(y, unit.to(x)(x))


def test_what_is_not_covered() -> None:
    pw, dw, gate = ConvBn(8, 8), ConvBn(8, 8, 3), SqueezeExcite(8)
    for branch, stride, projection, message in (
        ([gate, pw], 1, [], "squeeze-and-excite that follows no convolution"),
        ([pw, ConvBn(8, 8, act="sigmoid")], 1, [], "activation sigmoid"),
        ([pw], 2, [], "stride 2 without a depthwise convolution"),
        ([dw, pw], 2, [pw, pw], r"a projection of windows \[1, 1\]"),
    ):
        unit = DeviantUnit(8, branch, stride, projection, passthrough=stride == 1)
        with pytest.raises(Unsupported, match=message):
            plan_of(("cuda-emulated", torch.float32), nn.Sequential(unit), 8)


def test_a_window_too_large_for_shared_memory_is_not_covered() -> None:
    builder = GpuPlanBuilder()
    tell(builder, 16, nn.Sequential(styled_unit(1, 20, 8, 0, window=15, dilation=8)).eval())
    plan = builder.build()
    device = emulator.device()
    assert plan.covers(1, 9, 9, device)
    assert not plan.covers(1, 300, 300, device)


def test_a_gate_too_large_for_shared_memory_is_not_covered() -> None:
    gate = SqueezeExcite(8)
    gate.reduce, gate.expand = ConvBn(8, 20000), ConvBn(20000, 8, act="sigmoid")
    unit = DeviantUnit(12, [ConvBn(8, 8, 3), ConvBn(8, 8), gate]).eval()
    plan = plan_of(("cuda-emulated", torch.float32), nn.Sequential(unit), 12)
    assert not plan.covers(1, 9, 9, emulator.device())
