"""What a forward does besides computing, and what it looks up outside its module."""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import io
import logging
import os
import pickle
import random
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases import draw, runs_fused, small_network, unit_pair
from test_recognition_conditions import SIZE, Unit, explained, same
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import snv2_kernels as snv2

# Effects --------------------------------------------------------------------------------------

SEEN: list[Any] = []
NAMED: dict[str, Any] = {}
COUNT = 0
log = logging.getLogger("forward")


class Meter:
    """An object that counts."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.count = 0

    def update(self, value: Any) -> None:
        self.count += 1
        self.values.append(value)


def count_globally(unit: Unit, x: Tensor) -> None:
    global COUNT  # noqa: PLW0603
    COUNT += 1


def count_in_class(unit: Unit, x: Tensor) -> None:
    type(unit).counted = getattr(type(unit), "counted", 0) + 1


def count_enclosed() -> Callable[[Unit, Tensor], None]:
    seen = 0

    def count(unit: Unit, x: Tensor) -> None:
        nonlocal seen
        seen += 1

    return count


def keep_default(unit: Unit, x: Tensor, kept: list[Tensor] = []) -> None:  # noqa: B006
    kept.append(x)


# Attributes of the unit, what its forward does, and the effect that is named.
EFFECTS: dict[str, tuple[dict[str, Any], Callable[[Unit, Tensor], Any], str]] = {
    "list": ({"kept": []}, lambda unit, x: unit.kept.append(x), "changes 'kept'"),
    "dict": ({"kept": {}}, lambda unit, x: unit.kept.update(x=x), "sets 'kept.x'"),
    "set": ({"kept": set()}, lambda unit, x: unit.kept.add(x.dim()), "changes 'kept'"),
    "deque": (
        {"kept": collections.deque([0], 1)}, lambda unit, x: unit.kept.append(x), "changes 'kept'"
    ),
    "nested": ({"kept": ({"x": [[]]},)}, lambda unit, x: unit.kept[0]["x"][0].append(x), "changes"),
    "object": ({"kept": Meter()}, lambda unit, x: unit.kept.update(x), "sets 'kept.count'"),
    "namespace": (
        {"kept": types.SimpleNamespace(x=0)}, lambda unit, x: setattr(unit.kept, "x", x), "sets"
    ),
    "mode": ({}, lambda unit, x: unit.train() and None, "sets 'training'"),
    "global list": ({}, lambda unit, x: SEEN.append(x), "changes 'SEEN'"),
    "global dict": ({}, lambda unit, x: NAMED.update(x=x), "sets 'NAMED.x'"),
    "global": ({}, count_globally, "sets 'COUNT'"),
    "class": ({}, count_in_class, "sets 'Unit.counted'"),
    "enclosed": ({}, count_enclosed(), "sets 'seen'"),
    "default": ({}, keep_default, "changes 'keep_default'"),
    "attribute of a tensor": ({}, lambda unit, x: setattr(x, "seen", 1), "sets attributes of ten"),
    "print": ({}, lambda unit, x: print(x.shape), "calls print"),
    "log": ({}, lambda unit, x: log.debug("here"), "calls logging."),
    "file": (
        {"kept": io.StringIO()}, lambda unit, x: unit.kept.write("") or None, "calls StringIO.write"
    ),
    "random number": ({}, lambda unit, x: random.random() and None, "calls Random.random"),
    "time": ({}, lambda unit, x: time.perf_counter() and None, "calls perf_counter"),
    "environment": ({}, lambda unit, x: os.environ.get("") and None, "calls os."),
    "seed": ({}, lambda unit, x: torch.manual_seed(0) and None, "calls "),
    "threads": ({}, lambda unit, x: torch.set_num_threads(1), "calls set_num_threads"),
    "strides": ({}, lambda unit, x: 2 * x if x.stride(3) == 2 else x, "depends on stride"),
    "version": ({}, lambda unit, x: 2 * x if x._version == 1 else x, "depends on _version"),
}  # fmt: skip


def left_behind(model: Unit) -> str:
    """All that effects could leave but what is written."""
    kept = vars(model).get("kept")
    kept = vars(kept) if isinstance(kept, Meter | types.SimpleNamespace) else kept
    kept = kept.getvalue() if isinstance(kept, io.StringIO) else kept
    return repr((kept, SEEN, NAMED, COUNT, vars(Unit).get("counted"), keep_default.__defaults__))


@pytest.mark.parametrize("effect", EFFECTS)
def test_forward_with_an_effect_stays_plain(effect: str) -> None:
    attributes, does, reason = EFFECTS[effect]
    model = Unit(does)
    model.__dict__.update(attributes)
    before = left_behind(model)
    fused = snv2.fuse(model)
    assert left_behind(model) == before
    assert explained(model).startswith(f"(model): Unit: not fused: its forward {reason}")
    with contextlib.redirect_stdout(None):
        assert not runs_fused(fused, draw(*SIZE))


def test_effect_of_a_garbage_collection_is_not_the_forwards() -> None:
    """A callback or a finalizer may run anywhere."""

    def on_collection(phase: str, info: Any) -> None:
        time.perf_counter()

    before = gc.get_threshold()
    gc.callbacks.append(on_collection)
    gc.set_threshold(1)
    try:
        fused = snv2.fuse(Unit())
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(on_collection)
    assert gc.isenabled()
    assert runs_fused(fused, draw(*SIZE))


def test_cache_does_not_keep_what_was_recorded() -> None:
    @functools.lru_cache(maxsize=4)
    def table(channels: int) -> Tensor:
        return torch.arange(channels)

    unit = Unit(lambda unit, x: x[:, table(16)])
    snv2.fuse(unit)
    assert not isinstance(table(16), FakeTensor)


def test_effects_where_gradients_are_on() -> None:
    """In conditions that a forward asks about it may do more."""
    seen: list[Tensor] = []
    plain = Unit(lambda unit, x: seen.append(x) if torch.is_grad_enabled() else None)
    fused, x = snv2.fuse(plain), draw(*SIZE)
    assert runs_fused(fused, x)
    assert not seen
    fused(x)
    assert len(seen) == 1
    assert seen[0] is x


# What is looked up ----------------------------------------------------------------------------

FACTOR = 1
SETTINGS = types.SimpleNamespace(factor=1)


def scaled(x: Tensor) -> Tensor:
    return x * FACTOR if FACTOR != 1 else x


def by_setting(unit: Unit, x: Tensor) -> Tensor:
    return x * SETTINGS.factor if SETTINGS.factor != 1 else x


def enclosing() -> tuple[Callable[[Unit, Tensor], Tensor], Callable[[int], None]]:
    factor = 1

    def set_factor(value: int) -> None:
        nonlocal factor
        factor = value

    return lambda unit, x: x * factor if factor != 1 else x, set_factor


@pytest.mark.parametrize("kind", ["global", "function", "module's", "enclosing"])
def test_name_that_stands_for_something_else(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read, set_factor = enclosing()
    does: dict[str, Callable[[Unit, Tensor], Tensor]] = {
        "global": lambda unit, x: scaled(x),
        "function": lambda unit, x: scaled(x),
        "module's": lambda unit, x: F.relu(x),
        "enclosing": read,
    }
    plain, x = Unit(does[kind]), draw(*SIZE).abs()
    if kind == "module's":
        monkeypatch.setattr(F, "relu", lambda x, inplace=False: x)
    fused = snv2.fuse(plain)
    with torch.no_grad():
        same(fused, plain, x)
        assert runs_fused(fused, x)
        if kind == "global":
            monkeypatch.setitem(globals(), "FACTOR", 2)
        elif kind == "function":
            monkeypatch.setitem(globals(), "scaled", lambda x: x * 2)
        elif kind == "module's":
            monkeypatch.setattr(F, "relu", lambda x, inplace=False: -x)
        else:
            set_factor(2)
        same(fused, plain, x)
        monkeypatch.undo()
        set_factor(1)
        same(fused, plain, x)


class Config:
    factor = 1


def test_second_model_where_a_class_says_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that reads an attribute of a class is recorded again for the next model."""
    x = draw(*SIZE)
    for factor in (1, 2):
        monkeypatch.setattr(Config, "factor", factor)
        plain = Unit(lambda unit, x: x * 2 if Config.factor == 2 else x)
        with torch.no_grad():
            same(snv2.fuse(plain), plain, x)


def test_module_that_a_forward_imports_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported_by_a_forward.py").write_text("FACTOR = 2\ndef f():\n    return FACTOR\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def imports(unit: Unit, x: Tensor) -> Tensor:
        from imported_by_a_forward import FACTOR  # type: ignore[import-not-found]

        return x * FACTOR  # type: ignore[no-any-return]

    plain, x = Unit(imports), draw(*SIZE)
    fused = snv2.fuse(plain)
    with torch.no_grad():
        same(fused, plain, x)
    assert sys.modules.pop("imported_by_a_forward").f() == 2


def test_names_of_another_process() -> None:
    """A file may be read where the code has been changed."""
    fused, x = snv2.fuse(Unit(by_setting)), draw(*SIZE)
    stored = pickle.dumps(fused)
    SETTINGS.factor = 2
    try:
        loaded = pickle.loads(stored)
        with torch.no_grad():
            same(loaded, Unit(by_setting), x)
        assert loaded._beside() == "mul"
    finally:
        SETTINGS.factor = 1
    assert runs_fused(pickle.loads(stored), x)


# Methods --------------------------------------------------------------------------------------


def doubled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Tensor:
        return 2 * function(*args)

    return wrapper


METHODS: dict[str, tuple[Any, str]] = {
    "unit": (snv2.models.InvertedResidual, "forward"),
    "network": (snv2.models.ShuffleNetV2, "_forward_impl"),
    "convolution": (nn.Conv2d, "_conv_forward"),
    "activation": (nn.ReLU, "forward"),
}


@pytest.mark.parametrize("fused_before", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("what", METHODS)
def test_method_of_a_class_that_was_replaced(
    what: str, fused_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, name = METHODS[what]
    plain, x = small_network(), draw(1, 3, 33, 35)
    if not fused_before:
        monkeypatch.setattr(cls, name, doubled(getattr(cls, name)))
    fused = snv2.fuse(plain)
    with torch.no_grad():
        fused(x)
        if fused_before:
            monkeypatch.setattr(cls, name, doubled(getattr(cls, name)))
        same(fused, plain, x)
        monkeypatch.undo()
        same(fused, plain, x)
    assert runs_fused(snv2.fuse(small_network()), x)  # what was found then is not kept


def test_helper_that_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__(snv2.models.InvertedResidual.__module__, fromlist=["x"])
    monkeypatch.setattr(module, "channel_shuffle", lambda x, groups: x)
    plain, x = unit_pair(1, 34, 34)[0], draw(2, 34, 5, 7)
    with torch.no_grad():
        same(snv2.fuse(plain), plain, x)


@pytest.mark.parametrize("fused_before", [False, True], ids=["before", "after"])
def test_method_of_an_instance(fused_before: bool) -> None:
    def features(self: Any, x: Tensor) -> Tensor:
        return self.stage4(self.stage3(self.stage2(self.maxpool(self.conv1(x)))))

    plain, x = small_network(), draw(1, 3, 33, 35)
    fused = snv2.fuse(plain)
    fused(x)
    plain._forward_impl = types.MethodType(features, plain)
    if fused_before:
        fused._forward_impl = types.MethodType(features, fused)
    else:
        fused = snv2.fuse(plain)
    assert runs_fused(fused, x)  # as what it computes now
    with torch.no_grad():
        same(fused, plain, x)
