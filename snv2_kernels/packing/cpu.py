"""Plans of the CPU backend (``csrc/include/snv2/plan.h``): maps in panels of 16 planes, of float32
or bfloat16.

Products read planes by the word: one of float32, two neighbours of bfloat16. So that no product
reads half a word, whose other half might be NaN, a step places its result by who reads it: the
planes of a word are read by the same products, and one that has no such neighbour stands there
twice, with half its weight each time. In a stage of C channels, where half of what is left of a
result is read by each unit, that takes at most a plane more for each unit to come.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from snv2_kernels import _native
from snv2_kernels.memory import empty_floats
from snv2_kernels.packing.common import (
    BasePlan,
    Folded,
    FoldedHead,
    FoldedStem,
    FoldingBuilder,
    half,
    halvings_of,
    paper_branch,
    relu_only,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snv2_kernels.packing.units import Unit

__all__ = ["PANEL", "Plan", "PlanBuilder", "Product", "Step", "pack_panels"]

PANEL: int = _native.PANEL
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 2}  # snv2::DType
_IMPORT, _STEM, _UNIT, _HEAD, _EXPORT = range(5)


def pack_panels(weight: Tensor, bias: Tensor, element: torch.dtype = torch.float32) -> Tensor:
    """[O, K] and [O] as flat float32 panels: [ceil(O / 16)][1 + K][16], the bias row first. Of
    bfloat16 two columns lie in each row's floats: [ceil(O / 16)][1 + K / 2][16]."""
    padding = -weight.shape[0] % PANEL
    weight, bias = (
        nn.functional.pad(weight, (0, 0, 0, padding)),
        nn.functional.pad(bias, (0, padding)),
    )
    words = weight.to(element).view(-1, PANEL, weight.shape[1]).view(torch.float32)
    return torch.cat([bias.float().view(-1, PANEL, 1), words], 2).transpose(1, 2).flatten()


@dataclass
class Step:
    """One step of a plan; the fields and their order are those of ``snv2::Step``."""

    kind: int
    stride: int = 1
    new_buffer: int = 0
    buffer_panels: int = 0
    in_channels: int = 0
    in_table: int = 0
    mid_channels: int = 0
    out_channels: int = 0
    out_panel: int = 0
    pw1_weights: int = 0
    dw_weights: int = 0
    pw2_weights: int = 0
    proj_panels: int = 0
    proj_panel_table: int = 0
    proj_depth: int = 0
    proj_table: int = 0
    proj_channels: int = 0
    proj_out_panel: int = 0
    proj_dw_weights: int = 0
    proj_pw_weights: int = 0

    def words(self) -> list[int]:
        return [getattr(self, f.name) for f in fields(self)]


assert len(fields(Step)) == _native.STEP_WORDS


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


@dataclass(frozen=True, kw_only=True)
class Plan(BasePlan):
    """Everything the CPU backend needs: ``torch.ops.snv2.network(x, *plan.arguments)``."""

    words: Tensor  # int64, on the CPU
    weights: Tensor  # [floats] float32
    element: torch.dtype  # of the maps
    steps: tuple[Step, ...] = field(repr=False)
    # Rows and columns of the matrix at each offset of `weights`, as the network has it.
    shapes: dict[int, tuple[int, int]] = field(repr=False)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int, bool]:
        return self.weights, self.words, self.out_channels, self.halvings, self.classify

    def products(self, height: int, width: int) -> list[Product]:
        """All convolutions and linear layers in the order in which weights are packed."""
        products: list[Product] = []

        def add(step: str, name: str, weights: int, pixels: int, read: int, written: int) -> None:
            rows, columns = self.shapes[weights]
            size = rows * columns
            products.append(Product(step, name, weights, size * pixels, size, read, written))

        def pointwise(step: str, name: str, weights: int, pixels: int) -> None:
            rows, columns = self.shapes[weights]
            add(step, name, weights, pixels, columns * pixels, rows * pixels)

        def depthwise(step: str, name: str, weights: int, before: int, pixels: int) -> None:
            channels, _ = self.shapes[weights]
            add(step, name, weights, pixels, channels * before, channels * pixels)

        stage, unit = 1, 0
        for step in self.steps:
            pixels = height * width
            if step.kind == _STEM:
                height, width = half(height), half(width)
                convolved = height * width
                height, width = half(height), half(width)
                rows, _ = self.shapes[step.pw1_weights]
                pooled = rows * height * width
                add("stem", "conv", step.pw1_weights, convolved, 3 * pixels, pooled)
            elif step.kind == _UNIT:
                unit += 1
                if step.stride == 2:
                    stage, unit = stage + 1, 0
                    height, width = half(height), half(width)
                where = f"stage{stage}.{unit}"
                after = height * width
                pointwise(where, "pw1", step.pw1_weights, pixels)
                depthwise(where, "dw", step.dw_weights, pixels, after)
                pointwise(where, "pw2", step.pw2_weights, after)
                if step.proj_channels:
                    depthwise(where, "projection dw", step.proj_dw_weights, pixels, after)
                    pointwise(where, "projection pw", step.proj_pw_weights, after)
            elif step.kind == _HEAD:
                rows, columns = self.shapes[step.pw1_weights]
                add("head", "conv5 + mean", step.pw1_weights, pixels, columns * pixels, rows)
                pointwise("head", "fc", step.pw2_weights, 1)
        return products


class PlanBuilder(FoldingBuilder):
    """Collects steps; :meth:`build`, which knows them all, decides where planes lie."""

    def build(self, element: torch.dtype = torch.float32) -> Plan:
        """The plan; without a head the map leaves in logical order.

        Args:
            element: of the maps: float32, or bfloat16, which runs where the instruction set in use
                has it.

        Raises:
            Unsupported: for what the kernels do not cover.
        """
        if element not in _ELEMENTS:
            raise ValueError(f"element: expected float32 or bfloat16, got {element}")
        writer = _Writer(element, self._readers())
        if self._stem is not None:
            writer.stem(self._stem)
        else:
            writer.import_map(self.in_channels)
        for unit in self._units:
            writer.unit(unit)
        if self._head is not None:
            writer.head(self._head)
        else:
            writer.export_map()
        out_channels = writer.steps[-1].out_channels
        words = [_native.PLAN_MAGIC, len(writer.steps), self.in_channels, out_channels]
        words += [halvings_of(self.work), int(self._head is not None), _ELEMENTS[element]]
        assert len(words) == _native.HEADER_WORDS
        for step in writer.steps:
            words += step.words()
        return Plan(
            weights=torch.cat(writer.weights, out=empty_floats(writer.weight_count)),
            words=torch.tensor(words + writer.tables, dtype=torch.int64, device="cpu"),
            in_channels=self.in_channels,
            out_channels=out_channels,
            classify=self._head is not None,
            units=self.units,
            work=tuple(self.work),
            element=element,
            steps=tuple(writer.steps),
            shapes=writer.shapes,
        )

    def _readers(self) -> list[list[tuple[int, ...]]]:
        """The products that read each channel of each result, results in the order in which they
        are written."""
        channels = self.in_channels if self._stem is None else self._stem.conv.channels
        table: list[list[int]] = [[] for _ in range(channels)]  # readers of each logical channel
        results = [table]
        products = 0

        def read(channels: Sequence[int]) -> None:
            nonlocal products
            products += 1
            for c in channels:
                table[c].append(products)

        for unit in self._units:
            read(unit.main)
            first = [table[c] for c in unit.passthrough]
            if unit.projection is not None:
                read(range(len(table)))
                first = [[] for _ in range(unit.projection_channels)]
                results.append(first)
            result: list[list[int]] = [[] for _ in range(unit.branch_channels)]
            results.append(result)
            joined = first + result
            table = [joined[j] for j in unit.order]
        if self._head is not None:
            read(range(len(table)))
        return [[tuple(readers) for readers in result] for result in results]


class _Writer:
    """Steps, tables and weights of a plan, written while following the channel table of the map."""

    def __init__(self, element: torch.dtype, readers: list[list[tuple[int, ...]]]) -> None:
        self.steps: list[Step] = []
        self.tables: list[int] = []
        self.weights: list[Tensor] = []
        self.weight_count = 0
        self.shapes: dict[int, tuple[int, int]] = {}
        self._element = element
        self._in_word = 4 // element.itemsize  # planes
        self._readers = iter(readers)
        self._buffer = Step(_IMPORT)  # the step that started the current one
        self._panels = 0  # of it, so far
        self._table: list[int] = []  # first plane of each logical channel

    # Parts ------------------------------------------------------------------------------------

    def _add_table(self, entries: Sequence[int]) -> int:
        offset = len(self.tables)
        self.tables.extend(entries)
        return offset

    def _add_weights(self, packed: Tensor, matrix: Tensor) -> int:
        offset = self.weight_count
        self.shapes[offset] = matrix.shape[0], matrix.shape[1]
        self.weights.append(packed)
        self.weight_count += packed.numel()
        return offset

    def _add_product(self, folded: Folded, rows: Sequence[int], columns: Sequence[int]) -> int:
        """The matrix for a map and a result whose planes hold those columns and rows."""
        weight, bias = folded.weight, folded.bias
        times = torch.bincount(torch.tensor(columns))
        weight = (weight / times)[:, columns]
        packed = pack_panels(weight[rows], bias[rows], self._element)
        return self._add_weights(packed, folded.weight)

    def _start_buffer(self, step: Step) -> None:
        step.new_buffer = 1
        self._buffer = step
        self._panels = 0

    def _doubled(self, channels: int) -> list[int]:
        """Channels of whole words."""
        return [min(c, channels - 1) for c in range(channels + -channels % self._in_word)]

    def _place(self) -> tuple[int, list[int], list[int]]:
        """Fresh planes for the next result: their panel, its row in each, and the plane of each
        row."""
        readers = next(self._readers)
        rows: list[int] = list(range(len(readers)))
        if self._in_word > 1:
            alike: dict[tuple[int, ...], list[int]] = {}
            for row, products in enumerate(readers):
                alike.setdefault(products, []).append(row)
            rows = [group[i] for group in alike.values() for i in self._doubled(len(group))]
        panel = self._panels
        self._panels += -(-len(rows) // PANEL)
        self._buffer.buffer_panels = self._panels
        planes = [panel * PANEL + rows.index(row) for row in range(len(readers))]
        return panel, rows, planes

    def _gather(self, planes: Sequence[int]) -> tuple[list[int], list[int]]:
        """The words of some planes, in the order of memory, and which one each plane of a word
        holds."""
        place = {plane: k for k, plane in enumerate(planes)}
        words = sorted({plane - plane % self._in_word for plane in planes})
        columns = [place.get(word + i, place[word]) for word in words for i in range(self._in_word)]
        return words, columns

    # Steps ------------------------------------------------------------------------------------

    def import_map(self, channels: int) -> None:
        step = Step(_IMPORT, in_channels=channels)
        self._start_buffer(step)
        _, rows, self._table = self._place()
        step.out_channels, step.in_table = len(rows), self._add_table(rows)
        self.steps.append(step)

    def stem(self, stem: FoldedStem) -> None:
        step = Step(_STEM, in_channels=stem.in_channels)
        self._start_buffer(step)
        _, rows, self._table = self._place()
        channels = self._doubled(stem.in_channels)
        columns = [
            9 * c + tap
            for first in range(0, len(channels), self._in_word)
            for tap in range(9)
            for c in channels[first : first + self._in_word]
        ]
        step.out_channels = len(rows)
        step.pw1_weights = self._add_product(relu_only(stem.conv), rows, columns)
        self.steps.append(step)

    def unit(self, unit: Unit[Folded]) -> None:
        pw1, dw, pw2 = paper_branch(unit)
        step = Step(_UNIT, stride=unit.stride)
        words, columns = self._gather([self._table[c] for c in unit.main])
        middle = self._doubled(pw1.channels)
        step.in_channels, step.in_table = len(words), self._add_table(words)
        step.mid_channels = len(middle)
        step.pw1_weights = self._add_product(pw1, middle, columns)
        packed = pack_panels(dw.weight[middle], dw.bias[middle])
        step.dw_weights = self._add_weights(packed, dw.weight)
        if unit.projection is not None:
            depthwise = self._add_projection(step, unit.projection[0])
        if unit.stride == 2:
            self._start_buffer(step)
        first = [self._table[c] for c in unit.passthrough]
        if unit.projection is not None:
            step.proj_out_panel, rows, first = self._place()
            step.proj_channels = len(rows)
            step.proj_pw_weights = self._add_product(unit.projection[1], rows, depthwise)
        step.out_panel, rows, result = self._place()
        step.out_channels = len(rows)
        step.pw2_weights = self._add_product(pw2, rows, middle)
        joined = first + result
        self._table = [joined[j] for j in unit.order]
        self.steps.append(step)

    def _add_projection(self, step: Step, dw: Folded) -> list[int]:
        """The depthwise part; the columns of what it gives."""
        words, columns = self._gather(self._table)
        # It runs on whole panels; those without a live plane are left out.
        panels = sorted({word // PANEL for word in words})
        rank = {panel: i for i, panel in enumerate(panels)}
        words = [rank[word // PANEL] * PANEL + word % PANEL for word in words]
        planes = [word + i for word in words for i in range(self._in_word)]
        weight, bias = dw.weight, dw.bias
        spread_weight = weight.new_zeros(len(panels) * PANEL, 9)
        spread_bias = bias.new_zeros(len(panels) * PANEL)
        spread_weight[planes], spread_bias[planes] = weight[columns], bias[columns]
        step.proj_panels, step.proj_panel_table = len(panels), self._add_table(panels)
        step.proj_depth, step.proj_table = len(words), self._add_table(words)
        packed = pack_panels(spread_weight, spread_bias)
        step.proj_dw_weights = self._add_weights(packed, weight)
        return columns

    def head(self, head: FoldedHead) -> None:
        words, columns = self._gather(self._table)
        features, classes = self._doubled(head.conv.channels), range(head.fc.channels)
        step = Step(_HEAD, in_channels=len(words), in_table=self._add_table(words))
        step.mid_channels, step.out_channels = len(features), len(classes)
        step.pw1_weights = self._add_product(relu_only(head.conv), features, columns)
        step.pw2_weights = self._add_product(head.fc, classes, features)
        self.steps.append(step)

    def export_map(self) -> None:
        channels = len(self._table)
        step = Step(_EXPORT, in_channels=channels, out_channels=channels)
        step.in_table = self._add_table(self._table)
        self.steps.append(step)
