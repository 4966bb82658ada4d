"""``torch.ops.snv2_triton.*_backward``, as in ``csrc/torch/ops.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from snv2_kernels.ops import _empty_map, register_python_parts
from snv2_kernels.triton import backward_kernels, kernels, row_kernels
from snv2_kernels.triton.launches import (
    Rows,
    check,
    grid_of,
    is_channels_last,
    move,
    planar,
    strides,
    unit_of,
    wrapped,
)
from snv2_kernels.triton.ops import check_map, check_parameters, check_pixels, define
from snv2_kernels.triton.tiles import GradientTile, gradient_tile, overridden, power

_SUMS = int(row_kernels.SUMS)
_SUMS_PARTS, _SUMS_CHANNELS = 8, 32

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
    grad_weight, grad_scale, grad_shift = (torch.empty_like(t) for t in (weight, scale, shift))
    if channels == 0:
        return grad_x, grad_weight, grad_scale, grad_shift
    last = is_channels_last(grad_x)
    grad, g_places = planar(grad)
    x, x_places = planar(x)
    vector = 1 if last or w % 2 else unit_of(x, 4, w)

    def run(tile: GradientTile) -> Tensor:
        t_w, t_h = width // tile.columns, height // tile.rows
        t_n, t_c = n // tile.images, -(-channels // tile.channels)
        if last:
            parts = t_w * t_h * t_n
            first, third = -(-parts // tile.strips), 1
        else:
            first, third = t_h * -(-t_w // tile.useful(t_w, stride)), t_n
            parts = first * third
        sums = x.new_empty((parts, _SUMS, channels), dtype=torch.float32)
        if n == 0:
            return sums
        # As many rows under way as registers allow: those of all architectures.
        lead = int(not relu or t_w == 1) if last else tile.rows if relu else min(tile.rows, 7)
        grid, axes = grid_of(first, t_c, third)
        wrapped(backward_kernels.depthwise_gradient_kernel)[grid](
            grad, x, weight, scale, shift, grad_x, sums, tile.images, t_n, t_c,
            int(channels), int(h), int(w), *map(int, (*g_places, *x_places, *strides(grad_x))),
            ROWS=tile.rows, COLUMNS=tile.columns, BC=tile.channels, BG=tile.strips,
            ONE=tile.images == 1,
            LEAD=lead, STRIDE=stride, RELU=relu,
            PASSTHROUGH=bool(c != channels), CHANNELS_LAST=last, AXES=axes,
            num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
        return sums

    sizes = n, channels, height, width
    tile = gradient_tile(*sizes, stride, relu, vector, x.element_size(), last)
    if (override := overridden(tile)) is not None:
        tile = override.fitted(tile, last, n, height, width)
    sums = run(tile)
    parts = sums.shape[0]
    wrapped(backward_kernels.depthwise_sums_kernel)[(-(-channels // _SUMS_CHANNELS),)](
        sums, weight, scale, grad_weight, grad_scale, grad_shift, parts, channels,
        BP=power(parts, _SUMS_PARTS), BC=_SUMS_CHANNELS, num_warps=1,
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
