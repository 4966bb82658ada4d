"""ShuffleNet V2 units and networks as fused kernels.

>>> import snv2_kernels as snv2
>>> model = snv2.models.shufflenet_v2_x1_0().eval()  # or torchvision's
>>> fast = snv2.fuse(model)  # the same outputs, faster
"""

from typing import Any

import snv2_kernels.graph.op  # noqa: F401  # defines operators
from snv2_kernels import models, nn, ops, quantization
from snv2_kernels.backends import backends, use_backend
from snv2_kernels.engine import Engine
from snv2_kernels.explanation import explain
from snv2_kernels.fuse import fuse
from snv2_kernels.packing import fold_bn
from snv2_kernels.program import Program, save_program
from snv2_kernels.quantization import quantize

__all__ = [
    "Engine",
    "Program",
    "backends",
    "explain",
    "fold_bn",
    "fuse",
    "load_onnx",
    "models",
    "nn",
    "ops",
    "quantization",
    "quantize",
    "save_program",
    "use_backend",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load_onnx":  # which needs the package onnx
        from snv2_kernels.onnx import load_onnx

        return load_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
