"""Instructions of the ops' Triton kernels, in the PTX and the SASS that Triton makes for sm_90,
against the one table of bounds. Counts of what is compiled, not timings and not of a run: they
depend on Triton, which is 3.9 here."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.ci]

COUNTER = Path(__file__).with_name("_triton_launches.py")
VERSION = "3.9."

# Of a thread for each element of the result, float16: an op or a gradient, a memory format, bounds
# of PTX and of SASS for the maps of stages 2, 3 and 4, and the goal, where there is one. Half of
# the elements of the split are only copied. Of a gradient's 18 multiply-adds for each element, and
# nine more where the ReLU's mask is computed again, nothing can be left out.
OPS: list[tuple[str, str, list[tuple[float, float]], float | None]] = [
    ("cat_shuffle", "contiguous", [(2.5, 2.3), (4.6, 4.7), (8.0, 4.8)], 6),
    ("cat_shuffle", "channels_last", [(4.0, 3.3), (4.1, 3.3), (4.1, 3.3)], 5),
    ("split_dw_cat_shuffle", "contiguous", [(12.7, 11.1), (15.0, 13.4), (25.0, 21.1)], 24),
    ("split_dw_cat_shuffle", "channels_last", [(12.8, 10.9), (16.4, 14.4), (15.7, 13.2)], 20),
    ("dw_conv3x3", "contiguous", [(21.6, 19.4), (25.9, 22.9), (42.6, 38.2)], 24),
    ("dw_conv3x3", "channels_last", [(20.5, 19.2), (20.5, 19.2), (17.3, 15.5)], 20),
    ("dw_conv3x3:2", "contiguous", [(33.7, 27.8), (53.4, 47.4), (55.4, 49.3)], None),
    ("dw_conv3x3:2", "channels_last", [(38.3, 33.9), (42.2, 36.5), (40.5, 34.7)], None),
    ("split_dw_cat_shuffle_backward", "contiguous", [(27.3, 25.3), (27.3, 25.1), (35.3, 30.0)], 24),
    (
        "split_dw_cat_shuffle_backward",
        "channels_last",
        [(33.9, 28.3), (30.2, 25.0), (21.2, 18.5)],
        20,
    ),
    ("dw_conv3x3_backward", "contiguous", [(33.2, 30.4), (34.5, 31.1), (44.1, 36.6)], 24),
    ("dw_conv3x3_backward", "channels_last", [(37.2, 33.1), (34.6, 30.0), (27.3, 23.3)], 20),
    ("dw_conv3x3_backward:relu", "contiguous", [(50.9, 48.0), (49.1, 46.1), (61.5, 53.3)], None),
    ("dw_conv3x3_backward:relu", "channels_last", [(62.6, 55.6), (54.6, 45.8), (38.3, 34.4)], None),
    ("dw_conv3x3_backward:2", "contiguous", [(11.9, 9.9), (15.4, 12.9), (21.5, 16.8)], None),
    ("dw_conv3x3_backward:2", "channels_last", [(13.8, 10.8), (18.1, 15.1), (19.6, 16.2)], None),
    ("cat_shuffle_backward", "contiguous", [(2.4, 2.0), (4.2, 4.1), (7.9, 4.6)], 6),
    ("cat_shuffle_backward", "channels_last", [(3.9, 3.1), (3.9, 3.2), (3.9, 3.2)], 5),
]
# A bound that is further above than this says too little.
SLACK = 1.06

ROWS = [
    pytest.param(op, order, stage, *bounds[stage - 2], goal, id=f"{op}-{order}-{stage}")
    for op, order, bounds, goal in OPS
    for stage in (2, 3, 4)
]


@functools.cache
def counts() -> dict[str, Any]:
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith(VERSION):
        pytest.skip(f"the bounds are for Triton {VERSION}x, not {triton.__version__}")
    if not Path(str(triton.knobs.nvidia.cuobjdump.path)).exists():
        pytest.skip("Triton has no cuobjdump")
    names = [f"{op},{order},{stage}" for op, order, _, _ in OPS for stage in (2, 3, 4)]
    out = subprocess.run(
        [sys.executable, COUNTER, *names], env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True, text=True, check=False, timeout=570,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    return {line["name"]: line for line in map(json.loads, out.stdout.splitlines())}


@pytest.mark.parametrize(("op", "order", "stage", "ptx", "sass", "goal"), ROWS)
def test_op(op: str, order: str, stage: int, ptx: float, sass: float, goal: float | None) -> None:
    found = counts()[f"{op} {order} {stage}"]
    for name, bound in (("ptx", ptx), ("sass", sass)):
        n = found[name]
        assert n <= bound, f"{n:.2f} of {name}, at most {bound} wanted; the goal is {goal}"
        assert n * SLACK >= bound, f"only {n:.2f} of {name}: lower the bound from {bound}"


def test_accesses_are_vectors() -> None:
    """Of eight bytes or more where rows begin at multiples of them."""
    found = counts()
    (moved,) = found["cat_shuffle contiguous 2"]["accesses"]
    assert moved == {"ld": ["v4.b32"], "st": ["v4.b32"]}
    (split,) = found["split_dw_cat_shuffle contiguous 2"]["accesses"]
    assert split["st"] == ["v2.b32"]
    alone = [each for each in found.values() if len(each["kernels"]) == 1]
    assert all(max(each["shared"]) == 0 for each in alone)
