"""What a plan of the CUDA kernels is made of (``csrc/include/snv2/gpu_plan.h``)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from snv2_kernels import _native, gpu
from snv2_kernels.packing.common import BasePlan
from snv2_kernels.packing.planes import CALLERS_MAP, IDENTITY, NO_BUFFER, NO_RESULT, TILE_ROWS

__all__ = ["GpuPlan", "GpuStep", "pack_tiles"]

COPY, STEM, UNIT, HEAD, GATE, EXPORT, POOL = range(7)
EXPAND, DEPTHWISE, PROJECT = 1, 2, 4
OF_NINE, OF_THOSE_INSIDE = 8, 24  # parts of a POOL

_REMEMBERED = 1024  # shapes that a plan was asked for


def pack_tiles(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, depth] as tiles of 16 rows, flat: [rows / 16][depth / tile depth][elements of a tile].

    16-bit: [lane][8], the A fragments of mma.m16n8k16. float32: [row mod 8][k][row / 8].
    """
    rows, depth = weight.shape
    columns = 4 if dtype == torch.float32 else 16
    down, across = -(-rows // TILE_ROWS), -(-depth // columns)
    padded = weight.new_zeros(down * TILE_ROWS, across * columns)
    padded[:rows, :depth] = weight
    if dtype == torch.float32:
        tiles = padded.view(down, 2, 8, across, 4).permute(0, 3, 2, 4, 1)
    else:
        # Row 8 h + g and column 8 c + 2 t + j are element [c][h][j] of lane 4 g + t.
        tiles = padded.view(down, 2, 8, across, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    return tiles.to(dtype).flatten()


@dataclass
class GpuStep:
    """One step of a plan; the fields and their order are those of ``snv2::GpuStep``.

    Of a ``UNIT`` ``parts`` says which of ``EXPAND``, ``DEPTHWISE`` and ``PROJECT`` the main branch
    has: pw1, dw and pw2.

    Each layer has an ``_activation``, an index of ``ACTIVATIONS``, applied to its result; a layer
    that the step lacks has "identity". "leaky_relu" is written as "prelu", which alone has
    ``_slopes``, the offset in ``parameters`` of a float for each of the layer's rows, padded as a
    bias is. Rows are those of the layer's weights: of ``proj_dw`` in the order of ``in_table``.

    A ``GATE`` scales its ``out_channels`` planes by what pw1 and pw2 make of their means, or not
    where ``mid_channels`` is 0, adds to them the others of ``in_table``, if any, and applies
    ``dw_activation``.

    A ``POOL`` averages 3x3 pixels of each plane, ``OF_NINE`` or ``OF_THOSE_INSIDE``, and applies
    ``dw_activation``.

    A depthwise convolution of ``_window`` x ``_window`` with ``_dilation`` is padded with
    ``window // 2 * dilation`` zeros, and has ``window * window + 1`` floats for each channel in
    ``parameters``. A step that lacks it has window 1.
    """

    kind: int
    parts: int = 0
    stride: int = 1
    in_buffer: int = CALLERS_MAP
    out_buffer: int = NO_BUFFER
    out_planes: int = 0
    result: int = NO_RESULT
    in_channels: int = 0
    in_table: int = 0
    mid_channels: int = 0
    proj_channels: int = 0
    out_channels: int = 0
    out_table: int = 0
    result_channels: int = 0
    result_table: int = 0
    pw1_weights: int = 0
    pw2_weights: int = 0
    proj_weights: int = 0
    pw1_bias: int = 0
    pw2_bias: int = 0
    proj_bias: int = 0
    dw: int = 0
    proj_dw: int = 0
    dw_window: int = 1
    dw_dilation: int = 1
    proj_dw_window: int = 1
    proj_dw_dilation: int = 1
    pw1_activation: int = IDENTITY
    pw1_slopes: int = 0
    dw_activation: int = IDENTITY
    dw_slopes: int = 0
    pw2_activation: int = IDENTITY
    pw2_slopes: int = 0
    proj_dw_activation: int = IDENTITY
    proj_dw_slopes: int = 0
    proj_activation: int = IDENTITY
    proj_slopes: int = 0

    def words(self) -> list[int]:
        return [getattr(self, f.name) for f in fields(self)]


assert len(fields(GpuStep)) == _native.GPU_STEP_WORDS


@dataclass(frozen=True, kw_only=True)
class GpuPlan(BasePlan):
    """Everything the CUDA kernels need: ``torch.ops.snv2.gpu_network(x, *plan.arguments)``."""

    backends = ("cuda", "cuda-emulated")
    words: Tensor  # int64, on the CPU
    weights: Tensor  # matrices, of the map's dtype
    parameters: Tensor  # float32: biases, slopes and depthwise convolutions
    tables: Tensor  # int32, a copy of those in `words`
    steps: tuple[GpuStep, ...] = field(repr=False)
    _covered: dict[tuple[int, ...], bool] = field(default_factory=dict, repr=False, compare=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def arrays(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weights, self.parameters, self.tables, self.words

    @functools.cached_property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, bool]:
        return *self.arrays, self.out_channels, self.halvings, self.classify

    @functools.cached_property
    def result_arguments(self) -> tuple[Any, ...]:
        """Those of ``gpu_network_results``."""
        return *self.arrays, *self.result_fields

    def covers(self, batch: int, height: int, width: int, device: dict[str, int]) -> bool:
        """Whether the kernels can run this input on a device: a few rows of a unit's map must fit
        in its shared memory. ``device`` is from :func:`snv2_kernels.gpu.current_device`."""
        key = (batch, height, width, *device.values())
        covered = self._covered.get(key)
        if covered is None:
            try:
                gpu.launches(self.words, batch, height, width, device)
                covered = True
            except ValueError:
                covered = False
            if len(self._covered) >= _REMEMBERED:
                self._covered.clear()
            self._covered[key] = covered
        return covered
