"""The format of the CPU backend's plans (``csrc/include/snv2/plan.h``) in Python."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from snv2_kernels import _native
from snv2_kernels.packing.common import BasePlan, map_shape

__all__ = [
    "PANEL",
    "Branch",
    "MapSize",
    "Matrix",
    "PackedLayer",
    "Plan",
    "Product",
    "Step",
    "pack_panels",
]

PANEL: int = _native.PANEL


def pack_panels(weight: Tensor, *before: Tensor) -> Tensor:
    """Packs [O, K] weights and rows of [O] that stand before them, as flat float32.

    The result is [ceil(O / 16)][rows + words][16]. A word is a float, or as many neighbouring
    columns of a narrower dtype as take its place.
    """
    padding = -weight.shape[0] % PANEL
    words = nn.functional.pad(weight, (0, 0, 0, padding)).contiguous().view(torch.float32)
    rows = [nn.functional.pad(row.float(), (0, padding)).view(-1, PANEL, 1) for row in before]
    return torch.cat([*rows, words.view(-1, PANEL, words.shape[1])], 2).transpose(1, 2).flatten()


@dataclass
class PackedLayer:
    """``snv2::Layer``."""

    weights: int = 0
    activation: int = 0
    slopes: int = 0
    blocks: int = 0
    block_count: int = 0


@dataclass
class Branch:
    """``snv2::Branch``."""

    parts: int = 0
    in_channels: int = 0
    in_table: int = 0
    mid_channels: int = 0
    window: int = 0
    dilation: int = 0
    depth: int = 0
    table: int = 0
    out_channels: int = 0
    out_panel: int = 0
    added: int = 0
    added_panels: int = 0
    pw1: PackedLayer = field(default_factory=PackedLayer)
    dw: PackedLayer = field(default_factory=PackedLayer)
    pw2: PackedLayer = field(default_factory=PackedLayer)


@dataclass
class Step:
    """One step of a plan; the fields and their order are those of ``snv2::Step``."""

    kind: int
    stride: int = 1
    new_buffer: int = 0
    buffer_panels: int = 0
    main: Branch = field(default_factory=Branch)
    projection: Branch = field(default_factory=Branch)

    def words(self) -> list[int]:
        return _words(self)


def _words(value: Any) -> list[int]:
    if isinstance(value, int):
        return [value]
    return [word for f in fields(value) for word in _words(getattr(value, f.name))]


assert len(Step(0).words()) == _native.STEP_WORDS


@dataclass(frozen=True)
class Product:
    """One convolution or linear layer of a plan."""

    step: str  # "stem", "stage2.0" to "stage4.3", "head"
    name: str
    weights: int  # offset of its weights
    multiply_adds: int  # of one image
    parameters: int  # elements of its matrix
    read: int  # elements of one image's map
    written: int


MapSize = tuple[int, int | None]  # channels, and halvings of the image; None: it is one pixel


@dataclass(frozen=True)
class Matrix:
    """What a plan's weights at some offset are."""

    step: str
    name: str
    weights: int
    rows: int  # as the network has them
    columns: int
    halvings: int | None  # of the map for each of whose pixels it is multiplied
    read: MapSize
    written: MapSize


@dataclass(frozen=True, kw_only=True)
class Plan(BasePlan):
    """Everything the CPU backend needs: ``torch.ops.snv2.network(x, *plan.arguments)``."""

    backends = ("cpu",)
    words: Tensor  # int64, on the CPU
    weights: Tensor  # [floats] float32
    element: torch.dtype  # of the maps
    steps: tuple[Step, ...] = field(repr=False)
    matrices: tuple[Matrix, ...] = field(repr=False)

    @functools.cached_property
    def arguments(self) -> tuple[Tensor, Tensor, int, int, bool]:
        return self.weights, self.words, self.out_channels, self.halvings, self.classify

    @functools.cached_property
    def result_arguments(self) -> tuple[Any, ...]:
        """Those of ``network_results``."""
        return self.weights, self.words, *self.result_fields

    def products(self, height: int, width: int) -> list[Product]:
        """All convolutions and linear layers in the order in which they run, but that a unit's
        projection follows its branch."""

        def elements(channels: int, halvings: int | None) -> int:
            if halvings is None:
                return channels
            return math.prod(map_shape(1, channels, halvings, height, width))

        return [
            Product(
                m.step, m.name, m.weights, elements(m.rows * m.columns, m.halvings),
                m.rows * m.columns, elements(*m.read), elements(*m.written),
            )
            for m in self.matrices
        ]  # fmt: skip
