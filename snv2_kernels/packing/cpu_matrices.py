"""Matrices of the CPU backend's plans, as its kernels read them: rows and columns by planes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from snv2_kernels.packing.common import Folded
from snv2_kernels.packing.cpu_plan import pack_panels

if TYPE_CHECKING:
    from snv2_kernels.quantization.numbers import IntegerLayer

__all__ = ["packed_depthwise", "packed_product", "taken"]


def packed_product(
    folded: Folded, rows: Sequence[int], columns: Sequence[int], element: torch.dtype
) -> Tensor:
    """The packed matrix for planes that hold these rows and columns; a column that is held twice
    counts half each time."""
    if element == torch.uint8:
        return _integers(folded.integers, rows, columns)
    times = torch.bincount(torch.tensor(columns))
    weight = (folded.weight / times)[:, columns]
    return pack_panels(taken(weight, rows).to(element), taken(folded.bias, rows))


def _integers(layer: IntegerLayer | None, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """The same of bytes: multipliers, offsets, sums and int8 weights; a column of -1 is zero."""
    assert layer is not None
    weight = taken(layer.weight.T, columns).T
    # As int32; some processors multiply bytes less 128.
    sums = layer.weight.sum(1, dtype=torch.int32).view(torch.float32)
    before = (taken(values, rows) for values in (layer.multiplier, layer.offset, sums))
    return pack_panels(taken(weight, rows), *before)


def packed_depthwise(folded: Folded, rows: Sequence[int], element: torch.dtype) -> Tensor:
    """Packs the taps of a window, of integers each row of it in words of four."""
    if element != torch.uint8:
        return pack_panels(taken(folded.weight, rows).float(), taken(folded.bias, rows))
    assert folded.integers is not None
    taps = folded.integers.weight.view(-1, folded.kernel, folded.kernel)
    taps = nn.functional.pad(taps, (0, -folded.kernel % 4)).flatten(1)
    padded = replace(folded.integers, weight=taps)
    return _integers(padded, rows, range(taps.shape[1]))


def taken(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a tensor; -1 is one of zeros."""
    zeros = values.new_zeros(1, *values.shape[1:])
    return torch.cat([values, zeros])[list(rows)]
