"""Tiles that were measured: for each kernel, shape and GPU the fastest of the few that are tested.

Nothing is measured unless :func:`autotune` or ``SNV2_TRITON_AUTOTUNE=1`` asks for it. Then the
first launch of each shape runs in every tile, which takes a while, and later ones in the fastest.
:func:`save_tiles` keeps what was found, so that another process need not measure:
:func:`load_tiles`, or ``SNV2_TRITON_TILES`` with the name of the file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snv2_kernels.backends import is_set
from snv2_kernels.triton.tiles import (
    PRODUCT_TILES,
    AnyTile,
    ProductTile,
    StripTile,
    T,
    Tile,
    overridden,
)

__all__ = ["autotune", "load_tiles", "save_tiles", "tile_for"]

Timer = Callable[[Callable[[], None]], float]

_measured: dict[str, dict[str, AnyTile]] = {}  # of each GPU
_timer: Timer | None = None


def _milliseconds(launch: Callable[[], None]) -> float:
    from triton.testing import do_bench

    median: float = do_bench(launch, warmup=5, rep=20, return_mode="median")
    return median


def autotune(enabled: bool = True, timer: Timer = _milliseconds) -> None:
    """Whether tiles are measured from now on, in this process.

    Results may then differ in their last places from process to process, as sums are taken in
    another order. What was measured or loaded holds on when measuring ends.

    Args:
        enabled: measure, or no longer.
        timer: gives the time that a function takes, in any unit.
    """
    global _timer  # noqa: PLW0603
    _timer = timer if enabled else None


def save_tiles(path: str | Path) -> None:
    """Write all tiles that were measured or loaded to a JSON file."""
    saved = {
        gpu: {key: dataclasses.asdict(tile) for key, tile in sorted(tiles.items())}
        for gpu, tiles in _measured.items()
    }
    Path(path).write_text(json.dumps(saved, indent=1) + "\n")


def load_tiles(path: str | Path) -> None:
    """Use the tiles of a file that :func:`save_tiles` wrote, each on GPUs of the kind that it was
    measured on.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not such a file.
    """
    try:
        loaded = {
            gpu: {key: _tile(key, fields) for key, fields in tiles.items()}
            for gpu, tiles in json.loads(Path(path).read_text()).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"path: {path} is not a file of tiles: {error}") from None
    for gpu, tiles in loaded.items():
        _measured.setdefault(gpu, {}).update(tiles)


def _tile(key: str, values: dict[str, Any]) -> AnyTile:
    name = key.split(" ", maxsplit=1)[0]
    is_product = name in [kernel for kernel, _ in PRODUCT_TILES]
    kind = ProductTile if is_product else StripTile if name == "convolve_kernel" else Tile
    tile: AnyTile = kind(**values)
    of_a_thread = ("rows", "columns") if isinstance(tile, StripTile) else ("stages",)
    for name, value in dataclasses.asdict(tile).items():
        least = 16 if isinstance(tile, ProductTile) and name in ("rows", "pixels", "depth") else 1
        power_of_two = isinstance(value, int) and value > 0 and value & (value - 1) == 0
        if not power_of_two and name not in of_a_thread:
            raise ValueError(f"{name}: expected a power of two, got {value!r}")
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value!r}")
    return tile


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _may_measure(x: Tensor) -> bool:
    """Not while a compiler or a capture looks on."""
    return type(x) is Tensor and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def tile_for(
    x: Tensor,
    shape: tuple[object, ...],
    default: T,
    tiles: Sequence[T],
    launch: Callable[[T], None],
) -> T:
    """The tile to launch a kernel in.

    Args:
        x: a tensor of the launch.
        shape: the kernel's name and all that its time depends on.
        default: what the table says.
        tiles: to choose from.
        launch: runs the kernel, which may be run again.
    """
    override = overridden(default)
    if override is not None:
        return override
    if (not _measured and _timer is None) or any(isinstance(v, torch.SymInt) for v in shape):
        return default
    known, key = _measured.get(_name(x.device), {}), " ".join(map(str, shape))
    if key in known:
        return known[key]  # type: ignore[return-value]
    if _timer is None or not _may_measure(x):
        return default
    times = {tile: _timer(functools.partial(launch, tile)) for tile in tiles}
    best = min(times, key=times.__getitem__)
    _measured.setdefault(_name(x.device), {})[key] = best
    return best


def _obey_environment() -> None:
    if is_set("SNV2_TRITON_AUTOTUNE"):
        autotune()
    if path := os.environ.get("SNV2_TRITON_TILES"):
        load_tiles(path)


_obey_environment()
