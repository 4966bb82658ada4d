"""Plans for the CUDA kernels (``csrc/include/snv2/gpu_plan.h``).

Matrices are in the map's dtype, rounded once, as tiles that are fragments of the tensor cores'
instructions; biases and depthwise convolutions are float32.

A unit of stride 1 writes its result to planes of the same buffer that nobody reads any more, so a
stage of C channels takes C + C / 2 planes. Planes that a unit was the last to read are free for the
next one, and not for the same one: its CTAs read while others write.

A unit of pw, dw and pw is one step, its projection at stride 2 included. Any other is cut into
pieces of at most these three, from its front, and each gate is a step of its own; what a shortcut
adds keeps its planes until then. A projection runs beside the first piece where one launch can do
both. Pieces read and write planes only: the caller's map is copied to planes before them, and from
there to a result behind them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from snv2_kernels import _native
from snv2_kernels.packing.common import (
    Folded,
    FoldedHead,
    FoldedStem,
    FoldingBuilder,
    same_layer,
)
from snv2_kernels.packing.gpu_plan import (
    COPY,
    DEPTHWISE,
    EXPAND,
    EXPORT,
    GATE,
    HEAD,
    OF_NINE,
    OF_THOSE_INSIDE,
    POOL,
    PROJECT,
    STEM,
    UNIT,
    GpuPlan,
    GpuStep,
    pack_tiles,
)
from snv2_kernels.packing.planes import (
    CALLERS_MAP,
    DTYPES,
    NO_RESULT,
    Arrays,
    Map,
    Room,
    check_dtype,
)
from snv2_kernels.packing.segments import Segment, cut_branch
from snv2_kernels.packing.units import Gate, Pool, Unsupported

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snv2_kernels.packing.units import Activation, Unit

__all__ = ["GpuPlanBuilder"]


class _Tiles(Arrays):
    """Matrices in tiles."""

    def _packed(self, weight: Tensor) -> Tensor:
        return pack_tiles(weight, self.dtype)

    def product_layer(
        self, step: GpuStep, name: str, layer: Folded, columns: Tensor, gates: bool = False
    ) -> None:
        """Fills in the fields of a layer that multiplies by ``columns``."""
        setattr(step, f"{name}_weights", self.matrix(columns))
        setattr(step, f"{name}_bias", self.bias(layer.bias))
        self.activation_after(step, name, layer.activation, layer.channels, gates=gates)

    def depthwise_layer(
        self, step: GpuStep, name: str, layer: Folded, rows: Sequence[int] | slice = slice(None)
    ) -> None:
        """Fills in the fields of a depthwise convolution of these channels."""
        setattr(step, name, self.depthwise(layer.weight[rows], layer.bias[rows]))
        setattr(step, f"{name}_window", layer.kernel)
        setattr(step, f"{name}_dilation", layer.dilation)
        self.activation_after(step, name, layer.activation, layer.channels, rows)

    def activation_after(
        self,
        step: GpuStep,
        name: str,
        activation: Activation,
        channels: int,
        rows: Sequence[int] | slice = slice(None),
        gates: bool = False,
    ) -> None:
        """Fills in the fields of a layer's activation."""
        if activation.kind in ("sigmoid", "hardsigmoid") and not gates:
            raise Unsupported(f"activation {activation.kind}")
        kind, slopes = self.activation(activation, channels, rows)
        setattr(step, f"{name}_activation", kind)
        setattr(step, f"{name}_slopes", slopes)


class GpuPlanBuilder(FoldingBuilder):
    """Collects steps; :meth:`build`, which knows them all, decides where planes lie."""

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
        writer = _Writer(dtype)
        results: list[tuple[int, int]] = []
        halvings = 0
        place = Map(CALLERS_MAP, list(range(self.in_channels)))
        if self._stem is not None:
            place = writer.stem(self._stem)
            halvings = 2
        elif not _reads_callers_map(self._units[0], len(self._units) == 1 and self._head is None):
            place = writer.copy(self.in_channels)
        for i, unit in enumerate(self._units):
            halvings += unit.stride == 2
            last = self._head is None and i == len(self._units) - 1
            result = NO_RESULT
            if last or i in self._tapped:
                result = len(results)
                results.append((len(unit.order), halvings))
            place = writer.unit(unit, place, last, result)
        if self._head is not None:
            writer.head(self._head, place, len(results))
            results.append((self._head.fc.channels, halvings))
        return self._plan(writer.arrays, writer.finished(), results, torch.device(device))

    def _plan(
        self,
        arrays: _Tiles,
        steps: list[GpuStep],
        results: list[tuple[int, int]],
        device: torch.device,
    ) -> GpuPlan:
        weights = torch.cat([torch.empty(0, dtype=arrays.dtype), *arrays.matrices])
        parameters = torch.cat(arrays.floats)
        out_channels, halvings = results[-1]
        classify = self._head is not None
        words = [_native.GPU_PLAN_MAGIC, len(steps), self.in_channels, out_channels, halvings]
        words += [int(classify), len(results), weights.numel(), parameters.numel()]
        words.append(DTYPES.index(arrays.dtype))
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


# Units ----------------------------------------------------------------------------------------


def _cut(unit: Unit[Folded]) -> list[Segment]:
    """The pieces of a unit's branch.

    Raises:
        Unsupported: for what the kernels do not cover.
    """
    cut = cut_branch(unit.branch, feeding=False)
    if unit.stride == 2 and all(piece.dw is None for piece in cut):
        raise Unsupported("stride 2 without a depthwise convolution")
    if unit.projection_layers:
        windows = [layer.kernel for layer in unit.projection_layers]
        if windows[0] == 1 or windows[1] != 1:
            raise Unsupported(f"a projection of windows {windows}")
    return cut


def _is_whole(piece: Segment) -> bool:
    """pw, dw and pw."""
    return None not in (piece.pw1, piece.dw, piece.pw2)


def _projects(unit: Unit[Folded], piece: Segment, channels: int) -> bool:
    """Whether the projection of a unit's input of these channels runs beside its first piece: of
    a whole branch where both halve it, or if both are dw and pw of all of it."""
    alone = not unit.projection_layers or unit.strided > 0
    if alone or piece.dw is None or piece.pw2 is None:
        return False
    return unit.stride == 2 if piece.pw1 is not None else len(unit.main) == channels


def _reads_callers_map(unit: Unit[Folded], alone: bool) -> bool:
    """Whether a first unit takes the caller's map as it is; ``alone`` it is the last one too."""
    first, *others = _cut(unit)
    in_one = unit.projection is None or (
        bool(unit.projection_layers) and unit.stride == 2 and unit.strided == 0
    )
    one_step = not others and first.gate is None
    only_reader = not unit.passthrough and not unit.has_shortcut
    return _is_whole(first) and in_one and (only_reader or (alone and one_step))


def _columns(weight: Tensor, main: Sequence[int], channels: Sequence[int]) -> Tensor:
    """pw1's weight with a column for each of ``channels``, zero for those not in the main half."""
    columns = weight.new_zeros(len(weight), len(channels))
    place = {c: k for k, c in enumerate(channels)}
    columns[:, [place[c] for c in main]] = weight
    return columns


def _result_table(unit: Unit[Folded], place: Map) -> list[int]:
    """Which row of its results, or -1 - which plane, is each output channel of a unit."""
    rows = range(unit.projection_channels + unit.branch_channels)
    joined = [-1 - plane for plane in place.planes(unit.passthrough)] + list(rows)
    return [joined[j] for j in unit.order]


class _Writer:
    """Writes steps one after the other."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.arrays = _Tiles(dtype)
        self._steps: list[tuple[GpuStep, Room]] = []  # and the room of the map that it makes

    def finished(self) -> list[GpuStep]:
        for step, room in self._steps:
            step.out_planes = room.planes
        return [step for step, _ in self._steps]

    def copy(self, channels: int) -> Map:
        place = Map(0, list(range(channels)), Room(channels))
        step = GpuStep(COPY, out_buffer=0, in_channels=channels, out_channels=channels)
        step.in_table = step.out_table = self.arrays.table(place.table)
        self._steps.append((step, place.room))
        return place

    def stem(self, stem: FoldedStem) -> Map:
        channels = stem.conv.channels
        place = Map(0, list(range(channels)), Room(channels))
        step = GpuStep(STEM, out_buffer=0, in_channels=stem.in_channels, out_channels=channels)
        step.in_table = self.arrays.table(range(stem.in_channels))
        self.arrays.product_layer(step, "pw1", stem.conv, stem.conv.weight)
        step.out_table = self.arrays.table(place.table)
        self._steps.append((step, place.room))
        return place

    def head(self, head: FoldedHead, place: Map, result: int) -> None:
        gather = place.by_plane(range(len(place.table)))
        conv = head.conv or same_layer(len(place.table))
        step = self._reading(HEAD, place, gather)
        step.mid_channels, step.out_channels = conv.channels, head.fc.channels
        self.arrays.product_layer(step, "pw1", conv, conv.weight[:, gather])
        self.arrays.product_layer(step, "pw2", head.fc, head.fc.weight)
        step.result = result
        self._steps.append((step, Room()))

    def _reading(self, kind: int, place: Map, channels: Sequence[int]) -> GpuStep:
        step = GpuStep(kind, in_buffer=place.buffer, in_channels=len(channels))
        step.in_table = self.arrays.table(place.planes(channels))
        return step

    def unit(self, unit: Unit[Folded], place: Map, last: bool, result: int) -> Map:
        """Its steps, and where its map lies then."""
        cut = _cut(unit)
        whole = len(cut) == 1 and _is_whole(cut[0]) and cut[0].gate is None
        beside = unit.projection is None or (unit.projection_layers and unit.stride == 2)
        if not whole or not beside:
            after = self._pieces(unit, cut, place)
            if result != NO_RESULT:
                self._export(after, result)
            return after
        projects = unit.projection is not None
        step = self._piece(unit, cut[0], unit.stride, place, unit.main, projects)
        if result != NO_RESULT:
            step.result, step.result_channels = result, len(unit.order)
            step.result_table = self.arrays.table(_result_table(unit, place))
        if last:
            self._steps.append((step, Room()))
            return place
        after = self._target(unit, place)
        fresh = after.free_planes(step.proj_channels + step.out_channels)
        self._write(step, after, fresh)
        joined = place.planes(unit.passthrough) + fresh
        after.table = [joined[j] for j in unit.order]
        return after

    def _target(self, unit: Unit[Folded], place: Map) -> Map:
        """Where a unit's map will lie; the channels there are those of its input, if any."""
        if unit.stride == 2 or place.buffer == CALLERS_MAP:
            return Map(1 if place.buffer == 0 else 0)
        return Map(place.buffer, place.table, place.room)

    def _write(self, step: GpuStep, target: Map, planes: Sequence[int]) -> None:
        step.out_buffer, step.out_table = target.buffer, self.arrays.table(planes)
        self._steps.append((step, target.room))

    def _piece(
        self,
        unit: Unit[Folded],
        piece: Segment,
        stride: int,
        place: Map,
        main: Sequence[int],
        projects: bool,
    ) -> GpuStep:
        """A piece of a unit's branch that reads channels ``main`` of the map at ``place``, with the
        unit's projection beside it or not."""
        arrays = self.arrays
        gather = place.by_plane(range(len(place.table)) if projects else main)
        if piece.pw1 is None and piece.pw2 is None:
            gather = list(main)  # whose rows are the result's
        step = self._reading(UNIT, place, gather)
        step.stride = stride
        step.mid_channels, step.out_channels = len(gather), piece.channels
        rows: Sequence[int] | slice = slice(None)
        if piece.pw1 is not None:
            step.parts, step.mid_channels = EXPAND, piece.pw1.channels
            arrays.product_layer(step, "pw1", piece.pw1, _columns(piece.pw1.weight, main, gather))
        else:
            inner = {c: k for k, c in enumerate(main)}
            rows = [inner[c] for c in gather]
        if piece.dw is not None:
            step.parts |= DEPTHWISE
            arrays.depthwise_layer(step, "dw", piece.dw, rows)
        if piece.pw2 is not None:
            step.parts |= PROJECT
            arrays.product_layer(step, "pw2", piece.pw2, piece.pw2.weight[:, rows])
        if projects:
            dw, pw = unit.projection_layers
            step.proj_channels = pw.channels
            arrays.depthwise_layer(step, "proj_dw", dw, gather)
            arrays.product_layer(step, "proj", pw, pw.weight[:, gather])
        return step

    def _pieces(self, unit: Unit[Folded], cut: Sequence[Segment], place: Map) -> Map:
        """A unit in several steps: where its map lies then."""
        after = self._target(unit, place)
        first = place.planes(unit.passthrough)  # what comes before the branch's result
        source = place.planes(unit.main) if unit.has_shortcut else []
        read, main = place, list(unit.main)
        target = after if unit.stride == 1 else place

        def take(target: Map, count: int) -> list[int]:
            """Planes of what neither the unit's map nor its last or next step reads."""
            live = {*source, *(first if target.buffer == after.buffer else ())}
            live |= {*(read.table if target.buffer == read.buffer else ())}
            return target.room.take(count, live)

        projects = _projects(unit, cut[0], len(place.table))
        if isinstance(unit.projection, Pool):
            first = take(after, len(place.table))
            self._pool(unit.projection, unit.stride, place, after, first)
        elif unit.projection is not None and not projects:
            dw, pw = unit.projection
            channels = range(len(place.table))
            step = self._piece(unit, Segment(dw=dw, pw2=pw), unit.stride, place, channels, False)
            first = take(after, step.out_channels)
            self._write(step, after, first)
        depthwise = 0
        for i, piece in enumerate(cut):
            stride = 1
            if piece.dw is not None:
                if depthwise == unit.strided:
                    target, stride = after, unit.stride
                depthwise += 1
            step = self._piece(unit, piece, stride, read, main, projects and i == 0)
            fresh = take(target, step.proj_channels + step.out_channels)
            self._write(step, target, fresh)
            if step.proj_channels:
                first = fresh[: step.proj_channels]
            read = Map(target.buffer, fresh[step.proj_channels :], target.room)
            main = list(range(step.out_channels))
            if piece.gate is not None:
                self._gate(piece.gate, read, source if piece.gate.adds_source else [])
        joined = first + read.table
        return Map(after.buffer, [joined[j] for j in unit.order], after.room)

    def _pool(
        self, pool: Pool, stride: int, place: Map, target: Map, planes: Sequence[int]
    ) -> None:
        """The average of all channels of the map at ``place``."""
        step = self._reading(POOL, place, range(len(place.table)))
        step.parts = OF_NINE if pool.counts_padding else OF_THOSE_INSIDE
        step.stride, step.out_channels = stride, len(planes)
        self.arrays.activation_after(step, "dw", pool.activation, pool.channels)
        self._write(step, target, planes)

    def _gate(self, gate: Gate[Folded], place: Map, source: list[int]) -> None:
        """Of a map, in place; ``source`` are the planes that are added to it."""
        read = Map(place.buffer, place.table + source)
        step = self._reading(GATE, read, range(len(read.table)))
        step.out_channels = channels = len(place.table)
        if gate.layers:
            reduce, expand = gate.layers
            step.mid_channels = reduce.channels
            self.arrays.product_layer(step, "pw1", reduce, reduce.weight, gates=True)
            self.arrays.product_layer(step, "pw2", expand, expand.weight, gates=True)
        self.arrays.activation_after(step, "dw", gate.activation, channels)
        step.out_buffer, step.out_table = place.buffer, step.in_table
        self._steps.append((step, place.room))

    def _export(self, place: Map, result: int) -> None:
        """In logical order."""
        step = self._reading(EXPORT, place, range(len(place.table)))
        step.out_channels = step.result_channels = step.in_channels
        step.result = result
        self._steps.append((step, Room()))
