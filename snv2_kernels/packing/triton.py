"""Plans for the Triton kernels: a list of launches.

Matrices are in the map's dtype, row by row; rows are ``pitch(depth)`` elements apart, zeros at
their end, so that each begins where 16 bytes are read at once. Biases, slopes and depthwise
convolutions are float32.

A map lies in planes as the CUDA kernels' maps do (:mod:`snv2_kernels.packing.gpu`), or for the
next launch alone in one of two middle buffers, plane ``i`` channel ``i``. A unit's rows are its
main branch's and then its *side's*: the projection, or what passes through to the caller's map.

The paper's unit is two launches, ``PW`` and ``DW_PW``. Any other branch is cut from its front: a
depthwise convolution and the pointwise one after it are one launch, any other layer is one of its
own. Squeeze-and-excite is the means of a map and then the gates, two launches; the pointwise
convolution that reads the map next multiplies it. Without one, or where an activation or a shortcut
follows, ``SCALE`` is one more launch; of a shortcut alone it is all there is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from snv2_kernels.packing.common import (
    BasePlan,
    Folded,
    FoldedHead,
    FoldedStem,
    FoldingBuilder,
    same_layer,
)
from snv2_kernels.packing.planes import (
    CALLERS_MAP,
    NO_BUFFER,
    NO_RESULT,
    Arrays,
    Map,
    Room,
    check_dtype,
)
from snv2_kernels.packing.units import (
    ACTIVATIONS,
    IDENTITY,
    Activation,
    Gate,
    Pool,
    Unit,
    Unsupported,
)

__all__ = ["MIDDLE", "Depthwise", "Product", "TritonPlan", "TritonPlanBuilder", "TritonStep"]

COPY, STEM, PW, DW_PW, DW, MEANS, GATES, SCALE, FEATURES, LINEAR, POOL, POOL_INSIDE = range(12)
MIDDLE = 2  # the first of the middle buffers

_ALIGNED = 16  # elements


def pitch(length: int) -> int:
    """From row to row, where a row has ``length`` elements."""
    return -(-length // _ALIGNED) * _ALIGNED


@dataclass(frozen=True)
class Product:
    """``activation(matrix @ x + bias)``, or with no depth ``activation(x)``; offsets in the plan's
    arrays."""

    rows: int = 0
    depth: int = 0
    matrix: int = 0
    bias: int = 0
    activation: int = ACTIVATIONS.index("identity")
    slopes: int = 0  # of a PReLU, for each row


@dataclass(frozen=True)
class Depthwise:
    """Taps in row order and the shift of each channel, and the activation behind them."""

    channels: int = 0
    taps: int = 0
    window: int = 3
    dilation: int = 1
    activation: int = ACTIVATIONS.index("identity")
    slopes: int = 0


@dataclass(frozen=True)
class TritonStep:
    """One launch.

    Attributes:
        kind: ``COPY``, the caller's map -> planes; ``STEM``; ``PW``; ``DW_PW``; ``DW``; ``MEANS``
            of each channel -> float32; ``GATES``, means -> float32; ``SCALE``, a map times its
            gates, plus the side, and an activation; ``FEATURES``, the head's sums; ``LINEAR``, sums
            -> result; ``POOL``, the average of 3x3 pixels, ``POOL_INSIDE``, of those inside the
            map, and an activation.
        stride: of the depthwise convolutions, or the average.
        source: buffer that is read, or ``CALLERS_MAP``.
        table: [channels] planes of the source, or channels of the caller's map.
        channels: that are read.
        gated: whether ``source`` is multiplied by the gates.
        target: buffer that is written, or ``NO_BUFFER``.
        target_planes: that it has room for.
        target_table: [rows] the plane of each.
        result: of the plan, or ``NO_RESULT``.
        result_table: [rows] the channel of each.
        dw, pw: what is computed; of ``GATES`` ``pw`` comes first; ``pw`` of ``SCALE`` and pools has
            an activation alone.
        side_source: buffer that the side reads, or ``CALLERS_MAP``.
        side_table: [side_channels]
        side_channels: that it reads: as many as rows, where they pass through, or where ``SCALE``
            adds them.
        side_dw, side_pw: the projection; of ``GATES`` ``side_pw`` comes second.
    """

    kind: int
    stride: int = 1
    source: int = CALLERS_MAP
    table: int = 0
    channels: int = 0
    gated: int = 0
    target: int = NO_BUFFER
    target_planes: int = 0
    target_table: int = 0
    result: int = NO_RESULT
    result_table: int = 0
    dw: Depthwise = Depthwise()
    pw: Product = Product()
    side_source: int = CALLERS_MAP
    side_table: int = 0
    side_channels: int = 0
    side_dw: Depthwise = Depthwise()
    side_pw: Product = Product()

    @property
    def rows(self) -> int:
        """Of the main branch."""
        return self.pw.rows if self.pw.rows or self.kind == DW_PW else self.channels

    @property
    def side_rows(self) -> int:
        """That follow those of the main branch."""
        return 0 if self.kind == SCALE else self.side_pw.rows or self.side_channels

    def words(self) -> list[int]:
        return _flat(astuple(self))

    @staticmethod
    def of_words(words: Sequence[int]) -> TritonStep:
        """What :meth:`words` wrote."""
        rest = iter(words)
        values: list[Any] = []
        for f in fields(TritonStep):
            nested = _NESTED.get(f.name)
            count = 1 if nested is None else len(fields(nested))
            read = [next(rest) for _ in range(count)]
            values.append(read[0] if nested is None else nested(*read))
        return TritonStep(*values)


_NESTED: dict[str, type[Depthwise] | type[Product]] = {
    "dw": Depthwise, "pw": Product, "side_dw": Depthwise, "side_pw": Product
}  # fmt: skip


def _flat(values: tuple[int | tuple[int, ...], ...]) -> list[int]:
    return [w for v in values for w in (v if isinstance(v, tuple) else (v,))]


@dataclass(frozen=True, kw_only=True)
class TritonPlan(BasePlan):
    """``torch.ops.snv2_triton.network(x, *plan.arguments)``."""

    backends = ("triton",)
    weights: Tensor  # matrices, of the map's dtype
    parameters: Tensor  # float32: biases, slopes and depthwise convolutions
    tables: Tensor  # int32
    steps: tuple[TritonStep, ...] = field(repr=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weights, self.parameters, self.tables

    @functools.cached_property
    def step_words(self) -> list[int]:
        return [word for step in self.steps for word in step.words()]

    @functools.cached_property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, list[int], int, int, bool]:
        return *self.arrays, self.step_words, self.out_channels, self.halvings, self.classify

    @functools.cached_property
    def result_arguments(self) -> tuple[Any, ...]:
        """Those of ``network_results``."""
        return *self.arrays, self.step_words, *self.result_fields


class _Rows(Arrays):
    """The arrays of a plan while it is written."""

    def _packed(self, weight: Tensor) -> Tensor:
        rows, depth = weight.shape
        padded = weight.new_zeros(rows, pitch(depth))
        padded[:, :depth] = weight
        return padded.to(self.dtype).flatten()

    def product(self, layer: Folded, columns: Sequence[int] | None = None) -> Product:
        """``columns`` is the order in which the layer's input comes."""
        weight = layer.weight if columns is None else layer.weight[:, columns]
        rows, depth = weight.shape
        offsets = self.matrix(weight), self.bias(layer.bias)
        return Product(rows, depth, *offsets, *self.activation(layer.activation, rows))

    def activated(self, activation: Activation, rows: int) -> Product:
        kind, slopes = self.activation(activation, rows)
        return Product(rows, activation=kind, slopes=slopes)

    def taps(self, layer: Folded, channels: Sequence[int] | None = None) -> Depthwise:
        """``channels`` is the order in which the layer's input comes."""
        channels = range(layer.channels) if channels is None else channels
        taps = self.depthwise(layer.weight[channels], layer.bias[channels])
        shape = layer.kernel, layer.dilation
        after = self.activation(layer.activation, layer.channels, channels)
        return Depthwise(len(channels), taps, *shape, *after)


class TritonPlanBuilder(FoldingBuilder):
    """Collects steps; :meth:`build`, which knows them all, decides where planes lie."""

    def build(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> TritonPlan:
        """See :meth:`snv2_kernels.packing.GpuPlanBuilder.build`."""
        check_dtype(dtype)
        writer = _Writer(dtype)
        results: list[tuple[int, int]] = []
        halvings = 0
        place = Map(CALLERS_MAP, list(range(self.in_channels)))
        if self._stem is not None:
            place = writer.stem(self._stem)
            halvings = 2
        elif self._units[0].stride == 1 and (len(self._units) > 1 or self._head is not None):
            # What follows will want the first one's passthrough in planes.
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
        arrays = writer.arrays
        out_channels, _ = results[-1]
        return TritonPlan(
            in_channels=self.in_channels,
            out_channels=out_channels,
            classify=self._head is not None,
            units=self.units,
            work=tuple(self.work),
            results=tuple(results),
            weights=torch.cat([torch.empty(0, dtype=dtype), *arrays.matrices]).to(device),
            parameters=torch.cat(arrays.floats).to(device),
            tables=torch.tensor(arrays.tables, dtype=torch.int32, device=device),
            steps=writer.finished(),
        )


class _Writer:
    """Writes steps one after the other."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.arrays = _Rows(dtype)
        self._steps: list[tuple[TritonStep, Room]] = []  # and the room of the map that it makes

    def finished(self) -> tuple[TritonStep, ...]:
        return tuple(replace(step, target_planes=room.planes) for step, room in self._steps)

    def copy(self, channels: int) -> Map:
        place = Map(0, list(range(channels)), Room(channels))
        table = self.arrays.table(place.table)
        step = TritonStep(COPY, table=table, channels=channels, target=0, target_table=table)
        self._steps.append((step, place.room))
        return place

    def stem(self, stem: FoldedStem) -> Map:
        product = self.arrays.product(stem.conv)
        place = Map(0, list(range(product.rows)), Room(product.rows))
        step = TritonStep(STEM, channels=stem.in_channels, target=0, pw=product)
        step = replace(step, table=self.arrays.table(range(stem.in_channels)))
        self._steps.append((replace(step, target_table=self.arrays.table(place.table)), place.room))
        return place

    def head(self, head: FoldedHead, place: Map, result: int) -> None:
        gather = place.by_plane(range(len(place.table)))
        product = self.arrays.product(head.conv or same_layer(len(gather)), gather)
        features = TritonStep(FEATURES, **self._read(place, gather), pw=product)
        linear = TritonStep(LINEAR, result=result, pw=self.arrays.product(head.fc))
        self._steps += [(features, Room()), (linear, Room())]

    def _read(self, place: Map, channels: Sequence[int], prefix: str = "") -> dict[str, Any]:
        table = self.arrays.table(place.planes(channels))
        read = {"source": place.buffer, "table": table, "channels": len(channels)}
        return {f"{prefix}{key}": value for key, value in read.items()}

    # Units ------------------------------------------------------------------------------------

    def unit(self, unit: Unit[Folded], place: Map, last: bool, result: int) -> Map:
        windows = [1 if isinstance(part, Gate) else part.kernel for part in unit.branch]
        paired = len(unit.branch) > 1 and isinstance(unit.branch[1], Folded) and windows[1] == 1
        # The rows of a depthwise convolution alone are its result's.
        convolved = windows[0] > 1 and not paired
        gather = list(unit.main) if convolved else place.by_plane(unit.main)
        *before, final = self._branch(unit, place, gather)
        middle = MIDDLE
        for step in before:
            if step.kind in (MEANS, GATES):
                self._steps.append((step, Room()))
                continue
            table = self.arrays.table(range(step.rows))
            self._steps.append((replace(step, target=middle, target_table=table), Room(step.rows)))
            middle = _other(middle)
        after, fresh = self._place(unit, place, last)
        rows, proj = unit.branch_channels, unit.projection_channels
        to: dict[str, Any] = {}
        if not last:
            to = {"target": after.buffer}
            to["target_table"] = self.arrays.table(fresh[proj:] + fresh[:proj])
        if result != NO_RESULT:
            to["result"], firsts = result, len(unit.order) - rows
            channels = {entry: channel for channel, entry in enumerate(unit.order)}
            entries = [*range(firsts, firsts + rows), *range(firsts)]
            to["result_table"] = self.arrays.table([channels[entry] for entry in entries])
        side = self._side(unit, place, result != NO_RESULT)
        joins = final.kind == DW_PW and final.stride == unit.stride
        # Two gathers of a wide window in one kernel would take more registers than there are.
        joins = joins and (final.source >= MIDDLE or unit.projection is None)
        self._steps.append((replace(final, **to, **(side if joins else {})), after.room))
        # A launch without rows of its own: tables begin with its own.
        to |= {key: offset + rows for key, offset in to.items() if key.endswith("table")}
        if isinstance(unit.projection, Pool):
            pool = self._pool(unit.projection, unit.stride, place)
            self._steps.append((replace(pool, **to), after.room))
        elif side and not joins:
            alone = TritonStep(DW_PW, unit.stride, **to, **side)
            self._steps.append((alone, after.room))
        return after

    def _pool(self, pool: Pool, stride: int, place: Map) -> TritonStep:
        kind = POOL if pool.counts_padding else POOL_INSIDE
        after = self.arrays.activated(pool.activation, pool.channels)
        return TritonStep(kind, stride, **self._read(place, range(pool.channels)), pw=after)

    def _place(self, unit: Unit[Folded], place: Map, last: bool) -> tuple[Map, list[int]]:
        """Where the unit's result is, and the planes that are new: the projection's come first."""
        if last:
            return Map(NO_BUFFER), []
        if unit.stride == 2:
            after = Map(1 if place.buffer == 0 else 0)
        else:
            after = Map(place.buffer, place.table, place.room)
        fresh = after.free_planes(unit.projection_channels + unit.branch_channels)
        joined = place.planes(unit.passthrough) + fresh
        after.table = [joined[j] for j in unit.order]
        return after, fresh

    def _side(self, unit: Unit[Folded], place: Map, to_map: bool) -> dict[str, Any]:
        if unit.projection_layers:
            dw, pw = unit.projection_layers
            if dw.kernel == 1 or pw.kernel != 1:
                raise Unsupported(f"a projection of windows {[dw.kernel, pw.kernel]}")
            gather = place.by_plane(range(len(place.table)))
            side = self._read(place, gather, "side_")
            side["side_dw"] = self.arrays.taps(dw, gather)
            side["side_pw"] = self.arrays.product(pw, gather)
            return side
        if not to_map or not unit.passthrough:
            return {}
        return self._read(place, unit.passthrough, "side_")

    def _branch(self, unit: Unit[Folded], place: Map, gather: Sequence[int]) -> list[TritonStep]:
        """The launches of the branch, but for what the last one writes."""
        read = self._read(place, gather)
        inner = {c: k for k, c in enumerate(unit.main)}
        order: list[int] | None = [inner[c] for c in gather]  # in which the layer's input comes
        arrays, depthwise, middle = self.arrays, 0, MIDDLE
        launches: list[TritonStep] = []
        parts = list(unit.branch)
        while parts:
            part, pw = parts.pop(0), None
            following = parts[0] if parts else None
            if isinstance(following, Folded) and following.kernel == 1:
                pw = following
            if isinstance(part, Gate):
                if order is not None:
                    raise Unsupported("squeeze-and-excite of a unit's input")
                if part.layers:
                    launches.append(TritonStep(MEANS, **read))
                    first, second = map(arrays.product, part.layers)
                    gates = TritonStep(GATES, channels=first.depth, pw=first, side_pw=second)
                    launches.append(gates)
                step = TritonStep(SCALE, **read, gated=int(bool(part.layers)))
                if pw is not None and part.activation == IDENTITY:
                    step = replace(step, kind=PW, pw=arrays.product(pw))
                else:
                    after = arrays.activated(part.activation, step.channels)
                    added = self._read(place, unit.main, "side_") if part.adds_source else {}
                    step, pw = replace(step, pw=after, **added), None
            elif part.kernel == 1:
                step, pw = TritonStep(PW, **read, pw=arrays.product(part, order)), None
                if order is not None and not parts:
                    raise Unsupported("a branch of one pointwise convolution")
            else:
                stride = unit.stride if depthwise == unit.strided else 1
                step = TritonStep(DW, stride, **read, dw=arrays.taps(part, order))
                if pw is not None:
                    step = replace(step, kind=DW_PW, pw=arrays.product(pw, order))
                depthwise += 1
            parts = parts[pw is not None :]
            launches.append(step)
            table = arrays.table(range(step.rows))
            read = {"source": middle, "table": table, "channels": step.rows}
            order, middle = None, _other(middle)
        return launches


def _other(middle: int) -> int:
    return 2 * MIDDLE + 1 - middle
