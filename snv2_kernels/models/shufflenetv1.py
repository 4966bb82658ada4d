"""ShuffleNet v1, with which Table 8 of the paper compares.

Zhang, Zhou, Lin, Sun: *ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile
Devices*, CVPR 2018 (arXiv:1707.01083). Submodule names and state_dict keys are those of the
authors' repository, megvii-model/ShuffleNet-Series, folder ``ShuffleNetV1``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snv2_kernels.models.blocks import (
    channel_shuffle,
    check_lists,
    check_sizes,
    check_stride,
    depthwise,
)

__all__ = ["ShuffleNetV1", "ShuffleNetV1Unit", "shufflenet_v1"]

# Channels of stages 2, 3 and 4 by the number of groups: Table 1.
_CHANNELS = {
    1: (144, 288, 576),
    2: (200, 400, 800),
    3: (240, 480, 960),
    4: (272, 544, 1088),
    8: (384, 768, 1536),
}


class ShuffleNetV1Unit(nn.Module):
    """A unit of ShuffleNet v1: Figure 2 (b), (c).

    With ``shuffle = channel_shuffle(., mid // groups)``, the two branches' parts being grouped
    pointwise, bn, relu, depthwise 3x3, bn, and grouped pointwise, bn::

        branch = branch_main_2(shuffle(branch_main_1(x)))
        y = relu(x + branch)                                             # stride 1
        y = torch.cat([F.avg_pool2d(x, 3, 2, 1), relu(branch)], 1)       # stride 2

    Shapes: [N, inp, H, W] -> [N, oup, ceil(H / stride), ceil(W / stride)].

    Args:
        inp: channels of the input.
        oup: channels of the output.
        stride: 1 or 2.
        groups: of the pointwise convolutions.
        mid: channels between them.
        first_groups: of the first one, if it has others.

    Raises:
        TypeError, ValueError: naming the argument that does not fit; ``inp`` and ``oup`` too where
            they are not equal at stride 1, or leave no channels for the branch at stride 2; and
            where a pointwise convolution's channels are no multiple of its groups.
    """

    def __init__(
        self,
        inp: int,
        oup: int,
        stride: int,
        groups: int,
        mid: int,
        first_groups: int | None = None,
    ) -> None:
        super().__init__()
        first = groups if first_groups is None else first_groups
        check_sizes(inp=inp, oup=oup, groups=groups, mid=mid, first_groups=first)
        check_stride(stride)
        if stride == 1 and inp != oup:
            raise ValueError(
                f"inp, oup: a unit of stride 1 needs inp == oup, got inp={inp}, oup={oup}"
            )
        if stride == 2 and oup <= inp:
            raise ValueError(
                f"inp, oup: a unit of stride 2 needs oup > inp, got inp={inp}, oup={oup}"
            )
        out = oup if stride == 1 else oup - inp
        self.stride, self.group = stride, groups
        self.branch_main_1 = nn.Sequential(
            *_pointwise(inp, mid, first),
            nn.ReLU(inplace=True),
            depthwise(mid, stride),
            nn.BatchNorm2d(mid),
        )
        self.branch_main_2 = nn.Sequential(*_pointwise(mid, out, groups))
        if stride == 2:
            self.branch_proj = nn.AvgPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch_main_1(x)
        if self.group > 1:
            y = channel_shuffle(y, y.shape[1] // self.group)
        y = self.branch_main_2(y)
        if self.stride == 1:
            return F.relu(x + y)
        return torch.cat((self.branch_proj(x), F.relu(y)), 1)


def _pointwise(inp: int, oup: int, groups: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    if inp % groups or oup % groups:
        raise ValueError(f"groups: {inp} and {oup} channels are no multiples of {groups} groups")
    return nn.Conv2d(inp, oup, 1, groups=groups, bias=False), nn.BatchNorm2d(oup)


class ShuffleNetV1(nn.Module):
    """The classifier of Table 1. Initial weights are PyTorch's own. The mean at the end is of the
    whole map, which for images of 224 x 224 is what the authors' window of 7 x 7 takes.

    Args:
        stages_repeats: units in stages 2, 3 and 4; the first of each has stride 2.
        stages_out_channels: channels after first_conv and stages 2, 3 and 4.
        groups: of the pointwise convolutions, but the very first one's, which has one.
        num_classes: outputs of the linear layer.

    Shapes: [N, 3, H, W] -> [N, num_classes].

    Raises:
        TypeError, ValueError: naming the argument that does not fit, or the channels of a unit.
    """

    def __init__(
        self,
        stages_repeats: list[int],
        stages_out_channels: list[int],
        groups: int,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        check_lists(stages_repeats, stages_out_channels, stages=3, others=1)
        check_sizes(groups=groups)
        check_sizes(0, num_classes=num_classes)
        channels, *widths = stages_out_channels
        self.first_conv = nn.Sequential(
            nn.Conv2d(3, channels, 3, 2, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.features = nn.Sequential()
        for repeats, width in zip(stages_repeats, widths, strict=True):
            for i in range(repeats):
                first = 1 if len(self.features) == 0 else groups
                stride = 2 if i == 0 else 1
                unit = ShuffleNetV1Unit(channels, width, stride, groups, width // 4, first)
                self.features.append(unit)
                channels = width
        self.globalpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Linear(channels, num_classes, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.globalpool(self.features(self.maxpool(self.first_conv(x))))
        out: Tensor = self.classifier(x.flatten(1))
        return out


def shufflenet_v1(groups: int = 3, width: float = 1.0, **kwargs: Any) -> ShuffleNetV1:
    """ShuffleNet v1 of a number of groups and a width: "ShuffleNet 0.5x (g = 3)" and so on.

    Args:
        groups: 1, 2, 3, 4 or 8.
        width: a factor of all channels; the authors have 0.5, 1, 1.5 and 2. As in their code the
            stem's 24 channels change below 1 and from 2 on, up to a multiple of the groups.
        **kwargs: of :class:`ShuffleNetV1`.

    Raises:
        ValueError: for other groups, or a width that leaves channels which these do not divide.
    """
    if isinstance(groups, bool) or not isinstance(groups, int) or groups not in _CHANNELS:
        raise ValueError(
            f"groups: expected one of {', '.join(map(str, _CHANNELS))}, got {groups!r}"
        )
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 16:
        raise ValueError(f"width: expected a number above 0, at most 16, got {width!r}")
    stem = 24 if 1 <= width < 2 else round(24 * width)
    stem = -(-stem // groups) * groups
    channels = [stem, *(round(c * width) for c in _CHANNELS[groups])]
    if any(c < 4 or c // 4 % groups for c in channels[1:]):
        raise ValueError(f"width: {width} leaves channels that {groups} groups do not divide")
    return ShuffleNetV1([4, 8, 4], channels, groups, **kwargs)
