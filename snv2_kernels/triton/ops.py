"""``torch.ops.snv2_triton``: schemas, checks, memory and launches, as in ``csrc/torch/ops.h``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from snv2_kernels.ops import KERNEL_DTYPES, _empty_map, _format, _no_gradient
from snv2_kernels.triton import kernels, unit_kernels
from snv2_kernels.triton.tiles import UNIT_TILES, choose_tile

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["INTERPRETED"]

# With TRITON_INTERPRET=1 a kernel is a Python function, which no tracer looks into.
INTERPRETED = not isinstance(kernels.cat_shuffle_kernel, JITFunction)

_INT32 = 2**31

# Checks ---------------------------------------------------------------------------------------


def _check(condition: bool, message: str) -> None:
    torch._check(condition, lambda: message)


def _check_map(x: Tensor, name: str) -> None:
    _check(x.dim() == 4, f"{name} must have 4 dimensions [N, C, H, W], got {x.dim()}")
    _check(x.dtype in KERNEL_DTYPES, f"{name} must be float32, float16 or bfloat16")


def _check_pixels(x: Tensor) -> None:
    _check(x.shape[2] > 0 and x.shape[3] > 0, "x must have at least one pixel")


def _check_parameters(x: Tensor, channels: int, **parameters: Tensor) -> None:
    for name, t in parameters.items():
        _check(
            t.dtype == torch.float32 and t.is_contiguous() and t.device == x.device,
            f"{name} must be a contiguous float32 tensor on the device of x",
        )
        count = channels * (9 if name == "weight" else 1)
        _check(t.numel() == count, f"{name} must have {count} elements, got {t.numel()}")


# Launches -------------------------------------------------------------------------------------


def _planar(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """A map as the kernels take it, x itself or a copy, and its strides: from image to image,
    channel to channel, pixel to pixel."""
    _, _, h, w = x.shape
    _check(h * w < _INT32 // 2, "a plane must have fewer than 2^30 pixels")
    n, c, row, pixel = x.stride()
    if w == 1:
        pixel = row
    if (h > 1 and row != w * pixel) or w * pixel >= _INT32:
        x = x.contiguous(memory_format=_format(x))
        n, c, row, pixel = x.stride()
    return x, (n, c, pixel)


def _wrapped(kernel: Any) -> Any:
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def _launch(kernel: Any, y: Tensor, channels: int, *args: Any, **constants: Any) -> None:
    """One program for each tile of ``channels`` of y."""
    batch, pixels = y.shape[0], y.shape[2] * y.shape[3]
    if batch == 0 or channels == 0:
        return
    tile = choose_tile(batch, channels, pixels, _is_channels_last(y))
    tiles = batch * -(-channels // tile.channels) * -(-pixels // tile.pixels)
    _wrapped(kernel)[(tiles,)](
        *args, BP=tile.pixels, BC=tile.channels, num_warps=tile.warps, **constants
    )


def _is_channels_last(y: Tensor) -> bool:
    return y.stride(1) == 1 and y.shape[1] > 1


def _strides(y: Tensor) -> tuple[int, int, int]:
    """Of a dense map."""
    return y.stride(0), y.stride(1), (1 if y.is_contiguous() else y.shape[1])


# Ops ------------------------------------------------------------------------------------------


def cat_shuffle(a: Tensor, b: Tensor) -> Tensor:
    _check_map(a, "a")
    _check_map(b, "b")
    _check(a.device == b.device, "a and b must be on the same device")
    _check(a.dtype == b.dtype, "a and b must have the same dtype")
    _check(a.shape == b.shape, "a and b must have the same shape")
    _, c, h, w = a.shape
    y = _empty_map(a, 2 * c, h, w)
    if h * w == 0:
        return y
    (a, a_strides), (b, b_strides) = _planar(a), _planar(b)
    _launch(
        kernels.cat_shuffle_kernel, y, c,
        a, b, y, c, h * w, *a_strides, *b_strides, *_strides(y),
        CHANNELS_LAST=_is_channels_last(y),
    )  # fmt: skip
    return y


def dw_conv3x3(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride: int = 1, relu: bool = False
) -> Tensor:
    _check_map(x, "x")
    _check_pixels(x)
    _check(stride in (1, 2), f"stride must be 1 or 2, got {stride}")
    _, c, h, w = x.shape
    _check_parameters(x, c, weight=weight, scale=scale, shift=shift)
    y = _empty_map(x, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    x, x_strides = _planar(x)
    _launch(
        kernels.dw_conv3x3_kernel, y, c,
        x, weight, scale, shift, y, c, h, w, y.shape[2] * y.shape[3], y.shape[3],
        *x_strides, *_strides(y), STRIDE=stride, RELU=relu,
    )  # fmt: skip
    return y


def split_dw_cat_shuffle(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    _check_map(x, "x")
    _check_pixels(x)
    _, c, h, w = x.shape
    _check(c % 2 == 0, f"x must have an even number of channels, got {c}")
    _check_parameters(x, c // 2, weight=weight, scale=scale, shift=shift)
    y = _empty_map(x, c, h, w)
    x, x_strides = _planar(x)
    _launch(
        kernels.split_dw_cat_shuffle_kernel, y, c // 2,
        x, weight, scale, shift, y, c // 2, h, w, h * w, *x_strides, *_strides(y),
        CHANNELS_LAST=_is_channels_last(y),
    )  # fmt: skip
    return y


def unit(
    x: Tensor,
    table: Tensor,
    pw1: Tensor,
    pw1_bias: Tensor,
    dw: Tensor,
    pw2: Tensor,
    pw2_bias: Tensor,
    side_table: Tensor,
    side_dw: Tensor,
    side_pw: Tensor,
    side_bias: Tensor,
    out_table: Tensor,
    stride: int,
) -> Tensor:
    """A packed unit (:class:`snv2_kernels.packing.UnitWeights`); its tables are taken on trust."""
    _check_map(x, "x")
    _check_pixels(x)
    matrices = (pw1, pw2, side_pw)
    others = (pw1_bias, dw, pw2_bias, side_dw, side_bias, table, side_table, out_table)
    for t in (*matrices, *others):
        _check(t.device == x.device and t.is_contiguous(), "weights must be dense, on x's device")
    _check(all(t.dtype == x.dtype for t in matrices), "matrices must have the dtype of x")
    middle_rows, depth = pw1.shape
    rows, side_depth = pw2.shape[0], side_pw.shape[1]
    _check(pw2.shape[1] == middle_rows == dw.shape[0] and table.numel() == depth, "pw1 and pw2")
    side_rows = out_table.numel() - rows
    n, _, h, w = x.shape
    y = _empty_map(x, out_table.numel(), (h - 1) // stride + 1, (w - 1) // stride + 1)
    if n == 0:
        return y
    x, x_strides = _planar(x)
    middle = x.new_empty(n, middle_rows, h, w)
    tile = UNIT_TILES[x.dtype]
    sizes = {"BM": tile.rows, "BP": tile.pixels, "BK": tile.depth, "num_warps": tile.warps}
    sizes["num_stages"] = 1
    sizes["WIDENS"] = INTERPRETED and x.dtype == torch.bfloat16
    across = n * -(-h * w // tile.pixels)
    _wrapped(unit_kernels.pw1_kernel)[(across * -(-middle_rows // tile.rows),)](
        x, table, pw1, pw1_bias, middle, depth, middle_rows, h * w, *x_strides, **sizes
    )
    pixels = y.shape[2] * y.shape[3]
    down = -(-rows // tile.rows) - (-side_rows // tile.rows)
    _wrapped(unit_kernels.dw_pw2_kernel)[(n * -(-pixels // tile.pixels) * down,)](
        middle, dw, pw2, pw2_bias, x, side_table, side_dw, side_pw, side_bias, y, out_table,
        middle_rows, rows, side_depth, side_rows, h, w, y.shape[3], pixels,
        *x_strides, *_strides(y), STRIDE=stride, **sizes,
    )  # fmt: skip
    return y


def _unit_fake(
    x: Tensor,
    table: Tensor,
    pw1: Tensor,
    pw1_bias: Tensor,
    dw: Tensor,
    pw2: Tensor,
    pw2_bias: Tensor,
    side_table: Tensor,
    side_dw: Tensor,
    side_pw: Tensor,
    side_bias: Tensor,
    out_table: Tensor,
    stride: int,
) -> Tensor:
    height, width = ((extent - 1) // stride + 1 for extent in x.shape[2:])
    return _empty_map(x, out_table.numel(), height, width)


def _define(*functions: Callable[..., Any]) -> None:
    define: Any = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    for function in functions:
        define(f"snv2_triton::{function.__name__}", function, mutates_args=())


_define(cat_shuffle, dw_conv3x3, split_dw_cat_shuffle, unit)
torch.library.register_fake("snv2_triton::unit", _unit_fake)
torch.library.register_autograd("snv2_triton::unit", _no_gradient)
