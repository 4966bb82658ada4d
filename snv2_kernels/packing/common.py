"""What all plans share: folded batch norms, how a network is told to a builder, and arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "BasePlan",
    "Builder",
    "ConvBn",
    "Folded",
    "FoldedHead",
    "FoldedStem",
    "FoldedUnit",
    "FoldingBuilder",
    "Work",
    "fold_bn",
    "fold_conv_bn",
    "fold_fc",
    "half",
    "halvings_of",
    "map_shape",
]

ConvBn = tuple[nn.Conv2d, nn.BatchNorm2d]
Folded = tuple[Tensor, Tensor]  # weight [O, K] and bias [O], float64


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


def fold_conv_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Folded:
    """``bn(conv(x))`` as one convolution: weight [O, I * kH * kW] and bias [O] in float64."""
    scale, shift = _fold_bn64(bn)
    weight = conv.weight.detach().double().flatten(1) * scale[:, None]
    if conv.bias is not None:
        shift = shift + conv.bias.detach().double() * scale
    return weight, shift


def fold_fc(fc: nn.Linear) -> Folded:
    """The weight [O, I] and bias [O] of a linear layer in float64."""
    weight = fc.weight.detach().double()
    bias = weight.new_zeros(fc.out_features) if fc.bias is None else fc.bias.detach().double()
    return weight, bias


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one step, as the paper counts them: convolutions and linear layers."""

    stride: int
    per_input_pixel: int
    per_output_pixel: int
    per_image: int = 0


@dataclass(frozen=True, kw_only=True)
class BasePlan:
    """What a plan of any backend tells."""

    in_channels: int
    out_channels: int
    classify: bool  # the result is [N, out_channels]
    units: int
    work: tuple[Work, ...] = field(repr=False)
    # Channels and halvings of each result, the last one included, where there may be several.
    results: tuple[tuple[int, int], ...] = ()

    @property
    def halvings(self) -> int:
        """Times that height and width are halved, rounding up."""
        return halvings_of(self.work)

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds of one image."""
        total = 0
        for work in self.work:
            total += work.per_input_pixel * height * width
            if work.stride == 2:
                height, width = half(height), half(width)
            total += work.per_output_pixel * height * width + work.per_image
        return total

    def output_shape(self, batch: int, height: int, width: int) -> tuple[int, ...]:
        if self.classify:
            return (batch, self.out_channels)
        return map_shape(batch, self.out_channels, self.halvings, height, width)

    def result_shapes(self, batch: int, height: int, width: int) -> list[tuple[int, ...]]:
        return [
            *(map_shape(batch, c, halvings, height, width) for c, halvings in self.results[:-1]),
            self.output_shape(batch, height, width),
        ]


def half(extent: int) -> int:
    """Of a convolution or pooling of 3x3, stride 2."""
    return (extent + 1) // 2


def halvings_of(work: Sequence[Work]) -> int:
    return sum(w.stride == 2 for w in work)


def map_shape(
    batch: int, channels: int, halvings: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """[N, C, H, W] after some halvings of ``height`` and ``width``."""
    for _ in range(halvings):
        height, width = half(height), half(width)
    return (batch, channels, height, width)


class Builder:
    """Is told a network step by step. This class packs nothing and follows the channels only: a
    module that it can be told can be packed."""

    def __init__(self) -> None:
        self.channels = 0  # of the map so far
        self.in_channels = 0  # of the caller's
        self.units = 0
        self.work: list[Work] = []

    def add_import(self, channels: int) -> None:
        """The user's feature map, [N, channels, H, W]."""
        self.channels = self.in_channels = channels

    def add_stem(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        """``maxpool(relu(bn(conv(x))))``: conv 3x3 stride 2, max-pool 3x3 stride 2."""
        self.in_channels, self.channels = conv.in_channels, conv.out_channels
        self.work += [Work(2, 0, 9 * conv.in_channels * conv.out_channels), Work(2, 0, 0)]

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
        mid, width = pw1[0].out_channels, pw2[0].out_channels
        per_output = mid * (9 + width)
        if projection is not None:
            per_output += self.channels * (9 + projection[1][0].out_channels)
        self.work.append(Work(stride, len(main) * mid, per_output))
        self.channels = len(order)
        self.units += 1

    def add_result(self) -> None:
        """The map so far is a result too, in logical order.

        Raises:
            ValueError: if plans of this kind have only one result.
        """
        raise ValueError("plans of this kind have only one result")

    def add_head(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, fc: nn.Linear) -> None:
        """``fc(relu(bn(conv(x))).mean([2, 3]))``."""
        features = conv.out_channels
        self.work.append(Work(1, self.channels * features, 0, features * fc.out_features))
        self.channels = fc.out_features


@dataclass
class FoldedStem:
    conv: Folded
    in_channels: int


@dataclass
class FoldedHead:
    conv: Folded
    fc: Folded


@dataclass
class FoldedUnit:
    stride: int
    pw1: Folded
    dw: Folded
    pw2: Folded
    main: list[int]
    passthrough: list[int]
    order: list[int]
    projection: tuple[Folded, Folded] | None
    tapped: bool = False


def _fold(pair: ConvBn) -> Folded:
    weight, bias = fold_conv_bn(*pair)
    return weight.cpu(), bias.cpu()


class FoldingBuilder(Builder):
    """Collects folded steps: a subclass lays them out when it knows them all."""

    def __init__(self) -> None:
        super().__init__()
        self._stem: FoldedStem | None = None
        self._units: list[FoldedUnit] = []
        self._head: FoldedHead | None = None

    def add_stem(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        self._stem = FoldedStem(_fold((conv, bn)), conv.in_channels)
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
        folded = None if projection is None else (_fold(projection[0]), _fold(projection[1]))
        lists = list(main), list(passthrough), list(order)
        self._units.append(FoldedUnit(stride, _fold(pw1), _fold(dw), _fold(pw2), *lists, folded))
        super().add_unit(stride, pw1, dw, pw2, main, passthrough, order, projection)

    def add_head(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, fc: nn.Linear) -> None:
        weight, bias = fold_fc(fc)
        self._head = FoldedHead(_fold((conv, bn)), (weight.cpu(), bias.cpu()))
        super().add_head(conv, bn, fc)
