"""From modules to plans: batch norms folded, weights laid out, channel tables followed.

A *plan* is what a backend runs: a flat int64 array of steps and tables (its format stands in
``csrc/include/snv2/plan.h``) beside one float32 array of packed weights. Inside it a feature
map is a set of planes, each at a place of its own; ``table[i]`` is the plane that holds logical
channel ``i``. A unit reads the planes of its main half wherever they are, writes its result to
fresh planes, and hands on a new table::

    q[2 * i] = p[i]            # passthrough: not touched
    q[2 * i + 1] = result[i]

so split, concat and shuffle cost nothing, and logical order is restored only where a user's
tensor is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from snv2_kernels import _native

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Plan", "PlanBuilder", "Step", "fold_bn", "fold_conv_bn"]

PANEL: int = _native.PANEL
_IMPORT, _STEM, _UNIT, _HEAD, _EXPORT = range(5)


def fold_bn(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Inference batch norm as ``y = x * scale + shift``, for each channel.

    ``scale = weight / sqrt(running_var + eps)``, ``shift = bias - running_mean * scale``,
    computed in float64 and rounded once.

    Returns:
        ``scale`` and ``shift``, each [C], float64 for a float64 ``bn``, else float32.

    Raises:
        TypeError: if ``bn`` is not a batch norm.
        ValueError: if ``bn`` keeps no running statistics, so that it has no inference form.
    """
    scale, shift = _fold_bn64(bn)
    dtype = torch.float64 if _buffer(bn, "running_mean").dtype == torch.float64 else torch.float32
    return scale.to(dtype), shift.to(dtype)


def _buffer(bn: nn.BatchNorm2d, name: str) -> Tensor:
    value = getattr(bn, name, None)
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
        raise TypeError(f"bn: expected a BatchNorm2d, got {type(bn).__name__}")
    if value is None:
        raise ValueError(f"bn: {name} is None; a batch norm without running statistics cannot fold")
    assert isinstance(value, Tensor)
    return value


def _fold_bn64(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    mean, var = _buffer(bn, "running_mean").double(), _buffer(bn, "running_var").double()
    scale = torch.rsqrt(var + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.detach().double()
    shift = -mean * scale
    if bn.bias is not None:
        shift = shift + bn.bias.detach().double()
    return scale, shift


def fold_conv_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """``bn(conv(x))`` as one convolution: weight [O, I * kH * kW] and bias [O] in float64."""
    scale, shift = _fold_bn64(bn)
    weight = conv.weight.detach().double().flatten(1) * scale[:, None]
    if conv.bias is not None:
        shift = shift + conv.bias.detach().double() * scale
    return weight, shift


def pack_panels(weight: Tensor, bias: Tensor) -> Tensor:
    """[O, K] and [O] as flat float32 panels: [ceil(O / 16)][1 + K][16], the bias row first."""
    rows = torch.cat([bias[:, None], weight], 1).cpu()  # [O, 1 + K]
    panels = -(-rows.shape[0] // PANEL)
    padded = rows.new_zeros(panels * PANEL, rows.shape[1])
    padded[: rows.shape[0]] = rows
    return padded.view(panels, PANEL, -1).transpose(1, 2).to(torch.float32).flatten()


@dataclass
class Step:
    """One step of a plan; the fields and their order are those of ``snv2::Step``."""

    kind: int
    stride: int = 1
    new_buffer: int = 0
    buffer_panels: int = 0
    in_channels: int = 0
    in_table: int = 0
    mid_channels: int = 0
    out_channels: int = 0
    out_panel: int = 0
    pw1_weights: int = 0
    dw_weights: int = 0
    pw2_weights: int = 0
    proj_panels: int = 0
    proj_panel_table: int = 0
    proj_depth: int = 0
    proj_table: int = 0
    proj_channels: int = 0
    proj_out_panel: int = 0
    proj_dw_weights: int = 0
    proj_pw_weights: int = 0

    def words(self) -> list[int]:
        return [getattr(self, f.name) for f in fields(self)]


assert len(fields(Step)) == _native.STEP_WORDS


@dataclass(frozen=True)
class Plan:
    """Everything a backend needs: ``torch.ops.snv2.network(x, *plan.arguments)``."""

    weights: Tensor  # [floats] float32
    words: Tensor  # int64, on the CPU
    in_channels: int
    out_channels: int
    halvings: int  # times that height and width are halved, rounding up
    classify: bool  # the result is [N, out_channels]
    steps: tuple[Step, ...] = field(repr=False)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int, bool]:
        return self.weights, self.words, self.out_channels, self.halvings, self.classify

    @property
    def units(self) -> int:
        return sum(step.kind == _UNIT for step in self.steps)

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds of one image, as the paper counts them: convolutions and linear layers."""
        total = 0
        for step in self.steps:
            pixels = height * width
            if step.kind == _STEM:
                height, width = (height + 1) // 2, (width + 1) // 2
                total += 9 * step.in_channels * step.out_channels * height * width
                height, width = (height + 1) // 2, (width + 1) // 2
            elif step.kind == _UNIT:
                if step.stride == 2:
                    height, width = (height + 1) // 2, (width + 1) // 2
                out_pixels = height * width
                total += step.in_channels * step.mid_channels * pixels
                total += step.mid_channels * (9 + step.out_channels) * out_pixels
                if step.proj_channels:
                    total += step.proj_depth * (9 + step.proj_channels) * out_pixels
            elif step.kind == _HEAD:
                total += step.mid_channels * (step.in_channels * pixels + step.out_channels)
        return total

    def output_shape(self, batch: int, height: int, width: int) -> tuple[int, ...]:
        if self.classify:
            return (batch, self.out_channels)
        for _ in range(self.halvings):
            height, width = (height + 1) // 2, (width + 1) // 2
        return (batch, self.out_channels, height, width)


class PlanBuilder:
    """Collects steps while following the channel table of the feature map between them."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._tables: list[int] = []
        self._weights: list[Tensor] = []
        self._weight_count = 0
        self._buffer: Step | None = None  # step that started the current buffer
        self._panels = 0  # of it, so far
        self._table: list[int] = []
        self._in_channels = 0
        self._halvings = 0

    @property
    def channels(self) -> int:
        """Logical channels of the feature map so far."""
        return len(self._table)

    # Parts ------------------------------------------------------------------------------------

    def _add_table(self, entries: Sequence[int]) -> int:
        offset = len(self._tables)
        self._tables.extend(entries)
        return offset

    def _add_weights(self, weight: Tensor, bias: Tensor) -> int:
        packed = pack_panels(weight, bias)
        offset = self._weight_count
        self._weights.append(packed)
        self._weight_count += packed.numel()
        return offset

    def _start_buffer(self, step: Step) -> None:
        step.new_buffer = 1
        self._buffer = step
        self._panels = 0

    def _new_planes(self, channels: int) -> list[int]:
        """Fresh planes in the current buffer, starting a panel."""
        assert self._buffer is not None
        first = self._panels * PANEL
        self._panels += -(-channels // PANEL)
        self._buffer.buffer_panels = self._panels
        return list(range(first, first + channels))

    # Steps ------------------------------------------------------------------------------------

    def add_import(self, channels: int) -> None:
        """The user's feature map, [N, channels, H, W]."""
        step = Step(_IMPORT, in_channels=channels, out_channels=channels)
        self._start_buffer(step)
        self._table = self._new_planes(channels)
        self._in_channels = channels
        self._steps.append(step)

    def add_stem(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        """``maxpool(relu(bn(conv(x))))``: conv 3x3 stride 2, max-pool 3x3 stride 2."""
        step = Step(_STEM, in_channels=conv.in_channels, out_channels=conv.out_channels)
        step.pw1_weights = self._add_weights(*fold_conv_bn(conv, bn))
        self._start_buffer(step)
        self._table = self._new_planes(conv.out_channels)
        self._in_channels = conv.in_channels
        self._halvings += 2
        self._steps.append(step)

    def add_unit(
        self,
        stride: int,
        pw1: tuple[nn.Conv2d, nn.BatchNorm2d],
        dw: tuple[nn.Conv2d, nn.BatchNorm2d],
        pw2: tuple[nn.Conv2d, nn.BatchNorm2d],
        main: Sequence[int],
        passthrough: Sequence[int],
        order: Sequence[int],
        projection: tuple[tuple[nn.Conv2d, nn.BatchNorm2d], tuple[nn.Conv2d, nn.BatchNorm2d]]
        | None = None,
    ) -> None:
        """One unit, in general index lists.

        Args:
            stride: of the depthwise convolutions, 1 or 2.
            pw1, dw, pw2: the main branch, ``relu(pw2(dw(relu(pw1(x[:, main])))))``, each with
                its batch norm.
            main: logical channels the main branch reads.
            passthrough: logical channels that go through untouched; empty with a projection.
            order: output channel ``j`` is entry ``order[j]`` of ``cat([first, main result])``,
                where ``first`` is the passthrough or the projection's result.
            projection: ``(dw, pw)`` of ``relu(pw(dw(x)))``, over all logical channels.
        """
        # A gather in the order of the planes walks memory forwards.
        gather = sorted(main, key=lambda c: self._table[c])
        columns = {c: k for k, c in enumerate(main)}
        permutation = torch.tensor([columns[c] for c in gather])
        weight, bias = fold_conv_bn(*pw1)
        step = Step(_UNIT, stride=stride, in_channels=len(gather))
        step.in_table = self._add_table([self._table[c] for c in gather])
        step.mid_channels, step.out_channels = pw1[0].out_channels, pw2[0].out_channels
        step.pw1_weights = self._add_weights(weight[:, permutation], bias)
        step.dw_weights = self._add_weights(*fold_conv_bn(*dw))
        step.pw2_weights = self._add_weights(*fold_conv_bn(*pw2))
        if projection is not None:
            self._add_projection(step, *projection)
        if stride == 2:
            self._start_buffer(step)
            self._halvings += 1
        first = [self._table[c] for c in passthrough]
        if projection is not None:
            first = self._new_planes(step.proj_channels)
            step.proj_out_panel = first[0] // PANEL
        result = self._new_planes(step.out_channels)
        step.out_panel = result[0] // PANEL
        joined = first + result
        self._table = [joined[j] for j in order]
        self._steps.append(step)

    def _add_projection(
        self,
        step: Step,
        dw: tuple[nn.Conv2d, nn.BatchNorm2d],
        pw: tuple[nn.Conv2d, nn.BatchNorm2d],
    ) -> None:
        # The depthwise part runs on whole panels; those without a live plane are left out.
        panels = sorted({plane // PANEL for plane in self._table})
        rank = {panel: i for i, panel in enumerate(panels)}
        planes = [rank[plane // PANEL] * PANEL + plane % PANEL for plane in self._table]
        dw_weight, dw_bias = fold_conv_bn(*dw)
        spread_weight = dw_weight.new_zeros(len(panels) * PANEL, 9)
        spread_bias = dw_bias.new_zeros(len(panels) * PANEL)
        spread_weight[planes], spread_bias[planes] = dw_weight, dw_bias
        order = sorted(range(len(planes)), key=planes.__getitem__)
        weight, bias = fold_conv_bn(*pw)
        step.proj_panels = len(panels)
        step.proj_panel_table = self._add_table(panels)
        step.proj_depth = len(planes)
        step.proj_table = self._add_table([planes[c] for c in order])
        step.proj_channels = pw[0].out_channels
        step.proj_dw_weights = self._add_weights(spread_weight, spread_bias)
        step.proj_pw_weights = self._add_weights(weight[:, torch.tensor(order)], bias)

    def add_head(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, fc: nn.Linear) -> None:
        """``fc(relu(bn(conv(x))).mean([2, 3]))``."""
        order = sorted(range(len(self._table)), key=self._table.__getitem__)
        weight, bias = fold_conv_bn(conv, bn)
        step = Step(_HEAD, in_channels=len(order), mid_channels=conv.out_channels)
        step.out_channels = fc.out_features
        step.in_table = self._add_table([self._table[c] for c in order])
        step.pw1_weights = self._add_weights(weight[:, torch.tensor(order)], bias)
        fc_weight = fc.weight.detach().double()
        fc_bias = fc_weight.new_zeros(fc.out_features) if fc.bias is None else fc.bias.detach()
        step.pw2_weights = self._add_weights(fc_weight, fc_bias.double())
        self._steps.append(step)

    def build(self) -> Plan:
        """The plan; without a head the map leaves in logical order."""
        classify = self._steps[-1].kind == _HEAD
        if not classify:
            channels = len(self._table)
            step = Step(_EXPORT, in_channels=channels, out_channels=channels)
            step.in_table = self._add_table(self._table)
            self._steps.append(step)
        out_channels = self._steps[-1].out_channels
        words = [_native.PLAN_MAGIC, len(self._steps), self._in_channels, out_channels]
        words += [self._halvings, int(classify)]
        assert len(words) == _native.HEADER_WORDS
        for step in self._steps:
            words += step.words()
        return Plan(
            weights=torch.cat(self._weights),
            words=torch.tensor(words + self._tables, dtype=torch.int64),
            in_channels=self._in_channels,
            out_channels=out_channels,
            halvings=self._halvings,
            classify=classify,
            steps=tuple(self._steps),
        )
