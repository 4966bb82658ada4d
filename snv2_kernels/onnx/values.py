"""What the edges of an ONNX graph stand for while it is imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from snv2_kernels.onnx.reader import Array

__all__ = ["Constant", "Factor", "Map", "Quantization", "Value", "own_dims"]


class Quantization(NamedTuple):
    """``real = (number - zero) * scale``."""

    scale: float
    zero: int
    dtype: str


@dataclass(frozen=True)
class Factor:
    """An extent that depends on the input: batch, height or width of some map."""

    sizes: tuple[int | None, ...]  # in each world
    value: int  # a map that has it as a whole dimension
    axis: int


Dim = tuple["Factor | int", ...]  # a product


@dataclass(frozen=True)
class Map:
    """A tensor of the forward.

    Its shape is known in several *worlds*: at the file's own size, with another batch, and with
    another height and width. What is the same in all is a number of the network's; the rest is the
    input's.
    """

    id: int
    examples: tuple[Tensor | None, ...]  # on the meta device; None in a world that it cannot run in
    dims: tuple[Dim, ...]
    is_positive: bool = False  # or zero
    quantization: Quantization | None = None  # of a map that the file has as integers

    @property
    def shape(self) -> tuple[int, ...]:
        """In the first world."""
        return tuple(self.example.shape)

    @property
    def example(self) -> Tensor:
        first = self.examples[0]
        assert first is not None
        return first

    def fixed(self, axis: int) -> int | None:
        """An extent that does not depend on the input, None for others."""
        extents = {example.shape[axis] for example in self.examples if example is not None}
        return int(extents.pop()) if len(extents) == 1 else None


@dataclass(frozen=True)
class Constant:
    """An array that is known without an image: one for all worlds, or one for each."""

    arrays: tuple[Array, ...]
    name: str = ""  # of an initializer

    @property
    def array(self) -> Array | None:
        """The array in all worlds, None if they differ."""
        first, *others = self.arrays
        return first if all(np.array_equal(first, other) for other in others) else None

    def in_world(self, world: int) -> Array:
        return self.arrays[world % len(self.arrays)]


Value = Map | Constant


def own_dims(
    value: int, examples: Sequence[Tensor | None], like: Sequence[Map] = ()
) -> tuple[Dim, ...]:
    """The dimensions of a new map: where an axis is as long as that of a map before in all worlds,
    it is the same extent."""
    first: Any = examples[0]
    dims: list[Dim] = []
    for axis in range(first.dim()):
        sizes = tuple(None if t is None else int(t.shape[axis]) for t in examples)
        same = (m.dims[axis] for m in like if len(m.dims) == first.dim() and _fits(m, axis, sizes))
        known = {size for size in sizes if size is not None}
        fresh = known.pop() if len(known) == 1 else Factor(sizes, value, axis)
        dims.append(next(same, (fresh,)))
    return tuple(dims)


def _fits(m: Map, axis: int, sizes: tuple[int | None, ...]) -> bool:
    told = (None if t is None else t.shape[axis] for t in m.examples)
    return all(b is None or a == b for a, b in zip(told, sizes, strict=True))


def extent(dim: Dim, world: int) -> int:
    """A product in one world; a factor that is not known there counts as in the first."""
    return math.prod(
        f if isinstance(f, int) else int(f.sizes[world] or f.sizes[0] or 0) for f in dim
    )
