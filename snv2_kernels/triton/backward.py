"""``torch.ops.snv2_triton.*_backward``, as in ``csrc/torch/ops.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from snv2_kernels.ops import _empty_map, register_python_parts
from snv2_kernels.triton import backward_kernels
from snv2_kernels.triton.ops import (
    _is_channels_last,
    _launch,
    check,
    check_map,
    check_parameters,
    check_pixels,
    define,
    planar,
    strides,
    wrapped,
)
from snv2_kernels.triton.tiles import choose_tile

_SUMS = int(backward_kernels.SUMS)
_STEPS = 16  # tiles whose sums are written as one
CUT_WARPS = 4

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of x, weight, scale and shift


def cat_shuffle_backward(grad: Tensor) -> tuple[Tensor, Tensor]:
    check_map(grad, "grad")
    _, c, h, w = grad.shape
    check(c % 2 == 0, f"grad must have an even number of channels, got {c}")
    a, b = (_empty_map(grad, c // 2, h, w) for _ in range(2))
    if h * w > 0:
        grad, g_strides = planar(grad)
        _launch(
            backward_kernels.cat_shuffle_backward_kernel, a, c // 2,
            grad, a, b, c // 2, h * w, *g_strides, *strides(a),
        )  # fmt: skip
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
    # The smallest: nine taps and ten sums of more elements for each thread are spilled.
    tile = choose_tile(1, 1, 1, _is_channels_last(cut))
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
        _launch(
            backward_kernels.depthwise_input_kernel, grad_x, channels,
            cut, weight, scale, grad_x, c - channels, channels, h, w, h * w, width,
            *strides(cut), *strides(grad_x), STRIDE=stride,
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
