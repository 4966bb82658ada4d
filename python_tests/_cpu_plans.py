"""Plans of the CPU backend followed word by word, in float64: also those for bfloat16, which few
machines run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from snv2_kernels import _native
from snv2_kernels.packing import Plan
from snv2_kernels.packing.cpu_plan import PANEL, Branch, PackedLayer
from snv2_kernels.packing.units import ACTIVATIONS, Activation

IMPORT, _, UNIT, GATE, HEAD, EXPORT = range(6)
EXPAND, DEPTHWISE, PROJECT, POOL, POOL_INSIDE = 1, 2, 4, 8, 16


class _Interpreter:
    def __init__(self, plan: Plan) -> None:
        self.weights = plan.weights
        start = _native.HEADER_WORDS + len(plan.steps) * _native.STEP_WORDS
        self.tables: list[int] = plan.words[start:].tolist()
        self.element = plan.element
        self.in_word = 4 // plan.element.itemsize

    def table(self, offset: int, count: int) -> list[int]:
        return self.tables[offset : offset + count]

    def matrix(
        self, offset: int, outputs: int, depth: int, element: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Weight [panels * 16, depth * planes of a word] and bias."""
        panels, planes = -(-outputs // PANEL), 4 // element.itemsize
        floats = self.weights[offset : offset + panels * (depth + 1) * PANEL]
        floats = floats.view(panels, depth + 1, PANEL)
        words = floats[:, 1:].contiguous().view(element).view(panels, depth, PANEL, planes)
        weight = words.permute(0, 2, 1, 3).reshape(panels * PANEL, depth * planes)
        return weight.double(), floats[:, 0].flatten().double()

    def act(self, layer: PackedLayer, y: Tensor) -> Tensor:
        kind = ACTIVATIONS[layer.activation]
        slope = None
        if kind in ("prelu", "leaky_relu"):
            kind, slope = "prelu", self.weights[layer.slopes : layer.slopes + y.shape[1]].double()
        return Activation(kind, slope)(y)

    def product(
        self, layer: PackedLayer, x: Tensor, words: list[int], outputs: int,
        element: torch.dtype | None = None, added: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Planes of x are [N, P, H, W]; the result has those of whole panels."""
        element = element or self.element
        planes = 4 // element.itemsize
        blocks = self.table(layer.blocks, 3 * layer.block_count) or [outputs, 0, len(words)]
        offset, results = layer.weights, []
        for i in range(0, len(blocks), 3):
            rows, first, depth = blocks[i : i + 3]
            weight, bias = self.matrix(offset, rows, depth, element)
            read = [w + k for w in words[first : first + depth] for k in range(planes)]
            y = torch.einsum("oi,nihw->nohw", weight, x[:, read]) + bias[:, None, None]
            y[:, rows + -rows % (PANEL // 2) :] = 0  # half a panel is not computed
            results.append(y)
            offset += weight.numel() // planes + bias.numel()
        y = torch.cat(results, 1)
        return self.act(layer, y if added is None else y + added)

    def branch(self, x: Tensor, branch: Branch, stride: int) -> Tensor:
        in_table = self.table(branch.in_table, branch.in_channels)
        if branch.parts & POOL:
            inside = branch.parts & POOL_INSIDE
            y = F.avg_pool2d(_panels(x, in_table), 3, stride, 1, count_include_pad=not inside)
            return self.act(branch.dw, y)
        y, words = x, in_table
        if branch.parts & EXPAND:
            y = self.product(branch.pw1, x, in_table, branch.mid_channels)
        elif branch.parts & DEPTHWISE:
            y = _panels(x, in_table)
        if branch.parts & DEPTHWISE:
            k, channels = branch.window, y.shape[1]
            taps, bias = self.matrix(branch.dw.weights, channels, k * k, torch.float32)
            reach = k // 2 * branch.dilation
            y = F.conv2d(y, taps.view(-1, 1, k, k), bias, stride, reach, branch.dilation, channels)
            y = self.act(branch.dw, y)
            words = self.table(branch.table, branch.depth)
        if branch.parts & PROJECT:
            added = None
            if branch.added_panels:
                added = _panels(x, self.table(branch.added, branch.added_panels))
            y = self.product(branch.pw2, y, words, branch.out_channels, added=added)
        return y


def _panels(x: Tensor, panels: list[int]) -> Tensor:
    return x[:, [p * PANEL + i for p in panels for i in range(PANEL)]]


def interpret(plan: Plan, x: Tensor) -> Tensor:
    """The last result of a plan without a stem, in float64. What no step wrote is NaN."""
    run = _Interpreter(plan)
    current = out = x.double()
    for step in plan.steps:
        main = step.main
        if step.kind == IMPORT:
            rows = run.table(main.in_table, main.out_channels)
            current = x.new_full((len(x), step.buffer_panels * PANEL, *x.shape[2:]), torch.nan)
            current = current.double()
            for plane, channel in enumerate(rows):
                current[:, plane] = x[:, channel].double()
        elif step.kind == UNIT:
            made = [
                (b, run.branch(current, b, step.stride)) for b in (main, step.projection) if b.parts
            ]
            target = current.clone()
            if step.new_buffer:
                shape = len(x), step.buffer_panels * PANEL, *made[0][1].shape[2:]
                target = current.new_full(shape, torch.nan)
            for branch, y in made:
                target[:, branch.out_panel * PANEL :][:, : y.shape[1]] = y
            current = target
        elif step.kind == GATE:
            assert main.mid_channels == 0, "squeeze-and-excite is not followed"
            first, planes = main.out_panel * PANEL, main.out_channels
            y = current[:, first : first + planes]
            y = y + current[:, run.table(main.table, main.depth)]
            current = current.clone()
            current[:, first : first + planes] = run.act(main.dw, y)
        elif step.kind == EXPORT:
            out = current[:, run.table(main.in_table, main.in_channels)]
        else:
            planes = run.table(main.in_table, main.in_channels)
            means = current.mean([2, 3], keepdim=True)
            if main.parts != POOL:
                y = run.product(main.pw1, current, planes, main.mid_channels)
                means, planes = y.mean([2, 3], keepdim=True), list(range(main.mid_channels))
            features = means[:, planes]
            words = list(range(0, len(planes), run.in_word))
            out = run.product(main.pw2, features, words, main.out_channels)
            out = out[:, : main.out_channels, 0, 0]
    return out
