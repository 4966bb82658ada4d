"""Plans for the Triton kernels: those of the CUDA kernels, with matrices row by row.

Rows of a matrix are ``pitch(depth)`` elements apart, zeros at their end, so that each begins where
16 bytes are read at once. A unit's rows are its main branch's and then its side's: the projection
at stride 2, what passes through at stride 1. Tables that say where rows go have that order.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from snv2_kernels.packing.common import BasePlan
from snv2_kernels.packing.gpu import (
    COPY,
    IDENTITY,
    NO_BUFFER,
    NO_RESULT,
    STEM,
    UNIT,
    GpuStep,
)
from snv2_kernels.packing.units import ACTIVATIONS, Unsupported

if TYPE_CHECKING:
    from snv2_kernels.packing.gpu import GpuPlan

__all__ = ["TritonPlan", "pitch", "triton_plan"]

RELU = ACTIVATIONS.index("relu")
_ALIGNED = 16  # elements


def pitch(length: int) -> int:
    """From row to row, where a row has ``length`` elements."""
    return -(-length // _ALIGNED) * _ALIGNED


@dataclass(frozen=True, kw_only=True)
class TritonPlan(BasePlan):
    """``torch.ops.snv2_triton.network(x, *plan.arguments)``.

    Steps are those of the CUDA plan with offsets of their own. ``out_table`` has a plane for each
    row, ``result_table`` a channel of the result for each row, and at stride 1 behind them the
    planes that pass through.
    """

    weights: Tensor  # matrices, of the map's dtype
    parameters: Tensor  # float32: biases and depthwise convolutions
    tables: Tensor  # int32
    steps: tuple[GpuStep, ...] = field(repr=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def arrays(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weights, self.parameters, self.tables

    @functools.cached_property
    def step_words(self) -> list[int]:
        return [word for step in self.steps for word in step.words()]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, list[int], int, int, bool]:
        return *self.arrays, self.step_words, self.out_channels, self.halvings, self.classify


def _check_paper(step: GpuStep) -> None:
    """Raises :class:`Unsupported` for what the kernels do not cover: all but ReLU and 3x3."""
    for field_, value in vars(step).items():
        fits = (IDENTITY,) if "dw_" in field_ else (IDENTITY, RELU)
        if field_.endswith("_activation") and value not in fits:
            raise Unsupported(f"activation {ACTIVATIONS[value]}")
        if field_.endswith("_window") and value > 3:
            raise Unsupported(f"a window of {value}x{value}")
        if field_.endswith("_dilation") and value > 1:
            raise Unsupported(f"dilation {value}")
    products = {COPY: (), UNIT: ("pw1", "pw2")}.get(step.kind, ("pw1",))
    if step.proj_channels:
        products += ("proj",)
    for name in products:
        if getattr(step, f"{name}_activation") != RELU:
            raise Unsupported("a product without ReLU")


class _Rewriter:
    """Copies the arrays of a plan in the order of the steps."""

    def __init__(self, plan: GpuPlan) -> None:
        self._plan = plan
        self._from = plan.tables.tolist()
        self.tables: list[int] = []
        self.weights: list[Tensor] = [plan.weights[:0]]
        self._weight_count = 0

    def matrix(self, offset: int, rows: int, depth: int) -> int:
        padded = self._plan.weights.new_zeros(rows, pitch(depth))
        padded[:, :depth] = self._plan.matrix(offset, rows, depth)
        self.weights.append(padded.flatten())
        self._weight_count += padded.numel()
        return self._weight_count - padded.numel()

    def table(self, entries: list[int]) -> int:
        self.tables += entries
        return len(self.tables) - len(entries)

    def entries(self, offset: int, count: int) -> list[int]:
        return self._from[offset : offset + count]

    def step(self, step: GpuStep) -> GpuStep:
        _check_paper(step)
        depth, mid, out, proj = (
            step.in_channels, step.mid_channels, step.out_channels, step.proj_channels
        )  # fmt: skip
        new = replace(step, in_table=self.table(self.entries(step.in_table, depth)))
        if step.kind == COPY:
            return new
        if step.kind == STEM:
            new.pw1_weights = self.matrix(step.pw1_weights, out, 9 * depth)
            return new
        new.pw1_weights = self.matrix(step.pw1_weights, mid, depth)
        new.pw2_weights = self.matrix(step.pw2_weights, out, mid)
        if step.kind != UNIT:
            return new
        if proj:
            new.proj_weights = self.matrix(step.proj_weights, proj, depth)
        if step.out_buffer != NO_BUFFER:
            planes = self.entries(step.out_table, proj + out)
            new.out_table = self.table(planes[proj:] + planes[:proj])
        if step.result != NO_RESULT:
            new.result_table = self._result(step)
        return new

    def _result(self, step: GpuStep) -> int:
        result = self.entries(step.result_table, step.result_channels)
        # Rows of the CUDA plan are the projection's first; negative ones are planes.
        channels = {row: channel for channel, row in enumerate(result)}
        proj = step.proj_channels
        passing = [row for row in result if row < 0]
        order = [*range(proj, proj + step.out_channels), *(range(proj) if proj else passing)]
        return self.table([channels[row] for row in order] + [-1 - row for row in passing])


def triton_plan(plan: GpuPlan, device: torch.device) -> TritonPlan:
    """The same network; ``plan`` had better lie on the CPU."""
    rewriter = _Rewriter(plan)
    steps = tuple(map(rewriter.step, plan.steps))
    common = {f.name: getattr(plan, f.name) for f in dataclasses.fields(BasePlan)}
    return TritonPlan(
        **common,
        weights=torch.cat(rewriter.weights).to(device),
        parameters=plan.parameters.to(device),
        tables=torch.tensor(rewriter.tables, dtype=torch.int32, device=device),
        steps=steps,
    )
