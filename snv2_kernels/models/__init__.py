"""ShuffleNet V2 and its relatives as plain PyTorch.

Ma, Zhang, Zheng, Sun: *ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture
Design*, ECCV 2018 (arXiv:1807.11164), "the paper" in this package. :func:`load` makes the network
that weights belong to.
"""

from snv2_kernels.models.blocks import channel_shuffle
from snv2_kernels.models.large import (
    LargeUnit,
    ShuffleNetV2Large,
    se_shufflenet_v2_164,
    shufflenet_v2_50,
)
from snv2_kernels.models.loading import load
from snv2_kernels.models.megvii import MegviiShuffleNetV2, MegviiUnit, megvii_shufflenet_v2
from snv2_kernels.models.plus import ShuffleNetV2Plus, XceptionUnit, shufflenet_v2_plus
from snv2_kernels.models.shufflenetv1 import ShuffleNetV1, ShuffleNetV1Unit, shufflenet_v1
from snv2_kernels.models.shufflenetv2 import (
    InvertedResidual,
    ShuffleNetV2,
    shufflenet_v2_x0_5,
    shufflenet_v2_x1_0,
    shufflenet_v2_x1_5,
    shufflenet_v2_x2_0,
)
from snv2_kernels.models.star import StarUnit, shufflenet_v2_star

__all__ = [
    "InvertedResidual",
    "LargeUnit",
    "MegviiShuffleNetV2",
    "MegviiUnit",
    "ShuffleNetV1",
    "ShuffleNetV1Unit",
    "ShuffleNetV2",
    "ShuffleNetV2Large",
    "ShuffleNetV2Plus",
    "StarUnit",
    "XceptionUnit",
    "channel_shuffle",
    "load",
    "megvii_shufflenet_v2",
    "se_shufflenet_v2_164",
    "shufflenet_v1",
    "shufflenet_v2_50",
    "shufflenet_v2_plus",
    "shufflenet_v2_star",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
]
