"""Distributions of the channels of a map, in memory that does not grow with what is seen."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Histogram"]

_BINS = 1024  # on each side of 0
_FRACTIONS = 0.94 ** torch.arange(40, dtype=torch.float64)  # of the extreme, to clip at
LEVELS = 255


class Histogram:
    """Counts of ``|x|`` for each channel and sign, in bins that widen by factors of two.

    Zeros are counted apart: they are exact in any scale, and behind ReLU there are many.

    Args:
        channels: of the map.
    """

    def __init__(self, channels: int) -> None:
        self.width = torch.zeros(channels)  # of all bins of a sign together
        self.counts = torch.zeros(channels, 2, _BINS, dtype=torch.float64)  # positive, negative
        self.total = 0  # for each channel, zeros included
        self.highest = torch.zeros(channels)
        self.lowest = torch.zeros(channels)

    def add(self, x: Tensor) -> None:
        """Counts a map [N, C, ...]."""
        flat = x.transpose(0, 1).flatten(1)
        self.total += flat.shape[1]
        self.highest = torch.maximum(self.highest, flat.amax(1))
        self.lowest = torch.minimum(self.lowest, flat.amin(1))
        self._widen(torch.maximum(self.highest, -self.lowest))
        step = torch.where(self.width > 0, self.width, torch.ones_like(self.width)) / _BINS
        bins = (flat.abs() / step[:, None]).long().clamp_(max=_BINS - 1)
        bins += torch.arange(len(flat))[:, None] * (2 * _BINS) + (flat < 0) * _BINS
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

    def minmax(self) -> tuple[Tensor, Tensor]:
        """Returns the least and the largest number of each channel, [C] in float64; 0 counts as
        seen."""
        return self.lowest.double(), self.highest.double()

    def percentile(self, percent: float) -> tuple[Tensor, Tensor]:
        """Returns the least and the largest number of each channel once the rest of
        ``100 - percent`` percent is cut off on each side."""
        allowed = self.total * (100 - percent) / 100
        beyond = self.counts.flip(2).cumsum(2).flip(2)  # in this bin or further out
        kept = (beyond > allowed).sum(2).double()
        ends = kept * (self.width.double() / _BINS)[:, None]
        high = torch.minimum(ends[:, 0], self.highest.double())
        low = torch.maximum(-ends[:, 1], self.lowest.double())
        return low, high

    def least_error(self) -> tuple[Tensor, Tensor]:
        """Returns the ends between which 256 levels have the least mean squared error.

        What is inside errs by a step / sqrt(12), what is outside by its distance.
        """
        centers = (torch.arange(_BINS, dtype=torch.float64) + 0.5) / _BINS  # of the width
        lowest, highest = self.minmax()
        errors, ends = [], []
        for side, extreme in ((0, highest), (1, -lowest)):
            at = _FRACTIONS * extreme[:, None]  # [C, F]
            counts = self.counts[:, side]
            reach = centers * self.width.double()[:, None]  # [C, B]
            # Sums over all bins beyond each end, by what the bins add up to from the far end on.
            moments = torch.stack([counts, counts * reach, counts * reach**2])
            beyond = moments.flip(2).cumsum(2).flip(2)
            beyond = torch.cat([beyond, torch.zeros_like(beyond[:, :, :1])], 2)
            first = torch.searchsorted(reach.contiguous(), at.contiguous())
            n, total, squares = (m.gather(1, first) for m in beyond)
            errors.append(squares - 2 * at * total + at**2 * n)
            ends.append(at)
        inside = self.counts.sum((1, 2))[:, None, None]
        step = (ends[0][:, :, None] + ends[1][:, None, :]) / LEVELS
        error = errors[0][:, :, None] + errors[1][:, None, :] + step**2 / 12 * inside
        best = error.flatten(1).argmin(1)
        high = ends[0].gather(1, (best // len(_FRACTIONS))[:, None])[:, 0]
        low = ends[1].gather(1, (best % len(_FRACTIONS))[:, None])[:, 0]
        return -low, high
