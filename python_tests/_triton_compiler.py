"""Triton's compiler for GPUs that are not there. Run by test_triton.py, since a process decides
once whether Triton interprets; prints lines of JSON.

    quick|all <kernel>   what each configuration of a kernel uses
    trace                what torch.compile sees of each op
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from snv2_kernels.ops import operators
from snv2_kernels.triton import TILES, Tile, kernels

FLOATS = ("weight", "scale", "shift")
MAPS = ("x", "y", "a", "b")


def constants(kernel: str) -> list[dict[str, Any]]:
    """Of each instance of a kernel, but for its tile."""
    if kernel != "dw_conv3x3":
        return [{}]
    return [{"STRIDE": 1, "RELU": True}, {"STRIDE": 2, "RELU": False}]


def compile_kernel(
    name: str, tile: Tile, channels_last: bool, dtype: str, arch: int, instance: dict[str, Any]
) -> dict[str, Any]:
    kernel = getattr(kernels, f"{name}_kernel")
    values = {"BP": tile.pixels, "BC": tile.channels, **instance}
    if "CHANNELS_LAST" in kernel.arg_names:
        values["CHANNELS_LAST"] = channels_last
    # What a launch finds out about its arguments.
    values |= {f"{m}_{'c' if channels_last else 'p'}": 1 for m in MAPS}
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in values:
            signature[argument] = "constexpr"
            constexprs[(i,)] = values[argument]
        elif argument in (*MAPS, *FLOATS):
            signature[argument] = "*fp32" if argument in FLOATS else f"*{dtype}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled: Any = triton.compile(
            ASTSource(kernel, signature, constexprs, attributes),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": tile.warps},
        )
    counts = {
        key: [int(n) for n in re.findall(rf"(\d+) bytes {key}", log.getvalue())]
        for key in ("spill stores", "spill loads", "stack frame")
    }
    return {
        "name": f"{name} {tile} {dtype} sm_{arch} {instance}",
        "registers": [int(n) for n in re.findall(r"Used (\d+) registers", log.getvalue())],
        "shared": compiled.metadata.shared,
        "stored": len(re.findall(r"st\.global", compiled.asm["ptx"])),
        **counts,
    }


def cases(quick: bool) -> Iterator[tuple[Tile, bool, str, int]]:
    """Every tile on each GPU in float32, which takes the most registers; one in each other
    dtype."""
    tiles = sorted({(s.channels_last, repr(t)): t for s, t in TILES.items()}.items())
    for (channels_last, _), tile in tiles:
        for dtype, arch in itertools.product(("fp32", "fp16", "bf16"), (80, 90)):
            large = tile.pixels * tile.channels == 1024 and max(tile.pixels, tile.channels) > 32
            if not quick or dtype == "fp32" or (large and (arch == 80) == (dtype == "bf16")):
                yield tile, channels_last, dtype, arch


def compile_all(quick: bool, kernel: str) -> Iterator[Any]:
    knobs.nvidia.dump_ptxas_log = True
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache
        for (tile, channels_last, dtype, arch), instance in itertools.product(
            cases(quick), constants(kernel)
        ):
            yield compile_kernel(kernel, tile, channels_last, dtype, arch, instance)


class NoGpu:
    """As much of a driver as torch asks when it looks what a kernel writes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def trace() -> Iterator[Any]:
    """Names in the graph that a compiler behind AOTAutograd is given."""
    triton.runtime.driver.set_active(NoGpu())
    ops = operators("triton")
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        x, half = (torch.empty(2, c, 14, 14, dtype=torch.float16) for c in (58, 29))
        parameters = torch.empty(29, 1, 3, 3), torch.empty(29), torch.empty(29)
        for op, args in (
            (ops.cat_shuffle, (x, x.clone())),
            (ops.dw_conv3x3, (half, *parameters, 2, True)),
            (ops.split_dw_cat_shuffle, (x, *parameters)),
        ):
            tensors = [t for t in args if isinstance(t, torch.Tensor)]
            rest = args[len(tensors) :]
            graph = aot_export_joint_simple(
                lambda *t, op=op, rest=rest: [op(*t, *rest)], tensors, trace_joint=False
            )
            yield [getattr(n.target, "__name__", "") for n in graph.graph.nodes]


if __name__ == "__main__":
    command, *names = sys.argv[1:]
    for line in trace() if command == "trace" else compile_all(command == "quick", *names):
        print(json.dumps(line))
