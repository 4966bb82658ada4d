"""From modules to plans: batch norms folded, weights laid out, channel tables followed.

A *plan* is what a backend runs: a flat int64 array of steps and tables beside arrays of packed
weights. Inside it a feature map is a set of planes, each at a place of its own; ``table[i]`` is
the plane that holds logical channel ``i``. A unit reads the planes of its main half wherever they
are, writes its result to planes that nobody reads, and hands on a new table::

    q[2 * i] = p[i]            # passthrough: not touched
    q[2 * i + 1] = result[i]

so split, concat and shuffle cost nothing, and logical order is restored only where a user's
tensor is written. The CPU backend and the CUDA ones differ in the layout of weights and in where
planes lie (``csrc/include/snv2/plan.h``, ``gpu_plan.h``): :mod:`~snv2_kernels.packing.cpu`,
:mod:`~snv2_kernels.packing.gpu`. Triton's is a list of launches:
:mod:`~snv2_kernels.packing.triton`.
"""

from snv2_kernels.packing.common import BasePlan, Builder, fold_bn, fold_conv_bn
from snv2_kernels.packing.cpu import PlanBuilder
from snv2_kernels.packing.cpu_plan import Plan
from snv2_kernels.packing.gpu import GpuPlanBuilder
from snv2_kernels.packing.gpu_plan import GpuPlan
from snv2_kernels.packing.triton import TritonPlan, TritonPlanBuilder

__all__ = [
    "BasePlan",
    "Builder",
    "GpuPlan",
    "GpuPlanBuilder",
    "Plan",
    "PlanBuilder",
    "TritonPlan",
    "TritonPlanBuilder",
    "fold_bn",
    "fold_conv_bn",
]
