"""ShuffleNet v2-50 and SE-ShuffleNet v2-164: the paper's large models.

Section 4, "Generalization to Large Models", Table 6, and the architecture table and Figure 2 of the
appendix. What they leave open:

- The first unit of the first stage projects at stride 1, since the max pool has halved the map.
- Squeeze-and-excite is as wide inside as the unit, twice the branch it stands in. This reading
  gives both published counts of multiply-adds: 12.7 G here, and the 6 M that it adds to 2.0x in
  Table 8.
- It comes before the addition, and the last ReLU after it, as in the authors' repository
  (megvii-model/ShuffleNet-Series, folder ``ShuffleNetV2.Large``; the network there is another one,
  of grouped 3 x 3 convolutions).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from snv2_kernels.models.blocks import (
    channel_shuffle,
    check_list,
    check_lists,
    check_sizes,
    check_stride,
    depthwise,
    pointwise,
)

__all__ = ["LargeUnit", "ShuffleNetV2Large", "se_shufflenet_v2_164", "shufflenet_v2_50"]


class SqueezeExcitation(nn.Module):
    """``y = x * sigmoid(fc2(relu(fc1(mean of x over H, W))))``, [N, channels, H, W] -> the same."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.fc2(self.fc1(x.mean([2, 3], keepdim=True)).relu())
        return x * scale.sigmoid()


class LargeUnit(nn.Module):
    """The ShuffleNet V2 unit with squeeze-and-excite and a residual path (appendix, Figure 2).

    Where ``stride == 1`` and ``inp == oup``::

        a, b = x.chunk(2, dim=1)
        main = se(branch2(b))
        main = relu(main + b if residual else main)
        y = channel_shuffle(torch.cat([a, main], 1), 2)

    Else a projection ``branch1`` (dw, bn, pw, bn, relu), and no residual::

        y = channel_shuffle(torch.cat([branch1(x), relu(se(branch2(x)))], 1), 2)

    ``branch2`` is pw, bn, relu, dw, bn, pw, bn. Without ``squeeze`` and ``residual`` this computes
    what :class:`~snv2_kernels.models.InvertedResidual` does, with the same keys.

    Args:
        inp: channels of the input.
        oup: channels of the output, an even number.
        stride: 1 or 2.
        squeeze: whether there is squeeze-and-excite, ``oup`` channels wide inside.
        residual: whether the main half of the input is added.

    Shapes: [N, inp, H, W] -> [N, oup, ceil(H / stride), ceil(W / stride)].

    Raises:
        TypeError, ValueError: naming the argument that does not fit; ``oup`` if it is odd.
    """

    def __init__(
        self, inp: int, oup: int, stride: int, squeeze: bool = False, residual: bool = False
    ) -> None:
        super().__init__()
        check_sizes(inp=inp)
        check_sizes(2, oup=oup)
        check_stride(stride)
        if oup % 2:
            raise ValueError(f"oup: expected an even number, got {oup}")
        width = oup // 2
        self.residual = residual
        self.branch1 = nn.Sequential()
        entry = width
        if stride > 1 or inp != oup:
            entry = inp
            self.branch1 = nn.Sequential(
                depthwise(inp, stride),
                nn.BatchNorm2d(inp),
                pointwise(inp, width),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            )
        self.branch2 = nn.Sequential(
            pointwise(entry, width),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            depthwise(width, stride),
            nn.BatchNorm2d(width),
            pointwise(width, width),
            nn.BatchNorm2d(width),
        )
        self.se = SqueezeExcitation(width, oup) if squeeze else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if len(self.branch1):
            out = torch.cat((self.branch1(x), self.se(self.branch2(x)).relu()), dim=1)
        else:
            passthrough, half = x.chunk(2, dim=1)
            main = self.se(self.branch2(half))
            out = torch.cat((passthrough, (main + half if self.residual else main).relu()), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2Large(nn.Module):
    """The large classifier: ``conv1``, max pool, stages 2 to 5, ``conv6``, average pool, ``fc``.

    Args:
        stem_channels: channels after each 3 x 3 convolution of ``conv1``; the first has stride 2.
        stages_repeats: units in stages 2 to 5; the first of stages 3, 4 and 5 has stride 2.
        stages_out_channels: channels after stages 2 to 5 and conv6.
        num_classes: outputs of ``fc``.
        squeeze: whether each :class:`LargeUnit` has squeeze-and-excite.
        residual: whether each has a shortcut.

    Shapes: [N, 3, H, W] -> [N, num_classes].

    Raises:
        TypeError, ValueError: naming the argument that does not fit, or the channels of a unit.
    """

    def __init__(
        self,
        stem_channels: list[int],
        stages_repeats: list[int],
        stages_out_channels: list[int],
        num_classes: int = 1000,
        squeeze: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        if not stem_channels:
            raise ValueError(f"stem_channels: expected at least 1 integer, got {stem_channels!r}")
        check_list("stem_channels", stem_channels)
        check_lists(stages_repeats, stages_out_channels, stages=4, others=1)
        check_sizes(0, num_classes=num_classes)
        unit = partial(LargeUnit, squeeze=squeeze, residual=residual)
        channels = 3
        self.conv1 = nn.Sequential()
        for i, width in enumerate(stem_channels):
            conv = nn.Conv2d(channels, width, 3, 2 if i == 0 else 1, 1, bias=False)
            self.conv1.extend((conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)))
            channels = width
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        *widths, features = stages_out_channels
        stages = []
        for i, (repeats, width) in enumerate(zip(stages_repeats, widths, strict=True)):
            units = [unit(channels, width, 1 if i == 0 else 2)]
            units += [unit(width, width, 1) for _ in range(repeats - 1)]
            stages.append(nn.Sequential(*units))
            channels = width
        self.stage2, self.stage3, self.stage4, self.stage5 = stages
        self.conv6 = nn.Sequential(
            pointwise(channels, features), nn.BatchNorm2d(features), nn.ReLU(inplace=True)
        )
        self.fc = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.stage5(self.stage4(self.stage3(self.stage2(x))))
        out: Tensor = self.fc(self.conv6(x).mean([2, 3]))
        return out


def shufflenet_v2_50(num_classes: int = 1000) -> ShuffleNetV2Large:
    """ShuffleNet v2-50: 16.6 M parameters, 2.30 G multiply-adds at 224 x 224."""
    return ShuffleNetV2Large([64], [3, 4, 6, 3], [244, 488, 976, 1952, 2048], num_classes)


def se_shufflenet_v2_164(num_classes: int = 1000) -> ShuffleNetV2Large:
    """SE-ShuffleNet v2-164, with residual paths.

    194 M parameters, 12.66 G multiply-adds at 224 x 224.
    """
    return ShuffleNetV2Large(
        [64, 64, 128],
        [10, 10, 23, 10],
        [340, 680, 1360, 2720, 2048],
        num_classes,
        squeeze=True,
        residual=True,
    )
