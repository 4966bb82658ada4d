"""fuse() and explain() on whole networks."""

from __future__ import annotations

import copy
import itertools
import types
from typing import Any

import pytest
import torch
from _cases import (
    FORMATS,
    FP32_BOUND,
    MAPS,
    WIDTHS,
    assert_accurate,
    assert_close,
    case_id,
    draw,
    each_library,
    in_turn,
    network,
    run_fused,
    runs_fused,
    small_network,
    threads,
)
from conftest import instruction_set
from torch import nn

import snv2_kernels as snv2
from snv2_kernels import _native
from snv2_kernels.testing import float64_reference, max_error, randomize_

SIZES = [(224, 224), (160, 160), (97, 131), (32, 32)]

each_width = pytest.mark.parametrize("width", WIDTHS)


# Networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "size", "library"), in_turn(WIDTHS, SIZES, ["torchvision", "snv2"]), ids=case_id
)
def test_network(
    torchvision: types.ModuleType, width: str, size: tuple[int, int], library: str
) -> None:
    model = network(library, width)
    fused = snv2.fuse(model)
    for batch in (0, 1, 3):
        x = draw(batch, 3, *size)
        assert runs_fused(fused, x)
        assert_close(fused, model, x)
        assert fused(x).shape == (batch, 1000)


@each_library
@each_width
def test_state_is_the_models(torchvision: types.ModuleType, width: str, library: str) -> None:
    model = network(library, width)
    state, expected = snv2.fuse(model).state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(state[key] is not None and torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.parametrize(("width", "memory_format"), in_turn(WIDTHS, FORMATS), ids=case_id)
def test_network_on_each_instruction_set(
    isa: str, width: str, memory_format: torch.memory_format
) -> None:
    model = network("snv2", width)
    x = draw(2, 3, 97, 131, memory_format=memory_format)
    with torch.no_grad():
        eager, exact = model(x), float64_reference(model)(x)
        out = snv2.fuse(model)(x)
    assert_accurate("network", out, eager, exact)
    assert max_error(out, eager) < FP32_BOUND


@pytest.mark.parametrize(
    ("width", "size", "dtype", "memory_format"),
    in_turn(WIDTHS, [(160, 160), (33, 70)], MAPS[2:]),
    ids=case_id,
)
def test_network_in_low_precision(
    width: str, size: tuple[int, int], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    model = copy.deepcopy(network("snv2", width)).to(dtype)
    x = draw(2, 3, *size, dtype=dtype, memory_format=memory_format)
    with torch.no_grad():
        eager, out = model(x), snv2.fuse(model)(x)
    assert_accurate("network", out, eager, float64_reference(model)(x))


def test_another_instruction_set_packs_again() -> None:
    """Those that multiply bfloat16 and those that do not want other weights."""
    model = small_network().to(torch.bfloat16)
    fused = snv2.fuse(model)
    x = draw(2, 3, 37, 45, dtype=torch.bfloat16)
    with torch.no_grad():
        eager, exact = model(x), float64_reference(model)(x)
        for name in 2 * _native.available_cpu_isas():
            with instruction_set(name):
                out = run_fused(fused, x)
                assert_accurate("network", out, eager, exact)
                assert torch.equal(snv2.Engine(model, tuple(x.shape))(x), out)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("batch", [1, 5])
def test_threads(batch: int, count: int) -> None:
    model = network("snv2", "x0_5")
    x = draw(batch, 3, 97, 131)
    with threads(count):
        assert_close(snv2.fuse(model), model, x)


def test_small_images() -> None:
    model = small_network()
    fused = snv2.fuse(model)
    for height, width in itertools.product((1, 2, 3, 5, 8, 33), (1, 2, 4, 7, 32)):
        assert_close(fused, model, draw(2, 3, height, width))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(float("nan"), torch.float32), (float("inf"), torch.float32), (float("nan"), torch.bfloat16)],
    ids=str,
)
def test_special_values_stay_in_their_image(isa: str, value: float, dtype: torch.dtype) -> None:
    model = small_network().to(dtype)
    fused = snv2.fuse(model)
    clean = draw(3, 3, 40, 52, dtype=dtype)
    dirty = clean.clone()
    dirty[1, 2, 17, 30] = value
    with torch.no_grad():
        out, expected = fused(dirty), model(dirty)
        assert not expected[1].isfinite().any()
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out[0::2], fused(clean)[0::2])


# fuse() and explain() themselves ---------------------------------------------------------------


def test_fuse_twice() -> None:
    model = small_network()
    once = snv2.fuse(model)
    twice = snv2.fuse(once)
    assert twice is not once
    x = draw(2, 3, 65, 49)
    assert runs_fused(twice, x)
    assert torch.equal(twice(x), once(x))
    assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
    assert str(snv2.explain(once)) == str(snv2.explain(model))


def test_fuse_of_a_packed_module_packs_for_itself() -> None:
    once = snv2.fuse(small_network())
    x = draw(2, 3, 65, 49)
    with torch.no_grad():
        before = once(x)
        twice = snv2.fuse(once)
        twice.fc.weight = nn.Parameter(2 * once.fc.weight)  # its own, unlike the memory behind
        assert max_error(twice(x), before) > 0.1
        assert torch.equal(once(x), before)


def test_model_without_units_is_copied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    fused = snv2.fuse(model)
    assert fused is not model
    assert_close(fused, model, draw(1, 3, 9, 9))
    assert str(snv2.explain(model)) == "no ShuffleNet V2 parts found"


def test_explain_of_a_unit_that_the_kernels_do_not_cover() -> None:
    strided = randomize_(snv2.models.InvertedResidual(8, 8, 3)).eval()
    reason = "not fused: depthwise with stride (3, 3)"
    assert str(snv2.explain(strided)) == f"(model): InvertedResidual: {reason}"
    assert_close(snv2.fuse(strided), strided, draw(2, 8, 9, 11))
    double = snv2.models.InvertedResidual(8, 8, 1).double()
    assert str(snv2.explain(double)) == "(model): unit: not fused: torch.float64 runs the reference"


def test_explain_leaves_the_model_as_it_was() -> None:
    model = small_network().train()
    snv2.explain(model)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("function", [snv2.fuse, snv2.explain])
@pytest.mark.parametrize("model", [3, "model", None, torch.ones(3), nn.Linear], ids=str)
def test_not_a_module(function: Any, model: object) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got"):
        function(model)


def test_nothing_is_recorded_of_units_known_by_their_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(*_: object) -> None:
        pytest.fail("a unit was recorded, which takes a second for a network")

    monkeypatch.setattr("snv2_kernels.recognition.record", record)
    fused = snv2.fuse(snv2.models.shufflenet_v2_x0_5())
    snv2.fuse(fused)
    assert isinstance(fused.stage2[0], snv2.nn.InvertedResidual)


class Listed(nn.Module):
    """Modules that its forward finds elsewhere than in its registry."""

    def __init__(self) -> None:
        super().__init__()
        make = snv2.models.InvertedResidual
        self.unit, self.pool, self.outside = make(8, 8, 1), nn.MaxPool2d(2), (make(8, 8, 1),)
        self.blocks = [self.unit, (self.pool, {"again": self.unit})]
        self.run = self.unit.forward
        self.names = ["unit"]
        self.itself: list[object] = []
        self.itself.append(self.itself)


def test_modules_in_attributes_are_the_fused_ones() -> None:
    model = Listed()
    blocks, run = list(model.blocks), model.run
    fused = snv2.fuse(model)
    unit, (pool, others) = fused.blocks
    assert unit is others["again"] is fused.run.__self__ is fused.unit
    assert pool is fused.pool is not model.pool
    assert isinstance(unit, snv2.nn.InvertedResidual)
    # What holds none of its modules is shared.
    assert fused.outside is model.outside
    assert fused.names is model.names
    assert fused.itself is model.itself
    assert (model.blocks, model.run) == (blocks, run)
