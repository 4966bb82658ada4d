"""fuse() and explain() on units with other activations, windows, gates, branches and norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _cases import drawn
from _deviations import gates_of, layers_of, recognized
from _projects import ACTIVATIONS, GATES, NORMS, PROJECTS, General
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


@pytest.mark.parametrize("project", PROJECTS)
def test_project(project: str) -> None:
    make, channels = PROJECTS[project]
    model = make()
    steps = recognized(model, channels, "stage")
    assert [step[0] for step in steps] == ["import", *["unit"] * len(model)]
    assert "not fused: not" not in str(snv2_explain(model))


def snv2_explain(model: nn.Module) -> Any:
    import snv2_kernels as snv2

    return snv2.explain(model)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation(act: str) -> None:
    """After every layer of a branch and of a projection."""
    kind, _ = ACTIVATIONS[act]
    _, unit = recognized(General(10, 16, 2, act=act, dw_act=act), 10, size=5)
    layers = [*layers_of(unit), *unit[6]]
    assert [layer[2] for layer in layers] == [kind] * 5
    assert all(("a" in layer[0]) == (kind == "prelu") for layer in layers)
