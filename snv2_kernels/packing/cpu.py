"""Plans of the CPU backend (``csrc/include/snv2/plan.h``): panels of 16 planes, all float32."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from snv2_kernels import _native
from snv2_kernels.memory import empty_floats
from snv2_kernels.packing.common import (
    BasePlan,
    Builder,
    ConvBn,
    fold_conv_bn,
    fold_fc,
    half,
    halvings_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PANEL", "Plan", "PlanBuilder", "Product", "Step", "pack_panels"]

PANEL: int = _native.PANEL
_IMPORT, _STEM, _UNIT, _HEAD, _EXPORT = range(5)


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
class Product:
    """One convolution or linear layer of a plan."""

    step: str  # "stem", "stage2.0" to "stage4.3", "head"
    name: str
    weights: int  # offset of its weights
    multiply_adds: int  # of one image


@dataclass(frozen=True, kw_only=True)
class Plan(BasePlan):
    """Everything the CPU backend needs: ``torch.ops.snv2.network(x, *plan.arguments)``."""

    words: Tensor  # int64, on the CPU
    weights: Tensor  # [floats] float32
    steps: tuple[Step, ...] = field(repr=False)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int, bool]:
        return self.weights, self.words, self.out_channels, self.halvings, self.classify

    def products(self, height: int, width: int) -> list[Product]:
        """All convolutions and linear layers in the order in which weights are packed."""
        products = []
        stage, unit = 1, 0
        for step in self.steps:
            pixels = height * width
            if step.kind == _STEM:
                height, width = half(height), half(width)
                work = 9 * step.in_channels * step.out_channels * height * width
                products.append(Product("stem", "conv", step.pw1_weights, work))
                height, width = half(height), half(width)
            elif step.kind == _UNIT:
                unit += 1
                if step.stride == 2:
                    stage, unit = stage + 1, 0
                    height, width = half(height), half(width)
                products += _unit_products(f"stage{stage}.{unit}", step, pixels, height * width)
            elif step.kind == _HEAD:
                features = step.mid_channels
                work = step.in_channels * features * pixels
                products.append(Product("head", "conv5 + mean", step.pw1_weights, work))
                work = features * step.out_channels
                products.append(Product("head", "fc", step.pw2_weights, work))
        return products


def _unit_products(name: str, step: Step, pixels_in: int, pixels: int) -> list[Product]:
    mid, depth = step.mid_channels, step.proj_depth
    products = [
        ("pw1", step.pw1_weights, step.in_channels * mid * pixels_in),
        ("dw", step.dw_weights, 9 * mid * pixels),
        ("pw2", step.pw2_weights, mid * step.out_channels * pixels),
        ("projection dw", step.proj_dw_weights, 9 * depth * pixels),
        ("projection pw", step.proj_pw_weights, depth * step.proj_channels * pixels),
    ]
    return [Product(name, *product) for product in products if product[-1] > 0]


class PlanBuilder(Builder):
    """Collects steps while following the channel table of the feature map between them."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[Step] = []
        self._tables: list[int] = []
        self._weights: list[Tensor] = []
        self._weight_count = 0
        self._buffer: Step | None = None  # step that started the current buffer
        self._panels = 0  # of it, so far
        self._table: list[int] = []

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
        step = Step(_IMPORT, in_channels=channels, out_channels=channels)
        self._start_buffer(step)
        self._table = self._new_planes(channels)
        self._steps.append(step)
        super().add_import(channels)

    def add_stem(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        step = Step(_STEM, in_channels=conv.in_channels, out_channels=conv.out_channels)
        step.pw1_weights = self._add_weights(*fold_conv_bn(conv, bn))
        self._start_buffer(step)
        self._table = self._new_planes(conv.out_channels)
        self._steps.append(step)
        super().add_stem(conv, bn)

    def add_unit(
        self,
        stride: int,
        pw1: ConvBn,
        dw: ConvBn,
        pw2: ConvBn,
        main: Sequence[int],
        passthrough: Sequence[int],
        order: Sequence[int],
        projection: tuple[ConvBn, ConvBn] | None = None,
    ) -> None:
        # A gather in the order of the planes walks memory forwards.
        gather = sorted(main, key=lambda c: self._table[c])
        columns = {c: k for k, c in enumerate(main)}
        permutation = [columns[c] for c in gather]
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
        first = [self._table[c] for c in passthrough]
        if projection is not None:
            first = self._new_planes(step.proj_channels)
            step.proj_out_panel = first[0] // PANEL
        result = self._new_planes(step.out_channels)
        step.out_panel = result[0] // PANEL
        joined = first + result
        self._table = [joined[j] for j in order]
        self._steps.append(step)
        super().add_unit(stride, pw1, dw, pw2, main, passthrough, order, projection)

    def _add_projection(self, step: Step, dw: ConvBn, pw: ConvBn) -> None:
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
        step.proj_pw_weights = self._add_weights(weight[:, order], bias)

    def add_head(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, fc: nn.Linear) -> None:
        order = sorted(range(len(self._table)), key=self._table.__getitem__)
        weight, bias = fold_conv_bn(conv, bn)
        step = Step(_HEAD, in_channels=len(order), mid_channels=conv.out_channels)
        step.out_channels = fc.out_features
        step.in_table = self._add_table([self._table[c] for c in order])
        step.pw1_weights = self._add_weights(weight[:, order], bias)
        step.pw2_weights = self._add_weights(*fold_fc(fc))
        self._steps.append(step)
        super().add_head(conv, bn, fc)

    def build(self) -> Plan:
        """The plan; without a head the map leaves in logical order."""
        classify = self._steps[-1].kind == _HEAD
        if not classify:
            channels = len(self._table)
            step = Step(_EXPORT, in_channels=channels, out_channels=channels)
            step.in_table = self._add_table(self._table)
            self._steps.append(step)
        out_channels = self._steps[-1].out_channels
        words = [_native.PLAN_MAGIC, len(self._steps), self.in_channels, out_channels]
        words += [halvings_of(self.work), int(classify)]
        assert len(words) == _native.HEADER_WORDS
        for step in self._steps:
            words += step.words()
        return Plan(
            weights=torch.cat(self._weights, out=empty_floats(self._weight_count)),
            words=torch.tensor(words + self._tables, dtype=torch.int64, device="cpu"),
            in_channels=self.in_channels,
            out_channels=out_channels,
            classify=classify,
            units=self.units,
            work=tuple(self.work),
            steps=tuple(self._steps),
        )
