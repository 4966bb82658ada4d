"""``torch.ops.snv2_triton``: schemas, checks, memory and launches of the ops, as in
``csrc/torch/ops.h``. :mod:`~snv2_kernels.triton.network` has those of plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from snv2_kernels.ops import KERNEL_DTYPES, _empty_map, _format
from snv2_kernels.triton import kernels
from snv2_kernels.triton.tiles import Tile, choose_tile, map_tiles
from snv2_kernels.triton.tuning import tile_for

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "INTERPRETED",
    "check",
    "check_map",
    "check_pixels",
    "define",
    "planar",
    "strides",
    "wrapped",
]

# With TRITON_INTERPRET=1 a kernel is a Python function, which no tracer looks into.
INTERPRETED = not isinstance(kernels.cat_shuffle_kernel, JITFunction)

_INT32 = 2**31

# Checks ---------------------------------------------------------------------------------------


def check(condition: bool, message: str) -> None:
    torch._check(condition, lambda: message)


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


# Launches -------------------------------------------------------------------------------------


def planar(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """A map as the kernels take it, x itself or a copy, and its strides: from image to image,
    channel to channel, pixel to pixel."""
    _, _, h, w = x.shape
    check(x.numel() == 0 or h * w < _INT32 // 2, "a plane must have fewer than 2^30 pixels")
    n, c, row, pixel = x.stride()
    if w == 1:
        pixel = row
    if (h > 1 and row != w * pixel) or w * pixel >= _INT32:
        x = x.contiguous(memory_format=_format(x))
        n, c, row, pixel = x.stride()
    return x, (n, c, pixel)


def wrapped(kernel: Any) -> Any:
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def _launch(kernel: Any, y: Tensor, channels: int, *args: Any, **constants: Any) -> None:
    """One program for each tile of ``channels`` of y."""
    batch, pixels = y.shape[0], y.shape[2] * y.shape[3]
    if batch == 0 or channels == 0:
        return

    def launch(tile: Tile) -> None:
        tiles = batch * -(-channels // tile.channels) * -(-pixels // tile.pixels)
        wrapped(kernel)[(tiles,)](
            *args, BP=tile.pixels, BC=tile.channels, num_warps=tile.warps, **constants
        )

    last = _is_channels_last(y)
    default = choose_tile(batch, channels, pixels, last)
    shape = (kernel.fn.__name__, y.dtype, batch, channels, pixels, *constants.values())
    launch(tile_for(y, shape, default, map_tiles(last), launch))


def _is_channels_last(y: Tensor) -> bool:
    return y.stride(1) == 1 and y.shape[1] > 1


def strides(y: Tensor) -> tuple[int, int, int]:
    """Of a dense map."""
    return y.stride(0), y.stride(1), (1 if y.is_contiguous() else y.shape[1])


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
    _launch(
        kernels.cat_shuffle_kernel, y, c,
        a, b, y, c, h * w, *a_strides, *b_strides, *strides(y),
        CHANNELS_LAST=_is_channels_last(y),
    )  # fmt: skip
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
    x, x_strides = planar(x)
    _launch(
        kernels.dw_conv3x3_kernel, y, c,
        x, weight, scale, shift, y, c, h, w, y.shape[2] * y.shape[3], y.shape[3],
        *x_strides, *strides(y), STRIDE=stride, RELU=relu,
    )  # fmt: skip
    return y


def split_dw_cat_shuffle(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    check_map(x, "x")
    check_pixels(x)
    _, c, h, w = x.shape
    check(c % 2 == 0, f"x must have an even number of channels, got {c}")
    check_parameters(x, c // 2, weight=weight, scale=scale, shift=shift)
    y = _empty_map(x, c, h, w)
    x, x_strides = planar(x)
    _launch(
        kernels.split_dw_cat_shuffle_kernel, y, c // 2,
        x, weight, scale, shift, y, c // 2, h, w, h * w, *x_strides, *strides(y),
        CHANNELS_LAST=_is_channels_last(y),
    )  # fmt: skip
    return y


def define(function: Callable[..., Any], mutates: tuple[str, ...] = ()) -> None:
    """An op of the function's name and signature."""
    decorator: Any = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    decorator(f"snv2_triton::{function.__name__}", function, mutates_args=mutates)


for _function in (cat_shuffle, dw_conv3x3, split_dw_cat_shuffle):
    define(_function)
