"""How a recognised module is checked whose units are not the paper's."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from _cases import assert_accurate, draw, run_fused
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.graph.recipe import Recipe
from snv2_kernels.nn.recognized import Recognized
from snv2_kernels.testing import float64_reference, max_error, randomize_


def assert_fused(fused: nn.Module, model: nn.Module, kind: str, x: Tensor) -> None:
    """Right outputs, by one op."""
    assert isinstance(fused, Recognized)
    assert fused.reason() is None
    with torch.no_grad():
        exact = float64_reference(model)(x)
        assert_accurate(kind, run_fused(fused, x.clone()), model(x.clone()), exact)


def recognized(model: nn.Module, channels: int, kind: str = "unit", size: int = 9) -> list[Any]:
    """The steps of the recipe of a module that is recognised as a whole, and right."""
    randomize_(model).eval()
    x = draw(2, channels, size, size + 2)
    fused = snv2.fuse(model)
    assert isinstance(fused, Recognized), str(snv2.explain(model))
    recognition = fused._recognition
    assert recognition is not None
    assert recognition.kind == kind
    assert_fused(fused, model, kind, x)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        plain = Recipe.read(recognition.recipe).plain(x.double(), recognition.state(exact))
        assert max_error(plain, exact(x.double())) < 1e-12
    steps: list[Any] = json.loads(recognition.recipe)
    return steps


def layers_of(unit: list[Any]) -> list[Any]:
    """Written layers of a unit's step, without gates."""
    return [part for part in unit[2] if not isinstance(part[0], list)]


def gates_of(unit: list[Any]) -> list[Any]:
    return [part for part in unit[2] if isinstance(part[0], list)]
