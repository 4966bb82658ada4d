"""A recognised module that changes computes what its own forward then does."""

from __future__ import annotations

import copy
import enum
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases import FP32_BOUND, assert_close, draw, runs_fused
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.testing import max_error, randomize_


class Unit(nn.Module):
    """A unit of eight channels whose activation depends on an attribute."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()

        def layer(kernel: int, groups: int) -> nn.Sequential:
            conv = nn.Conv2d(4, 4, kernel, 1, kernel // 2, groups=groups, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(4))

        self.value = value
        self.pw1, self.dw, self.pw2 = layer(1, 1), layer(3, 4), layer(1, 1)

    def name(self) -> str:
        return "relu"

    def activate(self, x: Tensor) -> Tensor:
        return F.silu(x) if self.name() == "silu" else F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        b = self.activate(self.pw2(self.dw(self.activate(self.pw1(b)))))
        return torch.cat([a, b], 1).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)


class Mode(enum.Enum):
    RELU = 1
    SILU = 2


class ByEnum(Unit):
    def name(self) -> str:
        return str(self.value.name.lower())


class ByNamespace(Unit):
    def name(self) -> str:
        return str(self.value.act)


class ByDict(Unit):
    def name(self) -> str:
        return str(self.value["act"])


class ByDtype(Unit):
    def name(self) -> str:
        return "silu" if self.value is torch.half else "relu"


class ByFunctions(Unit):
    def activate(self, x: Tensor) -> Tensor:
        return self.value[0](x)  # type: ignore[no-any-return]


CHANGES: dict[str, tuple[type[Unit], Any, Any]] = {
    "enum": (ByEnum, Mode.RELU, Mode.SILU),
    "namespace": (
        ByNamespace,
        types.SimpleNamespace(act="relu"),
        types.SimpleNamespace(act="silu"),
    ),
    "dict": (ByDict, {"act": "relu"}, {"act": "silu"}),
    "dtype": (ByDtype, torch.float, torch.half),
    "functions": (ByFunctions, [F.relu], [F.silu]),
}


def fused_and_input(model: nn.Module) -> tuple[Any, Tensor]:
    """A fused module that has run, and its input."""
    fused, x = snv2.fuse(randomize_(model).eval()), draw(2, 8, 5, 6)
    assert runs_fused(fused, x)
    return fused, x


def assert_as_its_own_forward(fused: Any, x: Tensor) -> None:
    with torch.no_grad():
        fused(x)  # recognises it again
    assert runs_fused(fused, x)
    with torch.no_grad():
        assert max_error(fused(x), type(fused)._original.forward(fused, x)) < FP32_BOUND


@pytest.mark.parametrize("change", CHANGES)
def test_attribute_of_another_value(change: str) -> None:
    cls, before, after = CHANGES[change]
    fused, x = fused_and_input(cls(before))
    fused.value = after
    assert_as_its_own_forward(fused, x)


def test_attribute_changed_in_place_shows_after_eval() -> None:
    fused, x = fused_and_input(ByDict({"act": "relu"}))
    fused.value["act"] = "silu"
    fused.eval()
    assert_as_its_own_forward(fused, x)


def test_attribute_that_cannot_be_compared_leaves_the_module_plain() -> None:
    fused = snv2.fuse(randomize_(Unit(iter([1]))).eval())
    assert not runs_fused(fused, draw(2, 8, 5, 6))
    assert "value is a list_iterator" in str(snv2.explain(fused))


def test_method_of_the_class_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, x = fused_and_input(Unit())
    monkeypatch.setattr(Unit, "name", lambda self: "silu")
    assert_as_its_own_forward(fused, x)


class Two(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


def test_tied_weights_that_part() -> None:
    model = Two(Unit(), Unit())
    model.second.dw[0].weight = model.first.dw[0].weight  # type: ignore[index, union-attr]
    fused, x = fused_and_input(model)
    state = {k: torch.rand_like(v) + 0.5 for k, v in fused.state_dict().items() if v.dim()}
    fused.load_state_dict(state, strict=False, assign=True)
    assert_as_its_own_forward(fused, x)


def test_module_in_two_places_of_which_one_is_replaced() -> None:
    unit = Unit()
    fused, x = fused_and_input(Two(unit, unit))
    fused.second = randomize_(copy.deepcopy(fused.second), 5)
    assert_as_its_own_forward(fused, x)


def _compiled(model: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    return [
        torch.compile(snv2.fuse(model), backend="eager"),
        torch.compile(model, backend="snv2", options={"inner": "eager"}),
    ]


def test_statistics_move_under_torch_compile() -> None:
    model, x = randomize_(snv2.models.InvertedResidual(8, 8, 1)).eval(), draw(2, 8, 5, 6)
    for compiled in _compiled(model):
        with torch.no_grad():
            compiled(x)
            model.train()
            model(3 * x + 2)
            model.eval()
            assert max_error(compiled(x), model(x)) < FP32_BOUND


def test_eval_of_a_part_under_torch_compile() -> None:
    model = randomize_(snv2.models.ShuffleNetV2([1, 1, 1], [4, 8, 12, 16, 20], 3)).eval()
    fused, x = snv2.fuse(model), draw(1, 3, 33, 33)
    compiled = torch.compile(fused, backend="eager")
    with torch.no_grad():
        compiled(x)
        fused.stage3[0].branch2[0].weight.data.mul_(2)
        fused.stage3.eval()
        assert max_error(compiled(x), model(x)) < FP32_BOUND
    assert_close(fused, model, x)
