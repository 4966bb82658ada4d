"""The tests' backend ``cuda-ptx``: the CUDA kernels as nvcc's PTX, on an interpreter (docs/ptx.md).

It is there where ``SNV2_PTX`` names the folder of its libraries, as ``make test-ptx`` says it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from snv2_kernels import ops
from snv2_kernels.nn import SplitDepthwiseShuffle
from snv2_kernels.nn.planned import PlannedModule
from snv2_kernels.packing import GpuPlan

__all__ = ["NAME", "PTX", "SEED", "instructions", "needs_ptx", "operators"]

NAME = "cuda-ptx"
_NAMESPACE = "snv2_ptx"

PTX = os.environ.get("SNV2_PTX")
SEED = int(os.environ.get("SNV2_PTX_SEED", "0"))
needs_ptx = pytest.mark.ptx


def operators() -> Any:
    return getattr(torch.ops, _NAMESPACE)


def _register(folder: Path) -> None:
    backends = vars(sys.modules["snv2_kernels.backends"])  # the package's function hides it
    torch.ops.load_library(str(folder / "libsnv2_ptx_torch.so"))
    ops.register_gpu_parts(_NAMESPACE)
    ops.OPERATORS[NAME] = operators()
    backends["DEVICES"][NAME] = "cpu"
    backends["_STATES"][NAME] = lambda: "ok (for tests: nvcc's PTX, interpreted)"
    backends["NAMES"] += (NAME,)
    GpuPlan.backends = (*GpuPlan.backends, NAME)
    for kind in (PlannedModule, SplitDepthwiseShuffle):
        kind.kernel_backends = tuple(ops.OPERATORS)
    operators().set_seed(SEED)


if PTX:
    _register(Path(PTX))


def instructions(call: Callable[[], object]) -> int:
    """Returns how many instructions of warps the launches of a call execute."""
    operators().reset_counts()
    call()
    return sum(operators().launch_counts()[1])
