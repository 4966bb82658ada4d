"""ShuffleNet V2 and its relatives as plain PyTorch.

Ma, Zhang, Zheng, Sun: *ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture
Design*, ECCV 2018 (arXiv:1807.11164), "the paper" in this package.
"""

from snv2_kernels.models.blocks import channel_shuffle
from snv2_kernels.models.shufflenetv2 import (
    InvertedResidual,
    ShuffleNetV2,
    shufflenet_v2_x0_5,
    shufflenet_v2_x1_0,
    shufflenet_v2_x1_5,
    shufflenet_v2_x2_0,
)

__all__ = [
    "InvertedResidual",
    "ShuffleNetV2",
    "channel_shuffle",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "shufflenet_v2_x1_5",
    "shufflenet_v2_x2_0",
]
