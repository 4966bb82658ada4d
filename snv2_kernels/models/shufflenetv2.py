"""ShuffleNet V2 in torchvision's form: the reference that every kernel is checked against.

Section 4 of the paper. Constructors, submodule names and state_dict keys are torchvision's, so its
published weights load, and a model built here gives the same output to the bit.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from snv2_kernels.models.blocks import (
    WIDTHS,
    channel_shuffle,
    check_constructors,
    check_lists,
    check_sizes,
    check_stride,
    depthwise,
    pointwise,
)

__all__ = [
    "InvertedResidual",
    "ShuffleNetV2",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
]


class InvertedResidual(nn.Module):
    """The ShuffleNet V2 unit (Figure 3 (c), (d) of the paper).

    Stride 1 (``inp == oup``)::

        a, b = x.chunk(2, dim=1)
        y = channel_shuffle(torch.cat([a, branch2(b)], 1), 2)

    Larger strides have no split, and a projection ``branch1`` (dw, bn, pw, bn, relu)::

        y = channel_shuffle(torch.cat([branch1(x), branch2(x)], 1), 2)

    ``branch2`` is pw, bn, relu, dw, bn, pw, bn, relu.

    Args:
        inp: channels of the input.
        oup: channels of the output; an odd number loses one channel, as in torchvision.
        stride: 1, 2 or 3.

    Raises:
        TypeError, ValueError: naming the argument that does not fit; ``inp != oup`` at stride 1.
    """

    branch1: nn.Sequential
    branch2: nn.Sequential

    def __init__(self, inp: int, oup: int, stride: int) -> None:
        super().__init__()
        check_sizes(inp=inp)
        check_sizes(2, oup=oup)
        check_stride(stride, 3)
        width = oup // 2
        if stride == 1 and inp != 2 * width:
            raise ValueError(
                f"inp, oup: a unit of stride 1 needs an even inp == oup, got inp={inp}, oup={oup}"
            )
        self.stride = stride
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                depthwise(inp, stride),
                nn.BatchNorm2d(inp),
                pointwise(inp, width),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            )
        self.branch2 = nn.Sequential(
            pointwise(inp if stride > 1 else width, width),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            depthwise(width, stride),
            nn.BatchNorm2d(width),
            pointwise(width, width),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            passthrough, main = x.chunk(2, dim=1)
            out = torch.cat((passthrough, self.branch2(main)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    """The whole classifier (Table 5 of the paper).

    Args:
        stages_repeats: units in stages 2, 3 and 4; the first of each has stride 2.
        stages_out_channels: channels after conv1, stages 2, 3, 4 and conv5.
        num_classes: outputs of the linear layer.
        inverted_residual: constructor ``(inp, oup, stride)`` of a unit.

    Shapes: [N, 3, H, W] -> [N, num_classes].

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """

    conv1: nn.Sequential
    maxpool: nn.MaxPool2d
    stage2: nn.Sequential
    stage3: nn.Sequential
    stage4: nn.Sequential
    conv5: nn.Sequential
    fc: nn.Linear

    def __init__(
        self,
        stages_repeats: list[int],
        stages_out_channels: list[int],
        num_classes: int = 1000,
        inverted_residual: Callable[..., nn.Module] = InvertedResidual,
    ) -> None:
        super().__init__()
        check_lists(stages_repeats, stages_out_channels, stages=3, others=2)
        check_sizes(0, num_classes=num_classes)
        check_constructors(inverted_residual=inverted_residual)
        self._stage_out_channels = list(stages_out_channels)
        channels = stages_out_channels[0]
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, channels, 3, 2, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        for stage, (repeats, width) in enumerate(
            zip(stages_repeats, stages_out_channels[1:4], strict=True), start=2
        ):
            units = [inverted_residual(channels, width, 2)]
            units += [inverted_residual(width, width, 1) for _ in range(repeats - 1)]
            setattr(self, f"stage{stage}", nn.Sequential(*units))
            channels = width
        features = stages_out_channels[4]
        self.conv5 = nn.Sequential(
            pointwise(channels, features), nn.BatchNorm2d(features), nn.ReLU(inplace=True)
        )
        self.fc = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.stage4(self.stage3(self.stage2(x)))
        x = self.conv5(x).mean([2, 3])
        out: Tensor = self.fc(x)
        return out


def shufflenet_v2_x0_5(num_classes: int = 1000, **kwargs: Any) -> ShuffleNetV2:
    """ShuffleNet V2 0.5x: 1.37 M parameters, 40.5 M multiply-adds at 224 x 224."""
    return ShuffleNetV2([4, 8, 4], WIDTHS["0.5x"], num_classes=num_classes, **kwargs)


def shufflenet_v2_x1_0(num_classes: int = 1000, **kwargs: Any) -> ShuffleNetV2:
    """ShuffleNet V2 1.0x: 2.28 M parameters, 144.9 M multiply-adds at 224 x 224."""
    return ShuffleNetV2([4, 8, 4], WIDTHS["1.0x"], num_classes=num_classes, **kwargs)


def shufflenet_v2_x1_5(num_classes: int = 1000, **kwargs: Any) -> ShuffleNetV2:
    """ShuffleNet V2 1.5x: 3.50 M parameters, 295.8 M multiply-adds at 224 x 224."""
    return ShuffleNetV2([4, 8, 4], WIDTHS["1.5x"], num_classes=num_classes, **kwargs)


def shufflenet_v2_x2_0(num_classes: int = 1000, **kwargs: Any) -> ShuffleNetV2:
    """ShuffleNet V2 2.0x: 7.39 M parameters, 583.3 M multiply-adds at 224 x 224."""
    return ShuffleNetV2([4, 8, 4], WIDTHS["2.0x"], num_classes=num_classes, **kwargs)
