"""Drop-in modules: the plain modules' constructors, submodules and keys, with a fused forward.

In ``train()`` mode they are the plain modules. In ``eval()`` mode they run packed weights, made
on first use and again whenever a parameter, buffer or submodule has changed. What the kernels
do not cover (float64, a replaced submodule, hooks inside, tracing) runs the plain modules too.
torch.compile and torch.export keep the kernels (:mod:`snv2_kernels.graph`).
"""

from snv2_kernels.nn.fused import FusedModule
from snv2_kernels.nn.network import InvertedResidual, ShuffleNetV2, Stage
from snv2_kernels.nn.split import SplitDepthwiseShuffle
from snv2_kernels.packing.units import Unsupported

__all__ = [
    "FusedModule",
    "InvertedResidual",
    "ShuffleNetV2",
    "SplitDepthwiseShuffle",
    "Stage",
    "Unsupported",
]
