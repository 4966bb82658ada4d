"""The Triton kernels. Importing this package takes Triton and defines ``torch.ops.snv2_triton``;
:mod:`snv2_kernels.ops` does so when the backend is first used."""

from snv2_kernels.triton import backward, network  # noqa: F401  # they define their ops
from snv2_kernels.triton.launches import INTERPRETED
from snv2_kernels.triton.tiles import GradientTile, ProductTile, StripTile, Tile, use_tile
from snv2_kernels.triton.tuning import autotune, load_tiles, save_tiles

__all__ = [
    "INTERPRETED",
    "GradientTile",
    "ProductTile",
    "StripTile",
    "Tile",
    "autotune",
    "load_tiles",
    "network",
    "save_tiles",
    "use_tile",
]
