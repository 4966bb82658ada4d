"""How the ops' kernels are launched: the places of maps' elements, units, tiles and grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from snv2_kernels.ops import _format
from snv2_kernels.triton import depthwise_kernels, kernels
from snv2_kernels.triton.tiles import StripTile, T, Tile, map_tiles, strip_tiles
from snv2_kernels.triton.tuning import tile_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "INTERPRETED",
    "Rows",
    "check",
    "convolve",
    "grid_of",
    "is_channels_last",
    "move",
    "planar",
    "strides",
    "unit_of",
    "wrapped",
]

# With TRITON_INTERPRET=1 a kernel is a Python function, which no tracer looks into.
INTERPRETED = not isinstance(kernels.cat_shuffle_kernel, JITFunction)

_INT32 = 2**31
_AXIS = 2**16  # of a grid, but for the first
_PLANE = 64  # pixels of one whose size is worth kernels of its own

Strides = tuple[int, int, int]  # from image to image, channel to channel, pixel to pixel


def check(condition: bool, message: str) -> None:
    torch._check(condition, lambda: message)


def planar(x: Tensor) -> tuple[Tensor, Strides]:
    """Returns a map as the kernels take it, x itself or a copy, and its strides."""
    _, _, h, w = x.shape
    check(x.numel() == 0 or h * w < _INT32 // 2, "a plane must have fewer than 2^30 pixels")
    n, c, row, pixel = x.stride()
    if w == 1:
        pixel = row
    if (h > 1 and row != w * pixel) or w * pixel >= _INT32:
        x = x.contiguous(memory_format=_format(x))
        n, c, row, pixel = x.stride()
    return x, (n, c, pixel)


def strides(y: Tensor) -> Strides:
    """Returns those of a dense map."""
    return y.stride(0), y.stride(1), (1 if y.is_contiguous() else y.shape[1])


def is_channels_last(y: Tensor) -> bool:
    return y.stride(1) == 1 and y.shape[1] > 1


def wrapped(kernel: Any) -> Any:
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def unit_of(y: Tensor, most: int, *multiples: int) -> int:
    """Returns how many elements, of at most 16 bytes, can be moved as one where rows begin at such
    multiples."""
    unit = min(16 // y.element_size(), most)
    while any(n % unit != 0 for n in multiples):
        unit //= 2
    return unit


def launch(
    kernel: Any, y: Tensor, key: tuple[object, ...], tiles: Sequence[T], run: Callable[[T], None]
) -> None:
    """Run the kernel in its tile for such a key."""
    run(tile_for(y, (kernel.fn.__name__, y.dtype, *key), tiles[0], tiles, run))


def grid_of(first: int, second: int, third: int) -> tuple[tuple[int, ...], bool]:
    """Returns the grid of so many programs, and whether those are its axes."""
    if second < _AXIS and third < _AXIS:
        return (first, second, third), True
    return (first * second * third,), False


# Elements that are moved ----------------------------------------------------------------------


@dataclass
class Rows:
    """Maps as [batch, outer, inner], inner along memory, with their strides there."""

    channels_last: bool
    batch: int
    outer: int
    inner: int
    strides: list[Strides]

    @staticmethod
    def of(y: Tensor, channels: int, each: Sequence[Strides]) -> Rows:
        """``channels`` of maps of y's sizes and memory format; dimensions that lie in the memory of
        all of them as one are one."""
        batch, pixels = y.shape[0], y.shape[2] * y.shape[3]
        if not is_channels_last(y):
            rows = Rows(False, batch, channels, pixels, list(each))
            if all(n == channels * c for n, c, _ in each) and batch * channels < _INT32 // 4:
                rows.batch, rows.outer = 1, batch * channels
            return rows._trimmed()
        rows = Rows(True, batch, pixels, channels, [(n, p, c) for n, c, p in each])
        if all(p == channels * c for _, c, p in each):
            rows.outer, rows.inner = 1, pixels * channels
            together = all(n == pixels * channels * c for n, c, _ in each)
            if together and batch * rows.inner < _INT32 // 4:
                rows.batch, rows.inner = 1, batch * rows.inner
        return rows._trimmed()

    def _trimmed(self) -> Rows:
        """Without strides that lead nowhere."""
        self.strides = [
            (n if self.batch > 1 else 0, o if self.outer > 1 else 0, i) for n, o, i in self.strides
        ]
        return self


def move(
    kernel: Any, maps: Sequence[Tensor], rows: Rows, places: Sequence[int],
    steps: Sequence[int], dense: bool,
) -> None:  # fmt: skip
    """Launch a kernel that moves elements.

    Args:
        kernel: one of ``kernels.py``.
        maps: its tensors.
        rows: their common sizes.
        places: its strides of images and rows.
        steps: its strides of elements.
        dense: whether all rows of the maps lie one after the other.
    """
    outer, inner, last = rows.outer, rows.inner, rows.channels_last
    if rows.batch * outer * inner == 0:
        return
    y = maps[0]
    unit = unit_of(y, 8, inner, *places)
    plane = int(inner) if dense and not last and unit == 1 and inner <= _PLANE else 0

    def run(tile: Tile) -> None:
        across, down = (tile.channels, tile.pixels) if last else (tile.pixels, tile.channels)
        each = min(unit, across)
        t_o = -(-outer // (down if last else down * tile.rounds))
        t_i = -(-inner // (across * tile.rounds if last else across))
        grid, axes = grid_of(t_o, t_i, rows.batch)
        wrapped(kernel)[grid](
            *maps, outer, inner // each, t_i, rows.batch, *(n // each for n in places), *steps,
            BO=down, BI=across, ROUNDS=tile.rounds, UNIT=each, PLANE=plane,
            EVEN=bool(not last and outer % (down * tile.rounds) == 0),
            CHANNELS_LAST=last, AXES=axes, num_warps=tile.warps,
        )  # fmt: skip

    tiles = map_tiles(outer, inner, unit, y.element_size(), last)
    launch(kernel, y, (rows.batch, outer, inner, last), tiles, run)


# Depthwise convolutions -----------------------------------------------------------------------


def convolve(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    y: Tensor,
    channels: int,
    stride: int,
    relu: bool,
) -> None:
    """Launch a depthwise convolution of the last channels of x, which as many others pass."""
    batch, (height, width), last = y.shape[0], y.shape[2:], is_channels_last(y)
    if batch == 0 or channels == 0:
        return
    x, (x_n, x_c, x_p) = planar(x)
    y_n, y_c, y_p = strides(y)
    h, w = x.shape[2:]
    passthrough = bool(x.shape[1] != channels)
    if last:
        vector, vectors = 1, False
        x_unit = unit_of(x, 8, channels, x_n, x_p) if x_c == 1 else 1
        y_unit = unit_of(y, 8, y_n, y_p)
        x_places = x_n // x_unit, x_c, x_p // x_unit
        y_places = y_n // y_unit, y_c, y_p // y_unit
    else:
        vector = unit_of(y, 8, w) // stride if w % 2 == 0 else 1
        while width % vector != 0:
            vector //= 2
        x_unit = unit_of(x, vector * stride, w, x_n, x_c)
        vectors = bool(x_p == 1 and x_unit == vector * stride > 1)
        y_unit = vector
        x_places = x_n // x_unit, x_c // x_unit, x_p
        y_places = y_n // y_unit, y_c // y_unit, y_p

    def run(tile: StripTile) -> None:
        t_w, t_h = -(-width // tile.columns), -(-height // tile.rows)
        t_c = -(-channels // tile.channels)
        if last:
            first, third = -(-t_w * t_h * batch // tile.strips), 1
            sizes = channels // x_unit, h, w, height, width
        else:
            first, third = -(-t_w // tile.strips) * t_h, batch
            sizes = channels, h, w // x_unit, height, width // y_unit
        grid, axes = grid_of(first, t_c, third)
        wrapped(depthwise_kernels.convolve_kernel)[grid](
            x, weight, scale, shift, y, *sizes, t_w, t_h, t_c, batch, *x_places, *y_places,
            ROWS=tile.rows, COLUMNS=tile.columns, BC=tile.channels, BG=tile.strips,
            X_UNIT=x_unit, Y_UNIT=y_unit, STRIDE=stride, RELU=relu, PASSTHROUGH=passthrough,
            CHANNELS_LAST=last,
            VECTOR=vectors and tile.columns == vector,
            WHOLE=bool(tile.rows == height), EVEN=bool(height % tile.rows == 0),
            WIDTH=int(w) if not last and h * w <= _PLANE else 0,
            EXACT=bool(width % tile.columns == 0), UNDER=bool(stride == 1 or h % 2 == 1),
            EDGE=bool(stride == 1 or w % 2 == 1), AXES=axes, num_warps=tile.warps,
        )  # fmt: skip

    tiles = strip_tiles(batch, channels, height, width, stride, vector, y.element_size(), last)
    key = (batch, channels, height, width, stride, relu, passthrough, last)
    launch(depthwise_kernels.convolve_kernel, y, key, tiles, run)
