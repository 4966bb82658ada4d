"""Placement of planes in the panels of the CPU backend's feature maps.

Products read planes by the word: one of float32, two neighbours of bfloat16, four of bytes. So the
planes of a word are read by the same products, and one that has no such neighbour stands there
twice. Of bytes, which have no NaN, a product may leave some out: their weights are zero. The rows
of a pointwise layer of several groups lie group by group, each group's in panels of its own, so
that each group is a product of words that no other reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from snv2_kernels.packing.common import Folded
from snv2_kernels.packing.cpu_plan import PANEL, Step
from snv2_kernels.packing.units import Gate, Pool, Unit

__all__ = ["PanelAllocator", "places", "readers_of", "reads_panels"]

Panels = tuple[int, int]  # the first, and how many

_HALF = PANEL // 2  # planes that a product can leave out


class PanelAllocator:
    """Allocates panels of the current buffer, and orders planes within them.

    Args:
        element: of the maps.
        readers: the products that read each channel of each result, in the order of results.
        reads_panels: whether depthwise convolutions read whole panels.
    """

    def __init__(
        self, element: torch.dtype, readers: list[list[tuple[int, ...]]], reads_panels: bool
    ) -> None:
        self.in_word = 4 // element.itemsize  # planes
        self._readers = iter(readers)
        # Planes by who reads them: of a word all or none, and of a panel as many as can be.
        self._sorts = self.in_word > 1 or reads_panels
        self._has_nan = element.is_floating_point
        self._buffer: Step | None = None  # the step that started it
        self._free: list[Panels] = []

    # Order ------------------------------------------------------------------------------------

    def filled(self, channels: int) -> list[int]:
        """Returns channels in whole words: the last one again, or -1 where numbers have no NaN."""
        filling = channels - 1 if self._has_nan else -1
        return [*range(channels), *[filling] * (-channels % self.in_word)]

    def next_order(self, layer: Folded | None = None) -> list[int]:
        """The row of the next result, which a layer makes, for each of its planes; -1: none."""
        readers = next(self._readers)
        return self._order(layer, readers if self._sorts else [()] * len(readers))

    def inner_order(self, layer: Folded | None, reader: Folded | None) -> list[int]:
        """The same of a layer's result that one other layer reads."""
        assert layer is not None
        depth = layer.channels
        if self._sorts and reader is not None and reader.groups:
            depth = reader.weight.shape[1]
        return self._order(layer, [(row // depth,) for row in range(layer.channels)])

    def _order(self, layer: Folded | None, readers: Sequence[tuple[int, ...]]) -> list[int]:
        groups = (layer.groups if layer is not None else ()) or (0,) * len(readers)
        alike: dict[int, dict[tuple[int, ...], list[int]]] = {g: {} for g in sorted(set(groups))}
        for row, (group, products) in enumerate(zip(groups, readers, strict=True)):
            alike[group].setdefault(products, []).append(row)
        order: list[int] = []
        for sets in alike.values():
            order += [-1] * (-len(order) % PANEL)
            filled = [rows[i] if i >= 0 else -1 for rows in sets.values()
                      for i in self.filled(len(rows))]  # fmt: skip
            # Without NaN a word may be read in part; that costs less than more half panels.
            count = sum(map(len, sets.values()))
            if not self._has_nan and -(-len(filled) // _HALF) > -(-count // _HALF):
                filled = [row for rows in sets.values() for row in rows]
                filled += [-1] * (-count % self.in_word)
            order += filled
        return order

    # Panels -----------------------------------------------------------------------------------

    def start_buffer(self, step: Step) -> None:
        step.new_buffer, step.buffer_panels = 1, 0
        self._buffer = step
        self._free = []

    def allocate(self, planes: int) -> Panels:
        """Fresh panels."""
        assert self._buffer is not None
        panels = self._buffer.buffer_panels, -(-planes // PANEL)
        self._buffer.buffer_panels = sum(panels)
        return panels

    def reuse(self, planes: int) -> Panels:
        """Free panels, or fresh ones where too few in a row are free."""
        for panels in self._free:
            if panels[1] * PANEL >= planes:
                self._free.remove(panels)
                return panels
        return self.allocate(planes)

    def free(self, panels: Panels) -> None:
        self._free.append(panels)

    def free_map(self, planes: Sequence[int], live: Sequence[int]) -> None:
        """Free the panels of a map that hold no live plane."""
        first = count = 0
        dead = {plane // PANEL for plane in planes} - {plane // PANEL for plane in live}
        for panel in sorted(dead):
            if count and first + count != panel:
                self.free((first, count))
                count = 0
            first, count = (first if count else panel), count + 1
        if count:
            self.free((first, count))

    # Reading ----------------------------------------------------------------------------------

    def gather(self, planes: Sequence[int]) -> tuple[list[int], list[int]]:
        """The words of some planes, in the order of memory, and which one each plane of a word
        holds; -1: none."""
        place = {plane: k for k, plane in enumerate(planes)}
        words = sorted({plane - plane % self.in_word for plane in planes})
        columns = [
            place.get(word + i, place[word] if self._has_nan else -1)
            for word in words
            for i in range(self.in_word)
        ]
        return words, columns

    def by_group(
        self, layer: Folded | None, words: Sequence[int], columns: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """The words that a layer reads, in the order of its groups, and the columns in them."""
        assert layer is not None
        count = self.in_word
        depth = layer.weight.shape[1] if layer.groups else len(columns)
        order = sorted(range(len(words)), key=lambda k: columns[k * count] // depth)
        held = [columns[k * count + i] for k in order for i in range(count)]
        return [words[k] for k in order], held


def places(panels: Panels, rows: Sequence[int]) -> list[int]:
    """The plane of each row of a result whose planes hold ``rows``."""
    first = {row: plane for plane, row in reversed(list(enumerate(rows, panels[0] * PANEL)))}
    return [first[row] for row in range(max(rows) + 1)]


# Readers --------------------------------------------------------------------------------------


def reads_panels(units: Sequence[Unit[Folded]]) -> bool:
    """Whether a branch begins with a depthwise convolution, which runs on whole panels."""
    firsts = [unit.branch[0] for unit in units]
    return any(not isinstance(part, Gate) and part.kernel > 1 for part in firsts)


def readers_of(
    channels: int, units: Sequence[Unit[Folded]], has_head: bool
) -> list[list[tuple[int, ...]]]:
    """The products that read each channel of each result, results in the order in which they are
    written; ``channels`` are those of the first one."""
    table: list[list[int]] = [[] for _ in range(channels)]  # readers of each logical channel
    results = [table]
    products = 0

    def read(channels: Sequence[int], groups: int = 1) -> None:
        nonlocal products
        depth = len(channels) // groups
        for i, c in enumerate(channels):
            table[c].append(products + 1 + i // depth)
        products += groups

    for unit in units:
        layer = unit.branch[0]
        groups = () if isinstance(layer, Gate) else layer.groups
        read(unit.main, 1 + max(groups, default=0))
        first = [table[c] for c in unit.passthrough]
        if isinstance(unit.projection, Pool):
            first = table  # its planes lie as those that it reads
        elif unit.projection is not None:
            read(range(len(table)))
            first = [[] for _ in range(unit.projection_channels)]
            results.append(first)
        result: list[list[int]] = [[] for _ in range(unit.branch_channels)]
        results.append(result)
        joined = first + result
        table = [joined[j] for j in unit.order]
    if has_head:
        read(range(len(table)))
    return [[tuple(readers) for readers in result] for result in results]
