"""``torch.ops.snv2_triton``: schemas, checks and memory of the ops, as in ``csrc/torch/ops.h``.
:mod:`~snv2_kernels.triton.network` has those of plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snv2_kernels.ops import KERNEL_DTYPES, _empty_map
from snv2_kernels.triton import kernels
from snv2_kernels.triton.launches import (
    INTERPRETED,
    Rows,
    check,
    convolve,
    move,
    planar,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["check_map", "check_parameters", "check_pixels", "define"]


def check_map(x: Tensor, name: str) -> None:
    check(x.dim() == 4, f"{name} must have 4 dimensions [N, C, H, W], got {x.dim()}")
    check(x.dtype in KERNEL_DTYPES, f"{name} must be float32, float16 or bfloat16")


def check_pixels(x: Tensor) -> None:
    check(x.shape[2] > 0 and x.shape[3] > 0, "x must have at least one pixel")


def check_parameters(x: Tensor, channels: int, **parameters: Tensor) -> None:
    for name, t in parameters.items():
        check(
            t.dtype == torch.float32 and t.is_contiguous() and t.device == x.device,
            f"{name} must be a contiguous float32 tensor on the device of x",
        )
        count = channels * (9 if name == "weight" else 1)
        check(t.numel() == count, f"{name} must have {count} elements, got {t.numel()}")


# Ops ------------------------------------------------------------------------------------------


def cat_shuffle(a: Tensor, b: Tensor) -> Tensor:
    check_map(a, "a")
    check_map(b, "b")
    check(a.device == b.device, "a and b must be on the same device")
    check(a.dtype == b.dtype, "a and b must have the same dtype")
    check(a.shape == b.shape, "a and b must have the same shape")
    _, c, h, w = a.shape
    y = _empty_map(a, 2 * c, h, w)
    if h * w == 0:
        return y
    (a, a_strides), (b, b_strides) = planar(a), planar(b)
    rows = Rows.of(y, c, [a_strides, b_strides])
    (a_n, a_o, a_i), (b_n, b_o, b_i) = rows.strides
    y_places = 2 * rows.outer * rows.inner, 2 * rows.inner, rows.inner
    dense = bool(a_o == b_o == rows.inner and a_i == b_i == 1)
    places = a_n, a_o, b_n, b_o, *y_places
    move(kernels.cat_shuffle_kernel, [a, b, y], rows, places, [a_i, b_i], dense)
    return y


def dw_conv3x3(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride: int = 1, relu: bool = False
) -> Tensor:
    check_map(x, "x")
    check_pixels(x)
    check(stride in (1, 2), f"stride must be 1 or 2, got {stride}")
    _, c, h, w = x.shape
    check_parameters(x, c, weight=weight, scale=scale, shift=shift)
    y = _empty_map(x, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    convolve(x, weight, scale, shift, y, c, stride, relu)
    return y


def split_dw_cat_shuffle(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    check_map(x, "x")
    check_pixels(x)
    _, c, h, w = x.shape
    check(c % 2 == 0, f"x must have an even number of channels, got {c}")
    check_parameters(x, c // 2, weight=weight, scale=scale, shift=shift)
    y = _empty_map(x, c, h, w)
    convolve(x, weight, scale, shift, y, c // 2, 1, True)
    return y


def define(function: Callable[..., Any], mutates: tuple[str, ...] = ()) -> None:
    """An op of the function's name and signature."""
    decorator: Any = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    decorator(f"snv2_triton::{function.__name__}", function, mutates_args=mutates)


for _function in (cat_shuffle, dw_conv3x3, split_dw_cat_shuffle):
    define(_function)
