"""Checks of what an op is given that runs a plan: nothing is read or written beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snv2_kernels.ops import KERNEL_DTYPES
from snv2_kernels.packing.common import map_shape
from snv2_kernels.packing.triton import STEM, TritonStep
from snv2_kernels.triton.launches import check
from snv2_kernels.triton.ops import check_pixels
from snv2_kernels.triton.steps import BUFFERS, Results, parsed, sizes_of

__all__ = ["check_affine", "check_memory", "check_results", "checked"]


def checked(
    words: Sequence[int], weights: Tensor, parameters: Tensor, tables: Tensor, x: Tensor
) -> tuple[tuple[TritonStep, ...], Results]:
    """The steps and the results of a plan for ``x``, a map or bytes."""
    check(weights.dtype in KERNEL_DTYPES, "weights must be float32, float16 or bfloat16")
    for name, t, dtype in (
        ("weights", weights, weights.dtype if x.dtype == torch.uint8 else x.dtype),
        ("parameters", parameters, torch.float32),
        ("tables", tables, torch.int32),
    ):
        check(
            t.dtype == dtype and t.dim() == 1 and t.is_contiguous() and t.device == x.device,
            f"{name} must be a contiguous {dtype} vector on the device of x",
        )
    steps, results = parsed(tuple(words), weights.numel(), parameters.numel(), tables.numel())
    check(x.dim() == 4, f"x must have 4 dimensions [N, C, H, W], got {x.dim()}")
    check_pixels(x)
    channels = steps[0].channels
    check(x.shape[1] >= channels, f"x has {x.shape[1]} channels, too few for the plan")
    return steps, results


def check_affine(affine: Sequence[Tensor], steps: Sequence[TritonStep], x: Tensor) -> None:
    """Scale and shift of bytes, or nothing."""
    if not affine:
        return
    check(x.dtype == torch.uint8, "x must be uint8 where there is affine")
    check(steps[0].kind == STEM, "plan must begin with a stem where there is affine")
    channels = steps[0].channels
    fits = len(affine) == 2 and all(
        t.dtype == torch.float32 and t.shape == (channels,) and t.is_contiguous()
        and t.device == x.device
        for t in affine
    )  # fmt: skip
    check(fits, f"affine must be two float32 vectors of {channels} on the device of x")


def check_memory(
    memory: Sequence[Tensor], steps: Sequence[TritonStep], weights: Tensor, x: Tensor
) -> None:
    n, _, h, w = x.shape
    sizes = sizes_of(steps, n, h, w)
    check(len(memory) == len(sizes), f"memory must be {len(sizes)} tensors, got {len(memory)}")
    dtypes = [*BUFFERS * [weights.dtype], torch.float32, torch.float32]
    for i, (t, size, dtype) in enumerate(zip(memory, sizes, dtypes, strict=True)):
        fits = t.dtype == dtype and t.is_contiguous() and t.device == x.device and t.numel() >= size
        check(fits, f"memory[{i}] must be {size} contiguous {dtype} or more, on the device of x")


def check_results(
    results: Sequence[Tensor], planned: Results, classify: bool, weights: Tensor, x: Tensor
) -> None:
    count = len(results)
    check(planned.keys() == {*range(count)}, f"results must be {len(planned)}, got {count}")
    n, _, h, w = x.shape
    for i, out in enumerate(results):
        channels, halvings = planned[i]
        scores = classify and i == count - 1
        shape = (n, channels) if scores else map_shape(n, channels, halvings, h, w)
        check(out.shape == shape, f"results[{i}] must have shape {shape}, got {tuple(out.shape)}")
        last = out.dim() == 4 and out.is_contiguous(memory_format=torch.channels_last)
        fits = out.dtype == weights.dtype and out.device == x.device
        check(
            fits and (last or out.is_contiguous()),
            f"results[{i}] must be dense {weights.dtype} on the device of x",
        )
