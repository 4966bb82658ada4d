"""Weights of a unit for the Triton kernels: those of its GPU plan, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from snv2_kernels.packing.gpu import UNIT

if TYPE_CHECKING:
    from snv2_kernels.packing.gpu import GpuPlan

__all__ = ["UnitWeights", "unit_weights"]


@dataclass(frozen=True)
class UnitWeights:
    """``torch.ops.snv2_triton.unit(x, *weights.arguments)``. The side is the projection at
    stride 2, what passes through at stride 1."""

    table: Tensor  # int32 [in]: channels that pw1 reads
    pw1: Tensor  # [mid, in], of the map's dtype
    pw1_bias: Tensor  # float32 [mid]
    dw: Tensor  # float32 [mid, 10]: nine taps and the shift
    pw2: Tensor  # [out, mid]
    pw2_bias: Tensor
    side_table: Tensor  # int32: channels that pass through, or that the projection reads
    side_dw: Tensor  # float32 [in, 10]
    side_pw: Tensor  # [proj, in]
    side_bias: Tensor
    out_table: Tensor  # int32 [out + side]: the channel of the result that each row is
    stride: int

    @property
    def arguments(self) -> tuple[Tensor | int, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)


def unit_weights(plan: GpuPlan) -> UnitWeights:
    """Of a plan that is one unit, on the plan's device."""
    (step,) = plan.steps
    assert step.kind == UNIT
    mid, out, proj, depth = (
        step.mid_channels, step.out_channels, step.proj_channels, step.in_channels
    )  # fmt: skip
    tables, parameters = plan.tables, plan.parameters
    gathered = tables[step.in_table : step.in_table + depth]
    result = tables[step.result_table : step.result_table + step.result_channels].tolist()
    # Rows of the result are the projection's, then the main branch's; negative ones pass through.
    channels = {row: channel for channel, row in enumerate(result)}
    passing = [row for row in result if row < 0]
    order = [*range(proj, proj + out), *(range(proj) if proj else passing)]

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=tables.device)

    def floats(offset: int, *shape: int) -> Tensor:
        return parameters[offset:][: torch.Size(shape).numel()].view(shape)

    return UnitWeights(
        table=gathered,
        pw1=plan.matrix(step.pw1_weights, mid, depth),
        pw1_bias=floats(step.pw1_bias, mid),
        dw=floats(step.dw, mid, 10),
        pw2=plan.matrix(step.pw2_weights, out, mid),
        pw2_bias=floats(step.pw2_bias, out),
        side_table=gathered if proj else integers([-1 - row for row in passing]),
        side_dw=floats(step.proj_dw, depth, 10) if proj else parameters[:0].view(0, 10),
        side_pw=plan.matrix(step.proj_weights, proj, depth)
        if proj
        else plan.weights[:0].view(0, 0),
        side_bias=floats(step.proj_bias, proj),
        out_table=integers([channels[row] for row in order]),
        stride=step.stride,
    )
