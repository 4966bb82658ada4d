"""Quantized files as networks in integers: the ranges that the file has its maps in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from snv2_kernels.fuse import fuse
from snv2_kernels.nn.planned import PlannedModule
from snv2_kernels.onnx.values import Quantization
from snv2_kernels.packing import PlanBuilder
from snv2_kernels.packing.units import Layer, Unit, Unsupported
from snv2_kernels.quantization.network import Key, Step, steps
from snv2_kernels.quantization.numbers import LARGEST_BYTE, Affine, Ranges, integer_layers

__all__ = ["in_integers"]

_SIX = 6.0  # the end of ReLU6


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


def in_integers(
    network: nn.Module, image: Quantization | None, maps: Mapping[int, Quantization]
) -> nn.Module:
    """Returns the network fused, in integers within the ranges of its file.

    Weights are rounded again, as the kernels need them; maps that only pass through a unit are
    not, which the file's concatenations do.

    Args:
        network: of the file, dequantized.
        image: of the file's input, None if that is not quantized.
        maps: of each convolution's result, by the address of its weight.

    Raises:
        ValueError: if the network does not run in integers, or the file does not say a range.
    """
    fused = fuse(network)
    if not isinstance(fused, PlannedModule) or (reason := fused.reason()) is not None:
        why = reason if isinstance(fused, PlannedModule) else "it is not fused as a whole"
        raise ValueError(f"dtype: the network does not run in int8: {why}")
    builder = _LayerBuilder()
    try:
        fused._tell(builder)
        results = {
            step.key: _affine(step, _told(builder.convolutions[step.key], maps, step))
            for step in steps(builder)
            if step.kind != "fc"
        }
        ranges = Ranges(_input(image, builder.in_channels), results)
        builder.build_integers(integer_layers(builder, ranges))
    except Unsupported as error:
        raise ValueError(f"dtype: the network does not run in int8: {error}") from None
    fused._ranges = ranges
    fused._packed_state = None
    return fused


def _told(conv: nn.Conv2d, maps: Mapping[int, Quantization], step: Step) -> Quantization:
    found = maps.get(conv.weight.data_ptr())
    if found is None:
        raise Unsupported(
            f"the file does not say in which range the result of {step.name} is;"
            " snv2.quantize(load_onnx(path), images) finds it"
        )
    return found


def _ends(told: Quantization) -> tuple[float, float]:
    """The least and the largest number that integers stand for."""
    limits = np.iinfo(told.dtype)
    return (limits.min - told.zero) * told.scale, (limits.max - told.zero) * told.scale


def _affine(step: Step, told: Quantization) -> Affine:
    """What the bytes of a layer's result stand for, all channels alike."""
    channels = step.folded.channels
    low, high = _ends(told)
    if not step.clamps:
        scale, zero = told.scale, float(-low / told.scale)
    else:  # a byte of 0 is 0
        high = min(high, _SIX) if step.folded.activation.kind == "relu6" else high
        scale, zero = high / LARGEST_BYTE, 0.0
    return Affine(_filled(scale, channels), _filled(zero, channels))


def _input(image: Quantization | None, channels: int) -> Affine:
    if image is None:
        raise Unsupported("the file does not quantize its image")
    low, _ = _ends(image)
    return Affine(_filled(image.scale, channels), _filled(round(-low / image.scale), channels))


def _filled(value: Any, channels: int) -> torch.Tensor:
    return torch.full((channels,), float(value), dtype=torch.float64)
