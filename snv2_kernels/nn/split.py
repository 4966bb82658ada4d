"""The literal fused sequence as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from snv2_kernels.models import channel_shuffle
from snv2_kernels.nn.fused import FusedModule
from snv2_kernels.nn.methods import why_replaced
from snv2_kernels.nn.network import _conv_bn
from snv2_kernels.ops import KERNEL_DTYPES, OPERATORS, operators, split_dw_cat_shuffle
from snv2_kernels.packing import fold_bn
from snv2_kernels.packing.units import Layer, Unsupported

__all__ = ["SplitDepthwiseShuffle"]

_Weights = tuple[Tensor, Tensor, Tensor]  # weight, scale, shift


class SplitDepthwiseShuffle(FusedModule):
    """Split, depthwise 3x3 + BN + ReLU on the main half, concat and shuffle::

        a, b = x.chunk(2, 1)
        y = channel_shuffle(torch.cat([a, relu(bn(dw(b)))], 1), 2)

    Args:
        channels: of the input, even; the submodules ``dw`` and ``bn`` have half of them.

    Shapes: [N, channels, H, W] -> the same.

    Raises:
        ValueError: if ``channels`` is not an even positive number.
    """

    kernel_backends = tuple(OPERATORS)

    def __init__(self, channels: int) -> None:
        super().__init__()
        if not isinstance(channels, int) or channels <= 0 or channels % 2:
            raise ValueError(f"channels: expected an even positive number, got {channels!r}")
        half = channels // 2
        self.dw = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn = nn.BatchNorm2d(half)

    def _plain(self, x: Tensor) -> Tensor:
        passthrough, main = x.chunk(2, 1)
        main = self.bn(self.dw(main)).relu()
        return channel_shuffle(torch.cat([passthrough, main], 1), 2)

    def _parts(self) -> Layer:
        return _conv_bn("dw", self.dw, self.bn, 3, depthwise=True)

    def _in_channels(self) -> int:
        return 2 * self._parts().conv.in_channels

    def _check_supported(self) -> None:
        self._parts()
        if (reason := why_replaced(self)) is not None:
            raise Unsupported(reason)

    def _pack(self, backend: str, dtype: torch.dtype, device: torch.device) -> _Weights:
        layer = self._parts()
        conv = layer.conv
        scale, shift = fold_bn(layer.bn)
        if conv.bias is not None:
            shift = (shift.double() + conv.bias.detach().double() * scale.double()).float()
        return conv.weight.detach().float().contiguous(), scale.float(), shift.float()

    def _run(self, weights: _Weights, x: Tensor, backend: str) -> Tensor:
        out: Tensor = operators(backend).split_dw_cat_shuffle(x, *weights)
        return out

    def _in_graph(self, x: Tensor) -> Tensor:
        parameters = list(self.parameters())
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)):
            raise Unsupported("gradients, which folded parameters do not pass on")
        dtype, autocast = self._dtypes(x)
        weights = self._pack("", dtype, x.device)  # a few numbers for each channel
        own = self.dw.weight.dtype
        if own not in KERNEL_DTYPES or (autocast is None and own != x.dtype):
            raise Unsupported("dtypes")
        return split_dw_cat_shuffle(x.to(dtype), *weights, self._backend)

    def _autocast_dtype(self, x: torch.dtype, autocast: torch.dtype) -> torch.dtype:
        return torch.promote_types(x, autocast)
