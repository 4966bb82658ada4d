"""Which tile a program makes: a table keyed on the shape, so that a result never depends on a
measurement unless it was asked for (:mod:`~snv2_kernels.triton.tuning`).

A tile of a map has 1024 elements for 128 threads: eight sums for each, which stay in registers, and
enough loads under way. Its longer side runs along memory and is at least a line of 128 bytes, or
what the map has. Of small maps there would be too few tiles to fill a GPU of a hundred SMs, so
theirs have 256 elements for 64 threads.

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
    "TILES",
    "ProductTile",
    "Shapes",
    "Tile",
    "choose_product_tile",
    "choose_tile",
    "map_tiles",
    "overridden",
    "use_tile",
]


@dataclass(frozen=True)
class Tile:
    """Of a map: powers of two, and warps of a program."""

    pixels: int
    channels: int
    warps: int


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
_SMALL = 1 << 17  # elements of a map: half a tile of 1024 for each of 264 CTAs, two on an SM
_PLANE = 64  # pixels; a plane of 7 x 7 is one row of a tile
_NARROW = 32  # channels


@dataclass(frozen=True)
class Shapes:
    """Of maps that run in the same tile."""

    channels_last: bool
    small: bool
    short: bool  # few pixels in a plane, or with channels_last few channels


TILES: dict[Shapes, Tile] = {
    Shapes(False, False, False): Tile(256, 4, 4),
    Shapes(False, False, True): Tile(64, 16, 4),
    Shapes(False, True, False): Tile(64, 4, 2),
    Shapes(False, True, True): Tile(64, 4, 2),
    Shapes(True, False, False): Tile(16, 64, 4),
    Shapes(True, False, True): Tile(32, 32, 4),
    Shapes(True, True, False): Tile(8, 32, 2),
    Shapes(True, True, True): Tile(8, 32, 2),
}

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

AnyTile = Tile | ProductTile
T = TypeVar("T", Tile, ProductTile)

_override: ContextVar[dict[type, AnyTile]] = ContextVar("snv2_triton_tile", default={})  # noqa: B039


def choose_tile(batch: int, channels: int, pixels: int, channels_last: bool) -> Tile:
    """The tile for a map of which a program makes these channels and pixels."""
    short = channels <= _NARROW if channels_last else pixels <= _PLANE
    small = batch * channels * pixels < _SMALL
    return TILES[Shapes(channels_last, bool(small), bool(short))]  # sizes may be symbols


def map_tiles(channels_last: bool) -> list[Tile]:
    """Of maps in this memory format, each once."""
    return list(dict.fromkeys(t for s, t in TILES.items() if s.channels_last == channels_last))


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
    """What :func:`use_tile` put in place of a tile of this kind."""
    return _override.get().get(type(default))  # type: ignore[return-value]


@contextlib.contextmanager
def use_tile(*tiles: Tile | ProductTile) -> Iterator[None]:
    """Everything inside the ``with`` block runs in these tiles, one of each kind, for tests and
    measurements."""
    token = _override.set({**_override.get(), **{type(tile): tile for tile in tiles}})
    try:
        yield
    finally:
        _override.reset(token)
