"""Modules, engines and explanations are freed when they are dropped."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _cases import drop_in, each_drop_in, plain_and_input
from _styles import Wrapped
from torch import nn

import snv2_kernels as snv2
from snv2_kernels.testing import randomize_


@pytest.fixture(autouse=True)
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def is_freed(make: Callable[[], Any], collect: bool = False) -> bool:
    """Whether what ``make`` returns is gone as soon as it is dropped, or once the garbage collector
    has run."""
    made = make()
    dead = weakref.ref(made)
    del made
    if collect:
        gc.collect()
    return dead() is None


@each_drop_in
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_drop_in_that_has_run(kind: str, grad: bool) -> None:
    def make() -> nn.Module:
        _, module, x = drop_in(kind)
        with torch.set_grad_enabled(grad):
            y = module(x)
            if grad:
                y.sum().backward()
        return module

    assert is_freed(make)


def test_recognised_module_that_has_changed() -> None:
    def make() -> nn.Module:
        module: Any = snv2.fuse(randomize_(Wrapped(28, 28, 1)).eval())
        with torch.no_grad():
            module(torch.ones(1, 28, 5, 5))
            module.extra = [module, module.forward]  # a cycle of the user's own
            module(torch.ones(1, 28, 5, 5))
        return module

    assert is_freed(make, collect=True)


def test_container_of_series() -> None:
    def make() -> nn.Module:
        units = [Wrapped(28, 28, 1), Wrapped(28, 28, 1)]
        module = snv2.fuse(randomize_(nn.Sequential(nn.Tanh(), *units)).eval())
        with torch.no_grad():
            module(torch.ones(1, 28, 5, 5))
        return module

    assert is_freed(make)


def test_model_that_was_fused_explained_and_frozen() -> None:
    def make() -> nn.Module:
        model, x = plain_and_input("network")
        snv2.explain(model)
        snv2.fuse(model)(x)
        snv2.Engine(model, tuple(x.shape))(x)
        return model

    assert is_freed(make)


def test_engine() -> None:
    def make() -> snv2.Engine:
        model, x = plain_and_input("network")
        return snv2.Engine(model, tuple(x.shape))

    assert is_freed(make)


def test_compiled_module() -> None:
    def make() -> nn.Module:
        _, module, x = drop_in("unit-s1")
        with torch.no_grad():
            torch.compile(module, backend="eager")(x)
        torch.compiler.reset()
        return module

    assert is_freed(make, collect=True)
