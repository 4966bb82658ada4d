"""Models that ``torch.ao.quantization.convert`` made, such as torchvision's quantized networks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from snv2_kernels.quantization.spans import Span, within_spans

__all__ = ["from_torch_ao"]


def from_torch_ao(model: nn.Module) -> nn.Module:
    """Returns a model that PyTorch's eager mode quantized, in integers on this package's kernels.

    Its weights are dequantized and rounded again, row by row, and its maps keep the ranges that
    PyTorch observed; those that pass through a unit are not rounded again at its end.

    Args:
        model: in ``eval()`` mode, after ``torch.ao.quantization.convert``, of one network as a
            whole, such as ``torchvision.models.quantization.shufflenet_v2_x1_0(quantize=True)``.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if it was not converted, has a quantized module that is not known, or does not
            run in integers, with the reason.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    spans: dict[int, Span] = {}
    images: list[Span] = []
    with torch.no_grad():
        plain = _dequantized(model, "", spans, images)
    if not spans or len(images) != 1:
        raise ValueError(
            "model: expected one that torch.ao.quantization.convert has made, with one QuantStub;"
            f" it has {len(spans)} quantized convolutions and {len(images)} stubs"
        )
    try:
        return within_spans(plain.eval(), images[0], spans)
    except ValueError as error:
        raise ValueError(f"model: {error}") from None


def _dequantized(
    module: nn.Module, name: str, spans: dict[int, Span], images: list[Span]
) -> nn.Module:
    """The same module in floats; notes in which spans its maps are."""
    from torch.ao.nn import quantized
    from torch.ao.nn.intrinsic.quantized import ConvReLU2d

    made: Any = module
    if isinstance(made, quantized.Quantize):
        images.append(_span(float(made.scale), int(made.zero_point)))
        return nn.Identity()
    if isinstance(made, quantized.DeQuantize):
        return nn.Identity()
    if isinstance(made, quantized.QFunctional | quantized.FloatFunctional):
        return quantized.FloatFunctional()
    if isinstance(made, quantized.Conv2d):
        conv = _convolution(made)
        spans[conv.weight.data_ptr()] = _span(made.scale, made.zero_point)
        return nn.Sequential(conv, nn.ReLU()) if isinstance(made, ConvReLU2d) else conv
    if isinstance(made, quantized.Linear):
        linear = nn.Linear(made.in_features, made.out_features, made.bias() is not None)
        _fill(linear, made)
        return linear
    if type(module).__module__.startswith("torch.ao.nn."):
        raise ValueError(f"model: {name}: {type(module).__name__} is not known")
    copied = copy.copy(module)
    copied._modules = {
        key: None
        if child is None
        else _dequantized(child, f"{name}.{key}".strip("."), spans, images)
        for key, child in module._modules.items()
    }
    return copied


def _convolution(made: Any) -> nn.Conv2d:
    shape = made.in_channels, made.out_channels, made.kernel_size
    window = made.stride, made.padding, made.dilation, made.groups
    if made.padding_mode != "zeros":
        raise ValueError(f"model: padding_mode={made.padding_mode!r} is not known")
    conv = nn.Conv2d(*shape, *window, bias=made.bias() is not None)
    _fill(conv, made)
    return conv


def _fill(layer: nn.Conv2d | nn.Linear, made: Any) -> None:
    weight: Tensor = made.weight()
    layer.weight.copy_(weight.dequantize())
    if layer.bias is not None:
        layer.bias.copy_(made.bias())


def _span(scale: float, zero: int) -> Span:
    return Span(-zero * scale, (255 - zero) * scale)
