"""Post-training quantization: calibration, integer layers, and what they compute.

A network is told to a builder as for a plan, its maps are observed on sample images
(:func:`calibrate`), and its folded weights become integers (:func:`integer_layers`).
:func:`interpret` computes with them in plain PyTorch::

    builder = PlanBuilder()
    fused._tell(builder)
    ranges = calibrate(fused, images)
    quantization = integer_layers(builder, ranges)
    scores = interpret(builder, quantization, images)[-1]
"""

from snv2_kernels.quantization.calibrate import calibrate
from snv2_kernels.quantization.interpret import interpret
from snv2_kernels.quantization.network import Key
from snv2_kernels.quantization.numbers import (
    Affine,
    IntegerLayer,
    Quantization,
    Ranges,
    integer_layers,
)
from snv2_kernels.quantization.quantize import quantize
from snv2_kernels.quantization.torch_ao import from_torch_ao

__all__ = [
    "Affine",
    "IntegerLayer",
    "Key",
    "Quantization",
    "Ranges",
    "calibrate",
    "from_torch_ao",
    "integer_layers",
    "interpret",
    "quantize",
]
