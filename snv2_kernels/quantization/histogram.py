"""Distributions of the channels of a map, in memory that does not grow with what is seen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Histogram"]

_BINS = 512  # for each sign
_FRACTIONS = 0.94 ** torch.arange(40, dtype=torch.float64)  # of the extreme, to clip at
_STEPS = 255  # between the ends of a range


class Histogram:
    """Counts of ``|x|`` for each channel and sign, in bins that widen by factors of two.

    Zeros are counted apart: they are exact in any scale, and behind ReLU there are many.

    Args:
        channels: of the map.
        signed: whether it has negative numbers; an activation makes none.
    """

    def __init__(self, channels: int, signed: bool = True) -> None:
        self.width = torch.zeros(channels)  # of all bins of a sign together
        signs = 2 if signed else 1  # positive first
        self.counts = torch.zeros(channels, signs, _BINS, dtype=torch.int64)
        self.total = 0  # for each channel, zeros included
        self.highest = torch.full((channels,), -torch.inf)
        self.lowest = torch.full((channels,), torch.inf)

    def add(self, x: Tensor) -> None:
        """Counts a map [N, C, ...] of finite numbers."""
        flat = x.transpose(0, 1).flatten(1)
        self.total += flat.shape[1]
        self.highest = torch.maximum(self.highest, flat.amax(1))
        self.lowest = torch.minimum(self.lowest, flat.amin(1))
        self._widen(torch.maximum(self.highest, -self.lowest))
        step = torch.where(self.width > 0, self.width, torch.ones_like(self.width)) / _BINS
        bins = (flat.abs() / step[:, None]).clamp_(max=_BINS - 1).long()
        bins += torch.arange(len(flat))[:, None] * self.counts[0].numel() + (flat < 0) * _BINS
        counts = torch.bincount(bins[flat != 0], minlength=self.counts.numel())
        self.counts += counts.view(self.counts.shape)

    def _widen(self, largest: Tensor) -> None:
        is_new = (self.width == 0) & (largest > 0)
        self.width = torch.where(is_new, largest, self.width)
        while True:
            narrow = (largest > self.width).nonzero()[:, 0]
            if not len(narrow):
                return
            halved = self.counts[narrow].unflatten(2, (_BINS // 2, 2)).sum(3)
            self.counts[narrow] = torch.cat([halved, torch.zeros_like(halved)], 2)
            self.width[narrow] *= 2

    def nonzero(self) -> Tensor:
        """Returns how many numbers of each channel were not 0, [C] in float64."""
        return self.counts.sum((1, 2)).double()

    def minmax(self) -> tuple[Tensor, Tensor]:
        """Returns the least and the largest number of each channel, [C] in float64."""
        return self.lowest.double(), self.highest.double()

    def percentile(self, percent: float) -> tuple[Tensor, Tensor]:
        """Returns the least and the largest number of each channel once ``100 - percent`` percent
        of what is on either side of 0 is cut off at its end."""
        allowed = self.counts.sum(2, keepdim=True) * (100 - percent) / 100
        kept = (_from_far(self.counts) > allowed).sum(2).double()
        ends = kept * (self.width.double() / _BINS)[:, None]
        high = torch.minimum(ends[:, 0], self.highest.double())
        low = torch.minimum(ends[:, -1], -self.lowest.double())  # 0 of a map without negatives
        return -low, high

    def least_error(self) -> tuple[Tensor, Tensor]:
        """Returns the ends between which 256 levels have the least mean squared error.

        What is inside errs by a step / sqrt(12), what is outside by its distance.
        """
        lowest, highest = self.minmax()
        high, beyond_high = self._clipped(0, highest)
        low, beyond_low = self._clipped(-1, -lowest)
        step = (high[:, :, None] + low[:, None, :]) / _STEPS
        error = beyond_high[:, :, None] + beyond_low[:, None, :]
        error += step**2 / 12 * self.nonzero()[:, None, None]
        best = error.flatten(1).argmin(1, keepdim=True)
        count = len(_FRACTIONS)
        low = -low.gather(1, best % count)[:, 0]
        high = high.gather(1, best // count)[:, 0]
        return torch.maximum(low, lowest), torch.minimum(high, highest)

    def _clipped(self, sign: int, extreme: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ends to clip at on one side, [C, ends], and the squared errors that each makes of
        what is beyond."""
        ends = _FRACTIONS * extreme.clamp(min=0)[:, None]
        counts = self.counts[:, sign].double()
        centers = (torch.arange(_BINS, dtype=torch.float64) + 0.5) / _BINS
        centers = centers * self.width.double()[:, None]
        first = torch.searchsorted(centers, ends)  # bin beyond each end
        sums = [_from_far(F.pad(counts * centers**p, (0, 1))).gather(1, first) for p in (0, 1, 2)]
        return ends, sums[2] - 2 * ends * sums[1] + ends**2 * sums[0]


def _from_far(counts: Tensor) -> Tensor:
    """Returns the sum of each bin and of all further out."""
    return counts.flip(-1).cumsum(-1).flip(-1)
