"""ShuffleNetV2+: the authors' units with h-swish, squeeze-and-excite and mixed kernel sizes.

Source: the authors' repository, megvii-model/ShuffleNet-Series, folder ``ShuffleNetV2+``; submodule
names and state_dict keys are theirs. No paper describes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from snv2_kernels.models.blocks import (
    by_size,
    check_list,
    check_lists,
    check_sizes,
    depthwise,
    pointwise,
)
from snv2_kernels.models.megvii import MegviiUnit

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ARCHITECTURE", "ShuffleNetV2Plus", "XceptionUnit", "shufflenet_v2_plus"]

# Channels after first_conv, the four stages and conv_last.
PLUS_WIDTHS = {
    "Small": [16, 36, 104, 208, 416, 1280],
    "Medium": [16, 48, 128, 256, 512, 1280],
    "Large": [16, 68, 168, 336, 672, 1280],
}
# Kinds of the units: 0, 1 and 2 are windows of 3, 5 and 7, 3 is XceptionUnit. Of all sizes.
ARCHITECTURE = [0, 0, 3, 1, 1, 1, 0, 0, 2, 0, 2, 1, 1, 0, 2, 0, 2, 1, 3, 2]
KERNELS = (3, 5, 7)
XCEPTION = len(KERNELS)


class SELayer(nn.Module):
    """Squeeze-and-excite with a batch norm inside, without biases.

    ``y = x * hardsigmoid(SE_opr(x))``; ``SE_opr`` is global average, pw to ``channels // 4``, bn,
    relu, pw. Shapes: [N, channels, H, W] -> the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.SE_opr = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            pointwise(channels, channels // 4),
            nn.BatchNorm2d(channels // 4),
            nn.ReLU(inplace=True),
            pointwise(channels // 4, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.SE_opr(x))


class XceptionUnit(MegviiUnit):
    """:class:`~snv2_kernels.models.MegviiUnit` with three pairs of dw and pw, all windows 3 x 3.

    ``branch_main`` is three times dw, bn, pw, bn, activation. The first dw has the stride; in the
    authors' file all three have it, which fits no stride but 1, and theirs have no other.
    """

    @staticmethod
    def _main(
        inp: int, mid: int, out: int, stride: int, kernel: int, activation: Callable[..., nn.Module]
    ) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for i, o, s in ((inp, mid, stride), (mid, mid, 1), (mid, out, 1)):
            layers += [depthwise(i, s, kernel), nn.BatchNorm2d(i)]
            layers += [pointwise(i, o), nn.BatchNorm2d(o), activation(inplace=True)]
        return layers


class ShuffleNetV2Plus(nn.Module):
    """The ShuffleNetV2+ classifier.

    ``first_conv`` (stride 2, h-swish), then four stages of units in one sequence ``features``, with
    no pooling before them; ReLU in the first stage and h-swish in the others, squeeze-and-excite
    (:class:`SELayer`) at the end of the main branches of the last two. ``conv_last`` (h-swish),
    7 x 7 average, ``LastSE``, ``fc`` (linear, h-swish), dropout, ``classifier``.

    Initial weights are PyTorch's own. The authors' published weights take pixels from 0 to 255,
    blue first, not normalised.

    Args:
        stages_repeats: units in the four stages; the first of each has stride 2.
        stages_out_channels: channels after first_conv, the four stages and conv_last.
        architecture: the kind of each unit: 0, 1 and 2 for windows of 3, 5 and 7, 3 for
            :class:`XceptionUnit`.
        num_classes: outputs of ``classifier``.

    Shapes: [N, 3, H, W] -> [N, num_classes], for H and W from 193 to 416: ``globalpool`` takes the
    7 x 7 corner of the last map.

    Raises:
        TypeError, ValueError: naming the argument that does not fit, or the channels of a unit.
    """

    first_conv: nn.Sequential
    features: nn.Sequential
    conv_last: nn.Sequential
    globalpool: nn.AvgPool2d
    LastSE: SELayer
    fc: nn.Sequential
    dropout: nn.Dropout
    classifier: nn.Sequential

    def __init__(
        self,
        stages_repeats: list[int],
        stages_out_channels: list[int],
        architecture: list[int],
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        check_lists(stages_repeats, stages_out_channels, stages=4, others=2)
        check_sizes(0, num_classes=num_classes)
        check_list("architecture", architecture, sum(stages_repeats), least=0)
        strange = next((kind for kind in architecture if kind > XCEPTION), None)
        if strange is not None:
            raise ValueError(f"architecture: expected integers from 0 to 3, got {strange!r}")
        channels, *widths, features = stages_out_channels
        self.first_conv = nn.Sequential(
            nn.Conv2d(3, channels, 3, 2, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.Hardswish(inplace=True),
        )
        self.features = nn.Sequential()
        kinds = iter(architecture)
        for stage, (repeats, width) in enumerate(zip(stages_repeats, widths, strict=True)):
            activation = nn.ReLU if stage == 0 else nn.Hardswish
            squeeze = SELayer if stage >= 2 else None
            for i in range(repeats):
                kind = next(kinds)
                unit = XceptionUnit if kind == XCEPTION else MegviiUnit
                kernel = 3 if kind == XCEPTION else KERNELS[kind]
                stride = 2 if i == 0 else 1
                self.features.append(unit(channels, width, stride, kernel, activation, squeeze))
                channels = width
        self.conv_last = nn.Sequential(
            pointwise(channels, features), nn.BatchNorm2d(features), nn.Hardswish(inplace=True)
        )
        self.globalpool = nn.AvgPool2d(7)
        self.LastSE = SELayer(features)
        self.fc = nn.Sequential(
            nn.Linear(features, features, bias=False), nn.Hardswish(inplace=True)
        )
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Sequential(nn.Linear(features, num_classes, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_last(self.features(self.first_conv(x)))
        x = self.LastSE(self.globalpool(x))
        out: Tensor = self.classifier(self.dropout(self.fc(x.flatten(1))))
        return out


def shufflenet_v2_plus(model_size: str = "Medium", num_classes: int = 1000) -> ShuffleNetV2Plus:
    """ShuffleNetV2+ of a size: ``"Small"``, ``"Medium"`` or ``"Large"``.

    5.1, 5.7 and 6.8 M parameters; 155.8, 222.2 and 360.1 M multiply-adds at 224 x 224.

    Raises:
        ValueError: for another size.
    """
    channels = by_size(PLUS_WIDTHS, model_size)
    return ShuffleNetV2Plus([4, 4, 8, 4], channels, ARCHITECTURE, num_classes)
