"""G4 for ShuffleNet units: what element-wise operations cost before and after fusion.

The unit of stride 1, with less and less around its three convolutions. These have the same
multiply-adds throughout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from snv2_bench.peers import Unavailable
from snv2_kernels import models
from snv2_kernels.explanation import explain
from snv2_kernels.fuse import fuse
from snv2_kernels.nn.planned import PlannedModule
from snv2_kernels.nn.watch import why_plain
from snv2_kernels.packing.units import RELU, Layer, Unit

if TYPE_CHECKING:
    from snv2_kernels.packing import Builder

__all__ = ["SETTINGS", "STAGES", "FusedMainBranches", "fuse_units", "unit_network"]

# Channels and extent of the maps of x1.0 at 224 x 224.
STAGES = {"stage2": (116, 28), "stage3": (232, 14), "stage4": (464, 7)}

SETTINGS = ("unit", "no ReLU", "no shuffle", "main branch", "convolutions")


def _branch(width: int, norm: bool, relu: bool) -> nn.Sequential:
    """pw, dw, pw; without batch norms they have biases."""
    layers: list[nn.Module] = []
    for kernel, groups, activated in ((1, 1, True), (3, width, False), (1, 1, True)):
        layers.append(nn.Conv2d(width, width, kernel, 1, kernel // 2, groups=groups, bias=not norm))
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers += [nn.ReLU(inplace=True)] if relu and activated else []
    return nn.Sequential(*layers)


class _Unit(nn.Module):
    """The unit with or without its ReLUs and its shuffle."""

    def __init__(self, channels: int, relu: bool, shuffle: bool) -> None:
        super().__init__()
        self.branch2 = _branch(channels // 2, norm=True, relu=relu)
        self.shuffle = shuffle

    def forward(self, x: Tensor) -> Tensor:
        passthrough, main = x.chunk(2, 1)
        out = torch.cat([passthrough, self.branch2(main)], 1)
        return models.channel_shuffle(out, 2) if self.shuffle else out


def unit_network(setting: str, channels: int, count: int) -> nn.Sequential:
    """``count`` units in a row, or what is left of them.

    Args:
        setting: "unit" (all of it), "no ReLU", "no shuffle" (split and concat stay),
            "main branch" (no split, concat nor shuffle, on the main half alone),
            "convolutions" (of the main branch neither batch norms nor ReLUs).
        channels: of the whole unit, even.
        count: of the units.
    """
    if setting in ("main branch", "convolutions"):
        whole = setting == "main branch"
        return nn.Sequential(*(_branch(channels // 2, whole, whole) for _ in range(count)))
    return nn.Sequential(
        *(_Unit(channels, setting != "no ReLU", setting != "no shuffle") for _ in range(count))
    )


class FusedMainBranches(PlannedModule, nn.Sequential):
    """Main branches in a row on the kernels of units: units through which nothing passes.

    Args:
        branches: ``nn.Sequential(pw, bn, relu, dw, bn, pw, bn, relu)``, all of one width.
    """

    def _plain(self, x: Tensor) -> Tensor:
        out: Tensor = nn.Sequential.forward(self, x)
        return out

    def _layers(self) -> list[list[Any]]:
        return [list(branch.children()) for branch in self]

    def _in_channels(self) -> int:
        channels: int = self._layers()[0][0].in_channels
        return channels

    def _add_to(self, builder: Builder) -> None:
        everything = range(self._in_channels())
        for pw1, bn1, _, dw, bn2, pw2, bn3, _ in self._layers():
            branch = Layer(pw1, bn1, RELU), Layer(dw, bn2, kernel=3), Layer(pw2, bn3, RELU)
            builder.add_unit(Unit(1, branch, everything, [], everything))


def fuse_units(setting: str, network: nn.Sequential) -> nn.Module:
    """What :func:`unit_network` made, on the kernels.

    Raises:
        Unavailable: if there are none for it.
    """
    fused = FusedMainBranches(*network).eval() if setting == "main branch" else fuse(network)
    if not isinstance(fused, PlannedModule):
        reason = str(explain(network)).rpartition("not fused: ")[2]
        raise Unavailable(f"no fused kernel: {reason}")
    packed = fused.packed()
    if packed.runs_plain(fused):
        raise Unavailable(f"runs plain: {packed.reason or why_plain(fused)}")
    return fused
