"""PTX instructions that the kernels execute, counted by the interpreter (docs/ptx.md), against the
one table of bounds. Counts, not timings: they do not depend on the machine or on the data, but on
nvcc, which is that of CUDA 13.0 here."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from _cases import case_id, draw
from _ptx import NAME, instructions, needs_ptx, operators
from torch import Tensor

import snv2_kernels as snv2
from snv2_kernels.models import shufflenet_v2_x0_5, shufflenet_v2_x1_0
from snv2_kernels.testing import randomize_

pytestmark = needs_ptx

Shape = tuple[int, int, int, int]

LANES = 32
# Maps of x1.0.
STAGES: dict[int, Shape] = {2: (8, 116, 28, 28), 3: (8, 232, 14, 14), 4: (16, 464, 7, 7)}
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last

# Of a thread for each element of the result, float16: an op or a gradient, a memory format, bounds
# for the maps of stages 2, 3 and 4, and the goal, where there is one. Half of the elements of the
# split are only copied.
OPS: list[tuple[str, torch.memory_format, tuple[float, float, float], float | None]] = [
    ("cat_shuffle", CONTIGUOUS, (5.1, 4.1, 6.1), 6),
    ("cat_shuffle", CHANNELS_LAST, (2.6, 2.6, 2.6), 5),
    ("split_dw_cat_shuffle", CONTIGUOUS, (13.0, 13.9, 21.0), 24),
    ("split_dw_cat_shuffle", CHANNELS_LAST, (17.2, 17.8, 19.8), 20),
    ("dw_conv3x3", CONTIGUOUS, (21.7, 22.0, 30.7), None),
    ("dw_conv3x3", CHANNELS_LAST, (29.9, 31.1, 35.0), None),
    ("dw_conv3x3 stride 2", CONTIGUOUS, (65.2, 79.4, 111.9), None),
    ("dw_conv3x3 stride 2", CHANNELS_LAST, (45.5, 49.3, 79.9), None),
    ("cat_shuffle_backward", CONTIGUOUS, (5.1, 4.1, 6.1), None),
    ("cat_shuffle_backward", CHANNELS_LAST, (2.8, 2.8, 2.8), None),
    ("split_dw_cat_shuffle_backward", CONTIGUOUS, (32.3, 35.1, 45.5), 24),
    ("split_dw_cat_shuffle_backward", CHANNELS_LAST, (38.4, 36.8, 45.0), 20),
    ("dw_conv3x3_backward", CONTIGUOUS, (40.6, 44.5, 60.8), None),
    ("dw_conv3x3_backward", CHANNELS_LAST, (46.0, 46.5, 62.2), None),
    ("dw_conv3x3_backward stride 2", CONTIGUOUS, (17.7, 20.2, 70.9), None),
    ("dw_conv3x3_backward stride 2", CHANNELS_LAST, (18.9, 21.5, 71.2), None),
]
# Instructions of a unit of stride 1 alone, which reads and writes the caller's tensors.
UNITS: list[tuple[torch.memory_format, tuple[float, float, float]]] = [
    (CONTIGUOUS, (48.2, 92.1, 134.0)),
    (CHANNELS_LAST, (84.1, 119.0, 97.0)),
]
# Of warps, in millions: x1.0 on images of 224 x 224, by dtype and batch; the bound, and the goal,
# which in float32 is half of what was executed before, 50.4 and 253.5. Of MANY images one CTA in
# eleven is run, and the others are counted as that one.
MANY = 256
NETWORKS: list[tuple[torch.dtype, int, float, float | None]] = [
    (torch.float16, 1, 3.47, 5),
    (torch.float16, 8, 19.9, 28),
    (torch.float16, MANY, 346.0, 1.4 * MANY),
    (torch.bfloat16, 1, 3.43, 5),
    (torch.bfloat16, MANY, 339.0, 1.4 * MANY),
    (torch.float32, 1, 20.3, 25.2),
    (torch.float32, 8, 120.9, 126.7),
]
# The same on one image, of networks whose units are one launch where they fit.
IN_ONE_LAUNCH: list[tuple[Callable[..., torch.nn.Module], torch.dtype, float]] = [
    (shufflenet_v2_x0_5, torch.float16, 1.86),
    (shufflenet_v2_x1_0, torch.float16, 3.0),
    (shufflenet_v2_x1_0, torch.bfloat16, 2.97),
]
# A bound that is further above than this says too little.
SLACK = 1.06

ROWS = [
    pytest.param(op, order, stage, bounds[k], goal, id=f"{op}-{case_id(order)}-{stage}")
    for op, order, bounds, goal in OPS
    for k, stage in enumerate(STAGES)
]


def check(counted: float, bound: float, goal: float | None) -> None:
    assert counted <= bound, f"{counted:.2f} executed, at most {bound} wanted; the goal is {goal}"
    assert counted * SLACK >= bound, f"only {counted:.2f} executed: lower the bound from {bound}"


def call(name: str, stride: int, shape: Shape, order: torch.memory_format) -> Callable[[], object]:
    """An operator on maps of a shape: that of the result without a stride, or of the gradient of
    the input."""
    n, c, h, w = shape

    def channels(count: int, stride: int = 1) -> Tensor:
        extents = (h + stride - 1) // stride, (w + stride - 1) // stride
        return draw(n, count, *extents, dtype=torch.float16, memory_format=order)

    operator = getattr(operators(), name)
    if name == "cat_shuffle":
        return functools.partial(operator, channels(c // 2), channels(c // 2))
    x = channels(c)
    if name == "cat_shuffle_backward":
        return functools.partial(operator, x)
    maps = [channels(c, stride), x] if name.endswith("backward") else [x]
    k = c // 2 if name.startswith("split") else c
    options = [stride, False] if name.startswith("dw") else []
    return functools.partial(operator, *maps, draw(k, 1, 3, 3), draw(k), draw(k), *options)


@pytest.mark.parametrize(("op", "order", "stage", "bound", "goal"), ROWS)
def test_op(
    op: str, order: torch.memory_format, stage: int, bound: float, goal: float | None
) -> None:
    name, _, stride = op.partition(" stride ")
    n, c, h, w = STAGES[stage]
    if stride and not name.endswith("backward"):
        h, w = (h + 1) // 2, (w + 1) // 2
    executed = instructions(call(name, int(stride or 1), STAGES[stage], order))
    check(LANES * executed / (n * c * h * w), bound, goal)


@pytest.mark.parametrize(("dtype", "batch", "bound", "goal"), NETWORKS)
def test_network(dtype: torch.dtype, batch: int, bound: float, goal: float | None) -> None:
    model = randomize_(shufflenet_v2_x1_0()).eval()
    fused = snv2.fuse(model, backend=NAME).to(dtype)
    x = draw(batch, 3, 224, 224, dtype=dtype)
    operators().sample(11 if batch == MANY else 1)
    try:
        with torch.no_grad():
            executed = instructions(lambda: fused(x))
    finally:
        operators().sample(1)
    check(executed / 1e6, bound, goal)


@pytest.mark.parametrize(("make", "dtype", "bound"), IN_ONE_LAUNCH)
def test_units_in_one_launch(
    make: Callable[..., torch.nn.Module], dtype: torch.dtype, bound: float
) -> None:
    fused = snv2.fuse(randomize_(make()).eval(), backend=NAME).to(dtype)
    x = draw(1, 3, 224, 224, dtype=dtype)
    operators().gpu_tune(stages=2)
    try:
        with torch.no_grad():
            executed = instructions(lambda: fused(x))
    finally:
        operators().gpu_tune()
    check(executed / 1e6, bound, None)


@pytest.mark.parametrize(
    ("order", "stage", "bound"),
    [
        pytest.param(order, stage, bounds[k], id=f"{case_id(order)}-{stage}")
        for order, bounds in UNITS
        for k, stage in enumerate(STAGES)
    ],
)
def test_unit(order: torch.memory_format, stage: int, bound: float) -> None:
    _, channels, *size = STAGES[stage]
    unit = snv2.fuse(snv2.nn.InvertedResidual(channels, channels, 1).eval(), backend=NAME).half()
    x = draw(16, channels, *size, dtype=torch.float16, memory_format=order)
    with torch.no_grad():
        executed = instructions(lambda: unit(x))
    check(LANES * executed / x.numel(), bound, None)
