"""Plans for the CUDA kernels (``csrc/include/snv2/gpu_plan.h``).

Matrices are in the map's dtype, rounded once, as tiles that are fragments of the tensor cores'
instructions; biases and depthwise convolutions are float32.

A unit of stride 1 writes its result to planes of the same buffer that nobody reads any more, so a
stage of C channels takes C + C / 2 planes. Planes that a unit was the last to read are free for the
next one, and not for the same one: its CTAs read while others write.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from snv2_kernels import _native
from snv2_kernels.packing.common import (
    BasePlan,
    Folded,
    FoldedHead,
    FoldedStem,
    FoldingBuilder,
)
from snv2_kernels.packing.units import ACTIVATIONS, Gate, Unsupported

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snv2_kernels.packing.units import Layer, Unit

__all__ = ["GpuPlan", "GpuPlanBuilder", "GpuStep", "pack_tiles"]

COPY, STEM, UNIT, HEAD = range(4)
IDENTITY, PRELU = ACTIVATIONS.index("identity"), ACTIVATIONS.index("prelu")
CALLERS_MAP, NO_BUFFER = -1, -2
NO_RESULT = -1

_ROWS: int = _native.GPU_TILE_ROWS
_ALIGNED = 4  # floats; parameters are read in vectors
_REMEMBERED = 1024  # shapes that a plan was asked for
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # snv2::DType


def pack_tiles(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, depth] as tiles of 16 rows, flat: [rows / 16][depth / tile depth][elements of a tile].

    16-bit: [lane][8], the A fragments of mma.m16n8k16. float32: [row mod 8][k][row / 8].
    """
    rows, depth = weight.shape
    columns = 4 if dtype == torch.float32 else 16
    down, across = -(-rows // _ROWS), -(-depth // columns)
    padded = weight.new_zeros(down * _ROWS, across * columns)
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

    Each layer has an ``_activation``, an index of ``ACTIVATIONS``, applied to its result; a layer
    that the step lacks has "identity". "leaky_relu" is written as "prelu", which alone has
    ``_slopes``, the offset in ``parameters`` of a float for each of the layer's rows, padded as a
    bias is. Rows are those of the layer's weights: of ``proj_dw`` in the order of ``in_table``.

    A depthwise convolution of ``_window`` x ``_window`` with ``_dilation`` is padded with
    ``window // 2 * dilation`` zeros, and has ``window * window + 1`` floats for each channel in
    ``parameters``. A step that lacks it has window 1.
    """

    kind: int
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

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, bool]:
        return *self.arrays, self.out_channels, self.halvings, self.classify

    @property
    def result_arguments(self) -> tuple[Any, ...]:
        """Those of ``gpu_network_results``."""
        return *self.arrays, *self.result_fields

    def covers(self, batch: int, height: int, width: int, device: dict[str, int]) -> bool:
        """Whether the kernels can run this input on a device: a few rows of a unit's map must fit
        in its shared memory. ``device`` is from :func:`snv2_kernels.runners.device_fields`."""
        key = (batch, height, width, *device.values())
        covered = self._covered.get(key)
        if covered is None:
            try:
                _native.describe_network(self.words.numpy(), batch, height, width, device)
                covered = True
            except ValueError:
                covered = False
            if len(self._covered) >= _REMEMBERED:
                self._covered.clear()
            self._covered[key] = covered
        return covered


@dataclass
class _Arrays:
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
        return pack_tiles(weight, self.dtype)

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
        return self._parameters(bias, _ROWS)

    def depthwise(self, weight: Tensor, shift: Tensor) -> int:
        return self._parameters(torch.cat([weight, shift[:, None]], 1), _ALIGNED)

    def product_layer(self, step: GpuStep, name: str, layer: Folded, columns: Tensor) -> None:
        """Fills in the fields of a layer that multiplies by ``columns``."""
        setattr(step, f"{name}_weights", self.matrix(columns))
        setattr(step, f"{name}_bias", self.bias(layer.bias))
        self._activation(step, name, layer, slice(None))

    def depthwise_layer(
        self, step: GpuStep, name: str, layer: Folded, rows: Sequence[int] | slice = slice(None)
    ) -> None:
        """Fills in the fields of a depthwise convolution of these channels."""
        setattr(step, name, self.depthwise(layer.weight[rows], layer.bias[rows]))
        setattr(step, f"{name}_window", layer.kernel)
        setattr(step, f"{name}_dilation", layer.dilation)
        self._activation(step, name, layer, rows)

    def _activation(
        self, step: GpuStep, name: str, layer: Folded, rows: Sequence[int] | slice
    ) -> None:
        if layer.activation.kind in ("sigmoid", "hardsigmoid"):
            raise Unsupported(f"activation {layer.activation.kind}")
        kind, slopes = self.activation(layer, rows)
        setattr(step, f"{name}_activation", kind)
        setattr(step, f"{name}_slopes", slopes)

    def activation(self, layer: Folded, rows: Sequence[int] | slice) -> tuple[int, int]:
        """A layer's, and the offset of its slopes, if it has any: "leaky_relu" is "prelu"."""
        kind, slope = layer.activation.kind, layer.activation.slope
        if slope is None:
            return ACTIVATIONS.index(kind), 0
        slopes = torch.as_tensor(slope, dtype=torch.float64).flatten().expand(layer.channels)
        return PRELU, self.bias(slopes[rows])


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")


@dataclass
class _Room:
    """Planes that a buffer has for the maps that lie in it one after the other."""

    planes: int = 0


@dataclass
class _Map:
    """Where the map between two steps lies: ``table[i]`` is the plane (or the caller's channel) of
    logical channel ``i``."""

    buffer: int
    table: list[int] = field(default_factory=list)
    room: _Room = field(default_factory=_Room)

    def by_plane(self, channels: Sequence[int]) -> list[int]:
        """A gather in this order walks memory forwards."""
        return sorted(channels, key=self.table.__getitem__)

    def planes(self, channels: Sequence[int]) -> list[int]:
        return [self.table[c] for c in channels]

    def free_planes(self, count: int) -> list[int]:
        """That hold no logical channel; the buffer gets more where it has not enough."""
        live = set(self.table)
        free = [p for p in range(self.room.planes + count) if p not in live][:count]
        self.room.planes = max(self.room.planes, free[-1] + 1)
        return free


def _columns(weight: Tensor, main: Sequence[int], channels: Sequence[int]) -> Tensor:
    """pw1's weight with a column for each of ``channels``, zero for those not in the main half."""
    columns = weight.new_zeros(len(weight), len(channels))
    place = {c: k for k, c in enumerate(channels)}
    columns[:, [place[c] for c in main]] = weight
    return columns


class GpuPlanBuilder(FoldingBuilder):
    """Collects steps; :meth:`build`, which knows them all, decides where planes lie."""

    def add_unit(self, unit: Unit[Layer]) -> None:
        """See :meth:`Builder.add_unit`.

        Raises:
            Unsupported: for a projection at stride 1, or none at stride 2.
        """
        if (unit.projection is not None) != (unit.stride == 2):
            raise Unsupported("a projection at stride 1, or none at stride 2")
        super().add_unit(unit)

    # Steps ------------------------------------------------------------------------------------

    def build(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> GpuPlan:
        """The plan; without a head the last map is a result, in logical order.

        Args:
            dtype: of the maps: float32, float16 or bfloat16.
            device: of the arrays.

        Raises:
            Unsupported: for what the kernels do not cover.
            OverflowError: if a weight times its batch norm's scale is beyond ``dtype``.
        """
        check_dtype(dtype)
        arrays = _Arrays(dtype)
        steps: list[tuple[GpuStep, _Room]] = []  # and the room of the map that it makes
        results: list[tuple[int, int]] = []
        halvings = 0
        place = _Map(CALLERS_MAP, list(range(self.in_channels)))
        if self._stem is not None:
            step, place = _write_stem(self._stem, arrays)
            steps.append((step, place.room))
            halvings = 2
        elif self._units[0].stride == 1 and len(self._units) > 1:
            # The second unit will want the first one's passthrough in planes.
            step, place = _write_copy(self.in_channels, arrays)
            steps.append((step, place.room))
        for i, unit in enumerate(self._units):
            halvings += unit.stride == 2
            last = self._head is None and i == len(self._units) - 1
            step, after = _write_unit(unit, place, arrays, last)
            if last or i in self._tapped:
                step.result = len(results)
                step.result_channels = len(unit.order)
                step.result_table = arrays.table(_result_table(unit, place))
                results.append((len(unit.order), halvings))
            place = after
            steps.append((step, place.room))
        if self._head is not None:
            step = _write_head(self._head, place, arrays)
            step.result = len(results)
            results.append((step.out_channels, halvings))
            steps.append((step, _Room()))
        for step, room in steps:
            step.out_planes = room.planes
        return self._plan(arrays, [step for step, _ in steps], results, torch.device(device))

    def _plan(
        self,
        arrays: _Arrays,
        steps: list[GpuStep],
        results: list[tuple[int, int]],
        device: torch.device,
    ) -> GpuPlan:
        weights, parameters = torch.cat(arrays.matrices), torch.cat(arrays.floats)
        out_channels, halvings = results[-1]
        classify = self._head is not None
        words = [_native.GPU_PLAN_MAGIC, len(steps), self.in_channels, out_channels, halvings]
        words += [int(classify), len(results), weights.numel(), parameters.numel()]
        words.append(_DTYPES.index(arrays.dtype))
        assert len(words) == _native.GPU_HEADER_WORDS
        for step in steps:
            words += step.words()
        return GpuPlan(
            words=torch.tensor(words + arrays.tables, dtype=torch.int64, device="cpu"),
            in_channels=self.in_channels,
            out_channels=out_channels,
            classify=classify,
            units=self.units,
            work=tuple(self.work),
            weights=weights.to(device),
            parameters=parameters.to(device),
            tables=torch.tensor(arrays.tables, dtype=torch.int32, device=device),
            results=tuple(results),
            steps=tuple(steps),
        )


def _write_copy(channels: int, arrays: _Arrays) -> tuple[GpuStep, _Map]:
    step = GpuStep(COPY, out_buffer=0, in_channels=channels, out_channels=channels)
    planes = list(range(channels))
    step.in_table = step.out_table = arrays.table(planes)
    return step, _Map(0, planes, _Room(channels))


def _write_stem(stem: FoldedStem, arrays: _Arrays) -> tuple[GpuStep, _Map]:
    channels = stem.conv.channels
    step = GpuStep(STEM, out_buffer=0, in_channels=stem.in_channels, out_channels=channels)
    step.in_table = arrays.table(range(stem.in_channels))
    arrays.product_layer(step, "pw1", stem.conv, stem.conv.weight)
    planes = list(range(channels))
    step.out_table = arrays.table(planes)
    return step, _Map(0, planes, _Room(len(planes)))


def _paper_branch(unit: Unit[Folded]) -> tuple[Folded, Folded, Folded]:
    """pw, dw and pw."""
    if any(isinstance(part, Gate) for part in unit.branch):
        raise Unsupported("squeeze-and-excite")
    layers = [part for part in unit.branch if not isinstance(part, Gate)]
    windows = [layer.kernel for layer in layers]
    if len(layers) != 3 or [window > 1 for window in windows] != [False, True, False]:
        raise Unsupported(f"a branch of windows {windows}")
    pw1, dw, pw2 = layers
    return pw1, dw, pw2


def _write_unit(
    unit: Unit[Folded], place: _Map, arrays: _Arrays, last: bool
) -> tuple[GpuStep, _Map]:
    pw1, dw, pw2 = _paper_branch(unit)
    step = GpuStep(UNIT, stride=unit.stride, in_buffer=place.buffer)
    gather = place.by_plane(range(len(place.table)) if unit.projection else unit.main)
    step.in_channels = len(gather)
    step.in_table = arrays.table(place.planes(gather))
    step.mid_channels, step.out_channels = pw1.channels, pw2.channels
    arrays.product_layer(step, "pw1", pw1, _columns(pw1.weight, unit.main, gather))
    arrays.depthwise_layer(step, "dw", dw)
    arrays.product_layer(step, "pw2", pw2, pw2.weight)
    if unit.projection is not None:
        dw, pw = unit.projection
        step.proj_channels = pw.channels
        arrays.depthwise_layer(step, "proj_dw", dw, gather)
        arrays.product_layer(step, "proj", pw, pw.weight[:, gather])
    if last:
        return step, _Map(NO_BUFFER)
    if unit.stride == 2:
        after = _Map(1 if place.buffer == 0 else 0)
    else:
        after = _Map(place.buffer, place.table, place.room)
    fresh = after.free_planes(step.proj_channels + step.out_channels)
    step.out_buffer, step.out_table = after.buffer, arrays.table(fresh)
    joined = place.planes(unit.passthrough) + fresh
    after.table = [joined[j] for j in unit.order]
    return step, after


def _result_table(unit: Unit[Folded], place: _Map) -> list[int]:
    """Which row of its results, or -1 - which plane, is each output channel of a unit."""
    rows = range(unit.projection_channels + unit.branch_channels)
    joined = [-1 - plane for plane in place.planes(unit.passthrough)] + list(rows)
    return [joined[j] for j in unit.order]


def _write_head(head: FoldedHead, place: _Map, arrays: _Arrays) -> GpuStep:
    gather = place.by_plane(range(len(place.table)))
    step = GpuStep(HEAD, in_buffer=place.buffer, in_channels=len(gather))
    step.in_table = arrays.table(place.planes(gather))
    step.mid_channels, step.out_channels = head.conv.channels, head.fc.channels
    arrays.product_layer(step, "pw1", head.conv, head.conv.weight[:, gather])
    step.pw2_weights, step.pw2_bias = arrays.matrix(head.fc[0]), arrays.bias(head.fc[1])
    return step
