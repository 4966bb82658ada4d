"""Integer layers: how real numbers become bytes, and folded weights int8.

Every map is uint8, ``real = (q - zero[c]) * scale[c]``. Every layer computes::

    q_out[o] = clamp(rint(multiplier[o] * sum_k(weight[o, k] * q_in[k]) + offset[o]), 0, 255)

with an exact integer sum and one fused multiply-add in float32, rounded half to even. The scales of
what it reads are folded into ``weight`` before its rows are rounded, zero points into ``offset``.
The formula is all of a layer: ReLU is the clamp at 0, since ``zero`` is 0 behind one, and ReLU6 is
the clamp at 255, since 255 * scale is at most 6 behind one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from snv2_kernels.packing.common import FoldingBuilder
from snv2_kernels.packing.units import Unsupported
from snv2_kernels.quantization.network import Key, Step, evaluate

__all__ = ["Affine", "IntegerLayer", "Quantization", "Ranges", "integer_layers", "joined"]

LARGEST_BYTE, LARGEST_WEIGHT = 255, 127
_INT32 = 2.0**31


@dataclass(frozen=True)
class Affine:
    """Real numbers that bytes stand for: ``real = (q - zero[c]) * scale[c]`` for channel ``c``."""

    scale: Tensor  # [C], float64
    zero: Tensor  # [C], float64, not always whole

    def __len__(self) -> int:
        return len(self.scale)

    def take(self, channels: Sequence[int]) -> Affine:
        """Returns the affine of some channels, in the given order."""
        at = list(channels)
        return Affine(self.scale[at], self.zero[at])


@dataclass(frozen=True)
class IntegerLayer:
    """One layer in integers, as the formula of this module reads it.

    Attributes:
        weight: int8 [O, K] in [-127, 127], ``K`` as in :class:`Folded`: ``I``, ``I * 9`` or 9.
        multiplier: float32 [O].
        offset: float32 [O].
        result: what the bytes of the result stand for; None if the result is float scores.
    """

    weight: Tensor
    multiplier: Tensor
    offset: Tensor
    result: Affine | None


@dataclass(frozen=True)
class Ranges:
    """Everything that calibration finds; integer layers follow from it and the weights alone.

    Attributes:
        input: what the bytes of the image or of the caller's map stand for.
        results: what the bytes of each layer's result stand for; ``"fc"`` has none.
        means: for each layer the mean of what each column of its weight multiplies, [K] or, of a
            depthwise layer, [O, 9]. Rounding weights then moves no result's mean. Layers without an
            entry are not corrected.
    """

    input: Affine
    results: dict[Key, Affine]
    means: dict[Key, Tensor] = field(default_factory=dict)


def joined(parts: Sequence[Ranges]) -> Ranges:
    """Returns the ranges of networks without stem and head that run one behind the other."""
    results: dict[Key, Affine] = {}
    means: dict[Key, Tensor] = {}
    units = 0
    for part in parts:
        places = [key for key in part.results if not isinstance(key, str)]
        assert len(places) == len(part.results), "a part has a stem or a head"
        for unit, layer in places:
            results[units + unit, layer] = part.results[unit, layer]
            if (unit, layer) in part.means:
                means[units + unit, layer] = part.means[unit, layer]
        units += 1 + max(unit for unit, _ in places)
    return Ranges(parts[0].input, results, means)


@dataclass(frozen=True)
class Quantization:
    """A network in integers.

    Attributes:
        ranges: of the calibration that it was made with.
        layers: every layer, by its :data:`Key`.
    """

    ranges: Ranges
    layers: dict[Key, IntegerLayer]

    @property
    def input(self) -> Affine:
        """What the bytes of the image or of the caller's map stand for."""
        return self.ranges.input


def integer_layers(builder: FoldingBuilder, ranges: Ranges) -> Quantization:
    """Returns the integer layers of a folded network.

    For each row of a folded weight, with ``scaled = weight * scale_in``::

        step = scaled.abs().max() / 127
        integers = (scaled / step).round()
        real = integers * step / scale_in
        multiplier = step / scale_out
        offset = (bias + (weight - real) @ mean_in - (real * scale_in) @ zero_in) / scale_out
        offset += zero_out

    all in float64, ``multiplier`` and ``offset`` rounded to float32 at the end.

    Args:
        builder: was told the network.
        ranges: of the same network, be it with other weights.

    Raises:
        ValueError: if ``ranges`` are not of a network of this form.
        Unsupported: naming a layer that has no integer form, whose weights are not finite, or whose
            results could leave the range of int32.
    """
    if len(ranges.input) != builder.in_channels:
        raise ValueError(
            f"ranges: input: expected {builder.in_channels} channels, got {len(ranges.input)};"
            " is it of this network?"
        )
    maker = _Maker(ranges)
    evaluate(builder, ranges.input, maker)
    return Quantization(ranges, maker.layers)


class _Maker:
    """Evaluator of affines, which makes each layer as it comes by."""

    def __init__(self, ranges: Ranges) -> None:
        self.ranges = ranges
        self.layers: dict[Key, IntegerLayer] = {}

    def layer(self, step: Step, x: Affine) -> Affine:
        if step.kind == "depthwise" and x.zero.any():
            raise Unsupported(f"{step.name}: a depthwise layer pads with 0, which is no byte there")
        result = None if step.kind == "fc" else self._result(step)
        self.layers[step.key] = _integer_layer(step, x, result, self._means(step))
        return x if result is None else result

    def _result(self, step: Step) -> Affine:
        result = self.ranges.results.get(step.key)
        if result is None:
            raise ValueError(f"ranges: there is none for {step.name}; is it of this network?")
        count = len(step.folded.bias)
        if len(result) != count:
            raise ValueError(
                f"ranges: {step.name}: expected {count} channels, got {len(result)};"
                " is it of this network?"
            )
        if step.clamps and result.zero.any():
            raise ValueError(f"ranges: zero of {step.name}: expected 0 behind an activation")
        if step.folded.activation.kind == "relu6" and float(result.scale.max()) * 255 > 6.0001:
            raise ValueError(f"ranges: scale of {step.name}: expected at most 6 / 255 behind relu6")
        return result

    def _means(self, step: Step) -> Tensor | None:
        means = self.ranges.means.get(step.key)
        shape = step.folded.weight.shape[0 if step.kind == "depthwise" else 1 :]
        if means is not None and means.shape != shape:
            raise ValueError(
                f"ranges: means of {step.name}: expected {list(shape)}, got {list(means.shape)};"
                " is it of this network?"
            )
        return means

    def max_pool(self, x: Affine) -> Affine:
        return x

    def take(self, x: Affine, channels: Sequence[int]) -> Affine:
        return x.take(channels)

    def concat(self, parts: Sequence[Affine]) -> Affine:
        return Affine(torch.cat([p.scale for p in parts]), torch.cat([p.zero for p in parts]))


def _columns(step: Step, x: Affine) -> tuple[Tensor, Tensor]:
    """Scale and zero of what each column of the weight multiplies, [1, K] or [O, 1]."""
    if step.kind == "depthwise":
        return x.scale[:, None], x.zero[:, None]
    repeats = step.folded.weight.shape[1] // len(x)  # 9 of a stem
    return x.scale.repeat_interleave(repeats)[None], x.zero.repeat_interleave(repeats)[None]


def _integer_layer(
    step: Step, x: Affine, result: Affine | None, means: Tensor | None
) -> IntegerLayer:
    weight, bias = step.folded.weight, step.folded.bias
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise Unsupported(f"{step.name}: its weights are not finite")
    scale_in, zero_in = _columns(step, x)
    scaled = weight * scale_in
    row = scaled.abs().amax(1, keepdim=True) / LARGEST_WEIGHT
    row = torch.where(row > 0, row, torch.ones_like(row))
    integers = (scaled / row).round()
    shift = -(integers * row * zero_in).sum(1)
    if means is not None:
        shift += ((scaled - integers * row) / scale_in * means).sum(1)
    scale_out, zero_out = (1.0, 0.0) if result is None else (result.scale, result.zero)
    layer = IntegerLayer(
        integers.to(torch.int8),
        (row[:, 0] / scale_out).float(),
        ((bias + shift) / scale_out + zero_out).float(),
        result,
    )
    _check_bounds(step, layer)
    return layer


def _check_bounds(step: Step, layer: IntegerLayer) -> None:
    """Raises :class:`Unsupported` if int32 does not hold all sums, or all results before the
    clamp."""
    weight = layer.weight.double()
    multiplier, offset = layer.multiplier.double(), layer.offset.double()
    for side in (weight.clamp(min=0), weight.clamp(max=0)):
        sums = side.sum(1) * LARGEST_BYTE
        for what, values in (("sums", sums), ("results", multiplier * sums + offset)):
            if not bool((values.abs() < _INT32).all()):  # what is NaN is not smaller either
                raise Unsupported(f"{step.name}: its {what} could leave the range of int32")
