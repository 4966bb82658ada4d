"""Structures of module trees: equal for equal states, different for what a forward could see."""

from __future__ import annotations

import collections
import dataclasses
import decimal
import enum
import functools
import gc
import io
import logging
import random
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from snv2_kernels.nn.structure import Incomparable, structure


class Mode(enum.Enum):
    RELU = 1
    SILU = 2


@dataclasses.dataclass(slots=True)
class Slotted:
    value: int


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


class Holder(nn.Module):
    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.value = value


def closure(value: Any) -> Callable[[], Any]:
    return lambda: value


# Values, each beside one that it must not be mistaken for.
PAIRS: dict[str, tuple[Any, Any]] = {
    "bool": (1, True),
    "float": (1, 1.0),
    "zero": (0.0, -0.0),
    "nan": (float("nan"), 1.0),
    "list": ([1, [2]], [1, [3]]),
    "container": ([1], (1,)),
    "order": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "set": ({1}, {2}),
    "deque": (collections.deque([1]), collections.deque([2])),
    "enum": (Mode.RELU, Mode.SILU),
    "dtype": (torch.half, torch.float),
    "namespace": (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2)),
    "object": ([Plain([1])], [Plain([2])]),
    "slots": (Slotted(1), Slotted(2)),
    "function": (torch.relu, torch.sigmoid),
    "closure": (closure(1), closure(2)),
    "partial": (functools.partial(round, ndigits=1), functools.partial(round, ndigits=2)),
    "bound": ({"a": 1}.get, {"a": 2}.get),
    "array": (np.arange(3), np.arange(1, 4)),
    "module": ([nn.LeakyReLU(0.1)], [nn.LeakyReLU(0.2)]),
}


@pytest.mark.parametrize(("value", "other"), PAIRS.values(), ids=PAIRS)
def test_values(value: Any, other: Any) -> None:
    module = Holder(value)
    before = structure(module)
    assert structure(module) == before
    module.value = other
    assert structure(module) != before
    module.value = value
    assert structure(module) == before


def test_change_inside_a_value() -> None:
    module = Holder({"stages": [Plain({1, 2})]})
    before = structure(module)
    module.value["stages"][0].value.add(3)
    assert structure(module) != before


@pytest.mark.parametrize(
    "value",
    [random.Random(1), torch.Generator(), iter([1]), io.StringIO(), np.zeros(1 << 16)],
    ids=lambda value: type(value).__name__,
)
def test_values_that_cannot_be_compared(value: Any) -> None:
    with pytest.raises(
        Incomparable, match=rf"child\.value is an? .*{type(value).__name__[-5:]}|bytes"
    ):
        structure(nn.ModuleDict({"child": Holder([value])}))


def test_values_that_hold_themselves_or_what_no_forward_reads() -> None:
    loop: list[Any] = [threading.Lock(), logging.getLogger("x")]
    loop.append(loop)
    module = Holder(loop)
    assert structure(module) == structure(module)


def test_which_names_stand_for_one_tensor_or_module() -> None:
    states = []
    module = Holder()
    states.append(structure(module))
    module.b.weight = module.a.weight
    states.append(structure(module))
    module.b = module.a
    states.append(structure(module))
    assert len(set(states)) == 3


def test_methods_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Holder()
    before = structure(module)
    with monkeypatch.context() as patch:
        patch.setattr(Holder, "helper", lambda self: 1, raising=False)
        assert structure(module) != before
    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, "forward", lambda self, x: x)
        assert structure(module) != before
    with monkeypatch.context() as patch:
        states = set()
        for value in (decimal.Decimal(1), decimal.Decimal(2)):  # which cannot be looked into
            patch.setattr(Holder, "value_of_all", value, raising=False)
            states.add(structure(module))
        assert len(states) == 2
    assert structure(module) == before


def test_structure_does_not_keep_the_module_alive() -> None:
    module = Holder()
    module.value = [module, module.a, module.forward, functools.partial(print, module)]
    kept = structure(module)
    dead = weakref.ref(module)
    del module
    gc.collect()
    assert dead() is None
    assert kept
