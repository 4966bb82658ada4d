"""Networks whose units stand among other layers, written as the projects that have them do."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _styles import shuffle
from torch import Tensor, nn


def layer(i: int, o: int, k: int = 1, s: Any = 1, g: int = 1, act: bool = True) -> nn.Sequential:
    made = nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o))
    return made.append(nn.ReLU(inplace=True)) if act else made


# Attention ------------------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.expand(scale))


class EfficientChannelAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.pool(x).squeeze(-1).transpose(-1, -2))
        return x * y.transpose(-1, -2).unsqueeze(-1).sigmoid().expand_as(x)


class SimAM(nn.Module):
    """Divides by a number that follows from the map's size."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        _, _, h, w = x.size()
        d = (x - x.mean(dim=[2, 3], keepdim=True)).pow(2)
        y = d / (4 * (d.sum(dim=[2, 3], keepdim=True) / (w * h - 1) + 1e-4)) + 0.5
        return x * torch.sigmoid(y)


class BlockAttention(nn.Module):
    """CBAM: of channels, then of pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, channels, 1, bias=False)
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        x = x * torch.sigmoid(self.mlp(pooled[0]) + self.mlp(pooled[1]))
        both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.spatial(both))


# Units ----------------------------------------------------------------------------------------


class Unit(nn.Module):
    """A unit with attention in its branch or behind its shuffle."""

    def __init__(
        self, inp: int, oup: int, stride: int, inside: Any = nn.Identity, behind: Any = nn.Identity
    ) -> None:
        super().__init__()
        half = oup // 2
        wide = inp if stride == 2 else half
        self.side = None
        if stride == 2:
            self.side = nn.Sequential(layer(inp, inp, 3, 2, inp, False), layer(inp, half))
        self.main = nn.Sequential(
            layer(wide, half), layer(half, half, 3, stride, half, False), layer(half, half)
        )
        self.inside, self.behind = inside(half), behind(oup)

    def joined(self, x: Tensor) -> Tensor:
        first, y = x.chunk(2, 1) if self.side is None else (self.side(x), x)
        return torch.cat((first, self.inside(self.main(y))), 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.behind(shuffle(self.joined(x), 2))
        return out


class PermutedUnit(Unit):
    """Its shuffle is a list of channels, kept or made in one of several ways."""

    def __init__(self, inp: int, oup: int, stride: int, way: str) -> None:
        super().__init__(inp, oup, stride)
        order = torch.arange(oup).view(2, -1).t().flatten()
        self.way, self.listed, self.tensor = way, order.tolist(), order
        self.register_buffer("order", order.clone())

    def forward(self, x: Tensor) -> Tensor:
        y = self.joined(x)
        if self.way == "select":
            return y.index_select(1, self.order)
        index = {"buffer": self.order, "list": self.listed, "attribute": self.tensor}.get(self.way)
        if self.way == "made":
            index = torch.arange(y.shape[1], device=y.device).view(2, -1).t().reshape(-1)
        return y[:, index]


class Reparametrised(nn.Module):
    """A depthwise layer as RepVGG trains it."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.dense = layer(channels, channels, 3, stride, channels, False)
        self.point = layer(channels, channels, 1, stride, channels, False)
        self.same = nn.BatchNorm2d(channels) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x) + self.point(x) + (0 if self.same is None else self.same(x))


class Overparametrised(nn.Module):
    """A pointwise layer as MobileOne trains it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.same = nn.BatchNorm2d(channels)
        self.convs = nn.ModuleList(layer(channels, channels, act=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out = self.same(x)
        for conv in self.convs:
            out += conv(x)
        return F.relu(out)


class SummedUnit(Unit):
    def __init__(self, inp: int, oup: int, stride: int) -> None:
        super().__init__(inp, oup, stride)
        self.main[1], self.main[2] = Reparametrised(oup // 2, stride), Overparametrised(oup // 2)


class PreactivatedUnit(nn.Module):
    """Also returns its map before the last activation, for distillation."""

    def __init__(self, channels: int, is_last: bool) -> None:
        super().__init__()
        half = channels // 2
        self.main = nn.Sequential(
            layer(half, half), layer(half, half, 3, 1, half, False), layer(half, half, act=False)
        )
        self.is_last = is_last

    def forward(self, x: Tensor) -> Any:
        first, y = x.chunk(2, 1)
        before = self.main(y)
        out = shuffle(torch.cat([first, F.relu(before)], 1), 2)
        return (out, torch.cat([first, before], 1)) if self.is_last else out


# Networks -------------------------------------------------------------------------------------


class Size(NamedTuple):
    widths: tuple[int, ...]  # of the stem and of each stage
    repeats: tuple[int, ...]
    features: int
    classes: int


SMALL = Size((8, 16, 32), (3, 3), 24, 5)
X1_0 = Size((24, 116, 232, 464), (4, 8, 4), 1024, 1000)


class Network(nn.Module):
    """``stem`` and ``head`` are names of usual ones."""

    def __init__(
        self, unit: Any = Unit, stem: str = "imagenet", head: str = "linear", size: Size = SMALL
    ) -> None:
        super().__init__()
        self.conv1 = layer(3, size.widths[0], 3, 1 if stem == "cifar" else 2)
        self.pool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        self.stages = nn.ModuleList(
            nn.Sequential(unit(i, o, 2), *[unit(o, o, 1) for _ in range(repeats - 1)])
            for (i, o), repeats in zip(itertools.pairwise(size.widths), size.repeats, strict=True)
        )
        self.conv5 = layer(size.widths[-1], size.features)
        kind: Any = nn.Linear if head != "conv" else functools.partial(nn.Conv2d, kernel_size=1)
        self.fc: nn.Module = kind(size.features, size.classes)
        self.head = head
        if head == "generalised mean":
            self.p = nn.Parameter(torch.ones(1) * 3)

    def maps(self, x: Tensor) -> list[Tensor]:
        maps = [self.pool(self.conv1(x))]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps

    def forward(self, x: Tensor) -> Any:
        y = self.conv5(self.maps(x)[-1])
        if self.head == "normalised":
            return F.normalize(y.mean((2, 3)))
        if self.head == "conv":
            return self.fc(F.adaptive_avg_pool2d(y, 1)).flatten(1)
        if self.head == "generalised mean":
            y = y.clamp(min=1e-6).pow(self.p)
            return self.fc(F.avg_pool2d(y, y.shape[-2:]).pow(1 / self.p).flatten(1))
        if self.head == "max":
            return self.fc(y.amax((2, 3)))
        return y if self.head == "map" else self.fc(y.mean((2, 3)))


class Scores(NamedTuple):
    boxes: list[Tensor]
    pooled: dict[str, Tensor | None]


class Detector(Network):
    """A feature pyramid on maps that the next stage reads too, with depthwise layers in its head,
    and what many return: containers inside each other."""

    def __init__(self, size: Size = SMALL) -> None:
        super().__init__(size=size)
        width = max(12, size.features // 8)
        self.sides = nn.ModuleList(nn.Conv2d(c, width, 1) for c in size.widths[-3:])
        self.towers = nn.ModuleList(
            nn.Sequential(
                layer(width, width, 5, 1, width), layer(width, width),
                nn.Conv2d(width, 4, 3, padding=1),
            )
            for _ in range(3)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Any:
        maps = [side(y) for side, y in zip(self.sides, self.maps(x)[-3:], strict=True)]
        for i in (1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[2:])
        boxes = [tower(y) for tower, y in zip(self.towers, maps, strict=True)]
        means = torch.cat([y.flatten(2).mean(2) for y in boxes], 1)
        return Scores(boxes, {"means": means, "masks": None})


class Distilled(nn.Module):
    def __init__(self, size: Size = SMALL) -> None:
        super().__init__()
        width, count = size.widths[1], size.repeats[0]
        self.stem = layer(3, width, 3, 2)
        self.units = nn.ModuleList(PreactivatedUnit(width, i == count - 1) for i in range(count))
        self.fc = nn.Linear(width, size.classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        for unit in self.units[:-1]:
            x = unit(x)
        x, before = self.units[-1](x)
        return self.fc(x.mean((2, 3))), before


class Reader(Network):
    """For lines of text: some strides are of rows alone."""

    def __init__(self, size: Size = SMALL) -> None:
        super().__init__(size=size)
        first = self.stages[1][0]
        for conv in (first.side[0][0], first.main[1][0]):
            conv.stride = (2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv5(self.maps(x)[-1]).mean(2).permute(0, 2, 1)


def _of(unit: Any = Unit, **named: str) -> Callable[..., nn.Module]:
    return functools.partial(Network, unit, **named)


def _attended(inside: Any = nn.Identity, behind: Any = nn.Identity) -> Callable[..., nn.Module]:
    return _of(lambda i, o, s: Unit(i, o, s, inside, behind))


# Networks of a size, by what fuse() finds.
WHOLE: dict[str, Callable[..., nn.Module]] = {
    "se inside": _attended(SqueezeExcite),
    "reparametrised": _of(SummedUnit),
    **{
        f"shuffled by {way}": _of(functools.partial(PermutedUnit, way=way))
        for way in ("select", "buffer", "list", "attribute", "made")
    },
}
PARTITIONED: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "se behind": ("a stage and 5 units", _attended(behind=SqueezeExcite)),
    "eca inside": ("8 chains", _attended(EfficientChannelAttention)),
    "simam behind": ("a stage and 5 units", _attended(behind=SimAM)),
    "cbam inside": ("8 chains", _attended(BlockAttention)),
    "cifar stem": ("a network", _of(stem="cifar")),
    "stem without pool": ("a network", _of(stem="no pool")),
    "normalised": ("a network", _of(head="normalised")),
    "conv head": ("a stage", _of(head="conv")),
    "generalised mean": ("a stage", _of(head="generalised mean")),
    "maximum": ("a stage", _of(head="max")),
    "map": ("a stage", _of(head="map")),
    "detector": ("a stage and 3 chains", Detector),
    "distilled": ("a stage and a chain", Distilled),
    "strides of rows": ("2 stages", Reader),
}
