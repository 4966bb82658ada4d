"""Drawn units and networks of 1 to 12 channels, on maps of odd extents down to one pixel: where
kernels have more rows, tiles and vectors than there are channels."""

from __future__ import annotations

from random import Random

import pytest
import torch
from _cases import DTYPES, draw, largest_error
from _small_networks import BRANCHES, SmallNetwork, drawn_network, drawn_unit

from snv2_kernels.ops import run_plan
from snv2_kernels.packing.units import Unsupported

# Each backend's; a draw takes it a millisecond, a few dozen, or as many hundreds.
DRAWS = {"cpu": 36, "cuda-emulated": 16, "cuda-ptx": 8, "cuda": 48, "triton": 4}
_IMAGES = 64  # one image of one pixel may be next to zero, or hit an error of zero

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def check(network: SmallNetwork, backend: str, dtype: torch.dtype, random: Random) -> bool:
    """Whether the backend has kernels for it, which then are as right as eager PyTorch: errors are
    measured by what the network makes of more images than the few that it is given."""
    n, h, w = random.randint(1, 3), random.choice([1, 1, 2, 3, 5, 7]), random.choice([1, 2, 3, 5])
    if network.kind == "network":
        h, w = 3 * h, 4 * w + 1
    try:
        plan = network.plan(backend, dtype)
    except Unsupported:
        return False
    order = random.choice([torch.contiguous_format, torch.channels_last])
    x = draw(_IMAGES, network.channels, h, w, dtype=dtype, memory_format=order)
    with torch.no_grad():
        made = run_plan(x[:n], plan, backend)
    results = made if isinstance(made, tuple) else (made,)
    eps = torch.finfo(dtype).eps
    bound = largest_error(network.kind, dtype, backend) * eps
    for out, exact, eager in zip(
        results, network.formula(x.double()), network.formula(x), strict=True
    ):
        assert (out.dtype, out.shape) == (dtype, (n, *exact.shape[1:]))
        scale = exact.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        error = float((out.double() - exact[:n]).abs().max() / scale)
        of_eager = float((eager.double() - exact).abs().max() / scale)
        message = f"{error / eps:.2f} eps, eager {of_eager / eps:.2f} eps"
        assert error <= min(1.5 * of_eager + eps, bound), message
    return True


@each_dtype
def test_drawn_small_units(backend: str, dtype: torch.dtype) -> None:
    """Each kind of branch in turn."""
    ran = 0
    for seed in range(DRAWS[backend]):
        random = Random(seed)
        unit = drawn_unit(random, BRANCHES[seed % len(BRANCHES)])
        try:
            ran += check(unit, backend, dtype, random)
        except (AssertionError, RuntimeError) as error:
            pytest.fail(f"unit {seed}: {error}")
    assert ran > DRAWS[backend] * 2 / 3


@each_dtype
def test_drawn_small_networks(backend: str, dtype: torch.dtype) -> None:
    """With a stem, a head, both or none."""
    ran = 0
    for seed in range(DRAWS[backend] // 2):
        random = Random(1000 + seed)
        try:
            ran += check(drawn_network(random), backend, dtype, random)
        except (AssertionError, RuntimeError) as error:
            pytest.fail(f"network {1000 + seed}: {error}")
    assert ran > DRAWS[backend] / 4
