"""Ranges of a fused part: whether its kernels fit, and where the part keeps them."""

from __future__ import annotations

from snv2_kernels.nn.planned import PlannedModule
from snv2_kernels.packing import PlanBuilder
from snv2_kernels.quantization.numbers import Ranges, integer_layers

__all__ = ["check_kernels", "set_ranges"]


def check_kernels(builder: PlanBuilder, ranges: Ranges) -> None:
    """Packs a network in integers; raises :class:`Unsupported` where no kernel computes it."""
    builder.build_integers(integer_layers(builder, ranges))


def set_ranges(part: PlannedModule, ranges: Ranges) -> None:
    """Lets a part run in integers from its next call on."""
    part._ranges = ranges
    part._packed_state = None
