"""What plans of the CUDA and the Triton kernels have in common: maps in planes, and arrays."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from snv2_kernels import _native
from snv2_kernels.packing.units import ACTIVATIONS, Activation

__all__ = ["Arrays", "Map", "Room", "check_dtype"]

IDENTITY, PRELU = ACTIVATIONS.index("identity"), ACTIVATIONS.index("prelu")
CALLERS_MAP, NO_BUFFER = -1, -2
NO_RESULT = -1

TILE_ROWS: int = _native.GPU_TILE_ROWS
_ALIGNED = 4  # floats; parameters are read in vectors
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # snv2::DType of tensors
ELEMENTS = (*DTYPES, torch.uint8)  # snv2::DType


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")


@dataclass
class Arrays:
    """The tables, weights and parameters of a plan while it is written. Each function appends and
    returns the offset."""

    dtype: torch.dtype
    tables: list[int] = field(default_factory=list)
    matrices: list[Tensor] = field(default_factory=list)
    floats: list[Tensor] = field(default_factory=list)
    _weight_count: int = 0
    _float_count: int = 0

    def table(self, entries: Sequence[int]) -> int:
        offset = len(self.tables)
        self.tables.extend(entries)
        return offset

    def _packed(self, weight: Tensor) -> Tensor:
        """A matrix as the kernels read it, flat."""
        raise NotImplementedError

    def matrix(self, weight: Tensor) -> int:
        offset, tiles = self._weight_count, self._packed(weight)
        if tiles.isinf().any() and not weight.isinf().any():
            raise OverflowError(f"a folded weight is too large for {self.dtype}")
        self.matrices.append(tiles)
        self._weight_count += tiles.numel()
        return offset

    def _parameters(self, values: Tensor, multiple: int) -> int:
        offset = self._float_count
        padding = -values.numel() % multiple
        self.floats.append(nn.functional.pad(values.flatten().float(), (0, padding)))
        self._float_count += values.numel() + padding
        return offset

    def bias(self, bias: Tensor) -> int:
        return self._parameters(bias, TILE_ROWS)

    def depthwise(self, weight: Tensor, shift: Tensor) -> int:
        return self._parameters(torch.cat([weight, shift[:, None]], 1), _ALIGNED)

    def activation(
        self, activation: Activation, channels: int, rows: Sequence[int] | slice = slice(None)
    ) -> tuple[int, int]:
        """One of so many channels, and the offset of its slopes, if it has any: "leaky_relu" is
        "prelu"."""
        kind, slope = activation.kind, activation.slope
        if slope is None:
            return ACTIVATIONS.index(kind), 0
        slopes = torch.as_tensor(slope, dtype=torch.float64).flatten().expand(channels)
        return PRELU, self.bias(slopes[rows])


@dataclass
class Room:
    """Planes that a buffer has for the maps that lie in it one after the other."""

    planes: int = 0

    def take(self, count: int, live: Collection[int]) -> list[int]:
        """Planes that are not ``live``; the buffer gets more where it has not enough."""
        free = [p for p in range(self.planes + count) if p not in live][:count]
        self.planes = max(self.planes, free[-1] + 1)
        return free


@dataclass
class Map:
    """Where the map between two steps lies: ``table[i]`` is the plane (or the caller's channel) of
    logical channel ``i``."""

    buffer: int
    table: list[int] = field(default_factory=list)
    room: Room = field(default_factory=Room)

    def by_plane(self, channels: Sequence[int]) -> list[int]:
        """A gather in this order walks memory forwards."""
        return sorted(channels, key=self.table.__getitem__)

    def planes(self, channels: Sequence[int]) -> list[int]:
        return [self.table[c] for c in channels]

    def free_planes(self, count: int) -> list[int]:
        """That hold no logical channel."""
        return self.room.take(count, set(self.table))
