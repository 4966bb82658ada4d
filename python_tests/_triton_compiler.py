"""Triton's compiler for GPUs that are not there. Run by test_triton.py, since a process decides
once whether Triton interprets; prints lines of JSON.

    quick          what some configurations of all kernels use
    all <kernel>   what each configuration of a kernel uses
    trace          what torch.compile sees of each op
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
from _triton_launches import STAGES, TARGETS, NoGpu, launches_of
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from triton import knobs
from triton.compiler import ASTSource

import snv2_kernels as snv2
from snv2_kernels.ops import operators
from snv2_kernels.packing.units import ACTIVATIONS
from snv2_kernels.triton.network import KERNELS as PRODUCTS
from snv2_kernels.triton.tiles import PRODUCT_TILES, ProductTile

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UNLIKE = ("convolve", "depthwise_gradient", "stem", "dw_pw2", "gates")
QUICK = ("fp32", "sm_80"), ("fp16", "gfx942")
# Kernels of ops, and the ops that launch them, each with a stride. Those that take long have a part
# for each.
OPS = {
    "cat_shuffle": [("cat_shuffle", 1)],
    "convolve": [
        ("split_dw_cat_shuffle", 1), ("dw_conv3x3", 1), ("dw_conv3x3", 2),
    ],
    "cat_shuffle_backward": [("cat_shuffle_backward", 1)],
    "depthwise_gradient": [("split_dw_cat_shuffle_backward", 1)],
    "depthwise_gradient:1": [("dw_conv3x3_backward", 1)],
    "depthwise_gradient:2": [("dw_conv3x3_backward", 2)],
    "depthwise_sums": [("dw_conv3x3_backward", 1)],
}  # fmt: skip
SHAPES = [*STAGES.values(), (3, 42, 9, 11), (1, 24, 56, 56)]
MAPS = ("x", "y", "z", "a", "b", "middle", "source", "weights")
FLOATS = ("weight", "scale", "shift", "parameters", "sums", "means", "gates")
# Offsets and strides that are multiples of 16 in every plan, as a launch finds out.
ALIGNED = ("matrix", "side_matrix", "gate_matrix", "pitch", "side_pitch", "gate_pitch")
ALIGNED += ("middle_c", "y_c")


def compiled(
    kernel: Any, values: dict[str, Any], tile: ProductTile, dtype: str, target: str
) -> dict[str, Any]:
    """Returns what a kernel with these constants uses."""
    aligned = ALIGNED
    if values.get("FLAT") or values.get("TO_PLANES") or "GATED" in values:
        aligned += ("x_c",)
    if values.get("FLAT"):
        aligned += ("source_c",)
    signature, constexprs, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        types = dict.fromkeys(MAPS, dtype) | dict.fromkeys(FLOATS, "fp32") | {"tables": "i32"}
        if values.get("BYTES"):
            types["x"] = "u8"
        if argument in values:
            signature[argument] = "constexpr"
            constexprs[(i,)] = values[argument]
            continue
        signature[argument] = f"*{types[argument]}" if argument in types else "i32"
        if argument in types or argument in aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        binary: Any = triton.compile(
            ASTSource(kernel, signature, constexprs, attributes),
            target=TARGETS[target],
            options={"num_warps": tile.warps, "num_stages": tile.stages},
        )
    name = f"{kernel.__name__} {tile} {values} {dtype} {target}"
    return used(name, binary, log.getvalue(), target)


def used(name: str, binary: Any, log: str, target: str) -> dict[str, Any]:
    """Returns what a binary uses, of its compiler's log and the assembler's text."""
    if target.startswith("sm"):
        text = binary.asm["ptx"]
        found = re.findall(r"(\d+) bytes (spill stores|spill loads|stack frame)", log)
        spilled = {key: int(n) for n, key in found}
    else:
        text = binary.asm["amdgcn"]
        # Scalar registers spill to lanes of vector registers, not to memory.
        found = re.findall(r"(vgpr_spill_count|ScratchSize): (\d+)", text)
        spilled = {key: int(n) for key, n in found}
    return {
        "name": name,
        "target": target,
        "shared": binary.metadata.shared,
        "stored": len(re.findall(r"st\.global|(?:global|buffer)_store", text)),
        "spilled": spilled,
    }


def launched(name: str, dtype: str, target: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Yields what each launch of a kernel of ops uses."""
    kernel = name.partition(":")[0]
    shapes = list(STAGES.values()) if kernel == "depthwise_gradient" else SHAPES
    for (op, stride), shape, order in itertools.product(
        OPS[name][: 1 if quick else None],
        shapes[: 1 if quick else None],
        (torch.contiguous_format, torch.channels_last),
    ):
        for launch in launches_of(op, stride, shape, order, DTYPES[dtype], target):
            described = f"{op} {stride} {shape} {order} {dtype} {target}"
            if launch.kernel == f"{kernel}_kernel":
                yield used(described, launch.binary, launch.log, target)


# Configurations -------------------------------------------------------------------------------


def activations(kind: str, *prefixes: str) -> dict[str, int]:
    return {f"{prefix}ACTIVATION": ACTIVATIONS.index(kind) for prefix in ("", *prefixes)}


def paper(
    stride: int, window: int = 3, kind: str = "relu", from_x: bool = False
) -> dict[str, int | bool]:
    """Constants of the second kernel of a unit."""
    depthwise = "identity" if kind == "relu" else kind
    return {
        "FROM_X": from_x, "PROJECTS": stride == 2 and not from_x, "WINDOW": window, "DILATION": 1,
        "SIDE_WINDOW": window, "SIDE_DILATION": 1, **activations(kind, "SIDE_"),
        **{f"{side}DW_ACTIVATION": ACTIVATIONS.index(depthwise) for side in ("", "SIDE_")},
    }  # fmt: skip


def variants(  # noqa: PLR0912
    name: str, channels_last: bool
) -> Iterator[dict[str, Any]]:
    """Constants of each instance of a kernel but for its tile, strides of 1 among them, which a
    launch finds out; those that take the most registers first."""
    one = "c" if channels_last else "p"
    if name in ("stem", "stem_each"):
        each = {"EACH": name != "stem", **activations("relu" if name == "stem" else "silu")}
        for is_bytes in (True, False):
            yield {"BYTES": is_bytes, **each, f"x_{one}": 1}
    elif name == "pw1":
        for kind in ("relu", "silu"):
            yield {"FLAT": False, **activations(kind), f"x_{one}": 1}
            if not channels_last:
                yield {"FLAT": True, **activations(kind), "x_p": 1}
    elif name == "dw_pw2":
        for planes, to_map in ((True, True), (False, True), (True, False)):
            for stride in (1, 2):
                places = {"STRIDE": stride, "TO_PLANES": planes, "TO_MAP": to_map}
                # A unit alone reads the caller's map, one in a stage planes.
                places |= {f"x_{'p' if planes else one}": 1, f"z_{one}": 1}
                yield {**places, **paper(stride)}
        if not channels_last:
            for stride, window, kind in ((2, 5, "silu"), (1, 7, "prelu"), (2, 7, "hardswish")):
                for from_x in (False, True):
                    yield {**places, **paper(stride, window, kind, from_x), "STRIDE": stride}
    elif name in ("pointwise", "depthwise", "average", "scale"):
        for planes in (True, False):
            places = {"TO_PLANES": planes, "TO_MAP": not planes, f"z_{one}": 1}
            if name == "pointwise":
                yield {**places, "GATED": True, **activations("silu")}
            elif name == "scale":
                # A unit alone adds what the caller's map has, one in a stage planes.
                source = {f"source_{'p' if planes else one}": 1}
                for gated, adds, kind in ((True, True, "silu"), (False, True, "prelu")):
                    of = {"GATED": gated, "ADDS": adds, "FLAT": planes, **activations(kind)}
                    yield {**places, **source, **of}
                only = {"GATED": True, "ADDS": False, "FLAT": False, **activations("identity")}
                yield {**places, **only, "source_p": 1}
            elif name == "average":
                for inside in (True, False):
                    yield {**places, "STRIDE": 2, "INSIDE": inside, **activations("silu")}
            else:
                for stride, window in itertools.product((1, 2), (3, 7)):
                    window_of = {"STRIDE": stride, "WINDOW": window, "DILATION": 1}
                    yield {**places, **window_of, **activations("silu"), "x_p": 1}
    elif name == "gates":
        yield {**activations("silu"), "GATE_ACTIVATION": ACTIVATIONS.index("sigmoid")}
    elif name == "features":
        for kind in ("relu", "silu"):
            yield activations(kind)
    elif not channels_last:
        yield {}


def instances(name: str, dtype: str) -> Iterator[tuple[Any, dict[str, Any], ProductTile]]:
    kernel, tiles = PRODUCTS[name], PRODUCT_TILES[name, dtype != "fp32"]
    for channels_last in (False, True):
        for tile, values in itertools.product(tiles, variants(name, channels_last)):
            sizes = {"BM": tile.rows, "BP": tile.pixels, "BK": tile.depth, "WIDENS": False}
            sizes = {key: n for key, n in sizes.items() if key in kernel.arg_names}
            yield kernel, {**values, **sizes}, tile


def usage(names: list[str], quick: bool) -> Iterator[Any]:
    """Quick: one instance of each kernel in 16 bits for sm_90, and of those that are least like
    others in float32, which takes the most registers, for sm_80 and in 16 bits for AMD's."""
    knobs.nvidia.dump_ptxas_log = True
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache
        for name, dtype, target in itertools.product(names, DTYPES, TARGETS):
            chosen = {("bf16", "sm_90"), *(QUICK if name in UNLIKE else ())}
            if quick and (dtype, target) not in chosen:
                continue
            alike = dtype == "bf16" or target == "sm_80"  # to float16 and sm_90
            if name.startswith("depthwise_gradient") and alike and not quick:
                continue  # each takes seconds
            if name in OPS:
                for each in launched(name, dtype, target, quick):
                    yield {"kernel": name, **each}
                continue
            several = itertools.islice(instances(name, dtype), 1 if quick else None)
            for kernel, values, tile in several:
                yield {"kernel": name, **compiled(kernel, values, tile, dtype, target)}


# Tracing --------------------------------------------------------------------------------------


def trace() -> Iterator[Any]:
    """Names in the graph that a compiler behind AOTAutograd is given."""
    triton.runtime.driver.set_active(NoGpu())
    ops, half = operators("triton"), {"dtype": torch.float16}
    models = (
        snv2.models.InvertedResidual(58, 58, 1),
        snv2.models.ShuffleNetV2([1, 2, 1], [24, 48, 96, 192, 1024]),
    )
    plans = [
        snv2.fuse(model.eval())._triton_plan(torch.float16, torch.device("cpu")).arguments
        for model in models
    ]
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        x, b = torch.empty(2, 58, 14, 14, **half), torch.empty(2, 29, 14, 14, **half)
        image = torch.empty(2, 3, 64, 64, **half)
        parameters = torch.empty(29, 1, 3, 3), torch.empty(29), torch.empty(29)
        arrays = [[torch.empty(t.shape, dtype=t.dtype) for t in plan[:3]] for plan in plans]
        for op, args in (
            (ops.cat_shuffle, (x, x.clone())),
            (ops.dw_conv3x3, (b, *parameters, 2, True)),
            (ops.split_dw_cat_shuffle, (x, *parameters)),
            (ops.cat_shuffle_backward, (x,)),
            (ops.split_dw_cat_shuffle_backward, (x, x.clone(), *parameters)),
            (ops.network, (x, *arrays[0], *plans[0][3:])),
            (ops.network, (image, *arrays[1], *plans[1][3:])),
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
    quick = command == "quick"
    for line in trace() if command == "trace" else usage(names or [*OPS, *PRODUCTS], quick):
        print(json.dumps(line), flush=True)
