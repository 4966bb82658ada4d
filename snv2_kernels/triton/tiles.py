"""Which tile a program makes: a table keyed on the shape, so that a result never depends on a
measurement unless it was asked for (:mod:`~snv2_kernels.triton.tuning`).

A program that moves elements has 128 threads, whose vectors of at most 16 bytes lie along memory,
and each thread has up to four or, where they are narrow, more of them under way. A thread of a
depthwise convolution has a strip of results (``depthwise_kernels.py``): the taller and wider, the
fewer inputs are read twice, and the more registers it takes. Of small maps strips are lower, so
that there is a warp for each SM of a GPU of a hundred.

Products have lists of tiles from the largest to the smallest: the first of which a launch has
enough is taken. Larger ones read weights and maps less often, smaller ones fill the GPU where there
is one small image. ptxas spills in none of them on sm_80 and sm_90, and all fit in 48 KiB of shared
memory. None of this was timed yet.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "PRODUCT_TILES",
    "AnyTile",
    "GradientTile",
    "ProductTile",
    "StripTile",
    "Tile",
    "choose_product_tile",
    "gradient_tile",
    "map_tiles",
    "overridden",
    "power",
    "strip_tiles",
    "use_tile",
]


@dataclass(frozen=True)
class Tile:
    """Of elements that are moved: powers of two, how often, and warps of a program."""

    pixels: int
    channels: int
    warps: int
    rounds: int = 1


@dataclass(frozen=True)
class StripTile:
    """Of a depthwise convolution: results of a thread in each of its channels, channels and strips
    of a program, which are powers of two, and its warps."""

    rows: int
    columns: int
    channels: int
    strips: int
    warps: int


@dataclass(frozen=True)
class GradientTile:
    """Of the gradient of a depthwise convolution: elements of it that a thread has of each of some
    images in each of its channels, channels and strips of a program, and its warps."""

    rows: int
    columns: int
    images: int
    channels: int
    strips: int
    warps: int

    def useful(self, strips: int, stride: int) -> int:
        """Returns how many strips of a contiguous row a program computes that has so many."""
        if strips <= self.strips:
            return self.strips
        return self.strips - (4 if self.columns * stride == 1 else 2)

    def fitted(self, default: GradientTile, channels_last: bool, *sizes: int) -> GradientTile:
        """Returns this tile as it fits a batch, its height and its width in place of another."""
        batch, height, width = sizes
        return GradientTile(
            _divisor(height, self.rows),
            _divisor(width, self.columns) if channels_last else default.columns,
            _divisor(max(batch, 1), self.images),
            self.channels,
            self.strips if channels_last else default.strips,
            self.warps,
        )


@dataclass(frozen=True)
class ProductTile:
    """Rows of the result, pixels and depth of one product, and warps of a program. Loads start
    ``stages - 1`` products early."""

    rows: int
    pixels: int
    depth: int
    warps: int
    stages: int = 1


_SMS = 132
_WARPS = 100  # about one for each SM
_THREADS = 128

# By kernel and whether the map is in 16 bits; without tensor cores a thread makes fewer products.
# Nine taps are under way for each element of a depthwise tile, so a thread has few of them: a depth
# of 16, and no loads of the next step, for the same registers. The stem's 27 taps are one product
# of depth 32. The linear layer and the gates read each weight once: what counts is how many
# programs read. Kernels without a product have four elements for a thread, since the taps of 7 x 7
# take many registers.
PRODUCT_TILES: dict[tuple[str, bool], tuple[ProductTile, ...]] = {
    ("pw1", True): (
        ProductTile(64, 128, 32, 8, 3),
        ProductTile(64, 64, 32, 4, 3),
        ProductTile(32, 32, 32, 4, 3),
    ),
    ("pw1", False): (ProductTile(64, 64, 16, 8, 2), ProductTile(32, 32, 16, 4, 2)),
    ("dw_pw2", True): (
        ProductTile(128, 32, 16, 4),
        ProductTile(64, 64, 16, 8),
        ProductTile(32, 32, 16, 4),
    ),
    ("dw_pw2", False): (ProductTile(64, 32, 16, 8), ProductTile(32, 32, 16, 4)),
    ("stem", True): (ProductTile(32, 64, 32, 8), ProductTile(32, 32, 32, 4)),
    ("stem", False): (ProductTile(32, 32, 16, 4), ProductTile(32, 16, 16, 4)),
    ("stem_each", True): (ProductTile(32, 32, 32, 4),),
    ("stem_each", False): (ProductTile(32, 16, 16, 4),),
    ("pointwise", True): (ProductTile(64, 64, 32, 4, 3), ProductTile(32, 32, 32, 4, 3)),
    ("pointwise", False): (ProductTile(32, 32, 16, 4, 2),),
    **{
        (kernel, narrow): (ProductTile(32, 32, 16, 8),)
        for kernel in ("depthwise", "average", "means", "scale")
        for narrow in (True, False)
    },
    ("gates", True): (ProductTile(16, 16, 64, 4),),
    ("gates", False): (ProductTile(16, 16, 32, 4),),
    ("features", True): (ProductTile(64, 64, 32, 4, 3), ProductTile(32, 64, 32, 4, 3)),
    ("features", False): (ProductTile(32, 64, 16, 4, 2), ProductTile(16, 64, 16, 4, 2)),
    ("linear", True): (ProductTile(64, 32, 32, 4), ProductTile(16, 16, 64, 4)),
    ("linear", False): (ProductTile(32, 32, 32, 4), ProductTile(16, 16, 32, 4)),
}

AnyTile = Tile | StripTile | GradientTile | ProductTile
T = TypeVar("T", Tile, StripTile, GradientTile, ProductTile)

_override: ContextVar[dict[type, AnyTile]] = ContextVar("snv2_triton_tile", default={})  # noqa: B039


def power(n: int, most: int) -> int:
    """Returns the least power of two from n on, or ``most``."""
    power = 1
    while power < most and power < n:
        power *= 2
    return power


def map_tiles(outer: int, inner: int, unit: int, element: int, channels_last: bool) -> list[Tile]:
    """Returns tiles of maps, the first of which is the default.

    Args:
        outer: rows, of which each lies in memory as one.
        inner: elements of a row.
        unit: elements that can be moved as one.
        element: bytes.
        channels_last: whether a row is pixels' channels.
    """
    if channels_last:
        across = power(inner, 8 // element * _THREADS)
        down = power(outer, 8 // element * _THREADS // across)
        tiles = [Tile(down, across, 4, rounds) for rounds in (8, 4, 2, 1)]
        steps, rows = -(-inner // across), -(-outer // down)
    else:
        lanes = power(-(-inner // unit), _THREADS)
        across, down = lanes * unit, _THREADS // lanes
        most = 16 if unit == 1 else 8 if unit < 4 else 4
        tiles = [Tile(across, down, 4, most >> i) for i in range(most.bit_length())]
        steps, rows = -(-outer // down), -(-inner // across)
        even = [t for t in tiles if outer % (down * t.rounds) == 0]
        tiles = even or tiles
    enough = [t for t in tiles if 4 * -(-steps // t.rounds) * rows >= _WARPS and t.rounds <= steps]
    return (enough or tiles[-1:])[:3]


def _part(extent: int, most: int) -> int:
    """Returns the largest part of an extent, up to ``most``, if it is not much less."""
    if extent <= most:
        return int(extent)
    return next((n for n in range(most, most // 2, -1) if extent % n == 0), most)


def strip_tiles(
    batch: int, channels: int, height: int, width: int, stride: int, vector: int, element: int,
    channels_last: bool,
) -> list[StripTile]:  # fmt: skip
    """Returns tiles of a depthwise convolution, the first of which is the default.

    Args:
        batch: images.
        channels: of the convolution.
        height: of its results.
        width: of its results.
        stride: of the convolution.
        vector: results of a contiguous row whose inputs can be loaded as one, 1 if there are none.
        element: bytes.
        channels_last: the maps' memory format.
    """
    if channels_last:
        columns = _part(width, 7)
        across = power(channels, 64)
        strips = 512 // element // across
        warps, rows = 4, _part(height, 7 if stride == 1 else 3)
    else:
        columns = vector
        strips = power(-(-width // columns), 32)
        fits = [n for n in (4 * 32 // strips, 2 * 32 // strips, 32 // strips) if n > 0]
        padded = [-(-channels // n) * n for n in fits]
        across = next(n for n, p in zip(fits, padded, strict=True) if p * 49 <= min(padded) * 50)
        warps = across * strips // 32
        rows = _part(height, 14 if columns * stride <= 4 else 7)
    lanes = batch * -(-width // columns) * channels // (4 // element if channels_last else 1)
    while rows > 2 and lanes * -(-height // rows) < 32 * _WARPS:
        rows = -(-rows // 2)
    heights = dict.fromkeys([rows, -(-rows // 2), 2 * rows])
    return [StripTile(r, columns, across, strips, warps) for r in heights if r <= 14]


def _divisor(extent: int, most: int) -> int:
    """Returns the largest one up to ``most``."""
    return next(n for n in range(max(min(extent, most), 1), 0, -1) if extent % n == 0)


def gradient_tile(
    batch: int, channels: int, height: int, width: int, stride: int, relu: bool, vector: int,
    element: int, channels_last: bool,
) -> GradientTile:  # fmt: skip
    """Returns the tile of a depthwise convolution's gradient.

    Args:
        batch: images.
        channels: of the convolution.
        height: of its results.
        width: of its results.
        stride: of the convolution.
        relu: whether the convolution is computed again.
        vector: inputs of a contiguous row that can be loaded as one.
        element: bytes.
        channels_last: the maps' memory format.
    """
    lane = 1  # channels of a thread
    if channels_last:
        columns, wide = _divisor(width, 7 // stride), _divisor(width, 14 // stride)
        if relu and wide > columns:
            columns = wide
        else:
            lane = 4 // element
        padded = {n: -(-channels // n) * n for n in (32 * lane, 32, 16)}
        strips = 0
    else:
        columns = max(vector // stride, 1)
        strips = power(width // columns, 32)
        fits = [n for n in (4 * 32 // strips, 2 * 32 // strips, 32 // strips) if n > 0]
        padded = {n: -(-channels // n) * n for n in fits}
    across = next(n for n, p in padded.items() if p * 49 <= min(padded.values()) * 50)
    warps = across * strips // 32 or 1
    strips = strips or 32 * lane // across
    rows = _divisor(height, 14 if columns * stride <= 4 else 7 // stride)
    lanes = batch * (width // columns) * channels // lane
    while lanes * (height // rows) < 16 * _WARPS and _divisor(height, rows // 2) > 1:
        rows = _divisor(height, rows // 2)
    images = min(lanes * (height // rows) // (32 * _WARPS), 112 // (rows * columns))
    images = max(1, 0 if channels_last else images)
    return GradientTile(rows, columns, _divisor(max(batch, 1), images), across, strips, warps)


def programs(tile: ProductTile, rows: tuple[int, ...], columns: int) -> int:
    """That a product of matrices with these rows takes."""
    return sum(-(-r // tile.rows) for r in rows) * -(-columns // tile.pixels)


def choose_product_tile(
    kernel: str, narrow: bool, rows: tuple[int, ...], columns: int
) -> ProductTile:
    """The first tile of which there are two for each SM and of which rows fill more than half, or
    else the last."""
    tiles = PRODUCT_TILES[kernel, narrow]
    for tile in tiles[:-1]:
        if tile.rows < 2 * max(rows) and programs(tile, rows, columns) >= 2 * _SMS:
            return tile
    return tiles[-1]


def overridden(default: T) -> T | None:
    """Returns what :func:`use_tile` put in place of a tile of this kind."""
    return _override.get().get(type(default))  # type: ignore[return-value]


@contextlib.contextmanager
def use_tile(*tiles: AnyTile) -> Iterator[None]:
    """Everything inside the ``with`` block runs in these tiles, one of each kind, for tests and
    measurements."""
    token = _override.set({**_override.get(), **{type(tile): tile for tile in tiles}})
    try:
        yield
    finally:
        _override.reset(token)
