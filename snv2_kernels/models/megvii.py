"""ShuffleNet V2 in its authors' form.

Source: the authors' repository, megvii-model/ShuffleNet-Series, folder ``ShuffleNetV2``; submodule
names and state_dict keys are theirs. It computes what section 4 of the paper describes, with three
differences from torchvision's form: channels are shuffled where a unit begins, a unit of stride 2
keeps its input's width in the projection, and the last layer has no bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from snv2_kernels.models.blocks import (
    WIDTHS,
    by_size,
    check_constructors,
    check_lists,
    check_sizes,
    check_stride,
    depthwise,
    pointwise,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MegviiShuffleNetV2", "MegviiUnit", "megvii_shufflenet_v2"]


class MegviiUnit(nn.Module):
    """The authors' unit: Figure 3 (c), (d) of the paper, with the shuffle at its input.

    Stride 1 (``inp == oup``)::

        y = torch.cat([x[:, 0::2], branch_main(x[:, 1::2])], 1)

    Stride 2: a projection ``branch_proj`` (dw, bn, pw, bn, relu) of ``inp`` channels, and a main
    branch of ``oup - inp``::

        y = torch.cat([branch_proj(x), branch_main(x)], 1)

    ``branch_main`` is pw, bn, relu, dw, bn, pw, bn, relu; ``oup // 2`` channels wide inside.
    Shapes: [N, inp, H, W] -> [N, oup, ceil(H / stride), ceil(W / stride)].

    Args:
        inp: channels of the input.
        oup: channels of the output.
        stride: 1 or 2.
        kernel: rows and columns of the depthwise convolutions, an odd number.
        activation: constructor ``(inplace=True)`` in the place of ReLU.
        squeeze: constructor ``(channels)`` of a module after the last activation of
            ``branch_main``.

    Raises:
        TypeError, ValueError: naming the argument that does not fit; ``inp`` and ``oup`` too where
            they are not an equal, even number at stride 1, or leave no channels for the main branch
            at stride 2.
    """

    branch_main: nn.Sequential
    branch_proj: nn.Sequential | None

    def __init__(
        self,
        inp: int,
        oup: int,
        stride: int,
        kernel: int = 3,
        activation: Callable[..., nn.Module] = nn.ReLU,
        squeeze: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(inp=inp, oup=oup, kernel=kernel)
        check_stride(stride)
        check_constructors(activation=activation)
        if squeeze is not None:
            check_constructors(squeeze=squeeze)
        if kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd number, got {kernel}")
        if stride == 1 and (inp != oup or inp % 2):
            raise ValueError(
                f"inp, oup: a unit of stride 1 needs an even inp == oup, got inp={inp}, oup={oup}"
            )
        if stride == 2 and oup <= inp:
            raise ValueError(
                f"inp, oup: a unit of stride 2 needs oup > inp, got inp={inp}, oup={oup}"
            )
        entry, out = (inp // 2, oup // 2) if stride == 1 else (inp, oup - inp)
        self.branch_main = nn.Sequential(
            *self._main(entry, oup // 2, out, stride, kernel, activation)
        )
        if squeeze is not None:
            self.branch_main.append(squeeze(out))
        self.branch_proj = None
        if stride == 2:
            self.branch_proj = nn.Sequential(
                depthwise(inp, 2, kernel),
                nn.BatchNorm2d(inp),
                pointwise(inp, inp),
                nn.BatchNorm2d(inp),
                activation(inplace=True),
            )

    @staticmethod
    def _main(
        inp: int, mid: int, out: int, stride: int, kernel: int, activation: Callable[..., nn.Module]
    ) -> list[nn.Module]:
        return [
            pointwise(inp, mid),
            nn.BatchNorm2d(mid),
            activation(inplace=True),
            depthwise(mid, stride, kernel),
            nn.BatchNorm2d(mid),
            pointwise(mid, out),
            nn.BatchNorm2d(out),
            activation(inplace=True),
        ]

    def forward(self, x: Tensor) -> Tensor:
        if self.branch_proj is not None:
            return torch.cat((self.branch_proj(x), self.branch_main(x)), dim=1)
        return torch.cat((x[:, 0::2], self.branch_main(x[:, 1::2])), dim=1)


class MegviiShuffleNetV2(nn.Module):
    """The authors' classifier (Table 5 of the paper).

    The units of all stages are one sequence, ``features``. Initial weights are PyTorch's own. The
    authors' published weights take pixels from 0 to 255, blue first, not normalised.

    Args:
        stages_repeats: units in stages 2, 3 and 4; the first of each has stride 2.
        stages_out_channels: channels after first_conv, stages 2, 3, 4 and conv_last.
        num_classes: outputs of the linear layer.
        dropout: probability of the dropout before it; theirs is 0.2 at 2.0x and else 0.

    Shapes: [N, 3, H, W] -> [N, num_classes], for H and W from 193 to 416: ``globalpool`` takes the
    7 x 7 corner of the last map.

    Raises:
        TypeError, ValueError: naming the argument that does not fit, or the channels of a unit.
    """

    first_conv: nn.Sequential
    maxpool: nn.MaxPool2d
    features: nn.Sequential
    conv_last: nn.Sequential
    globalpool: nn.AvgPool2d
    dropout: nn.Dropout
    classifier: nn.Sequential

    def __init__(
        self,
        stages_repeats: list[int],
        stages_out_channels: list[int],
        num_classes: int = 1000,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_lists(stages_repeats, stages_out_channels, stages=3, others=2)
        check_sizes(0, num_classes=num_classes)
        if not isinstance(dropout, float | int) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a number from 0 to 1, got {dropout!r}")
        self._stage_out_channels = list(stages_out_channels)
        channels, *widths, features = stages_out_channels
        self.first_conv = nn.Sequential(
            nn.Conv2d(3, channels, 3, 2, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.features = nn.Sequential()
        for repeats, width in zip(stages_repeats, widths, strict=True):
            self.features.append(MegviiUnit(channels, width, 2))
            self.features.extend(MegviiUnit(width, width, 1) for _ in range(repeats - 1))
            channels = width
        self.conv_last = nn.Sequential(
            pointwise(channels, features), nn.BatchNorm2d(features), nn.ReLU(inplace=True)
        )
        self.globalpool = nn.AvgPool2d(7)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Sequential(nn.Linear(features, num_classes, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(self.maxpool(self.first_conv(x)))
        x = self.dropout(self.globalpool(self.conv_last(x)))
        out: Tensor = self.classifier(x.flatten(1))
        return out


def megvii_shufflenet_v2(model_size: str = "1.0x", num_classes: int = 1000) -> MegviiShuffleNetV2:
    """The authors' network of a size: ``"0.5x"``, ``"1.0x"``, ``"1.5x"`` or ``"2.0x"``.

    40.5, 145.8, 299.0 and 590.8 M multiply-adds at 224 x 224.

    Raises:
        ValueError: for another size.
    """
    channels = by_size(WIDTHS, model_size)
    dropout = 0.2 if model_size == "2.0x" else 0.0
    return MegviiShuffleNetV2([4, 8, 4], channels, num_classes, dropout)
