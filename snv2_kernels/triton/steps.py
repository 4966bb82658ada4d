"""The steps of a plan: read from words and checked, and the extents of their maps."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from snv2_kernels.packing.common import half
from snv2_kernels.packing.planes import CALLERS_MAP, NO_BUFFER, NO_RESULT, PRELU
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
    TritonStep,
    pitch,
)
from snv2_kernels.packing.units import ACTIVATIONS
from snv2_kernels.triton.launches import check

__all__ = ["BUFFERS", "Results", "Size", "parsed", "sized", "sizes_of"]

BUFFERS = MIDDLE + 2
_WORDS = len(TritonStep(COPY).words())
_LEAST_PIXELS = 16  # of a tile
_MOST_REACH = 1 << 30  # pixels, as planes have: kernels add the two in 32 bits
Size = tuple[int, int]
Results = dict[int, tuple[int, int]]  # of a plan: channels and halvings of each


def sized(
    steps: Sequence[TritonStep], height: int, width: int
) -> Iterator[tuple[TritonStep, Size, Size, Size]]:
    """Each step with the extents of the map that it reads, of the one that its side reads and of
    the one that it makes."""
    sizes = {CALLERS_MAP: (height, width)}
    for step in steps:
        size, side = sizes.get(step.source, (0, 0)), sizes.get(step.side_source, (0, 0))
        made = size if step.channels else side
        for _ in range(2 if step.kind == STEM else step.stride - 1):
            made = half(made[0]), half(made[1])
        if step.target != NO_BUFFER:
            sizes[step.target] = made
        yield step, size, side, made


def sizes_of(steps: Sequence[TritonStep], batch: int, height: int, width: int) -> list[int]:
    """Elements of each of a call's tensors in ``Memory``: planes, sums and gates."""
    planes, sums, gates = [0] * BUFFERS, 0, 0
    for step, (h, w), _, (out_h, out_w) in sized(steps, height, width):
        if step.target != NO_BUFFER:
            size = step.target_planes * pitch(batch * out_h * out_w)
            planes[step.target] = max(planes[step.target], size)
        if step.kind == MEANS:
            sums = max(sums, batch * step.channels)
        if step.kind == GATES:
            gates = max(gates, batch * step.channels)
        if step.kind == FEATURES:
            sums = max(sums, -(-h * w // _LEAST_PIXELS) * batch * step.rows)
    return [*planes, sums, gates]


def _extents(step: TritonStep) -> Iterator[tuple[str, int, int]]:
    """Where each operand of a step begins and ends in ``weights``, ``parameters`` or ``tables``."""
    yield "tables", step.table, step.channels if step.kind != GATES else 0
    for product in (step.pw, step.side_pw):
        yield "weights", product.matrix, product.rows * pitch(product.depth)
        yield "parameters", product.bias, product.rows
        yield "parameters", product.slopes, product.rows * (product.activation == PRELU)
    for dw in (step.dw, step.side_dw):
        yield "parameters", dw.taps, dw.channels * (dw.window**2 + 1)
        yield "parameters", dw.slopes, dw.channels * (dw.activation == PRELU)
    if step.kind == GATES:
        return
    yield "tables", step.side_table, step.side_channels
    if step.target != NO_BUFFER:
        yield "tables", step.target_table, step.rows + step.side_pw.rows
    if step.result != NO_RESULT and step.kind != LINEAR:
        yield "tables", step.result_table, step.rows + step.side_rows


def _is_known(step: TritonStep) -> bool:
    """Whether its parts fit together."""
    dw, pw, side_dw, side_pw = step.dw, step.pw, step.side_dw, step.side_pw
    fits = COPY <= step.kind <= POOL_INSIDE and step.stride in (1, 2) and step.target < BUFFERS
    fits = fits and min(step.words()) >= NO_BUFFER and CALLERS_MAP <= step.source < BUFFERS
    fits = fits and CALLERS_MAP <= step.side_source < MIDDLE
    if step.kind in (COPY, STEM):
        fits = fits and step.target in (0, 1)
    elif step.kind == LINEAR:
        fits = fits and step.result != NO_RESULT
    elif step.kind not in (MEANS, GATES, FEATURES):
        fits = fits and (step.target, step.result) != (NO_BUFFER, NO_RESULT)
    if step.kind in (MEANS, SCALE, FEATURES) or step.gated:
        fits = fits and step.source != CALLERS_MAP
    for d in (dw, side_dw):
        fits = fits and d.window % 2 == 1 and d.dilation >= 1
        fits = fits and d.window // 2 * d.dilation < _MOST_REACH
    fits = fits and all(p.activation < len(ACTIVATIONS) for p in (dw, pw, side_dw, side_pw))
    if step.kind in (DW, DW_PW):
        fits = fits and dw.channels == step.channels
    if step.kind == SCALE:
        fits = fits and (pw.rows, pw.depth, side_pw.rows) == (step.channels, 0, 0)
        fits = fits and step.stride == 1 and step.side_channels in (0, step.channels)
    if step.kind in (POOL, POOL_INSIDE):
        fits = fits and (pw.rows, pw.depth, step.side_channels) == (step.channels, 0, 0)
    if step.kind in (PW, DW_PW, FEATURES, GATES, STEM):
        fits = fits and pw.depth == step.channels * (9 if step.kind == STEM else 1)
    if step.kind == GATES:
        return fits and (side_pw.rows, side_pw.depth) == (step.channels, pw.rows)
    return fits and (not side_pw.rows or side_pw.depth == side_dw.channels == step.side_channels)


@functools.lru_cache(maxsize=256)
def parsed(words: tuple[int, ...], *sizes: int) -> tuple[tuple[TritonStep, ...], Results]:
    """The steps, whose operands must lie in ``weights``, ``parameters`` and ``tables`` of these
    sizes, and their results."""
    check(bool(words) and len(words) % _WORDS == 0, f"steps must have {_WORDS} words each")
    starts = range(0, len(words), _WORDS)
    steps = tuple(TritonStep.of_words(words[i : i + _WORDS]) for i in starts)
    available = dict(zip(("weights", "parameters", "tables"), sizes, strict=True))
    halved = {CALLERS_MAP: 0}  # how often, of the map that was written last
    latest = {MEANS: 0, GATES: 0, FEATURES: 0}  # channels of the last one
    pooled = 0  # halvings of the map that the last features are of
    results: Results = {}
    for i, step in enumerate(steps):
        check(_is_known(step) and (step.kind in (STEM, COPY)) <= (i == 0), f"step {i} is not known")
        reads = {step.source, step.side_source}
        check(reads <= halved.keys(), f"step {i} reads a map that no step made")
        source, side = halved[step.source], halved[step.side_source]
        both = step.channels > 0 and step.side_channels > 0
        check(not both or source == side, f"step {i} reads maps of two extents")
        made = source if step.channels or not step.side_channels else side
        made += 2 if step.kind == STEM else step.stride - 1
        halved[step.target] = made
        needed = GATES if step.gated else MEANS if step.kind == GATES else None
        fits = needed is None or latest[needed] == step.channels
        check(fits, f"step {i} reads means or gates that no step made")
        if step.kind == LINEAR:
            fits, made = latest[FEATURES] == step.pw.depth, pooled
            check(fits, f"step {i} reads features that no step made")
        if step.kind == FEATURES:
            pooled = made
        if step.kind in latest:
            latest[step.kind] = step.rows if step.kind == FEATURES else step.channels
        # Each plane is in a table of those that are written, or in the caller's.
        fits = step.target_planes <= available["tables"]
        check(fits, f"step {i} writes more planes than its tables have")
        for name, begin, length in _extents(step):
            inside = begin >= 0 and length >= 0 and begin + length <= available[name]
            check(inside, f"step {i} reads beyond its {name}")
        if step.result != NO_RESULT:
            # Two steps may write parts of one.
            channels, before = results.get(step.result, (0, made))
            check(before == made, f"step {i} writes a result of another extent than the one before")
            results[step.result] = channels + step.rows + step.side_rows, made
    return steps, results
