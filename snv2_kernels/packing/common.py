"""What all plans share: folded batch norms, how a network is told to a builder, and arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from snv2_kernels.packing.units import (
    IDENTITY,
    Activation,
    Gate,
    Layer,
    Term,
    Unit,
    Unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snv2_kernels.quantization.numbers import IntegerLayer

__all__ = [
    "BasePlan",
    "Builder",
    "Folded",
    "FoldedHead",
    "FoldedStem",
    "FoldingBuilder",
    "Work",
    "fold",
    "fold_bn",
    "fold_conv_bn",
    "fold_fc",
    "half",
    "halvings_of",
    "map_shape",
    "same_layer",
]


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
    if value is None or isinstance(value, UninitializedTensorMixin):
        what = "None" if value is None else "not there yet"
        message = f"bn: {name} is {what}; a batch norm without running statistics cannot fold"
        raise ValueError(message)
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


def fold_fc(fc: nn.Linear) -> tuple[Tensor, Tensor]:
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

    backends: ClassVar[tuple[str, ...]]  # whose kernels read it
    in_channels: int
    out_channels: int
    classify: bool  # the result is [N, out_channels]
    units: int
    work: tuple[Work, ...] = field(repr=False)
    results: tuple[tuple[int, int], ...]  # channels and halvings of each, the last one included

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

    @property
    def result_fields(self) -> tuple[list[int], list[int], bool]:
        """What the ops that give all results take: channels and halvings of each, and whether the
        last are scores."""
        return (
            [c for c, _ in self.results],
            [halvings for _, halvings in self.results],
            self.classify,
        )

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
        self._classifies = False

    def add_import(self, channels: int) -> None:
        """The user's feature map, [N, channels, H, W]."""
        self.channels = self.in_channels = channels

    def add_stem(self, layer: Layer) -> None:
        """``maxpool(layer(x))``: convolution 3x3 stride 2, max-pool 3x3 stride 2."""
        self.in_channels, self.channels = layer.conv.in_channels, layer.channels
        self.work += [Work(2, 0, 9 * self.in_channels * self.channels), Work(2, 0, 0)]

    def add_unit(self, unit: Unit[Layer]) -> None:
        """One unit, in general index lists."""
        per_input = per_output = per_image = 0
        depth, depthwise = len(unit.main), 0
        for part in unit.branch:
            if isinstance(part, Gate):
                per_image += sum(g.conv.in_channels * g.conv.out_channels for g in part.layers)
                continue
            depthwise += part.kernel > 1
            outputs = part.conv.out_channels
            read = part.kernel**2 if part.kernel > 1 else depth // part.conv.groups
            multiply_adds = outputs * read
            if depthwise > unit.strided:
                per_output += multiply_adds
            else:
                per_input += multiply_adds
            depth = part.channels
        if unit.projection_layers:
            dw, pw = unit.projection_layers
            per_output += self.channels * (dw.kernel**2 + pw.channels)
        self.work.append(Work(unit.stride, per_input, per_output, per_image))
        self.channels = len(unit.order)
        self.units += 1

    def add_result(self) -> None:
        """The map so far is a result too, in logical order.

        Raises:
            ValueError: if it is not one that a unit makes.
        """
        if not self.units or self._classifies:
            raise ValueError("only the map that a unit makes can be a result")

    def add_head(self, layer: Layer | None, fc: nn.Linear | None) -> None:
        """``fc(layer(x).mean([2, 3]))``, the layer pointwise if there is one; the means themselves
        without fc."""
        features = self.channels if layer is None else layer.channels
        scores = 0 if fc is None else fc.out_features
        per_pixel = 0 if layer is None else self.channels * features
        self.work.append(Work(1, per_pixel, 0, features * scores))
        self.channels = scores or features
        self._classifies = True


class Folded(NamedTuple):
    """A :class:`Layer` as numbers, in float64 on the CPU."""

    weight: Tensor  # [O, I / groups * kH * kW]
    bias: Tensor  # [O]
    activation: Activation = IDENTITY
    kernel: int = 1
    dilation: int = 1
    keeps_input: bool = False
    groups: tuple[int, ...] = ()  # group of each row, if a pointwise layer has more than one
    shuffle: tuple[int, ...] = ()  # of the result; empty: as it is
    integers: IntegerLayer | None = None  # the same layer for a plan of integers

    @property
    def channels(self) -> int:
        return len(self.bias) * (1 + self.keeps_input)

    def dense(self) -> Folded:
        """The layer as one group: zeros where a row's own reads nothing, so what is infinite in the
        others makes NaN of it."""
        if not self.groups:
            return self
        depth = self.weight.shape[1]
        weight = self.weight.new_zeros(len(self.bias), depth * (1 + max(self.groups)))
        for row, group in enumerate(self.groups):
            weight[row, group * depth : (group + 1) * depth] = self.weight[row]
        return self._replace(weight=weight, groups=())

    def rows(self, order: Sequence[int]) -> Folded:
        """The layer, without its shuffle, with its result in another order."""
        at = list(order)
        slope = self.activation.slope
        if isinstance(slope, Tensor) and slope.numel() > 1:
            slope = slope[at]
        return self._replace(
            weight=self.weight[at], bias=self.bias[at],
            activation=replace(self.activation, slope=slope),
            groups=tuple(self.groups[i] for i in at) if self.groups else (), shuffle=(),
        )  # fmt: skip


@dataclass
class FoldedStem:
    conv: Folded
    in_channels: int


@dataclass
class FoldedHead:
    conv: Folded | None
    fc: Folded


def fold(layer: Layer) -> Folded:
    weight, bias = fold_conv_bn(layer.conv, layer.bn)
    for term in layer.terms:
        of_term = _fold_term(term, layer)
        weight, bias = weight + of_term[0], bias + of_term[1]
    shape = layer.kernel, layer.dilation, layer.keeps_input
    groups: tuple[int, ...] = ()
    if layer.kernel == 1 and layer.conv.groups > 1:
        height = layer.conv.out_channels // layer.conv.groups
        groups = tuple(row // height for row in range(layer.conv.out_channels))
    shuffle = tuple(layer.shuffle or ())
    activation = _in_float64(layer.activation)
    return Folded(weight.cpu(), bias.cpu(), activation, *shape, groups, shuffle)


def _fold_term(term: Term, layer: Layer) -> tuple[Tensor, Tensor]:
    """What a term adds to its layer's folded weight and bias."""
    depth, rows = layer.conv.in_channels // layer.conv.groups, layer.conv.out_channels
    if term.conv is not None:
        weight, bias = fold_conv_bn(term.conv, term.bn)
        weight = weight.view(rows, depth, -1)
    else:
        scale, bias = _fold_bn64(term.bn)
        weight = scale.new_zeros(rows, depth, 1)
        row = torch.arange(rows, device=scale.device)
        weight[row, row % depth, 0] = scale
    kernel = math.isqrt(weight.shape[2])
    begin = (layer.kernel - kernel) // 2  # both windows are around the same pixel
    whole = weight.new_zeros(rows, depth, layer.kernel, layer.kernel)
    whole[:, :, begin : begin + kernel, begin : begin + kernel] = weight.view(
        rows, depth, kernel, kernel
    )
    return whole.flatten(1), bias


def _in_float64(activation: Activation) -> Activation:
    """With its slope on the CPU, if that is a tensor."""
    if not isinstance(activation.slope, Tensor):
        return activation
    return replace(activation, slope=activation.slope.detach().double().cpu())


# What no kernel computes, told in layers that all of them do --------------------------------------


def lowered(unit: Unit[Folded], keep_groups: bool) -> Unit[Folded]:
    """The same unit, of layers that neither keep their input nor shuffle, and gates of two layers
    or none. Only where ``keep_groups`` the branch's layers have groups."""
    unit = _unshuffled(unit)
    branch: list[Folded | Gate[Folded]] = []
    for part in unit.branch:
        if isinstance(part, Gate):
            if part.adds_source and not _fits_shortcut(part, unit):
                raise Unsupported("a shortcut that does not lead around a whole branch")
            if part != Gate():
                branch.append(_of_two_layers(part.map(Folded.dense)))
        elif part.keeps_input:
            branch[-1:] = _over_both(branch[-1] if branch else None, part)
        else:
            branch.append(part if keep_groups else part.dense())
    projection = unit.projection
    if isinstance(projection, tuple):
        projection = projection[0], projection[1].dense()
    return replace(unit, branch=tuple(branch), projection=projection)


def _unshuffled(unit: Unit[Folded]) -> Unit[Folded]:
    """The same unit with each shuffle in the rows of the pointwise layer before it, or in what the
    branch reads."""
    branch: list[Folded | Gate[Folded]] = []
    wanted: Sequence[int] = ()  # the order of what the layer at hand makes
    for part in reversed(unit.branch):
        if isinstance(part, Gate):
            if wanted:
                raise Unsupported("a shuffle behind squeeze-and-excite")
            branch.append(part)
            continue
        if part.shuffle:
            wanted = [part.shuffle[i] for i in wanted] if wanted else part.shuffle
        if wanted and part.keeps_input:
            raise Unsupported("a shuffle of a depthwise convolution beside its input")
        branch.append(part.rows(wanted) if wanted else part)
        if part.kernel == 1:
            wanted = ()
    main = [unit.main[i] for i in wanted] if wanted else unit.main
    if wanted and unit.has_shortcut:
        raise Unsupported("a shuffle without a pointwise layer before it, and a shortcut")
    return replace(unit, branch=tuple(reversed(branch)), main=main)


def _fits_shortcut(gate: Gate[Folded], unit: Unit[Folded]) -> bool:
    same_map = unit.stride == 1 and unit.branch_channels == len(unit.main)
    return same_map and unit.branch[-1] is gate


def _of_two_layers(gate: Gate[Folded]) -> Gate[Folded]:
    """The first of them changes nothing where there is but one."""
    gate = replace(gate, activation=_in_float64(gate.activation))
    if gate.expand is None or gate.reduce is not None:
        return gate
    return replace(gate, reduce=same_layer(gate.expand.weight.shape[1]))


def same_layer(channels: int) -> Folded:
    """A pointwise layer that changes nothing, for kernels that cannot do without one."""
    return Folded(*_same(channels))


def _same(channels: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that changes nothing. Zeros times an infinity are NaN."""
    same = torch.eye(channels, dtype=torch.float64)
    return same, same.new_zeros(channels)


def _over_both(before: Folded | Gate[Folded] | None, dw: Folded) -> tuple[Folded, Folded]:
    """Rows of the layer before, twice, and a depthwise convolution that takes the first of each as
    they are: its other taps are zeros, so an infinity beside a pixel makes a NaN of it."""
    if before is None or isinstance(before, Gate) or before.kernel > 1:
        raise Unsupported("a depthwise convolution beside its input, which no pointwise one makes")
    before = before.dense()
    channels = len(dw.bias)
    same = torch.zeros_like(dw.weight)
    same[:, dw.kernel**2 // 2] = 1
    taps, shift = torch.cat([same, dw.weight]), torch.cat([torch.zeros_like(dw.bias), dw.bias])
    activation = _after_identity(dw.activation, channels)
    slope = before.activation.slope
    if isinstance(slope, Tensor) and slope.numel() > 1:
        slope = slope.repeat(2)
    twice = before._replace(
        weight=before.weight.repeat(2, 1), bias=before.bias.repeat(2),
        activation=replace(before.activation, slope=slope),
    )  # fmt: skip
    return twice, Folded(taps, shift, activation, dw.kernel, dw.dilation)


def _after_identity(activation: Activation, channels: int) -> Activation:
    """None of so many channels, the given one of as many more."""
    if activation.kind == "identity":
        return activation
    slope = {"relu": 0.0, "leaky_relu": activation.slope, "prelu": activation.slope}
    if activation.kind not in slope:
        raise Unsupported(f"{activation.kind} of a depthwise convolution beside its input")
    slopes = torch.as_tensor(slope[activation.kind], dtype=torch.float64).expand(channels)
    return Activation("prelu", torch.cat([slopes.new_ones(channels), slopes]))


class FoldingBuilder(Builder):
    """Collects folded steps: a subclass lays them out when it knows them all. The unit that makes a
    result writes it in logical order too."""

    keeps_groups = False  # whether the kernels have pointwise layers of several groups

    def __init__(self) -> None:
        super().__init__()
        self._stem: FoldedStem | None = None
        self._units: list[Unit[Folded]] = []
        self._head: FoldedHead | None = None
        self._tapped: set[int] = set()  # units whose map is a result

    def add_stem(self, layer: Layer) -> None:
        self._stem = FoldedStem(fold(layer), layer.conv.in_channels)
        super().add_stem(layer)

    def add_unit(self, unit: Unit[Layer]) -> None:
        self._units.append(lowered(unit.map(fold), self.keeps_groups))
        super().add_unit(unit)

    def add_result(self) -> None:
        super().add_result()
        self._tapped.add(len(self._units) - 1)

    def add_head(self, layer: Layer | None, fc: nn.Linear | None) -> None:
        features = self.channels if layer is None else layer.channels
        weight, bias = _same(features) if fc is None else fold_fc(fc)
        conv = None if layer is None else fold(layer)
        self._head = FoldedHead(conv, Folded(weight.cpu(), bias.cpu()))
        super().add_head(layer, fc)
