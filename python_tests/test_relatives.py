"""The paper's relatives on each backend, from model to fused model: gates, shortcuts, longer
branches and projections at stride 1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _cases import DTYPES, FP32_BOUND, assert_accurate, draw
from torch import nn

import snv2_kernels as snv2
from snv2_kernels import emulator, models
from snv2_kernels.testing import float64_reference, max_error, randomize_

Make = Callable[[], nn.Module]

# Units of each kind in a model that is one run of them, and a map they take.
UNITS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "plus-se": (
        lambda: models.MegviiUnit(12, 12, 1, 5, nn.Hardswish, models.plus.SELayer), (2, 12, 9, 7)
    ),
    "plus-se-s2": (
        lambda: models.MegviiUnit(12, 20, 2, 7, nn.Hardswish, models.plus.SELayer), (2, 12, 9, 7)
    ),
    "plus-xception": (lambda: models.XceptionUnit(12, 12, 1), (2, 12, 9, 7)),
    "plus-xception-se": (
        lambda: models.XceptionUnit(12, 12, 1, 3, nn.Hardswish, models.plus.SELayer), (2, 12, 9, 7)
    ),
    "star": (lambda: models.StarUnit(12, 12, 1), (2, 12, 9, 7)),
    "star-s2": (lambda: models.StarUnit(12, 20, 2), (2, 12, 9, 7)),
    "large-s1": (lambda: models.LargeUnit(12, 20, 1), (2, 12, 9, 7)),
    "large-se": (lambda: models.LargeUnit(12, 12, 1, True, True), (2, 12, 9, 7)),
    "large-se-s1": (lambda: models.LargeUnit(12, 20, 1, True, True), (2, 12, 9, 7)),
    "large-se-s2": (lambda: models.LargeUnit(12, 20, 2, True, True), (2, 12, 9, 7)),
    "large-residual": (lambda: models.LargeUnit(12, 12, 1, False, True), (2, 12, 9, 7)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.on_triton(4)
def test_units(kernels: str, kind: str, dtype: torch.dtype) -> None:
    make, shape = UNITS[kind]
    model = randomize_(nn.Sequential(make())).eval()
    fused = snv2.fuse(model)
    x = draw(*shape, dtype=dtype)
    model, fused = model.to(x), fused.to(x)
    exact = float64_reference(model)(x)
    assert "0: unit: fused" in str(snv2.explain(fused)).splitlines()
    with torch.no_grad():
        emulator.reset_counters()
        assert_accurate("stage", fused(x), model(x), exact, kernels)
    if kernels == "cuda-emulated":
        assert emulator.counters()["launches"] > 0


NETWORKS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "plus": (
        lambda: models.ShuffleNetV2Plus(
            [1, 1, 2, 1], [8, 12, 20, 32, 40, 16], [0, 1, 2, 3, 3]
        ).features,
        (1, 8, 24, 16),
    ),
    "star": (
        lambda: models.ShuffleNetV2([2, 1, 1], [8, 12, 20, 32, 40], 5, models.StarUnit),
        (1, 3, 40, 32),
    ),
    "v2-50": (
        lambda: models.ShuffleNetV2Large([8], [2, 1, 1, 1], [12, 16, 20, 24, 32], 5),
        (1, 3, 40, 32),
    ),
    "SE-v2-164": (
        lambda: models.ShuffleNetV2Large([8, 8], [2, 1, 1, 2], [12, 16, 20, 24, 16], 5, True, True),
        (1, 3, 40, 32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.on_triton(2)
def test_networks(kernels: str, name: str) -> None:
    make, shape = NETWORKS[name]
    model = randomize_(make()).eval()
    x = draw(*shape)
    fused = snv2.fuse(model).to(x)
    emulator.reset_counters()
    with torch.no_grad():
        assert max_error(fused(x), model.to(x)(x)) < FP32_BOUND
    if kernels == "cuda-emulated":
        assert emulator.counters()["launches"] > 3
