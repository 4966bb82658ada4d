"""The networks of the paper's Tables 1 to 4: ten blocks each, plain PyTorch, for 56 x 56 maps.

Convolutions have a bias, which is what inference leaves of a batch norm. What the paper leaves
open is said where it is decided.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["EXTENT", "Bottleneck", "Parallel", "channels_of", "guideline_network"]

EXTENT = 56
_BLOCKS = 10


def _fragments(setting: str) -> tuple[int, str]:
    """``"4-series"`` in parts; ``"1-fragment"`` is a series of one."""
    count, _, kind = setting.partition("-")
    return int(count), kind


def channels_of(table: str, setting: str, channels: Sequence[int], scale: int) -> tuple[int, ...]:
    """The channels of a set-up, from the paper's at scale 1.

    Args:
        table: "G1" to "G4".
        setting: a setting of that table in :data:`~snv2_bench.guidelines.paper.GUIDELINES`.
        channels: of that setting.
        scale: of all channels.

    In G2 they are rounded to a multiple of the groups, which concerns the paper's 180 in 8 groups.
    In G3 a series of n convolutions has 1 / sqrt(n) of the channels of one.
    """
    scaled = [scale * c for c in channels]
    if table == "G2":
        groups = int(setting.removeprefix("g="))
        scaled = [groups * math.floor(c / groups + 0.5) for c in scaled]
    if table == "G3":
        count, kind = _fragments(setting)
        if kind == "series":
            scaled = [round(c / math.sqrt(count)) for c in scaled]
    return tuple(scaled)


def _pointwise(inp: int, oup: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inp, oup, 1, groups=groups)


class Parallel(nn.Module):
    """Convolutions side by side: ``torch.cat([conv(x) for conv in convs], 1)``.

    The paper says that they are parallel, not in its text how they join. As in Inception each
    makes an equal part of the channels, which keeps the multiply-adds of one convolution.

    Args:
        channels: of input and output, a multiple of ``count``.
        count: of the convolutions.
    """

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_pointwise(channels, channels // count) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x) for conv in self.convs], 1)


class Bottleneck(nn.Module):
    """ResNet's: 1x1, ReLU, 3x3, ReLU, 1x1, ``+ x``, ReLU.

    The paper calls c the channels of the unit; here they are those of the map, and the 3x3 has a
    quarter of them. With c in the middle its speeds at c = 128 would be beyond its GPU's peak.

    Args:
        channels: of input and output, a multiple of 4.
        relu: without it there is none of the three ReLUs.
        shortcut: without it there is no addition.
    """

    def __init__(self, channels: int, relu: bool, shortcut: bool) -> None:
        super().__init__()
        middle = channels // 4
        layers: list[nn.Module] = []
        for conv in (_pointwise(channels, middle), nn.Conv2d(middle, middle, 3, 1, 1)):
            layers += [conv, nn.ReLU(inplace=True)] if relu else [conv]
        layers.append(_pointwise(middle, channels))
        self.layers = nn.Sequential(*layers)
        self.relu = nn.ReLU(inplace=True) if relu else None
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        if self.shortcut:
            y = y + x
        return y if self.relu is None else self.relu(y)


def _block(table: str, setting: str, channels: Sequence[int]) -> list[nn.Module]:
    if table == "G1":
        narrow, wide = channels
        return [_pointwise(narrow, wide), _pointwise(wide, narrow)]
    (c,) = channels
    if table == "G2":
        return [_pointwise(c, c, int(setting.removeprefix("g=")))]
    if table == "G3":
        count, kind = _fragments(setting)
        if kind == "parallel":
            return [Parallel(c, count)]
        return [_pointwise(c, c) for _ in range(count)]
    return [Bottleneck(c, relu="ReLU" in setting, shortcut="shortcut" in setting)]


def guideline_network(table: str, setting: str, channels: Sequence[int]) -> nn.Sequential:
    """Ten blocks of a set-up; the input has ``channels[0]`` channels.

    Args:
        table, setting: as in :func:`channels_of`.
        channels: what :func:`channels_of` returned.
    """
    return nn.Sequential(*(m for _ in range(_BLOCKS) for m in _block(table, setting, channels)))
