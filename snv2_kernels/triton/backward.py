"""``torch.ops.snv2_triton.*_backward``, as in ``csrc/torch/ops.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from snv2_kernels.ops import _empty_map, register_python_parts
from snv2_kernels.triton import backward_kernels, kernels
from snv2_kernels.triton.launches import (
    Rows,
    check,
    convolve,
    is_channels_last,
    move,
    planar,
    strides,
    wrapped,
)
from snv2_kernels.triton.ops import check_map, check_parameters, check_pixels, define
from snv2_kernels.triton.tiles import Tile

_SUMS = int(backward_kernels.SUMS)
_STEPS = 16  # tiles whose sums are written as one
CUT_WARPS = 4
CUT_TILES = Tile(64, 4, 2), Tile(8, 32, 2)  # of contiguous and channels-last maps

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of x, weight, scale and shift


def cat_shuffle_backward(grad: Tensor) -> tuple[Tensor, Tensor]:
    check_map(grad, "grad")
    _, c, h, w = grad.shape
    check(c % 2 == 0, f"grad must have an even number of channels, got {c}")
    a, b = (_empty_map(grad, c // 2, h, w) for _ in range(2))
    if h * w > 0:
        grad, g_strides = planar(grad)
        g_n, g_c, g_p = g_strides
        rows = Rows.of(a, c // 2, [(g_n, 2 * g_c, g_p)])
        ((g_n, g_o, g_i),) = rows.strides
        g_i = g_c if rows.channels_last else g_i
        places = g_n, g_o, 0 if rows.channels_last else g_c, rows.outer * rows.inner, rows.inner
        dense = bool(g_c == rows.inner and g_i == 1)
        move(kernels.cat_shuffle_backward_kernel, [grad, a, b], rows, places, [g_i], dense)
    return a, b


def _check_gradient(grad: Tensor, x: Tensor, height: int, width: int) -> None:
    check_map(grad, "grad")
    check(grad.device == x.device, "grad and x must be on the same device")
    check(grad.dtype == x.dtype, "grad and x must have the same dtype")
    n, c, _, _ = x.shape
    check(grad.shape == (n, c, height, width), f"grad must be {n} x {c} x {height} x {width}")


def _depthwise_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    channels: int,
    stride: int,
    relu: bool,
) -> Gradients:
    n, c, h, w = x.shape
    height, width = grad.shape[2:]
    grad_x = _empty_map(x, c, h, w)
    cut = _empty_map(x, channels, height, width)
    # Small: nine taps and ten sums of more elements for each thread are spilled.
    tile = CUT_TILES[is_channels_last(cut)]
    steps = min(_STEPS, -(-height * width // tile.pixels))
    strips = -(-height * width // (tile.pixels * steps))
    sums = x.new_empty((n * strips, channels, _SUMS), dtype=torch.float32)
    grad_weight, grad_scale, grad_shift = (torch.empty_like(t) for t in (weight, scale, shift))
    if channels == 0:
        return grad_x, grad_weight, grad_scale, grad_shift
    if n > 0:
        grad, g_strides = planar(grad)
        x, x_strides = planar(x)
        programs = n * strips * -(-channels // tile.channels)
        wrapped(backward_kernels.depthwise_cut_kernel)[(programs,)](
            grad, x, weight, scale, shift, cut, grad_x, sums, channels, h, w, height * width, width,
            steps, *g_strides, *x_strides, *strides(cut), *strides(grad_x),
            BP=tile.pixels, BC=tile.channels, num_warps=CUT_WARPS, num_stages=1,
            STRIDE=stride, RELU=relu, PASSTHROUGH=c != channels,
        )  # fmt: skip
        if stride == 1:
            convolve(cut, weight, scale, shift, grad_x, channels, 1, False, turned=True)
        else:
            programs = n * -(-h * w // tile.pixels) * -(-channels // tile.channels)
            wrapped(backward_kernels.depthwise_input_kernel)[(programs,)](
                cut, weight, scale, grad_x, channels, h, w, h * w, width,
                *strides(cut), *strides(grad_x),
                BP=tile.pixels, BC=tile.channels, num_warps=tile.warps, STRIDE=stride,
            )  # fmt: skip
    wrapped(backward_kernels.depthwise_sums_kernel)[(channels,)](
        sums, weight, scale, grad_weight, grad_scale, grad_shift, n * strips, channels,
        BP=64, num_warps=2,
    )  # fmt: skip
    return grad_x, grad_weight, grad_scale, grad_shift


def dw_conv3x3_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int = 1,
    relu: bool = False,
) -> Gradients:
    check_map(x, "x")
    check_pixels(x)
    check(stride in (1, 2), f"stride must be 1 or 2, got {stride}")
    _, c, h, w = x.shape
    check_parameters(x, c, weight=weight, scale=scale, shift=shift)
    _check_gradient(grad, x, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return _depthwise_backward(grad, x, weight, scale, shift, c, stride, relu)


def split_dw_cat_shuffle_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor
) -> Gradients:
    check_map(x, "x")
    check_pixels(x)
    _, c, h, w = x.shape
    check(c % 2 == 0, f"x must have an even number of channels, got {c}")
    check_parameters(x, c // 2, weight=weight, scale=scale, shift=shift)
    _check_gradient(grad, x, h, w)
    return _depthwise_backward(grad, x, weight, scale, shift, c // 2, 1, True)


for _function in (cat_shuffle_backward, dw_conv3x3_backward, split_dw_cat_shuffle_backward):
    define(_function)
register_python_parts("snv2_triton")
