"""Where a branch is cut into steps: each has at most a pointwise, a depthwise and a pointwise
convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from snv2_kernels.packing.common import Folded
from snv2_kernels.packing.units import Gate, Unsupported

__all__ = ["Segment", "cut_branch"]


@dataclass
class Segment:
    """Of a branch: what is one step, and the gate behind it."""

    pw1: Folded | None = None
    dw: Folded | None = None
    pw2: Folded | None = None
    gate: Gate[Folded] | None = None

    @property
    def channels(self) -> int:
        layer = self.pw2 or self.dw
        assert layer is not None
        return layer.channels


def cut_branch(branch: Sequence[Folded | Gate[Folded]], *, feeding: bool) -> list[Segment]:
    """As few as there can be. A pointwise convolution between two depthwise ones goes with the one
    before, or where ``feeding`` with the one that it feeds.

    Raises:
        Unsupported: for a gate of the branch's input.
    """
    left = list(branch)

    def next_is(kind: str, at: int = 0) -> bool:
        if len(left) <= at:
            return False
        part = left[at]
        if isinstance(part, Gate):
            return kind == "gate"
        return kind == ("pw" if part.kernel == 1 else "dw")

    def take(wanted: bool) -> Any:
        return left.pop(0) if wanted else None

    cut = []
    while left:
        if next_is("gate"):
            raise Unsupported("squeeze-and-excite that follows no convolution")
        segment = Segment(take(next_is("pw") and next_is("dw", 1)))
        segment.dw = take(next_is("dw"))
        fed = feeding and segment.dw is not None and next_is("dw", 1)
        segment.pw2 = take(next_is("pw") and not fed)
        segment.gate = take(next_is("gate"))
        cut.append(segment)
    return cut
