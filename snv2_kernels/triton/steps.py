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
    PW,
    SCALE,
    STEM,
    TritonStep,
    pitch,
)
from snv2_kernels.packing.units import ACTIVATIONS
from snv2_kernels.triton.ops import check

__all__ = ["BUFFERS", "Size", "parsed", "sized"]

BUFFERS = MIDDLE + 2
_WORDS = len(TritonStep(COPY).words())
_LEAKY = (ACTIVATIONS.index("leaky_relu"), ACTIVATIONS.index("prelu"))
Size = tuple[int, int]


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
    fits = COPY <= step.kind <= LINEAR and step.stride in (1, 2) and step.target < BUFFERS
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
    fits = fits and all(p.activation < len(ACTIVATIONS) for p in (dw, pw, side_dw, side_pw))
    if step.kind in (DW, DW_PW):
        fits = fits and dw.channels == step.channels
    if step.kind == SCALE:
        fits = fits and (pw.rows, pw.depth, side_pw.rows) == (step.channels, 0, 0)
        fits = fits and step.stride == 1 and step.side_channels in (0, step.channels)
    if step.kind in (PW, DW_PW, FEATURES, GATES, STEM):
        fits = fits and pw.depth == step.channels * (9 if step.kind == STEM else 1)
    if step.kind == GATES:
        return fits and (side_pw.rows, side_pw.depth) == (step.channels, pw.rows)
    return fits and (not side_pw.rows or side_pw.depth == side_dw.channels == step.side_channels)


@functools.lru_cache(maxsize=256)
def parsed(words: tuple[int, ...], *sizes: int) -> tuple[TritonStep, ...]:
    """The steps, whose operands must lie in ``weights``, ``parameters`` and ``tables`` of these
    sizes."""
    check(bool(words) and len(words) % _WORDS == 0, f"steps must have {_WORDS} words each")
    starts = range(0, len(words), _WORDS)
    steps = tuple(TritonStep.of_words(words[i : i + _WORDS]) for i in starts)
    available = dict(zip(("weights", "parameters", "tables"), sizes, strict=True))
    written = {CALLERS_MAP}
    latest = {MEANS: 0, GATES: 0}  # channels of the last one
    for i, step in enumerate(steps):
        check(_is_known(step) and (step.kind in (STEM, COPY)) <= (i == 0), f"step {i} is not known")
        reads = {step.source, step.side_source}
        check(reads <= written, f"step {i} reads a map that no step made")
        written.add(step.target)
        needed = GATES if step.gated else MEANS if step.kind == GATES else None
        made = needed is None or latest[needed] == step.channels
        check(made, f"step {i} reads means or gates that no step made")
        if step.kind in latest:
            latest[step.kind] = step.channels
        for name, begin, length in _extents(step):
            inside = begin >= 0 and length >= 0 and begin + length <= available[name]
            check(inside, f"step {i} reads beyond its {name}")
    return steps
