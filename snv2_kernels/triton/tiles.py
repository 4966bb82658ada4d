"""Which tile a program makes: a table keyed on the shape, so that a result never depends on a
measurement.

A tile has 1024 elements for 128 threads: eight sums for each, which stay in registers, and enough
loads under way. Its longer side runs along memory and is at least a line of 128 bytes, or what the
map has. Of small maps there would be too few tiles to fill a GPU of a hundred SMs, so theirs have
256 elements for 64 threads. None of this was measured yet.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["TILES", "UNIT_TILES", "Shapes", "Tile", "UnitTile", "choose_tile", "use_tile"]


@dataclass(frozen=True)
class Tile:
    """Powers of two, and warps of a program."""

    pixels: int
    channels: int
    warps: int


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


@dataclass(frozen=True)
class UnitTile:
    """Rows of the result, pixels and depth of one product, and warps of a program."""

    rows: int
    pixels: int
    depth: int
    warps: int


# Nine taps are under way for each element of a depthwise tile, so a thread has few of them: 16 bits
# in tiles of 64 x 64 for 256 threads, float32, without tensor cores, of 32 x 32 for 128.
# Loads of the next step are not started early (num_stages is 1), for the same registers. ptxas
# spills in none of these on sm_80 and sm_90; in 16 bits it does for half as many threads. None
# was timed.
UNIT_TILES: dict[torch.dtype, UnitTile] = {
    torch.float32: UnitTile(32, 32, 16, 4),
    torch.float16: UnitTile(64, 64, 16, 8),
    torch.bfloat16: UnitTile(64, 64, 16, 8),
}

_override: ContextVar[Tile | None] = ContextVar("snv2_triton_tile", default=None)


def choose_tile(batch: int, channels: int, pixels: int, channels_last: bool) -> Tile:
    """The tile for a map of which a program makes these channels and pixels."""
    chosen = _override.get()
    if chosen is not None:
        return chosen
    short = channels <= _NARROW if channels_last else pixels <= _PLANE
    small = batch * channels * pixels < _SMALL
    return TILES[Shapes(channels_last, bool(small), bool(short))]  # sizes may be symbols


@contextlib.contextmanager
def use_tile(tile: Tile) -> Iterator[None]:
    """Everything inside the ``with`` block runs in this tile, for tests and measurements."""
    token = _override.set(tile)
    try:
        yield
    finally:
        _override.reset(token)
