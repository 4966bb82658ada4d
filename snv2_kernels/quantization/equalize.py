"""Scales of channels that balance what rounding maps costs against what rounding weights costs.

A channel ``k`` needs a scale ``s`` of at least its range / 255. Where a pointwise layer reads it, a
larger one can be better. The errors of row ``o`` of such a layer, whose weights are rounded to
steps ``row[o] = (weight[o] * s).abs().max() / 127`` of bytes, have the variance::

    weight[o, k]**2 * s[k]**2 / 12                 # of the map's rounding
    row[o]**2 / 12 * variance[k] / s[k]**2         # of the weight's

so ``s[k]**4 = (row**2).sum() * variance[k] / (weight[:, k]**2).sum()`` is best, over the rows of
all layers that read the channel, as long as it makes no ``row`` larger. Rounding a weight moves no
mean, which offsets make good; hence the variance of the channel and not its mean square.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from snv2_kernels.packing.common import FoldingBuilder
from snv2_kernels.quantization.network import Key, Step, evaluate
from snv2_kernels.quantization.numbers import LARGEST_WEIGHT

__all__ = ["equalized"]

_TINY = 1e-300  # instead of a division by 0


def equalized(
    builder: FoldingBuilder,
    input_scale: Tensor,
    scales: Mapping[Key, Tensor],
    variances: Mapping[Key, Tensor],
) -> dict[Key, Tensor]:
    """Returns the scales of all results, each at least as large as the one it comes from.

    Args:
        builder: was told the network.
        input_scale: of the image or the caller's map, [C], which stays as it is.
        scales: least scale of each channel of each layer's result, [O].
        variances: of what each column of a layer's weight multiplies; see :class:`Ranges` for its
            shape.
    """
    planes = _Planes(input_scale, scales, variances)
    evaluate(builder, torch.arange(len(input_scale)), planes)
    best = (planes.weight_cost / planes.map_cost.clamp(min=_TINY)) ** 0.25
    best = torch.minimum(best, planes.most)
    found = torch.where(planes.map_cost > 0, torch.maximum(planes.least, best), planes.least)
    return {key: found[at : at + len(scales[key])] for key, at in planes.first.items()}


class _Planes:
    """Evaluator of indices of channels, which adds up what layers ask of the scale of each."""

    def __init__(
        self, input_scale: Tensor, scales: Mapping[Key, Tensor], variances: Mapping[Key, Tensor]
    ) -> None:
        self.first: dict[Key, int] = {}  # plane of each result
        count = len(input_scale)
        for key, scale in scales.items():
            self.first[key] = count
            count += len(scale)
        self.least = torch.cat([input_scale, *scales.values()])
        self.scales = scales
        self.variances = variances
        self.map_cost = torch.zeros(count, dtype=torch.float64)  # times scale**2
        self.weight_cost = torch.zeros(count, dtype=torch.float64)  # over scale**2
        self.most = torch.full((count,), torch.inf, dtype=torch.float64)

    def layer(self, step: Step, x: Tensor) -> Tensor:
        weight = step.folded.weight
        # Errors count in steps of the result, the same for all rows: what reads them weighs them by
        # weights of about the same size.
        unit = 1.0 if step.kind == "fc" else float(self.scales[step.key].square().mean())
        if step.kind == "depthwise":  # its rows are of one channel, so it takes any scale
            self.map_cost.index_add_(0, x, weight.square().sum(1) / unit)
        elif step.kind != "stem":
            row = (weight * self.least[x]).abs().amax(1, keepdim=True) / LARGEST_WEIGHT
            variance = self.variances[step.key].clamp(min=0)
            self.map_cost.index_add_(0, x, weight.square().sum(0) / unit)
            self.weight_cost.index_add_(0, x, row.square().sum() * variance / unit)
            most = (row * LARGEST_WEIGHT / weight.abs().clamp(min=_TINY)).amin(0)
            self.most[x] = torch.minimum(self.most[x], most)
        if step.kind == "fc":
            return x
        return self.first[step.key] + torch.arange(len(weight))

    def max_pool(self, x: Tensor) -> Tensor:
        return x

    def take(self, x: Tensor, channels: Sequence[int]) -> Tensor:
        return x[list(channels)]

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))
