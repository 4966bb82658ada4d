"""Models that were quantized elsewhere, in integers within the ranges of their maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from snv2_kernels.fuse import fuse
from snv2_kernels.nn.planned import PlannedModule
from snv2_kernels.packing import PlanBuilder
from snv2_kernels.packing.units import Layer, Unit, Unsupported
from snv2_kernels.quantization.network import Key, Step, steps
from snv2_kernels.quantization.numbers import LARGEST_BYTE, Affine, Ranges
from snv2_kernels.quantization.ranges import check_kernels, set_ranges

__all__ = ["Span", "within_spans"]

_SIX = 6.0  # the end of ReLU6


class Span(NamedTuple):
    """The least and the largest number that the integers of a map stand for."""

    low: float
    high: float

    @property
    def scale(self) -> float:
        """Of a byte."""
        return (self.high - self.low) / LARGEST_BYTE


class _LayerBuilder(PlanBuilder):
    """Keeps which convolution each layer is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions: dict[Key, nn.Conv2d] = {}

    def add_stem(self, layer: Layer) -> None:
        self.convolutions["stem"] = layer.conv
        super().add_stem(layer)

    def add_unit(self, unit: Unit[Layer]) -> None:
        for j, layer in enumerate(unit.layers()):
            self.convolutions[len(self._units), j] = layer.conv
        super().add_unit(unit)

    def add_head(self, layer: Layer | None, fc: nn.Linear | None) -> None:
        if layer is not None:
            self.convolutions["features"] = layer.conv
        super().add_head(layer, fc)


def within_spans(network: nn.Module, image: Span | None, maps: Mapping[int, Span]) -> nn.Module:
    """Returns the network fused, in integers within the spans of its maps.

    Weights are rounded again, as the kernels need them; maps that only pass through a unit are
    not, as concatenations of quantized models are.

    Args:
        network: in floats, of dequantized weights.
        image: of the input, None if that was not quantized.
        maps: of each convolution's result, by the address of its weight.

    Raises:
        ValueError: if the network does not run in integers, or a span is not known.
    """
    fused = fuse(network)
    if not isinstance(fused, PlannedModule) or (reason := fused.reason()) is not None:
        why = reason if isinstance(fused, PlannedModule) else "it is not fused as a whole"
        raise ValueError(f"the network does not run in int8: {why}")
    builder = _LayerBuilder()
    try:
        fused._tell(builder)
        results = {
            step.key: _affine(step, _span(builder.convolutions[step.key], maps, step))
            for step in steps(builder)
            if step.kind != "fc"
        }
        ranges = Ranges(_input(image, builder.in_channels), results)
        check_kernels(builder, ranges)
    except Unsupported as error:
        raise ValueError(f"the network does not run in int8: {error}") from None
    set_ranges(fused, ranges)
    return fused


def _span(conv: nn.Conv2d, maps: Mapping[int, Span], step: Step) -> Span:
    found = maps.get(conv.weight.data_ptr())
    if found is None:
        raise Unsupported(
            f"it does not say in which range the result of {step.name} is;"
            " snv2.quantize(model, images) of the model in floats finds it"
        )
    return found


def _affine(step: Step, span: Span) -> Affine:
    """What the bytes of a layer's result stand for, all channels alike."""
    channels = step.folded.channels
    if not step.clamps:
        return Affine(_filled(span.scale, channels), _filled(-span.low / span.scale, channels))
    # A byte of 0 is 0.
    high = min(span.high, _SIX) if step.folded.activation.kind == "relu6" else span.high
    return Affine(_filled(high / LARGEST_BYTE, channels), _filled(0, channels))


def _input(image: Span | None, channels: int) -> Affine:
    if image is None:
        raise Unsupported("it does not quantize its image")
    zero = round(-image.low / image.scale)
    return Affine(_filled(image.scale, channels), _filled(zero, channels))


def _filled(value: float, channels: int) -> torch.Tensor:
    return torch.full((channels,), float(value), dtype=torch.float64)
