"""Backbones that return maps on the way, as the projects that use them write theirs."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from _projects import General, PlusUnit
from _styles import ConvBNReLU
from torch import Tensor, nn

WIDTHS = (10, 28, 44, 60)


def stages(count: int = 3, **kwargs: Any) -> list[nn.Sequential]:
    """A unit of stride 2 each, in the first with one of stride 1 behind it."""
    found = [
        nn.Sequential(General(i, o, 2, **kwargs))
        for i, o in itertools.pairwise(WIDTHS[: count + 1])
    ]
    found[0].append(General(WIDTHS[1], WIDTHS[1], **kwargs))
    return found


class Looked(nn.Module):
    """NanoDet's: stages by name, a tuple."""

    def __init__(self, out_stages: tuple[int, ...] = (2, 3, 4)) -> None:
        super().__init__()
        self.out_stages = out_stages
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 10, 3, 2, 1, bias=False), nn.BatchNorm2d(10), nn.LeakyReLU(0.1)
        )
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        for i, stage in enumerate(stages(act="leaky")):
            setattr(self, f"stage{i + 2}", stage)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.conv1(x)
        x = self.maxpool(x)
        output = []
        for i in range(2, 5):
            stage = getattr(self, f"stage{i}")
            x = stage(x)
            if i in self.out_stages:
                output.append(x)
        return tuple(output)


class Indexed(nn.Module):
    """OpenMMLab's: a ModuleList, indices, one map alone where there is one."""

    def __init__(self, out_indices: tuple[int, ...] = (0, 2), frozen_stages: int = -1) -> None:
        super().__init__()
        self.out_indices, self.frozen_stages = out_indices, frozen_stages
        self.conv1 = ConvBNReLU(3, 10, 3, 2)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layers = nn.ModuleList(stages())

    def train(self, mode: bool = True) -> Indexed:
        super().train(mode)
        for layer in self.layers[: self.frozen_stages + 1]:
            layer.eval()
        return self

    def forward(self, x: Tensor) -> Any:
        x = self.conv1(x)
        x = self.maxpool(x)
        outs = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.out_indices:
                outs.append(x)
        return outs[0] if len(outs) == 1 else tuple(outs)


class Named(nn.Module):
    """YOLOX's: a dict, of which a part is returned; no stem."""

    def __init__(self, out_features: tuple[str, ...] = ("dark3", "dark4")) -> None:
        super().__init__()
        self.out_features = out_features
        self.dark3, self.dark4 = stages(2, act="silu")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs = {}
        x = self.dark3(x)
        outputs["dark3"] = x
        x = self.dark4(x)
        outputs["dark4"] = x
        return {k: v for k, v in outputs.items() if k in self.out_features}


class Getter(nn.ModuleDict):
    """torchvision's IntermediateLayerGetter."""

    def __init__(self) -> None:
        first, second, third = stages()
        super().__init__(OrderedDict(stage2=first, stage3=second, stage4=third))
        self.return_layers = {"stage2": "fine", "stage4": "coarse"}

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        out = OrderedDict()
        for name, module in self.items():
            x = module(x)
            if name in self.return_layers:
                out[self.return_layers[name]] = x
        return out


class Backwards(nn.Module):
    """The coarsest map first, and once more; units shuffled at the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBNReLU(3, 8, 3, 2)
        self.a = nn.Sequential(
            PlusUnit(8, 24, 2, 3, "ReLU", False), PlusUnit(24, 24, 1, 3, "ReLU", False)
        )
        self.b = nn.Sequential(
            PlusUnit(24, 48, 2, 5, "HS", True), PlusUnit(48, 48, 1, 5, "HS", True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        p3 = self.a(F.max_pool2d(self.stem(x), 3, 2, 1))
        p4 = self.b(p3)
        return [p4, p3, p4]


class Scored(nn.Module):
    """A classifier that returns a map beside its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBNReLU(3, 10, 3, 2)
        self.body, self.tail = stages(2)
        self.last, self.fc = ConvBNReLU(44, 50), nn.Linear(50, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.body(F.max_pool2d(self.stem(x), 3, 2, 1))
        return self.fc(self.last(self.tail(fine)).mean([2, 3])), fine


# Constructor, channels of the input, whether the CUDA kernels cover it.
BACKBONES: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
    "nanodet": (Looked, 3, True),
    "nanodet-last": (lambda: Looked((4,)), 3, True),
    "openmmlab": (Indexed, 3, True),
    "yolox": (Named, 10, True),
    "torchvision": (Getter, 10, True),
    "backwards": (Backwards, 3, True),
    "scored": (Scored, 3, True),
}
