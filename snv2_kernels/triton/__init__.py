"""The Triton kernels. Importing this package takes Triton and defines ``torch.ops.snv2_triton``;
:mod:`snv2_kernels.ops` does so when the backend is first used."""

from snv2_kernels.triton import backward  # noqa: F401  # defines the rest of them
from snv2_kernels.triton.ops import INTERPRETED
from snv2_kernels.triton.tiles import (
    TILES,
    UNIT_TILES,
    Shapes,
    Tile,
    UnitTile,
    choose_tile,
    use_tile,
)

__all__ = [
    "INTERPRETED",
    "TILES",
    "UNIT_TILES",
    "Shapes",
    "Tile",
    "UnitTile",
    "choose_tile",
    "use_tile",
]
