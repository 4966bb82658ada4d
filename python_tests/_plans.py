"""Units with any index lists, and plans for GPUs followed word by word."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from snv2_kernels import _native
from snv2_kernels.packing import Builder, GpuPlan
from snv2_kernels.packing.gpu_plan import GpuStep
from snv2_kernels.packing.units import ACTIVATIONS, IDENTITY, RELU, Activation, Layer, Unit

# Units ----------------------------------------------------------------------------------------


def conv_bn(
    inp: int, oup: int, kernel: int = 1, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Sequential:
    padding = kernel // 2 * dilation
    conv = nn.Conv2d(inp, oup, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(oup))


@dataclass(frozen=True)
class Style:
    """Activations after pw1, dw, pw2 and the projection's dw and pw, and windows."""

    activations: tuple[Activation, ...] = (RELU, IDENTITY, RELU, IDENTITY, RELU)
    window: int = 3
    dilation: int = 1
    proj_window: int = 3
    proj_dilation: int = 1


PAPER = Style()


class GeneralUnit(nn.Module):
    """A unit with any main half, passthrough, widths and order of the output."""

    def __init__(
        self,
        channels: int,
        stride: int,
        mid: int,
        width: int,
        main: list[int],
        passthrough: list[int],
        projection: int,
        order: list[int],
        style: Style = PAPER,
    ) -> None:
        super().__init__()
        self.stride, self.order, self.style = stride, order, style
        self.main, self.passthrough = main, passthrough
        self.pw1 = conv_bn(len(main), mid)
        self.dw = conv_bn(mid, mid, style.window, stride, mid, style.dilation)
        self.pw2 = conv_bn(mid, width)
        self.projection = nn.ModuleList()
        if projection:
            window = style.proj_window, stride, channels, style.proj_dilation
            self.projection.append(conv_bn(channels, channels, *window))
            self.projection.append(conv_bn(channels, projection))

    def forward(self, x: Tensor) -> Tensor:
        # Slopes are of the map's dtype, as a module's would be.
        after = [
            replace(act, slope=act.slope.to(x.dtype)) if isinstance(act.slope, Tensor) else act
            for act in self.style.activations
        ]
        main = after[1](self.dw(after[0](self.pw1(x[:, self.main]))))
        main = after[2](self.pw2(main))
        if self.projection:
            first = after[4](self.projection[1](after[3](self.projection[0](x))))
        else:
            first = x[:, self.passthrough]
        return torch.cat([first, main], 1)[:, self.order]

    def add_to(self, builder: Builder) -> None:
        style, after = self.style, self.style.activations
        dw = Layer(*self.dw, after[1], style.window, style.dilation)
        branch = Layer(*self.pw1, after[0]), dw, Layer(*self.pw2, after[2])
        projection = None
        if self.projection:
            dw = Layer(*self.projection[0], after[3], style.proj_window, style.proj_dilation)
            projection = dw, Layer(*self.projection[1], after[4])
        lists = self.main, self.passthrough, self.order
        builder.add_unit(Unit(self.stride, branch, *lists, projection))


def tell(builder: Builder, channels: int, units: nn.Sequential) -> None:
    builder.add_import(channels)
    for unit in units:
        unit.add_to(builder)


@st.composite
def general_units(draw_: Any) -> tuple[int, nn.Sequential]:
    """Channels of the input and up to four units. The lists of a unit may leave channels out and
    name them in any order."""
    channels = first = draw_(st.integers(1, 40))
    units = nn.Sequential()
    for _ in range(draw_(st.integers(1, 4))):
        shuffled = draw_(st.permutations(range(channels)))
        cut = draw_(st.integers(1, channels))
        main, rest = shuffled[:cut], shuffled[cut:]
        stride = draw_(st.sampled_from([1, 1, 2]))
        projects = stride == 2 or draw_(st.booleans())
        projection = draw_(st.integers(1, 20)) if projects else 0
        passthrough = [] if projection else rest[: draw_(st.integers(0, len(rest)))]
        width, mid = draw_(st.integers(1, 40)), draw_(st.integers(1, 40))
        joined = width + (projection or len(passthrough))
        order = list(draw_(st.permutations(range(joined))))
        units.append(
            GeneralUnit(channels, stride, mid, width, main, passthrough, projection, order)
        )
        channels = joined
    return first, units


def any_slopes(channels: int) -> list[Activation]:
    """Each activation that a layer of these channels may have."""
    kinds = [Activation(kind) for kind in ("relu", "identity", "relu6", "silu", "hardswish")]
    kinds += [Activation("leaky_relu", 0.1), Activation("leaky_relu", -0.5)]
    slopes = torch.linspace(-0.5, 1.5, channels)
    return [*kinds, Activation("prelu", slopes[:1]), Activation("prelu", slopes)]


def styled_unit(stride: int, mid: int, width: int, turn: int, **windows: int) -> GeneralUnit:
    """A unit of any widths whose layers have activations of their own: all come in nine turns."""
    channels = 2 * width if stride == 1 else width
    halves = list(range(width)), list(range(width, channels))
    rows = mid, mid, width, channels, width
    after = tuple(any_slopes(n)[(turn + 2 * i) % len(any_slopes(n))] for i, n in enumerate(rows))
    projection = 0 if stride == 1 else width
    order = list(range(2 * width))[::-1]
    return GeneralUnit(
        channels, stride, mid, width, *halves, projection, order, Style(after, **windows)
    )


def authors_units() -> tuple[int, nn.Sequential]:
    """The original authors' convention: passthrough = even, main = odd channels, plain concat; at
    stride 2 the widths of the two branches differ."""
    halves = list(range(1, 58, 2)), list(range(0, 58, 2))
    return 24, nn.Sequential(
        GeneralUnit(24, 2, 29, 34, list(range(24)), [], 24, list(range(58))),
        *(GeneralUnit(58, 1, 29, 29, *halves, 0, list(range(58))) for _ in range(3)),
        GeneralUnit(58, 2, 58, 58, list(range(58)), [], 58, list(range(116))),
    )


# Plans for GPUs -------------------------------------------------------------------------------

HEADER_FIELDS = [
    "magic", "step_count", "in_channels", "out_channels", "halvings", "classify", "result_count",
    "weight_count", "parameter_count", "dtype",
]  # fmt: skip
STEP_FIELDS = list(GpuStep.__dataclass_fields__)
assert len(HEADER_FIELDS) == _native.GPU_HEADER_WORDS
COPY, STEM, UNIT, HEAD, GATE, EXPORT = range(6)
EXPAND, DEPTHWISE, PROJECT = 1, 2, 4


def unpack_tiles(packed: Tensor, rows: int, depth: int) -> Tensor:
    """The matrix [rows, depth] of which ``packed`` begins with the tiles: as gpu_plan.h says."""
    columns = 4 if packed.dtype == torch.float32 else 16
    down, across = -(-rows // 16), -(-depth // columns)
    tiles = packed[: down * across * 16 * columns].view(down, across, 16 * columns)
    place = torch.empty(16, columns, dtype=torch.int64)
    if columns == 4:
        for g in range(8):
            for k in range(4):
                for high in range(2):
                    place[g + 8 * high, k] = 8 * g + 2 * k + high
    else:
        for lane in range(32):
            g, t = lane // 4, lane % 4
            owned = [(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]
            owned += [(row, column + 8) for row, column in owned]
            for i, (row, column) in enumerate(owned):
                place[row, column] = 8 * lane + i
    whole = tiles[:, :, place].transpose(1, 2).reshape(16 * down, columns * across)
    outside = whole.clone()
    outside[:rows, :depth] = 0
    assert not outside.any(), "padding that is not zero"
    return whole[:rows, :depth].double()


@dataclass
class _Reader:
    """The arrays of a plan and the words of one step."""

    plan: GpuPlan
    step: dict[str, int]

    def table(self, name: str, count: int) -> list[int]:
        return self.plan.tables[self.step[name] :][:count].tolist()

    def matrix(self, name: str, rows: int, depth: int) -> Tensor:
        return unpack_tiles(self.plan.weights[self.step[name] :], rows, depth)

    def bias(self, name: str, rows: int) -> Tensor:
        padded = self.plan.parameters[self.step[name] :][: -(-rows // 16) * 16]
        assert not padded[rows:].any()
        return padded[:rows].double()

    def activation(self, y: Tensor, name: str) -> Tensor:
        """A layer's, of its result [rows, N, H, W]."""
        kind, slopes = ACTIVATIONS[self.step[f"{name}_activation"]], None
        if kind == "prelu":
            slopes = self.bias(f"{name}_slopes", len(y))
        return Activation(kind, slopes)(y.transpose(0, 1)).transpose(0, 1)

    def product(self, x: Tensor, name: str, rows: int) -> Tensor:
        """A matrix times planes [depth, N, H, W]."""
        weight = self.matrix(f"{name}_weights", rows, len(x))
        bias = self.bias(f"{name}_bias", rows)
        y = torch.einsum("ok,knhw->onhw", weight, x) + bias[:, None, None, None]
        return self.activation(y, name)

    def depthwise(self, x: Tensor, name: str) -> Tensor:
        window, dilation = self.step[f"{name}_window"], self.step[f"{name}_dilation"]
        floats = window * window + 1
        packed = self.plan.parameters[self.step[name] :][: floats * len(x)].view(-1, floats)
        weight, shift = packed.double().split([window * window, 1], 1)
        y = F.conv2d(
            x.transpose(0, 1),
            weight.reshape(-1, 1, window, window),
            shift.flatten(),
            self.step["stride"],
            window // 2 * dilation,
            dilation,
            groups=len(x),
        )
        return self.activation(y.transpose(0, 1), name)

    def branch(self, x: Tensor) -> Tensor:
        """What a unit's step makes of planes [in_channels, N, H, W]."""
        parts = self.step["parts"]
        if parts & EXPAND:
            x = self.product(x, "pw1", self.step["mid_channels"])
        if parts & DEPTHWISE:
            x = self.depthwise(x, "dw")
        if parts & PROJECT:
            x = self.product(x, "pw2", self.step["out_channels"])
        return x

    def gate(self, x: Tensor) -> Tensor:
        """What a gate's step makes of planes, and those that it adds behind them."""
        x, *added = x.split(self.step["out_channels"])
        if self.step["mid_channels"]:
            means = x.mean([2, 3], keepdim=True)
            hidden = self.product(means, "pw1", self.step["mid_channels"])
            x = x * self.product(hidden, "pw2", len(x))
        return self.activation(sum(added, x), "dw")


def steps_of(words: Tensor) -> tuple[dict[str, int], list[dict[str, int]], Tensor]:
    """Header, steps and tables of a plan's words."""
    header = dict(zip(HEADER_FIELDS, words.tolist(), strict=False))
    size, start = _native.GPU_STEP_WORDS, _native.GPU_HEADER_WORDS
    stop = start + size * header["step_count"]
    steps = [
        dict(zip(STEP_FIELDS, row, strict=True))
        for row in words[start:stop].view(-1, size).tolist()
    ]
    return header, steps, words[stop:]


def interpret(plan: GpuPlan, x: Tensor) -> list[Tensor]:
    """All results of a plan for ``x``, in float64."""
    header, steps, tables = steps_of(plan.words)
    assert torch.equal(tables, plan.tables.long())
    assert header["weight_count"] == plan.weights.numel()
    assert header["parameter_count"] == plan.parameters.numel()
    buffers: dict[int, Tensor] = {-1: x.double().transpose(0, 1)}
    halvings = {-1: 0}  # of what lies in each
    results: list[Tensor] = [torch.empty(0)] * header["result_count"]
    for step in steps:
        read = _Reader(plan, step)
        source = buffers[step["in_buffer"]]
        kind, width, mid = step["kind"], step["out_channels"], step["mid_channels"]
        x = source[read.table("in_table", step["in_channels"])]
        if kind == COPY:
            y = x
        elif kind == STEM:
            taps = F.unfold(x.transpose(0, 1), 3, padding=1, stride=2)  # [N, C * 9, pixels]
            extent = [(e + 1) // 2 for e in x.shape[2:]]
            taps = taps.transpose(0, 1).unflatten(2, extent)
            y = F.max_pool2d(read.product(taps, "pw1", width), 3, 2, 1)
        elif kind == GATE:
            y = read.gate(x)
        elif kind == EXPORT:
            results[step["result"]] = x.transpose(0, 1)
            continue
        elif kind == UNIT:
            y = read.branch(x)
            if step["proj_channels"]:
                first = read.depthwise(x, "proj_dw")
                y = torch.cat([read.product(first, "proj", step["proj_channels"]), y])
        else:
            features = read.product(x, "pw1", mid).mean([2, 3])  # [features, N]
            weight, bias = read.matrix("pw2_weights", width, mid), read.bias("pw2_bias", width)
            results[step["result"]] = features.T @ weight.T + bias
            continue
        if step["result"] >= 0:
            rows = read.table("result_table", step["result_channels"])
            planes = [y[row] if row >= 0 else source[-1 - row] for row in rows]
            results[step["result"]] = torch.stack(planes, 1)
        out = step["out_buffer"]
        if out >= 0:
            now = halvings[step["in_buffer"]] + (2 if kind == STEM else step["stride"] == 2)
            if halvings.get(out) != now:
                buffers[out] = y.new_full((step["out_planes"], *y.shape[1:]), torch.nan)
            halvings[out] = now
            buffers[out][read.table("out_table", len(y))] = y
    return results
