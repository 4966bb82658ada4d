"""Plans of the CPU backend (``csrc/include/snv2/plan.h``): maps in panels of 16 planes, of float32,
bfloat16 or bytes.

So that no product reads half a word, whose other half might be NaN, a step places its result by
who reads it (:mod:`~snv2_kernels.packing.cpu_panels`): a plane that stands there twice has half its
weight each time. In a stage of C channels, where half of what is left of a result is read by each
unit, that takes at most a plane more for each unit to come. A pointwise layer of several groups is
a product for each group. A unit through which nothing passes, as ShuffleNet v1's, leaves the panels
of its input to the next one.

A branch is cut into steps of at most a pointwise, a depthwise and a pointwise convolution. What
lies between two steps is a result like any other, of which the next unit's may take the place.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from snv2_kernels import _native
from snv2_kernels.memory import empty_floats
from snv2_kernels.packing.common import (
    Folded,
    FoldedHead,
    FoldedStem,
    FoldingBuilder,
    halvings_of,
)
from snv2_kernels.packing.cpu_panels import readers_of, reads_panels
from snv2_kernels.packing.cpu_plan import Plan
from snv2_kernels.packing.cpu_writer import Entry, Writer
from snv2_kernels.packing.planes import ELEMENTS
from snv2_kernels.packing.units import Unsupported

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from snv2_kernels.packing.units import Unit
    from snv2_kernels.quantization.numbers import IntegerLayer, Quantization
    from snv2_kernels.runners import Pixels

__all__ = ["PlanBuilder"]


class PlanBuilder(FoldingBuilder):
    """Collects steps; :meth:`build`, which knows them all, decides where planes lie."""

    keeps_groups = True

    def build(self, element: torch.dtype = torch.float32) -> Plan:
        """The plan; maps that are results leave in logical order, without a head the last one too.

        Args:
            element: of the maps: float32, or bfloat16, which runs where the instruction set in use
                has it.

        Raises:
            Unsupported: for what the kernels do not cover.
        """
        if element not in (torch.float32, torch.bfloat16):
            raise ValueError(f"element: expected float32 or bfloat16, got {element}")
        return self._built(element, self._stem, self._units, self._head, None)

    def build_integers(self, quantization: Quantization, pixels: Pixels | None = None) -> Plan:
        """The plan of a network in integers.

        Args:
            quantization: of this network.
            pixels: what bytes as the input stand for, for a plan that takes such.

        Raises:
            Unsupported: for what the kernels do not cover.
        """
        layers = quantization.layers
        units = []
        for i, unit in enumerate(self._units):
            integers = iter([layers[i, j] for j, _ in enumerate(unit.layers())])
            units.append(unit.map(functools.partial(_with_next, integers)))
        stem, head = self._stem, self._head
        if stem is not None:
            stem = replace(stem, conv=stem.conv._replace(integers=layers["stem"]))
        if head is not None:
            if head.conv is None:
                raise Unsupported("a head without a convolution, in integers")
            conv = head.conv._replace(integers=layers["features"])
            head = FoldedHead(conv, head.fc._replace(integers=layers["fc"]))
        entry = Entry(quantization.input, pixels)
        return self._built(torch.uint8, stem, units, head, entry)

    def _built(
        self,
        element: torch.dtype,
        stem: FoldedStem | None,
        units: Sequence[Unit[Folded]],
        head: FoldedHead | None,
        entry: Entry | None,
    ) -> Plan:
        channels = self.in_channels if stem is None else stem.conv.channels
        readers = readers_of(channels, units, head is not None)
        writer = Writer(element, readers, reads_panels(units), entry)
        if stem is not None:
            writer.stem(stem)
        else:
            writer.import_map(self.in_channels)
        for i, unit in enumerate(units):
            writer.unit(unit)
            if i in self._tapped or (head is None and i == len(units) - 1):
                writer.export_map()
        if head is not None:
            writer.head(head)
        out_channels = writer.steps[-1].main.out_channels
        words = [_native.PLAN_MAGIC, len(writer.steps), self.in_channels, out_channels]
        words += [halvings_of(self.work), int(head is not None), ELEMENTS.index(element)]
        assert len(words) == _native.HEADER_WORDS
        for step in writer.steps:
            words += step.words()
        return Plan(
            weights=torch.cat(writer.weights, out=empty_floats(writer.weight_count)),
            words=torch.tensor(words + writer.tables, dtype=torch.int64, device="cpu"),
            in_channels=self.in_channels,
            out_channels=out_channels,
            classify=head is not None,
            units=self.units,
            work=tuple(self.work),
            results=tuple(writer.results),
            element=element,
            steps=tuple(writer.steps),
            matrices=tuple(writer.matrices),
        )


def _with_next(integers: Iterator[IntegerLayer], folded: Folded) -> Folded:
    return folded._replace(integers=next(integers))
