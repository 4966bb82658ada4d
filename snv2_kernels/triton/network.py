"""``torch.ops.snv2_triton.network``: a plan (:class:`snv2_kernels.packing.TritonPlan`) as launches,
two for each unit, one for the stem and two for the head."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snv2_kernels.ops import _no_gradient, _plan_fake
from snv2_kernels.packing.gpu import (
    CALLERS_MAP,
    COPY,
    HEAD,
    NO_BUFFER,
    NO_RESULT,
    STEM,
    UNIT,
    GpuStep,
)
from snv2_kernels.packing.triton import pitch
from snv2_kernels.triton import end_kernels, unit_kernels
from snv2_kernels.triton.ops import (
    INTERPRETED,
    check,
    check_map,
    check_pixels,
    define,
    planar,
    strides,
    wrapped,
)
from snv2_kernels.triton.tiles import PRODUCT_TILES, ProductTile, choose_product_tile, programs
from snv2_kernels.triton.tuning import tile_for

__all__ = ["Arrays", "Memory", "allocate", "run"]

_LEAST_PIXELS = 16  # of a tile
_WORDS = len(GpuStep(COPY).words())

KERNELS = {
    "stem": end_kernels.stem_kernel,
    "pw1": unit_kernels.pw1_kernel,
    "dw_pw2": unit_kernels.dw_pw2_kernel,
    "features": end_kernels.features_kernel,
    "linear": end_kernels.linear_kernel,
}


@dataclass(frozen=True)
class Arrays:
    """Of a plan."""

    weights: Tensor
    parameters: Tensor
    tables: Tensor


@dataclass(frozen=True)
class Memory:
    """Of one call, to be written in any order; its size follows from plan and input."""

    planes: tuple[Tensor, Tensor]  # of the maps between steps: a plan's buffers
    middle: Tensor  # planes of a unit's middle map
    sums: Tensor  # float32, of the head's features

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.planes, self.middle, self.sums


@dataclass(frozen=True)
class _Map:
    """What a step reads: memory and its strides from image to image, channel to channel, pixel to
    pixel."""

    memory: Tensor
    strides: tuple[int, int, int]
    is_planes: bool


def _halved(extent: int) -> int:
    return (extent - 1) // 2 + 1


def _sized(
    steps: Sequence[GpuStep], height: int, width: int
) -> Iterator[tuple[GpuStep, tuple[int, int], tuple[int, int]]]:
    """Each step with the extents of the map that it reads and of the one that it makes."""
    size = height, width
    for step in steps:
        before = size
        if step.kind == STEM or step.stride == 2:
            size = _halved(size[0]), _halved(size[1])
        if step.kind == STEM:
            size = _halved(size[0]), _halved(size[1])
        yield step, before, size


def allocate(like: Tensor, steps: Sequence[GpuStep], batch: int, height: int, width: int) -> Memory:
    """Memory for one call, beside the weights ``like``."""
    planes, middle, sums = [0, 0], 0, 0
    for step, (h, w), (out_h, out_w) in _sized(steps, height, width):
        if step.out_buffer >= 0:
            size = step.out_planes * pitch(batch * out_h * out_w)
            planes[step.out_buffer] = max(planes[step.out_buffer], size)
        if step.kind == UNIT:
            middle = max(middle, step.mid_channels * pitch(batch * h * w))
        if step.kind == HEAD:
            sums = -(-h * w // _LEAST_PIXELS) * batch * step.mid_channels
    return Memory(
        planes=(like.new_empty(planes[0]), like.new_empty(planes[1])),
        middle=like.new_empty(middle),
        sums=like.new_empty(sums, dtype=torch.float32),
    )


def _launch(
    name: str, arrays: Arrays, rows: tuple[int, ...], images: int, pixels: int,
    *args: Any, **constants: Any,
) -> ProductTile:  # fmt: skip
    """A product of matrices with these rows and of all pixels, which are cut by image if there is
    more than one image; the tile that it ran in."""
    weights, kernel = arrays.weights, KERNELS[name]
    widens = INTERPRETED and weights.dtype == torch.bfloat16

    def launch(tile: ProductTile) -> None:
        wrapped(kernel)[(images * programs(tile, rows, pixels),)](
            *args, **constants, BM=tile.rows, BP=tile.pixels, BK=tile.depth, WIDENS=widens,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    narrow = weights.dtype != torch.float32
    default = choose_product_tile(name, narrow, rows, images * pixels)
    shape = (name, weights.dtype, *rows, images, pixels, *constants.values())
    tile = tile_for(weights, shape, default, PRODUCT_TILES[name, narrow], launch)
    launch(tile)
    return tile


def _read(x: Tensor, step: GpuStep, memory: Memory, batch: int, pixels: int) -> _Map:
    if step.in_buffer == CALLERS_MAP:
        return _Map(*planar(x), False)
    return _Map(memory.planes[step.in_buffer], (pixels, pitch(batch * pixels), 1), True)


def _run_stem(
    x: Tensor, arrays: Arrays, step: GpuStep, y: Tensor, size: tuple[int, int],
    out_size: tuple[int, int], affine: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    n, (h, w), (out_h, out_w) = x.shape[0], size, out_size
    x, x_strides = planar(x)
    scale, shift = (arrays.parameters, arrays.parameters) if affine is None else affine
    _launch(
        "stem", arrays, (step.out_channels,), 1, n * out_h * out_w,
        x, scale, shift, y, arrays.weights, arrays.parameters, n, step.in_channels, h, w,
        _halved(h), _halved(w), out_h * out_w, out_w,
        step.pw1_weights, pitch(9 * step.in_channels), step.pw1_bias, step.out_channels,
        *x_strides, pitch(n * out_h * out_w), BYTES=affine is not None,
    )  # fmt: skip


def _run_unit(
    x: _Map, arrays: Arrays, step: GpuStep, memory: Memory, batch: int, size: tuple[int, int],
    out_size: tuple[int, int], result: Tensor | None,
) -> None:  # fmt: skip
    (h, w), (out_h, out_w) = size, out_size
    pixels, out_pixels = h * w, out_h * out_w
    mid, middle_pitch = step.mid_channels, pitch(batch * pixels)
    _launch(
        "pw1", arrays, (mid,), 1, batch * pixels,
        x.memory, memory.middle, arrays.tables, arrays.weights, arrays.parameters, batch, pixels,
        step.in_table, step.pw1_weights, pitch(step.in_channels), step.pw1_bias, step.in_channels,
        mid, *x.strides, middle_pitch, FLAT=x.is_planes,
    )  # fmt: skip
    rows, side_rows, side_table = step.out_channels, step.proj_channels, step.in_table
    if step.stride == 1 and result is not None:
        side_rows = step.result_channels - rows
        side_table = step.result_table + step.result_channels
    planes = None if step.out_buffer == NO_BUFFER else memory.planes[step.out_buffer]
    assert planes is not None or result is not None
    _launch(
        "dw_pw2", arrays, (rows, side_rows), 1, batch * out_pixels,
        memory.middle, x.memory, result if planes is None else planes,
        planes if result is None else result,
        arrays.tables, arrays.weights, arrays.parameters, batch, h, w, out_pixels, out_w,
        step.dw, step.pw2_weights, pitch(mid), step.pw2_bias, mid, rows,
        side_table, step.proj_dw, step.proj_weights, pitch(step.in_channels), step.proj_bias,
        step.in_channels, side_rows, step.out_table, step.result_table,
        middle_pitch, *x.strides, pitch(batch * out_pixels),
        *((0, 0, 0) if result is None else strides(result)),
        STRIDE=step.stride, TO_PLANES=planes is not None, TO_MAP=result is not None,
    )  # fmt: skip


def _run_head(
    x: _Map, arrays: Arrays, step: GpuStep, sums: Tensor, batch: int, pixels: int, result: Tensor
) -> None:
    features = step.mid_channels
    tile = _launch(
        "features", arrays, (features,), batch, pixels,
        x.memory, sums, arrays.tables, arrays.weights, arrays.parameters, batch, pixels,
        step.in_table, step.pw1_weights, pitch(step.in_channels), step.pw1_bias,
        step.in_channels, features, x.strides[1],
    )  # fmt: skip
    _launch(
        "linear", arrays, (step.out_channels,), 1, batch,
        sums, result, arrays.weights, arrays.parameters, batch, pixels, -(-pixels // tile.pixels),
        step.pw2_weights, pitch(features), step.pw2_bias, features, step.out_channels,
    )  # fmt: skip


def run(
    x: Tensor,
    arrays: Arrays,
    steps: Sequence[GpuStep],
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
    batch = x.shape[0]
    for step, size, out_size in _sized(steps, x.shape[2], x.shape[3]):
        pixels = size[0] * size[1]
        result = None if step.result == NO_RESULT else results[step.result]
        if step.kind == STEM:
            _run_stem(x, arrays, step, memory.planes[0], size, out_size, affine)
            continue
        if step.kind == COPY:
            length = pitch(batch * pixels)
            rows = memory.planes[0][: step.out_channels * length].view(step.out_channels, length)
            planes = rows[:, : batch * pixels].unflatten(1, (batch, *size))
            planes.copy_(x.transpose(0, 1))
            continue
        source = _read(x, step, memory, batch, pixels)
        if step.kind == UNIT:
            _run_unit(source, arrays, step, memory, batch, size, out_size, result)
        else:
            assert result is not None
            _run_head(source, arrays, step, memory.sums, batch, pixels, result)


def _extents(step: GpuStep) -> Iterator[tuple[str, int, int]]:
    """Where each operand of a step begins and ends in ``weights``, ``parameters`` or ``tables``."""
    depth, mid, out, proj = (
        step.in_channels, step.mid_channels, step.out_channels, step.proj_channels
    )  # fmt: skip
    yield "tables", step.in_table, depth
    first = (out, 9 * depth) if step.kind == STEM else (mid, depth)
    if step.kind != COPY:
        yield "weights", step.pw1_weights, first[0] * pitch(first[1])
        yield "parameters", step.pw1_bias, first[0]
    if step.kind in (UNIT, HEAD):
        yield "weights", step.pw2_weights, out * pitch(mid)
        yield "parameters", step.pw2_bias, out
    if step.kind != UNIT:
        return
    yield "parameters", step.dw, 10 * mid
    yield "weights", step.proj_weights, proj * pitch(depth)
    yield "parameters", step.proj_dw, 10 * depth if proj else 0
    yield "parameters", step.proj_bias, proj
    if step.out_buffer != NO_BUFFER:
        yield "tables", step.out_table, out + proj
    if step.result != NO_RESULT:
        passing = step.result_channels - out - proj
        yield "tables", step.result_table, step.result_channels + passing


@functools.lru_cache(maxsize=256)
def _parsed(words: tuple[int, ...], *sizes: int) -> tuple[GpuStep, ...]:
    """The steps, whose operands must lie in ``weights``, ``parameters`` and ``tables`` of these
    sizes."""
    check(bool(words) and len(words) % _WORDS == 0, f"steps must have {_WORDS} words each")
    steps = tuple(GpuStep(*words[i : i + _WORDS]) for i in range(0, len(words), _WORDS))
    available = dict(zip(("weights", "parameters", "tables"), sizes, strict=True))
    for i, step in enumerate(steps):
        known = COPY <= step.kind <= HEAD and step.stride in (1, 2) and step.out_buffer < 2
        known = known and step.in_buffer in (CALLERS_MAP, 0, 1) and min(step.words()) >= NO_BUFFER
        check(known and (step.kind in (STEM, COPY)) <= (i == 0), f"step {i} is not known")
        for name, begin, length in _extents(step):
            inside = begin >= 0 and length >= 0 and begin + length <= available[name]
            check(inside, f"step {i} reads beyond its {name}")
    return steps


def _steps_of(
    words: Sequence[int], weights: Tensor, parameters: Tensor, tables: Tensor
) -> tuple[GpuStep, ...]:
    return _parsed(tuple(words), weights.numel(), parameters.numel(), tables.numel())


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
    check_map(x, "x")
    check_pixels(x)
    for name, t, dtype in (
        ("weights", weights, x.dtype),
        ("parameters", parameters, torch.float32),
        ("tables", tables, torch.int32),
    ):
        check(
            t.dtype == dtype and t.dim() == 1 and t.is_contiguous() and t.device == x.device,
            f"{name} must be a contiguous {dtype} vector on the device of x",
        )
    parsed = _steps_of(steps, weights, parameters, tables)
    results = [step.result for step in parsed if step.result != NO_RESULT]
    check(results == [0], f"plan must have one result, has {len(results)}")
    check(x.shape[1] >= parsed[0].in_channels, f"x has {x.shape[1]} channels, too few for the plan")
    out = _plan_fake(x, out_channels, halvings, classify)
    if x.shape[0] > 0:
        memory = allocate(weights, parsed, x.shape[0], x.shape[2], x.shape[3])
        run(x, Arrays(weights, parameters, tables), parsed, memory, [out])
    return out


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
    check(len(memory) == 4, "memory must be four tensors")
    first, second, middle, sums = memory
    arrays = Arrays(weights, parameters, tables)
    if x.shape[0] > 0:
        scale_shift = (affine[0], affine[1]) if affine else None
        planned = Memory((first, second), middle, sums)
        run(x, arrays, _steps_of(steps, weights, parameters, tables), planned, results, scale_shift)


def _network_fake(x: Tensor, *arguments: Any) -> Tensor:
    out_channels, halvings, classify = arguments[-3:]
    return _plan_fake(x, out_channels, halvings, classify)


def _network_out_fake(*arguments: Any) -> None:
    return None


define(network)
define(network_out, mutates=("memory", "results"))
torch.library.register_fake("snv2_triton::network_out", _network_out_fake)
torch.library.register_fake("snv2_triton::network", _network_fake)
torch.library.register_autograd("snv2_triton::network", _no_gradient)
