"""Writes the steps, tables and weights of a plan of the CPU backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from snv2_kernels import _native
from snv2_kernels.packing.common import Folded, FoldedHead, FoldedStem
from snv2_kernels.packing.cpu_matrices import packed_depthwise, packed_product, taken
from snv2_kernels.packing.cpu_panels import PanelAllocator, places
from snv2_kernels.packing.cpu_plan import PANEL, Branch, MapSize, Matrix, PackedLayer, Step
from snv2_kernels.packing.segments import Segment, cut_branch
from snv2_kernels.packing.units import ACTIVATIONS, Activation, Gate, Pool, Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from snv2_kernels.packing.units import Unit
    from snv2_kernels.quantization.numbers import Affine
    from snv2_kernels.runners import Pixels

__all__ = ["Entry", "Writer"]

_IMPORT, _STEM, _UNIT, _GATE, _HEAD, _EXPORT = range(6)
_EXPAND, _DEPTHWISE, _PROJECT, _POOL, _POOL_INSIDE = 1, 2, 4, 8, 16  # snv2::Branch::parts


def _segments(branch: Sequence[Folded | Gate[Folded]]) -> list[Segment]:
    """A pointwise convolution goes with the depthwise one that it feeds, whose rows it makes one
    at a time, or else with the one before."""
    cut = cut_branch(branch, feeding=True)
    if all(map(_keeps_places, cut)):
        # Its planes would lie as the input's do, which other products read.
        raise Unsupported("a branch of depthwise convolutions alone")
    return cut


def _keeps_places(segment: Segment) -> bool:
    """Whether its result lies as the panels do that it reads."""
    return segment.pw1 is None and segment.pw2 is None


def _names(branch: Sequence[Folded | Gate[Folded]]) -> Iterator[str]:
    """Of its convolutions: pw1, dw and pw2 in the paper."""
    kinds = ["pw" if part.kernel == 1 else "dw" for part in branch if not isinstance(part, Gate)]
    for i, kind in enumerate(kinds):
        alone = kind == "dw" and kinds.count(kind) == 1
        yield kind if alone else f"{kind}{kinds[: i + 1].count(kind)}"


def _check_depthwise(layer: Folded) -> None:
    if layer.kernel not in range(3, _native.MAX_WINDOW + 1, 2):
        raise Unsupported(f"a depthwise window of {layer.kernel}")
    if layer.dilation > _native.MAX_DILATION:
        raise Unsupported(f"dilation {layer.dilation}")


@dataclass(frozen=True)
class Entry:
    """How a map of floats, or of bytes as pixels, becomes one of a network in integers."""

    affine: Affine
    pixels: Pixels | None

    def rows(self) -> Tensor:
        """Factors, summands and the bytes that pad, [3, C]."""
        factors, summands = 1 / self.affine.scale, self.affine.zero
        if self.pixels is not None:
            told = self.pixels.scale, self.pixels.shift
            scale, shift = (torch.tensor(numbers, dtype=torch.float64) for numbers in told)
            factors, summands = scale * factors, shift * factors + summands
            # Bytes that stay what they are need no arithmetic.
            moves = torch.cat([summands, 255 * (factors - 1) + summands]).abs().max()
            if moves < 0.01:
                factors, summands = torch.ones_like(factors), torch.zeros_like(summands)
        return torch.stack([factors, summands, self.affine.zero.round()])


class Writer:
    """Steps, tables and weights of a plan, written while following the channel table of the map."""

    def __init__(
        self,
        element: torch.dtype,
        readers: list[list[tuple[int, ...]]],
        reads_panels: bool,
        entry: Entry | None = None,
    ) -> None:
        self.steps: list[Step] = []
        self.tables: list[int] = []
        self.weights: list[Tensor] = []
        self.weight_count = 0
        self.matrices: list[Matrix] = []
        self.results: list[tuple[int, int]] = []  # channels and halvings
        self._element = element
        self._panels = PanelAllocator(element, readers, reads_panels)
        self._in_word = self._panels.in_word
        self._table: list[int] = []  # first plane of each logical channel
        self._entry = entry  # of a network in integers
        self._reals: list[tuple[float, float]] = []  # its (scale, zero) of each logical channel
        self._stage, self._unit = 1, 0
        self._where = ""
        self._halvings = 0
        self._halvings_before = 0  # the current step

    # Parts ------------------------------------------------------------------------------------

    def _add_table(self, entries: Sequence[int]) -> int:
        offset = len(self.tables)
        self.tables.extend(entries)
        return offset

    def _add_floats(self, packed: Tensor) -> int:
        offset = self.weight_count
        self.weights.append(packed)
        self.weight_count += packed.numel()
        return offset

    def _activation(
        self, activation: Activation, channels: int, rows: Sequence[int]
    ) -> PackedLayer:
        """A layer that is nothing else yet."""
        layer = PackedLayer(activation=ACTIVATIONS.index(activation.kind))
        if activation.slope is not None:
            slope = torch.as_tensor(activation.slope, dtype=torch.float64)
            slopes = taken(slope.expand(channels), rows).float()
            layer.slopes = self._add_floats(nn.functional.pad(slopes, (0, -len(rows) % PANEL)))
        return layer

    def _add_layer(
        self,
        name: str,
        folded: Folded,
        rows: Sequence[int],
        packed: Tensor,
        halvings: int | None,
        read: MapSize | None = None,
        written: MapSize | None = None,
    ) -> PackedLayer:
        height, width = folded.weight.shape
        layer = self._activation(folded.activation, height, rows)
        layer.weights = self._add_floats(packed)
        maps = read or (width, halvings), written or (height, halvings)
        self.matrices.append(
            Matrix(self._where, name, layer.weights, height, width, halvings, *maps)
        )
        return layer

    def _add_product(
        self,
        name: str,
        folded: Folded,
        rows: Sequence[int],
        columns: Sequence[int],
        halvings: int | None,
        element: torch.dtype | None = None,
        read: MapSize | None = None,
        written: MapSize | None = None,
    ) -> PackedLayer:
        """The matrix for a map and a result whose planes hold those columns and rows."""
        element = element or self._element
        if folded.groups:
            return self._add_blocks(name, folded, rows, columns, halvings, element)
        packed = packed_product(folded, rows, columns, element)
        return self._add_layer(name, folded, rows, packed, halvings, read, written)

    def _add_blocks(
        self,
        name: str,
        folded: Folded,
        rows: Sequence[int],
        columns: Sequence[int],
        halvings: int | None,
        element: torch.dtype,
    ) -> PackedLayer:
        """A matrix for each group; rows and columns are in the order of groups."""
        depth, in_word = folded.weight.shape[1], 4 // element.itemsize
        blocks: list[int] = []
        packed: list[Tensor] = []
        for group in range(1 + max(folded.groups)):
            own = [row for row in rows if row >= 0 and folded.groups[row] == group]
            read = [i for i, column in enumerate(columns) if column // depth == group]
            if own:
                if read[0] % in_word or len(read) % in_word:
                    raise Unsupported("groups of which two have channels in one word of bfloat16")
                blocks += [len(own), read[0] // in_word, len(read) // in_word]
                within = [columns[i] - group * depth for i in read]
                packed.append(packed_product(folded, own, within, element))
        sizes = (depth * (1 + max(folded.groups)), halvings), (len(folded.bias), halvings)
        layer = self._add_layer(name, folded, rows, torch.cat(packed), halvings, *sizes)
        layer.blocks, layer.block_count = self._add_table(blocks), len(blocks) // 3
        return layer

    def _add_depthwise(self, name: str, folded: Folded, rows: Sequence[int]) -> PackedLayer:
        packed = packed_depthwise(folded, rows, self._element)
        read = folded.channels, self._halvings_before
        return self._add_layer(name, folded, rows, packed, self._halvings, read)

    def _add_conversion(self, rows: Tensor) -> PackedLayer:
        """Rows between floats and bytes, [rows, C]."""
        return PackedLayer(weights=self._add_floats(rows.float().flatten()))

    def _reals_of(self, layer: Folded | None) -> list[tuple[float, float]]:
        """What the bytes of a layer's result stand for; nothing is known where there are none."""
        if layer is None or layer.integers is None or layer.integers.result is None:
            return []
        result = layer.integers.result
        return list(zip(result.scale.tolist(), result.zero.tolist(), strict=True))

    def _join_reals(self, unit: Unit[Folded]) -> None:
        side = unit.projection_layers[-1:]
        kept = self._reals_of(side[0]) if side else [self._reals[c] for c in unit.passthrough]
        ends = [part for part in unit.branch if not isinstance(part, Gate)]
        reals = kept + self._reals_of(ends[-1])
        self._reals = [reals[j] for j in unit.order]

    # Steps ------------------------------------------------------------------------------------

    def import_map(self, channels: int) -> None:
        step = Step(_IMPORT)
        self._panels.start_buffer(step)
        rows = self._panels.next_order()
        self._table = places(self._panels.allocate(len(rows)), rows)
        step.main.in_channels, step.main.out_channels = channels, len(rows)
        step.main.in_table = self._add_table([max(row, 0) for row in rows])
        if self._entry is not None:
            step.main.dw = self._add_conversion(self._entry.rows()[:2])
            affine = self._entry.affine
            self._reals = list(zip(affine.scale.tolist(), affine.zero.tolist(), strict=True))
        self.steps.append(step)

    def stem(self, stem: FoldedStem) -> None:
        step = Step(_STEM)
        self._panels.start_buffer(step)
        self._where = "stem"
        rows = self._panels.next_order()
        self._table = places(self._panels.allocate(len(rows)), rows)
        channels = self._panels.filled(stem.in_channels)
        columns = [
            9 * c + tap if c >= 0 else -1
            for first in range(0, len(channels), self._in_word)
            for tap in range(9)
            for c in channels[first : first + self._in_word]
        ]
        step.main.in_channels, step.main.out_channels = stem.in_channels, len(rows)
        maps: Any = {"read": (stem.in_channels, 0), "written": (stem.conv.channels, 2)}
        step.main.pw1 = self._add_product("conv", stem.conv, rows, columns, 1, **maps)
        if self._entry is not None:
            step.main.dw = self._add_conversion(self._entry.rows())
        self._reals = self._reals_of(stem.conv)
        self._halvings = 2
        self.steps.append(step)

    def unit(self, unit: Unit[Folded]) -> None:
        segments = _segments(unit.branch)
        with_depthwise = [i for i, segment in enumerate(segments) if segment.dw is not None]
        if unit.stride == 2 and not with_depthwise:
            raise Unsupported("stride 2 without a depthwise convolution")
        strided = with_depthwise[unit.strided] if with_depthwise else len(segments) - 1
        self._unit += 1
        if unit.stride == 2:
            self._stage, self._unit = self._stage + 1, 0
        self._where = f"stage{self._stage}.{self._unit}"
        names = _names(unit.branch)
        planes = source = [self._table[c] for c in unit.main]
        first = [self._table[c] for c in unit.passthrough]
        borrowed: tuple[int, int] | None = None
        side_rows = self._panels.next_order() if unit.projection_layers else []
        wanted = self._wanted(segments)
        for i, segment in enumerate(segments):
            step = Step(_UNIT)
            self._halvings_before = self._halvings
            if i == strided:
                step.stride = unit.stride
                if unit.stride == 2:
                    self._panels.start_buffer(step)
                    borrowed = None
            rows = self._branch(step.main, segment, planes, wanted[i], step.stride, names)
            if i == strided and isinstance(unit.projection, Pool):
                first = self._pool(step.projection, unit.projection)
            elif i == strided and unit.projection_layers:
                dw, pw = unit.projection_layers
                names_of_both = iter(["projection dw", "projection pw"])
                both = Segment(dw=dw, pw2=pw)
                self._branch(step.projection, both, self._table, side_rows, 1, names_of_both)
                panels = self._panels.allocate(len(side_rows))
                step.projection.out_panel, first = panels[0], places(panels, side_rows)
            fresh = unit.joins and i == len(segments) - 1
            allocate = self._panels.allocate if fresh else self._panels.reuse
            place = allocate(len(rows))
            step.main.out_panel, planes = place[0], places(place, rows)
            self.steps.append(step)
            if segment.gate is not None and not self._shortcut(step.main, segment, rows, source):
                self._gate(segment.gate, step.main.out_panel, rows, source)
            if borrowed is not None:
                self._panels.free(borrowed)
            borrowed = place
        joined = first + planes
        before, self._table = self._table, [joined[j] for j in unit.order]
        if self._entry is not None:
            self._join_reals(unit)
        if not unit.joins and unit.stride == 1:
            self._panels.free_map(before, self._table)

    def _wanted(self, segments: Sequence[Segment]) -> list[list[int] | None]:
        """Which row each plane of the segments' results is to hold, None where they lie as the
        input's do."""
        layers = [segment.pw2 or segment.pw1 for segment in segments]
        readers = [segment.pw1 or segment.pw2 for segment in segments]
        rows: list[list[int] | None] = []
        for i, segment in enumerate(segments):
            reader = next((layer for layer in readers[i + 1 :] if layer is not None), None)
            keeps = _keeps_places(segment)
            rows.append(None if keeps else self._panels.inner_order(layers[i], reader))
        last = max(i for i, row in enumerate(rows) if row is not None)
        rows[last] = self._panels.next_order(layers[last])
        return rows

    def _branch(
        self,
        branch: Branch,
        segment: Segment,
        planes: Sequence[int],
        rows: list[int] | None,
        stride: int,
        names: Iterator[str],
    ) -> list[int]:
        """Fills in a branch that reads these planes; None stands for rows that lie as the input's
        panels do. Returns the rows."""
        pw1, dw, pw2 = segment.pw1, segment.dw, segment.pw2
        words, columns = self._panels.gather(planes)
        if pw1 is not None or dw is None:
            words, columns = self._panels.by_group(pw1 or pw2, words, columns)
        if dw is not None and pw1 is None:
            # It runs on whole panels; those without a live plane are left out.
            panels = sorted({word // PANEL for word in words})
            rank = {panel: i for i, panel in enumerate(panels)}
            words = [rank[word // PANEL] * PANEL + word % PANEL for word in words]
            middle = [-1] * (len(panels) * PANEL)
            for i, column in enumerate(columns):
                middle[words[i // self._in_word] + i % self._in_word] = column
            branch.parts |= _DEPTHWISE
            branch.in_channels, branch.in_table = len(panels), self._add_table(panels)
        else:
            branch.in_channels, branch.in_table = len(words), self._add_table(words)
            middle = columns
        if pw1 is not None:
            if rows is not None and pw2 is None:
                middle = rows
            else:
                middle = self._panels.inner_order(pw1, pw2)
            branch.parts |= _EXPAND
            branch.pw1 = self._add_product(next(names), pw1, middle, columns, self._halvings)
            words = [i for i in range(0, len(middle), self._in_word) if middle[i] >= 0]
            columns = [middle[word + i] for word in words for i in range(self._in_word)]
        self._halvings += stride == 2
        if dw is not None:
            _check_depthwise(dw)
            branch.parts |= _DEPTHWISE
            branch.mid_channels = len(middle)
            branch.window, branch.dilation = dw.kernel, dw.dilation
            branch.dw = self._add_depthwise(next(names), dw, middle)
        if pw2 is not None:
            assert rows is not None
            branch.parts |= _PROJECT
            if dw is not None:
                words, columns = self._panels.by_group(pw2, words, columns)
                branch.depth, branch.table = len(words), self._add_table(words)
            branch.pw2 = self._add_product(next(names), pw2, rows, columns, self._halvings)
        rows = middle if pw2 is None else rows
        assert rows is not None
        branch.out_channels = len(rows)
        return rows

    def _pool(self, branch: Branch, pool: Pool) -> list[int]:
        """Fills in a projection of the whole map: the planes of its result, which lie as those that
        it reads."""
        panels = sorted({plane // PANEL for plane in self._table})
        place = {plane: channel for channel, plane in enumerate(self._table)}
        rows = [place.get(panel * PANEL + lane, -1) for panel in panels for lane in range(PANEL)]
        branch.parts = _POOL if pool.counts_padding else _POOL | _POOL_INSIDE
        branch.in_channels, branch.in_table = len(panels), self._add_table(panels)
        branch.mid_channels = branch.out_channels = len(rows)
        branch.dw = self._activation(pool.activation, pool.channels, rows)
        result = self._panels.allocate(len(rows))
        branch.out_panel = result[0]
        return places(result, rows)

    def _shortcut(
        self, branch: Branch, segment: Segment, rows: Sequence[int], source: Sequence[int]
    ) -> bool:
        """Has the last product add the source, if that lies as the result does; else False."""
        gate, pw2 = segment.gate, segment.pw2
        if gate is None or gate.layers or not gate.adds_source:
            return False
        if pw2 is None or pw2.activation.kind != "identity":
            return False
        panels: list[int] = []
        for first in range(0, len(rows), PANEL):
            places = {
                source[row] - i for i, row in enumerate(rows[first : first + PANEL]) if row >= 0
            }
            panel, lane = divmod(min(places), PANEL)
            if lane or len(places) != 1:
                return False
            panels.append(panel)
        packed = self._activation(gate.activation, pw2.channels, rows)
        branch.pw2.activation, branch.pw2.slopes = packed.activation, packed.slopes
        branch.added, branch.added_panels = self._add_table(panels), len(panels)
        return True

    def _gate(self, gate: Gate[Folded], panel: int, rows: list[int], source: Sequence[int]) -> None:
        """Of the planes from a panel on, which hold these rows; ``source`` is what may be added."""
        step = Step(_GATE)
        main = step.main
        channels = range(max(rows) + 1)
        main.in_channels = len(channels)
        main.out_channels, main.out_panel = len(rows), panel
        if gate.reduce is not None and gate.expand is not None:
            main.in_table = self._add_table([rows.index(c) for c in channels])
            float32, reduced = torch.float32, range(gate.reduce.channels)
            product = self._add_product
            main.mid_channels = len(reduced)
            main.pw1 = product("gate reduce", gate.reduce, reduced, channels, None, float32)
            main.pw2 = product("gate expand", gate.expand, rows, reduced, None, float32)
        if gate.adds_source:
            # A row of nothing is read by nobody.
            main.depth, main.table = len(rows), self._add_table([source[row] for row in rows])
        main.dw = self._activation(gate.activation, len(channels), rows)
        self.steps.append(step)

    def head(self, head: FoldedHead) -> None:
        step = Step(_HEAD)
        main = step.main
        self._where = "head"
        halvings = self._halvings
        channels = len(self._table) if head.conv is None else head.conv.channels
        features, classes = self._panels.filled(channels), range(head.fc.channels)
        main.mid_channels, main.out_channels = len(features), len(classes)
        if head.conv is None:
            main.parts, planes = _POOL, [self._table[channel] for channel in features]
            main.in_channels, main.in_table = len(planes), self._add_table(planes)
        else:
            words, columns = self._panels.gather(self._table)
            main.in_channels, main.in_table = len(words), self._add_table(words)
            main.pw1 = self._add_product(
                "conv5 + mean", head.conv, features, columns, halvings, written=(channels, None)
            )
        main.pw2 = self._add_product("fc", head.fc, classes, features, None)
        self.steps.append(step)
        self.results.append((len(classes), halvings))

    def export_map(self) -> None:
        channels = len(self._table)
        step = Step(_EXPORT)
        step.main.in_channels = step.main.out_channels = channels
        step.main.in_table = self._add_table(self._table)
        if self._entry is not None:
            scale, zero = torch.tensor(self._reals, dtype=torch.float64).T
            step.main.dw = self._add_conversion(torch.stack([scale, -zero * scale]))
        self.steps.append(step)
        self.results.append((channels, self._halvings))
