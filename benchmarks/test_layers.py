"""Micro-benchmarks of the ops, units and stages of x1.0 at 224 x 224, batch 1:

    pytest benchmarks --benchmark-group-by=group

Each group is one layer; its members are the plain PyTorch formula and the kernels. An output is
checked against float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.testing import float64_reference, max_error, randomize_

STAGES = {"stage2": (116, 28), "stage3": (232, 14), "stage4": (464, 7)}  # channels, extent
BOUND = 1e-5


def _layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    model = randomize_(snv2.models.shufflenet_v2_x1_0())
    layers: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}
    channels, extent = 24, 56
    for name, (width, out_extent) in STAGES.items():
        stage = getattr(model, name)
        layers[f"{name}: split_dw_cat_shuffle"] = (
            randomize_(snv2.nn.SplitDepthwiseShuffle(width)),
            (1, width, out_extent, out_extent),
        )
        layers[f"{name}: unit, stride 2"] = (stage[0], (1, channels, extent, extent))
        layers[f"{name}: unit, stride 1"] = (stage[1], (1, width, out_extent, out_extent))
        layers[f"{name}: all units"] = (stage, (1, channels, extent, extent))
        channels, extent = width, out_extent
    layers["network"] = (model, (1, 3, 224, 224))
    return layers


LAYERS = _layers()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(benchmark: Any, layer: str, backend: str) -> None:
    plain, shape = LAYERS[layer]
    plain.eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    module: Callable[[Tensor], Tensor] = snv2.fuse(plain)
    benchmark.group = layer
    with torch.inference_mode(), snv2.use_backend(backend):
        assert max_error(module(x), float64_reference(plain)(x)) < BOUND
        benchmark(module, x)
