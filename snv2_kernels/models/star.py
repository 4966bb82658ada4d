"""ShuffleNet V2*: the paper's variant for detection, with a larger receptive field.

Section 4, "Object Detection": "an additional 3 x 3 depthwise convolution before the first pointwise
convolution in each building block". The paper gives neither its stride nor its norm: here it has
stride 1 and a batch norm with no activation, as the other depthwise convolution has.
"""

from __future__ import annotations

from torch import nn

from snv2_kernels.models.blocks import WIDTHS, by_size, depthwise
from snv2_kernels.models.shufflenetv2 import InvertedResidual, ShuffleNetV2

__all__ = ["StarUnit", "shufflenet_v2_star"]


class StarUnit(InvertedResidual):
    """:class:`~snv2_kernels.models.InvertedResidual`, whose ``branch2`` is dw, bn, pw, bn, relu,
    dw, bn, pw, bn, relu. The first dw has stride 1. Arguments, shapes and errors are the same."""

    def __init__(self, inp: int, oup: int, stride: int) -> None:
        super().__init__(inp, oup, stride)
        entry = inp if stride > 1 else oup // 2
        self.branch2 = nn.Sequential(depthwise(entry, 1), nn.BatchNorm2d(entry), *self.branch2)


def shufflenet_v2_star(model_size: str = "1.0x", num_classes: int = 1000) -> ShuffleNetV2:
    """ShuffleNet V2* of a size: ``"0.5x"``, ``"1.0x"``, ``"1.5x"`` or ``"2.0x"``.

    42.9, 149.8, 302.8 and 592.8 M multiply-adds at 224 x 224.

    Raises:
        ValueError: for another size.
    """
    channels = by_size(WIDTHS, model_size)
    return ShuffleNetV2([4, 8, 4], channels, num_classes, inverted_residual=StarUnit)
