"""How a recognised module is checked whose units are not the paper's."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from _cases import FP32_BOUND, assert_accurate, draw, run_fused
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.graph.recipe import Recipe
from snv2_kernels.recognition import Recognized
from snv2_kernels.testing import float64_reference, max_error, randomize_

# Whether the kernels of the CPU backend compute all that a recipe can say.
ALL_RUN_FUSED = False
_NOT_PACKED = (
    "activation ", "a branch of windows ", "dilation ", "squeeze-and-excite", "a projection at",
)  # fmt: skip


def is_packed_or_will_be(reason: str | None) -> bool:
    """Whether a recognised module runs fused; or does not yet, for what its units have of their
    own."""
    return reason is None or (not ALL_RUN_FUSED and reason.startswith(_NOT_PACKED))


def assert_fused(fused: nn.Module, model: nn.Module, kind: str, x: Tensor) -> None:
    """Right outputs, by one op where the kernels compute it."""
    assert isinstance(fused, Recognized)
    reason = fused.reason()
    with torch.no_grad():
        if reason is None:
            exact = float64_reference(model)(x)
            assert_accurate(kind, run_fused(fused, x.clone()), model(x.clone()), exact)
        else:
            assert is_packed_or_will_be(reason), reason
            assert max_error(fused(x.clone()), model(x.clone())) < FP32_BOUND


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
