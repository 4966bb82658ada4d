"""``torch.ops.snv2_triton.network``: a plan (:class:`snv2_kernels.packing.TritonPlan`) as launches,
one for each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snv2_kernels.ops import _no_gradient, _plan_fake, _results_fake
from snv2_kernels.packing.common import half
from snv2_kernels.packing.planes import CALLERS_MAP, NO_BUFFER, NO_RESULT
from snv2_kernels.packing.triton import (
    COPY,
    DW,
    DW_PW,
    FEATURES,
    GATES,
    LINEAR,
    MEANS,
    MIDDLE,
    POOL,
    POOL_INSIDE,
    PW,
    SCALE,
    STEM,
    Product,
    TritonStep,
    pitch,
)
from snv2_kernels.packing.units import ACTIVATIONS
from snv2_kernels.triton import branch_kernels, end_kernels, unit_kernels
from snv2_kernels.triton.arguments import check_affine, check_memory, check_results, checked
from snv2_kernels.triton.launches import INTERPRETED, check, planar, strides, wrapped
from snv2_kernels.triton.ops import check_map, define
from snv2_kernels.triton.steps import Size, sized, sizes_of
from snv2_kernels.triton.tiles import PRODUCT_TILES, ProductTile, choose_product_tile, programs
from snv2_kernels.triton.tuning import tile_for

__all__ = ["Arrays", "Memory", "allocate", "run"]

_RISING = [ACTIVATIONS.index(kind) for kind in ("relu", "identity", "relu6")]  # or level

KERNELS = {
    "stem": end_kernels.stem_kernel,
    "stem_each": end_kernels.stem_kernel,  # with EACH
    "pw1": unit_kernels.pw1_kernel,
    "dw_pw2": unit_kernels.dw_pw2_kernel,
    "pointwise": branch_kernels.pointwise_kernel,
    "depthwise": branch_kernels.depthwise_kernel,
    "average": branch_kernels.average_kernel,
    "means": branch_kernels.means_kernel,
    "gates": branch_kernels.gates_kernel,
    "scale": branch_kernels.scale_kernel,
    "features": end_kernels.features_kernel,
    "linear": end_kernels.linear_kernel,
}


class Arrays(NamedTuple):
    """Of a plan."""

    weights: Tensor
    parameters: Tensor
    tables: Tensor


@dataclass(frozen=True)
class Memory:
    """Of one call, to be written in any order; its size follows from plan and input."""

    planes: tuple[Tensor, ...]  # of the maps between steps: a plan's buffers
    sums: Tensor  # float32: of the head's features, or means of a map
    gates: Tensor  # float32

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.planes, self.sums, self.gates


class _Map(NamedTuple):
    """What a step reads: memory, its strides from image to image, channel to channel, pixel to
    pixel, and the extents of the map there."""

    memory: Tensor
    strides: tuple[int, int, int]
    size: tuple[int, int]


class _Target(NamedTuple):
    """What a step writes; kernels take a map of another step's for one that is not written."""

    planes: Tensor | None
    result: Tensor | None

    @property
    def memory(self) -> tuple[Tensor, Tensor]:
        planes = self.result if self.planes is None else self.planes
        result = self.planes if self.result is None else self.result
        assert planes is not None
        assert result is not None
        return planes, result

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of the result."""
        return (0, 0, 0) if self.result is None else strides(self.result)

    @property
    def constants(self) -> dict[str, bool]:
        return {"TO_PLANES": self.planes is not None, "TO_MAP": self.result is not None}


def allocate(
    like: Tensor, steps: Sequence[TritonStep], batch: int, height: int, width: int
) -> Memory:
    """Memory for one call, beside the weights ``like``."""
    *planes, sums, gates = sizes_of(steps, batch, height, width)
    return Memory(
        planes=tuple(like.new_empty(count) for count in planes),
        sums=like.new_empty(sums, dtype=torch.float32),
        gates=like.new_empty(gates, dtype=torch.float32),
    )


def _launch(
    name: str, arrays: Arrays, rows: tuple[int, ...], images: int, pixels: int,
    *args: Any, **constants: Any,
) -> ProductTile:  # fmt: skip
    """Make these rows of all pixels, which are cut by image if there is more than one image; the
    tile that it ran in."""
    weights, kernel = arrays.weights, KERNELS[name]
    widens = INTERPRETED and weights.dtype == torch.bfloat16

    def launch(tile: ProductTile) -> None:
        sizes = {"BM": tile.rows, "BP": tile.pixels}
        if "BK" in kernel.arg_names:
            sizes |= {"BK": tile.depth, "WIDENS": widens}
        wrapped(kernel)[(images * programs(tile, rows, pixels),)](
            *args, **constants, **sizes, num_warps=tile.warps, num_stages=tile.stages
        )

    narrow = weights.dtype != torch.float32
    default = choose_product_tile(name, narrow, rows, images * pixels)
    shape = (name, weights.dtype, *rows, images, pixels, *constants.values())
    tile = tile_for(weights, shape, default, PRODUCT_TILES[name, narrow], launch)
    launch(tile)
    return tile


class _Run(NamedTuple):
    """One call."""

    x: Tensor
    arrays: Arrays
    memory: Memory
    results: Sequence[Tensor]

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    def read(self, source: int, size: Size) -> _Map:
        if source == CALLERS_MAP:
            return _Map(*planar(self.x), size)
        pixels = size[0] * size[1]
        return _Map(self.memory.planes[source], (pixels, pitch(self.batch * pixels), 1), size)

    def target(self, step: TritonStep) -> _Target:
        planes = None if step.target == NO_BUFFER else self.memory.planes[step.target]
        result = None if step.result == NO_RESULT else self.results[step.result]
        return _Target(planes, result)


def _matrix(product: Product) -> tuple[int, int, int, int]:
    return product.matrix, pitch(product.depth), product.bias, product.slopes


def _run_stem(
    run: _Run, step: TritonStep, size: Size, made: Size, affine: tuple[Tensor, Tensor] | None
) -> None:
    (h, w), (out_h, out_w), arrays = size, made, run.arrays
    x, x_strides = planar(run.x)
    pixels = run.batch * out_h * out_w
    each = step.pw.activation not in _RISING
    scale, shift = (arrays.parameters, arrays.parameters) if affine is None else affine
    _launch(
        "stem_each" if each else "stem", arrays, (step.rows,), 1, pixels,
        x, scale, shift, run.memory.planes[step.target], arrays.weights, arrays.parameters,
        run.batch, step.channels, h, w, half(h), half(w), out_h * out_w, out_w,
        *_matrix(step.pw), step.rows, *x_strides, pitch(pixels),
        BYTES=affine is not None, EACH=each, ACTIVATION=step.pw.activation,
    )  # fmt: skip


def _run_copy(run: _Run, step: TritonStep, size: Size) -> None:
    pixels = run.batch * size[0] * size[1]
    length = pitch(pixels)
    rows = run.memory.planes[step.target][: step.rows * length].view(step.rows, length)
    planes = rows[:, :pixels].unflatten(1, (run.batch, *size))
    planes.copy_(run.x[:, : step.rows].transpose(0, 1))


def _run_pw(run: _Run, step: TritonStep, x: _Map, made: Size) -> None:
    pixels = math.prod(made)
    arrays, total, (_, x_c, _) = run.arrays, run.batch * pixels, x.strides
    constants: dict[str, Any] = {"ACTIVATION": step.pw.activation}
    if step.target >= MIDDLE and not step.gated:
        _launch(
            "pw1", arrays, (step.rows,), 1, total,
            x.memory, run.memory.planes[step.target], arrays.tables, arrays.weights,
            arrays.parameters, run.batch, pixels, step.table, *_matrix(step.pw), step.channels,
            step.rows, *x.strides, pitch(total), FLAT=step.source != CALLERS_MAP, **constants,
        )  # fmt: skip
        return
    to = run.target(step)
    _launch(
        "pointwise", arrays, (step.rows,), 1, total,
        x.memory, run.memory.gates, *to.memory, arrays.tables, arrays.weights, arrays.parameters,
        run.batch, pixels, *_matrix(step.pw), step.channels, step.rows, step.target_table,
        step.result_table, x_c, pitch(total), *to.strides,
        GATED=bool(step.gated), **to.constants, **constants,
    )  # fmt: skip


def _run_dw_pw(run: _Run, step: TritonStep, x: _Map, side: _Map, made: Size) -> None:
    arrays, (out_h, out_w), to = run.arrays, made, run.target(step)
    (h, w), rows, side_rows = (x if step.channels else side).size, step.rows, step.side_rows
    # Of the two the kernel is given one for another that it does not read.
    middle, unit_x = (x if step.channels else side), (side if side_rows else x)
    dw, pw, side_dw, side_pw = step.dw, step.pw, step.side_dw, step.side_pw
    _launch(
        "dw_pw2", arrays, (rows, side_rows), 1, run.batch * out_h * out_w,
        middle.memory, unit_x.memory, *to.memory, arrays.tables, arrays.weights, arrays.parameters,
        run.batch, h, w, out_h * out_w, out_w,
        step.table, dw.taps, dw.slopes, *_matrix(pw), step.channels, rows,
        step.side_table, side_dw.taps, side_dw.slopes, *_matrix(side_pw), step.side_channels,
        side_rows, step.target_table, step.result_table,
        middle.strides[1], *unit_x.strides, pitch(run.batch * out_h * out_w), *to.strides,
        STRIDE=step.stride, FROM_X=step.channels > 0 and step.source < MIDDLE,
        PROJECTS=side_pw.rows > 0, **to.constants,
        WINDOW=dw.window, DILATION=dw.dilation, DW_ACTIVATION=dw.activation,
        ACTIVATION=pw.activation, SIDE_WINDOW=side_dw.window, SIDE_DILATION=side_dw.dilation,
        SIDE_DW_ACTIVATION=side_dw.activation, SIDE_ACTIVATION=side_pw.activation,
    )  # fmt: skip


def _run_dw(run: _Run, step: TritonStep, x: _Map, made: Size) -> None:
    arrays, (h, w), (out_h, out_w), to = run.arrays, x.size, made, run.target(step)
    pixels, dw = out_h * out_w, step.dw
    _launch(
        "depthwise", arrays, (step.rows,), 1, run.batch * pixels,
        x.memory, *to.memory, arrays.tables, arrays.parameters, run.batch, h, w, pixels, out_w,
        step.table, dw.taps, dw.slopes, step.rows, step.target_table, step.result_table,
        *x.strides, pitch(run.batch * pixels), *to.strides,
        STRIDE=step.stride, **to.constants, WINDOW=dw.window, DILATION=dw.dilation,
        ACTIVATION=dw.activation,
    )  # fmt: skip


def _run_pool(run: _Run, step: TritonStep, x: _Map, made: Size) -> None:
    arrays, (h, w), (out_h, out_w), to = run.arrays, x.size, made, run.target(step)
    pixels = out_h * out_w
    _launch(
        "average", arrays, (step.rows,), 1, run.batch * pixels,
        x.memory, *to.memory, arrays.tables, arrays.parameters, run.batch, h, w, pixels, out_w,
        step.table, step.pw.slopes, step.rows, step.target_table, step.result_table,
        *x.strides, pitch(run.batch * pixels), *to.strides,
        STRIDE=step.stride, INSIDE=step.kind == POOL_INSIDE, **to.constants,
        ACTIVATION=step.pw.activation,
    )  # fmt: skip


def _run_means(run: _Run, step: TritonStep, x: _Map, made: Size) -> None:
    pixels = math.prod(made)
    _launch(
        "means", run.arrays, (step.channels,), run.batch, 1,
        x.memory, run.memory.sums, pixels, step.channels, x.strides[1],
    )  # fmt: skip


def _run_gates(run: _Run, step: TritonStep) -> None:
    arrays, memory = run.arrays, run.memory
    _launch(
        "gates", arrays, (step.channels,), 1, run.batch,
        memory.sums, memory.gates, arrays.weights, arrays.parameters, run.batch, step.channels,
        *_matrix(step.pw), step.pw.rows, *_matrix(step.side_pw),
        ACTIVATION=step.pw.activation, GATE_ACTIVATION=step.side_pw.activation,
    )  # fmt: skip


def _run_scale(run: _Run, step: TritonStep, x: _Map, made: Size) -> None:
    pixels = math.prod(made)
    arrays, to, total = run.arrays, run.target(step), run.batch * pixels
    adds = step.side_channels > 0
    added = run.read(step.side_source, x.size) if adds else x
    _launch(
        "scale", arrays, (step.rows,), 1, total,
        x.memory, run.memory.gates, added.memory, *to.memory, arrays.tables, arrays.parameters,
        run.batch, pixels, step.pw.slopes, step.rows, step.side_table, step.target_table,
        step.result_table, x.strides[1], *added.strides, pitch(total), *to.strides,
        GATED=bool(step.gated), ADDS=adds, FLAT=adds and step.side_source != CALLERS_MAP,
        **to.constants, ACTIVATION=step.pw.activation,
    )  # fmt: skip


def _run_features(run: _Run, step: TritonStep, x: _Map, pixels: int) -> int:
    """Tiles that an image was cut into."""
    arrays = run.arrays
    tile = _launch(
        "features", arrays, (step.rows,), run.batch, pixels,
        x.memory, run.memory.sums, arrays.tables, arrays.weights, arrays.parameters, run.batch,
        pixels, step.table, *_matrix(step.pw), step.channels, step.rows, x.strides[1],
        ACTIVATION=step.pw.activation,
    )  # fmt: skip
    return -(-pixels // tile.pixels)


def _run_linear(run: _Run, step: TritonStep, pixels: int, tiles: int) -> None:
    arrays = run.arrays
    matrix, row, bias, _ = _matrix(step.pw)
    _launch(
        "linear", arrays, (step.rows,), 1, run.batch,
        run.memory.sums, run.results[step.result], arrays.weights, arrays.parameters, run.batch,
        pixels, tiles, matrix, row, bias, step.pw.depth, step.rows,
    )  # fmt: skip


def run(
    x: Tensor,
    arrays: Arrays,
    steps: Sequence[TritonStep],
    memory: Memory,
    results: Sequence[Tensor],
    affine: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Launch a plan.

    Args:
        x: [N, C, H, W], N > 0; bytes where there is an ``affine``.
        arrays, steps: of the plan.
        memory: from :func:`allocate`.
        results: of the plan, dense.
        affine: scale and shift for each channel of bytes, float32; the network's input is
            ``x * scale + shift``.
    """
    call = _Run(x, arrays, memory, results)
    pooled = tiles = 0
    for step, size, side_size, made in sized(steps, x.shape[2], x.shape[3]):
        pixels = size[0] * size[1]
        if step.kind == STEM:
            _run_stem(call, step, size, made, affine)
        elif step.kind == COPY:
            _run_copy(call, step, size)
        elif step.kind == GATES:
            _run_gates(call, step)
        elif step.kind == LINEAR:
            _run_linear(call, step, pooled, tiles)
        else:
            source = call.read(step.source, size)
            if step.kind == FEATURES:
                pooled, tiles = pixels, _run_features(call, step, source, pixels)
            elif step.kind == DW_PW:
                _run_dw_pw(call, step, source, call.read(step.side_source, side_size), made)
            else:
                _RUN_MAPS[step.kind](call, step, source, made)


_RUN_MAPS: dict[int, Callable[[_Run, TritonStep, _Map, Size], None]] = {
    PW: _run_pw,
    DW: _run_dw,
    MEANS: _run_means,
    SCALE: _run_scale,
    POOL: _run_pool,
    POOL_INSIDE: _run_pool,
}


def _new_results(
    x: Tensor, arrays: Arrays, words: Sequence[int], channels: dict[str, int],
    halvings: dict[str, int], classify: bool,
) -> list[Tensor]:  # fmt: skip
    """Each result's, by what the caller calls it."""
    check_map(x, "x")
    steps, planned = checked(words, *arrays, x)
    wanted = "one result" if len(channels) == 1 else f"{len(channels)} results"
    check(planned.keys() == {*range(len(channels))}, f"plan must have {wanted}, has {len(planned)}")
    for i, both in enumerate(zip(channels.items(), halvings.items(), strict=True)):
        for expected, (name, got) in zip(planned[i], both, strict=True):
            check(expected == got, f"{name} must be {expected}, as in plan, got {got}")
    scores = steps[-1].kind == LINEAR
    check(classify == scores, f"classify must be {scores}, as in plan, got {classify}")
    made = _results_fake(x, [*channels.values()], [*halvings.values()], classify)
    if x.shape[0] > 0:
        memory = allocate(arrays.weights, steps, x.shape[0], x.shape[2], x.shape[3])
        run(x, arrays, steps, memory, made)
    return made


def network(
    x: Tensor,
    weights: Tensor,
    parameters: Tensor,
    tables: Tensor,
    steps: Sequence[int],
    out_channels: int,
    halvings: int,
    classify: bool,
) -> Tensor:
    """A plan with one result; the entries of its tables are taken on trust."""
    arrays, named = Arrays(weights, parameters, tables), {"out_channels": out_channels}
    (out,) = _new_results(x, arrays, steps, named, {"halvings": halvings}, classify)
    return out


def network_results(
    x: Tensor,
    weights: Tensor,
    parameters: Tensor,
    tables: Tensor,
    steps: Sequence[int],
    channels: Sequence[int],
    halvings: Sequence[int],
    classify: bool,
) -> list[Tensor]:
    """All results of a plan; ``channels`` and ``halvings`` are theirs."""
    count = len(channels)
    check(len(halvings) == count, f"halvings must have {count} elements, as channels")
    named = {f"channels[{i}]": c for i, c in enumerate(channels)}
    halved = {f"halvings[{i}]": times for i, times in enumerate(halvings)}
    return _new_results(x, Arrays(weights, parameters, tables), steps, named, halved, classify)


def network_out(
    x: Tensor,
    weights: Tensor,
    parameters: Tensor,
    tables: Tensor,
    steps: Sequence[int],
    memory: Sequence[Tensor],
    results: Sequence[Tensor],
    affine: Sequence[Tensor],
) -> None:
    """The same in memory from :func:`allocate`, with all results of the plan. ``affine`` is empty,
    or ``x`` is bytes and the network's input ``x * scale + shift``, with float32 [C] each."""
    arrays = Arrays(weights, parameters, tables)
    if not affine:
        check_map(x, "x")
    parsed_steps, planned = checked(steps, *arrays, x)
    check_affine(affine, parsed_steps, x)
    check_memory(memory, parsed_steps, weights, x)
    check_results(results, planned, parsed_steps[-1].kind == LINEAR, weights, x)
    if x.shape[0] > 0:
        *planes, sums, gates = memory
        scale_shift = (affine[0], affine[1]) if affine else None
        run(x, arrays, parsed_steps, Memory(tuple(planes), sums, gates), results, scale_shift)


def _network_fake(x: Tensor, *arguments: Any) -> Tensor:
    out_channels, halvings, classify = arguments[-3:]
    return _plan_fake(x, out_channels, halvings, classify)


def _network_results_fake(x: Tensor, *arguments: Any) -> list[Tensor]:
    return _results_fake(x, *arguments[-3:])


def _network_out_fake(*arguments: Any) -> None:
    return None


define(network)
define(network_results)
define(network_out, mutates=("memory", "results"))
torch.library.register_fake("snv2_triton::network_out", _network_out_fake)
torch.library.register_fake("snv2_triton::network", _network_fake)
torch.library.register_fake("snv2_triton::network_results", _network_results_fake)
for _name in ("network", "network_results"):
    torch.library.register_autograd(f"snv2_triton::{_name}", _no_gradient)
