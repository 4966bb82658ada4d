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
import torch.utils._pytree as pytree
import triton
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from snv2_kernels.ops import operators
from snv2_kernels.triton import (
    TILES,
    UNIT_TILES,
    Tile,
    UnitTile,
    backward_kernels,
    choose_tile,
    kernels,
    unit_kernels,
)
from snv2_kernels.triton.backward import CUT_WARPS

MAPS = ("x", "y", "a", "b", "middle", "matrix", "side_matrix", "grad", "cut", "grad_x")
FLOATS = (
    "weight",
    "scale",
    "shift",
    "bias",
    "dw",
    "side_bias",
    "side_dw",
    "sums",
    "grad_weight",
    "grad_scale",
    "grad_shift",
)
TABLES = ("table", "side_table", "out_table")


def constants(kernel: str) -> list[dict[str, Any]]:
    """Of each instance of a kernel, but for its tile."""
    if kernel == "depthwise_cut":
        return [
            {"STRIDE": 1, "RELU": True, "PASSTHROUGH": True},
            {"STRIDE": 2, "RELU": True, "PASSTHROUGH": False},
        ]
    if kernel == "depthwise_input":
        return [{"STRIDE": 1}, {"STRIDE": 2}]
    if kernel != "dw_conv3x3":
        return [{}]
    return [{"STRIDE": 1, "RELU": True}, {"STRIDE": 2, "RELU": False}]


def compiled(
    kernel: Any,
    values: dict[str, Any],
    warps: int,
    dtype: str,
    arch: int,
    label: str,
    stages: int = 3,
) -> dict[str, Any]:
    """What a kernel with these constants uses."""
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in values:
            signature[argument] = "constexpr"
            constexprs[(i,)] = values[argument]
        elif argument in (*MAPS, *FLOATS, *TABLES):
            types = dict.fromkeys(FLOATS, "fp32") | dict.fromkeys(TABLES, "i32")
            signature[argument] = f"*{types.get(argument, dtype)}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[argument] = "i32"
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        binary: Any = triton.compile(
            ASTSource(kernel, signature, constexprs, attributes),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": warps, "num_stages": stages},
        )
    counts = {
        key: [int(n) for n in re.findall(rf"(\d+) bytes {key}", log.getvalue())]
        for key in ("spill stores", "spill loads", "stack frame")
    }
    return {
        "name": f"{label} {dtype} sm_{arch}",
        "registers": [int(n) for n in re.findall(r"Used (\d+) registers", log.getvalue())],
        "shared": binary.metadata.shared,
        "stored": len(re.findall(r"st\.global", binary.asm["ptx"])),
        **counts,
    }


def compile_kernel(
    name: str, tile: Tile, channels_last: bool, dtype: str, arch: int, instance: dict[str, Any]
) -> dict[str, Any]:
    kernel = getattr(kernels, f"{name}_kernel", None) or getattr(backward_kernels, f"{name}_kernel")
    values = {"BP": tile.pixels, "BC": tile.channels, **instance}
    if "CHANNELS_LAST" in kernel.arg_names:
        values["CHANNELS_LAST"] = channels_last
    # What a launch finds out about its arguments.
    values |= {f"{m}_{'c' if channels_last else 'p'}": 1 for m in ("x", "y", "a", "b", "t")}
    label = f"{name} {tile} {instance}"
    if name == "depthwise_cut":  # as _depthwise_backward launches it
        return compiled(kernel, values, CUT_WARPS, dtype, arch, label, 1)
    return compiled(kernel, values, tile.warps, dtype, arch, label)


def compile_unit(name: str, tile: UnitTile, dtype: str, arch: int, stride: int) -> dict[str, Any]:
    kernel = getattr(unit_kernels, name)
    values = {"BM": tile.rows, "BP": tile.pixels, "BK": tile.depth, "WIDENS": False}
    values |= {"STRIDE": stride} if "STRIDE" in kernel.arg_names else {}
    # Contiguous maps; both kinds of memory are alike where pixels are not followed.
    values |= {"x_p": 1, "y_p": 1} if "y_p" in kernel.arg_names else {"x_p": 1}
    return compiled(kernel, values, tile.warps, dtype, arch, f"{name} {tile} stride {stride}", 1)


def unit_cases(quick: bool) -> Iterator[dict[str, Any]]:
    for (torch_dtype, tile), arch in itertools.product(UNIT_TILES.items(), (80, 90)):
        dtype = {torch.float32: "fp32", torch.float16: "fp16"}.get(torch_dtype, "bf16")
        if quick and dtype == "bf16":  # as float16
            continue
        yield compile_unit("pw1_kernel", tile, dtype, arch, 1)
        for stride in (1, 2):
            yield compile_unit("dw_pw2_kernel", tile, dtype, arch, stride)


def cases(quick: bool) -> Iterator[tuple[Tile, bool, str, int]]:
    """Every tile on each GPU in float32, which takes the most registers; one in each other
    dtype."""
    tiles = sorted({(s.channels_last, repr(t)): t for s, t in TILES.items()}.items())
    for (channels_last, _), tile in tiles:
        for dtype, arch in itertools.product(("fp32", "fp16", "bf16"), (80, 90)):
            large = tile.pixels * tile.channels == 1024 and max(tile.pixels, tile.channels) > 32
            if not quick or dtype == "fp32" or (large and (arch == 80) == (dtype == "bf16")):
                yield tile, channels_last, dtype, arch


def cut_cases(quick: bool) -> Iterator[tuple[Tile, bool, str, int]]:
    for channels_last, dtype, arch in itertools.product(
        (False, True), ("fp32", "fp16", "bf16"), (80, 90)
    ):
        if not quick or dtype != "bf16":  # as float16
            yield choose_tile(1, 1, 1, channels_last), channels_last, dtype, arch


def compile_all(quick: bool, kernel: str) -> Iterator[Any]:
    knobs.nvidia.dump_ptxas_log = True
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache
        if kernel == "unit":
            yield from unit_cases(quick)
            return
        if kernel == "depthwise_cut":
            for arch in (80, 90):
                yield compiled(
                    backward_kernels.depthwise_sums_kernel, {"BP": 64}, 2, "fp32", arch, "sums"
                )
        chosen = cut_cases(quick) if kernel == "depthwise_cut" else cases(quick)
        for (tile, channels_last, dtype, arch), instance in itertools.product(
            chosen, constants(kernel)
        ):
            if quick and kernel != "depthwise_cut" and instance.get("STRIDE") == 2 and arch == 90:
                continue  # takes what stride 1 does
            yield compile_kernel(kernel, tile, channels_last, dtype, arch, instance)


class NoGpu:
    """As much of a driver as torch asks when it looks what a kernel writes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def unit_arguments(half: int) -> list[torch.Tensor]:
    """Of stride 1."""
    table, bias = torch.empty(half, dtype=torch.int32), torch.empty(half)
    matrix, dw = torch.empty(half, half, dtype=torch.float16), torch.empty(half, 10)
    none = torch.empty(0, 0, dtype=torch.float16)
    out_table = torch.empty(2 * half, dtype=torch.int32)
    main = [table, matrix, bias, dw, matrix.clone(), bias.clone()]
    return [*main, table.clone(), torch.empty(0, 10), none, torch.empty(0), out_table]


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
            (ops.cat_shuffle_backward, (x,)),
            (ops.split_dw_cat_shuffle_backward, (x, x.clone(), *parameters)),
            (ops.unit, (x, *unit_arguments(29), 1)),
        ):
            tensors = [t for t in args if isinstance(t, torch.Tensor)]
            rest = args[len(tensors) :]
            graph = aot_export_joint_simple(
                lambda *t, op=op, rest=rest: pytree.tree_leaves(op(*t, *rest)),
                tensors,
                trace_joint=False,
            )
            yield [getattr(n.target, "__name__", "") for n in graph.graph.nodes]


if __name__ == "__main__":
    command, *names = sys.argv[1:]
    for line in trace() if command == "trace" else compile_all(command == "quick", *names):
        print(json.dumps(line))
