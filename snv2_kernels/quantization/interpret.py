"""The integer network in plain PyTorch: what every int8 kernel must give to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from snv2_kernels.packing.common import FoldingBuilder
from snv2_kernels.quantization.network import Key, Step, evaluate
from snv2_kernels.quantization.numbers import LARGEST_BYTE, Affine, IntegerLayer, Quantization

__all__ = ["IntegerMap", "dequantized", "fused_multiply_add", "interpret", "quantized"]

Observer = Callable[[Key, Tensor], None]  # is shown the result of each layer


@dataclass(frozen=True)
class IntegerMap:
    """Bytes [N, C, H, W] or [N, C], and what they stand for; float scores [N, C] without that."""

    values: Tensor
    affine: Affine | None


def quantized(x: Tensor, affine: Affine) -> Tensor:
    """Returns the bytes of an image or map: ``clamp(rint(x / scale + zero), 0, 255)``.

    The quotient is a product with ``(1 / scale)`` in float32, and it and the sum are one fused
    multiply-add.

    Args:
        x: float [N, C, H, W].
        affine: of the ``C`` channels.
    """
    inverse, zero = (1 / affine.scale).float(), affine.zero.float()
    return _to_bytes(fused_multiply_add(x.float(), _channels(inverse, x), _channels(zero, x)))


def dequantized(values: Tensor, affine: Affine) -> Tensor:
    """Returns ``(values - zero) * scale`` in float32, for bytes [N, C, H, W]."""
    zero, scale = affine.zero.float(), affine.scale.float()
    return (values.float() - _channels(zero, values)) * _channels(scale, values)


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Returns ``a * b + c`` in float32, rounded once.

    The product is exact in float64. The sum is rounded to odd there, which the rounding to float32
    that follows cannot tell from no rounding at all.
    """
    product, c = torch.broadcast_tensors(a.double() * b.double(), c.double())
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)  # exact: Knuth's TwoSum
    is_even = total.view(torch.int64) % 2 == 0
    towards = torch.where(error > 0, torch.inf, -torch.inf).to(total)
    odd = torch.nextafter(total, towards)
    return torch.where((error != 0) & is_even, odd, total).float()


def _channels(per_channel: Tensor, x: Tensor) -> Tensor:
    """Shaped so that it meets the channels of ``x``."""
    return per_channel.view(-1, *[1] * (x.dim() - 2))


def _to_bytes(x: Tensor) -> Tensor:
    return x.round().clamp(0, LARGEST_BYTE).to(torch.uint8)


class _Integers:
    """Evaluator of the integer network."""

    def __init__(self, layers: dict[Key, IntegerLayer], observer: Observer | None) -> None:
        self.layers = layers
        self.observer = observer

    def layer(self, step: Step, x: IntegerMap) -> IntegerMap:
        layer = self.layers[step.key]
        sums = _sums(step, layer, x)
        multiplier, offset = (_channels(t, sums) for t in (layer.multiplier, layer.offset))
        real = fused_multiply_add(sums.float(), multiplier, offset)
        if step.kind == "features":
            real = real.clamp(min=0).double().mean((2, 3)).float()
        values = real if layer.result is None else _to_bytes(real)
        if self.observer is not None:
            self.observer(step.key, values)
        return IntegerMap(values, layer.result)

    def max_pool(self, x: IntegerMap) -> IntegerMap:
        return IntegerMap(F.max_pool2d(x.values.float(), 3, 2, 1).to(torch.uint8), x.affine)

    def take(self, x: IntegerMap, channels: Sequence[int]) -> IntegerMap:
        assert x.affine is not None
        return IntegerMap(x.values[:, list(channels)], x.affine.take(channels))

    def concat(self, parts: Sequence[IntegerMap]) -> IntegerMap:
        affines = [part.affine for part in parts if part.affine is not None]
        affine = Affine(torch.cat([a.scale for a in affines]), torch.cat([a.zero for a in affines]))
        return IntegerMap(torch.cat([part.values for part in parts], 1), affine)


def _sums(step: Step, layer: IntegerLayer, x: IntegerMap) -> Tensor:
    """Returns the exact sums of the layer's formula, in float32 or float64.

    Whole numbers below 2^24 add up exactly in float32, in any order.
    """
    largest = int(layer.weight.int().abs().sum(1).max()) * LARGEST_BYTE
    dtype = torch.float32 if largest < 2**24 else torch.float64
    values, weight = x.values.to(dtype), layer.weight.to(dtype)
    if step.kind == "fc":
        return values @ weight.T
    if step.kind == "stem":
        assert x.affine is not None
        border = x.affine.zero.round()
        padded = torch.cat(
            [
                F.pad(values[:, c : c + 1], (1, 1, 1, 1), value=float(border[c]))
                for c in range(values.shape[1])
            ],
            1,
        )
        return F.conv2d(padded, weight.view(len(weight), -1, 3, 3), stride=2)
    if step.kind == "depthwise":
        weight = weight.view(-1, 1, 3, 3)
        return F.conv2d(values, weight, None, step.stride, 1, groups=len(weight))
    return F.conv2d(values, weight[:, :, None, None])


@torch.no_grad()
def interpret(
    builder: FoldingBuilder,
    quantization: Quantization,
    x: Tensor,
    observer: Observer | None = None,
) -> list[Tensor]:
    """Returns the float32 results of the integer network: tapped maps, then the last one.

    Args:
        builder: was told the network that ``quantization`` is of.
        quantization: its integers.
        x: images or the caller's map, [N, C, H, W]: float, or uint8 if they are bytes already.
        observer: is called with the key and the result of each layer, before any max-pool: bytes
            [N, C, H, W], or [N, C] of ``"features"``, and float32 scores of ``"fc"``.

    Raises:
        ValueError: if ``x`` has another shape.
    """
    affine = quantization.input
    if x.dim() != 4 or x.shape[1] != len(affine):
        raise ValueError(f"x: expected [N, {len(affine)}, H, W], got {list(x.shape)}")
    values = x if x.dtype == torch.uint8 else quantized(x, affine)
    start = IntegerMap(values, affine)
    results = evaluate(builder, start, _Integers(quantization.layers, observer))
    return [r.values if r.affine is None else dequantized(r.values, r.affine) for r in results]
