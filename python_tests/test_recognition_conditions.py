"""Forwards that ask about more than numbers, or do more than compute: seen, or left plain."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _cases import FP32_BOUND, draw, runs_fused
from _styles import Wrapped
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.testing import max_error, randomize_

SIZE = (2, 16, 5, 7)


class Unit(Wrapped):
    """A unit with a hook for a test's code."""

    def __init__(self, before: Callable[[Unit, Tensor], Any] = lambda unit, x: x) -> None:
        super().__init__(16, 16, 1)
        self.before = before
        randomize_(self).eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(self, x)
        return super().forward(x if y is None else y)


def explained(model: nn.Module) -> str:
    return str(snv2.explain(model)).splitlines()[0]


def same(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    a, b = fused(x), plain(x)
    assert (a.dtype, a.requires_grad) == (b.dtype, b.requires_grad)
    is_narrow = torch.is_autocast_enabled("cpu") or a.dtype == torch.bfloat16
    bound = 4 * torch.finfo(torch.bfloat16).eps if is_narrow else FP32_BOUND
    assert max_error(a.detach(), b.detach()) < bound


# Conditions -----------------------------------------------------------------------------------


@contextlib.contextmanager
def without_gradients(x: Tensor) -> Iterator[Tensor]:
    with torch.no_grad():
        yield x


@contextlib.contextmanager
def inference(x: Tensor) -> Iterator[Tensor]:
    with torch.inference_mode():
        yield x.clone()


@contextlib.contextmanager
def autocast(x: Tensor) -> Iterator[Tensor]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield x


SITUATIONS: dict[str, Callable[[Tensor], Any]] = {
    "usual": without_gradients,
    "grad": contextlib.nullcontext,
    "requires-grad": lambda x: contextlib.nullcontext(x.clone().requires_grad_()),
    "autocast": autocast,
    "inference": inference,
    "bfloat16": lambda x: without_gradients(x.bfloat16()),
    "channels-last": lambda x: without_gradients(x.contiguous(memory_format=torch.channels_last)),
    "other-strides": lambda x: without_gradients(torch.cat([x, x], 1)[:, ::2]),
    "one-image": lambda x: without_gradients(x[:1]),
    "one-pixel": lambda x: without_gradients(x[:1, :, :1, :1]),
}
# Where the forward does something else than usual.
ASKS: dict[str, tuple[Callable[[Unit, Tensor], Any], tuple[str, ...]]] = {
    "dtype": (lambda unit, x: 2 * x if x.dtype == torch.bfloat16 else x, ("bfloat16",)),
    "dtype-of-weight": (
        lambda unit, x: 2 * x if unit.main[0].conv.weight.dtype == torch.bfloat16 else x,
        ("bfloat16",),
    ),
    "item-size": (lambda unit, x: 2 * x if x.element_size() == 2 else x, ("bfloat16",)),
    "grad-mode": (lambda unit, x: 2 * x if torch.is_grad_enabled() else x, ("grad",)),
    "requires-grad": (lambda unit, x: 2 * x if x.requires_grad else x, ("requires-grad",)),
    "autocast": (lambda unit, x: 2 * x if torch.is_autocast_enabled("cpu") else x, ("autocast",)),
    "inference": (
        lambda unit, x: 2 * x if torch.is_inference_mode_enabled() else x, ("inference",)
    ),
    "inference-tensor": (lambda unit, x: 2 * x if x.is_inference() else x, ("inference",)),
    "contiguous": (
        lambda unit, x: x if x.is_contiguous() else 2 * x, ("channels-last", "other-strides")
    ),
    "branch-contiguous": (
        lambda unit, x: 2 * x if x.chunk(2, 1)[1].is_contiguous() else x, ("one-image",)
    ),
    "channels-last": (
        lambda unit, x: 2 * x if x.is_contiguous(memory_format=torch.channels_last) else x,
        ("channels-last", "one-pixel"),
    ),
    "detached": (lambda unit, x: x.detach(), ()),
}  # fmt: skip


@pytest.mark.parametrize("asks", ASKS)
def test_answer_that_matters_is_the_one_of_each_call(asks: str) -> None:
    ask, others = ASKS[asks]
    plain, x = Unit(ask), draw(*SIZE)
    fused = snv2.fuse(plain)
    assert explained(fused) == "(model): unit: fused"
    assert runs_fused(fused, x)
    for name in others:
        if name == "bfloat16":
            plain.bfloat16(), fused.bfloat16()
        with SITUATIONS[name](x) as given:
            same(fused, plain, given)


def test_answer_that_does_not_matter_leaves_it_fused() -> None:
    def ask(unit: Unit, x: Tensor) -> Tensor:
        assert x.dtype == unit.main[0].conv.weight.dtype
        asked = torch.is_grad_enabled(), x.is_contiguous()
        return x if all(asked) else x.contiguous()

    plain, x = Unit(ask), draw(*SIZE)
    fused = snv2.fuse(plain)
    for name in ("usual", "channels-last", "one-image", "requires-grad"):
        with SITUATIONS[name](x) as given:
            same(fused, plain, given)
            assert runs_fused(fused, given), name
    plain.bfloat16(), fused.bfloat16()
    with torch.no_grad():
        same(fused, plain, x.bfloat16())
    assert runs_fused(fused, x.bfloat16())


@torch.no_grad()
def _frozen(unit: Unit, x: Tensor) -> Tensor:
    return Wrapped.forward(unit, x)


WITHOUT_GRADIENTS: dict[str, Callable[[Unit, Tensor], Any]] = {
    "no_grad": _frozen,
    "detach": lambda unit, x: Wrapped.forward(unit, x).detach(),
}


@pytest.mark.parametrize("how", WITHOUT_GRADIENTS)
def test_result_without_a_gradient(how: str) -> None:
    class Frozen(Wrapped):
        forward = WITHOUT_GRADIENTS[how]

    plain, x = randomize_(Frozen(16, 16, 1)).eval(), draw(*SIZE)
    fused = snv2.fuse(plain)
    assert runs_fused(fused, x)
    same(fused, plain, x.requires_grad_())


def test_question_that_follows_from_another() -> None:
    def ask(unit: Unit, x: Tensor) -> Tensor:
        return 2 * x if not x.is_contiguous() and torch.is_grad_enabled() else x

    plain, x = Unit(ask), draw(*SIZE).contiguous(memory_format=torch.channels_last)
    fused = snv2.fuse(plain)
    for name in ("usual", "grad"):
        with SITUATIONS[name](x):
            same(fused, plain, x)


def test_sizes_of_one() -> None:
    """Of which torch's symbols think that they are none."""
    for dim in (0, 2):
        plain = Unit(lambda unit, x, dim=dim: 2 * x if x.shape[dim] == 1 else x)
        assert "its control flow depends on the size" in explained(plain)


def test_only_float32_differs() -> None:
    """It cannot be verified in float64."""
    plain = Unit(lambda unit, x: x if x.dtype == torch.float32 else 2 * x)
    assert "depends on the dtype" in explained(plain)


def test_dtype_of_its_own() -> None:
    class Narrow(Wrapped):
        @torch.autocast("cpu", torch.bfloat16)
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    assert "computes in torch.bfloat16 by itself" in explained(Narrow(10, 16, 2).eval())

    class Wide(Wrapped):
        @torch.autocast("cpu", enabled=False)
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    plain = randomize_(Wide(10, 16, 2)).eval()
    x = draw(2, 10, 5, 7)
    fused = snv2.fuse(plain)
    assert runs_fused(fused, x)
    with autocast(x):
        same(fused, plain, x)


def test_conditions_of_a_series() -> None:
    """A unit that asks is its own op call between others."""
    units = [Unit(), Unit(ASKS["grad-mode"][0]), Unit(), Unit()]
    plain, x = nn.Sequential(nn.Conv2d(16, 16, 1), *units).eval(), draw(*SIZE)
    fused = snv2.fuse(plain)
    for name in ("usual", "grad"):
        with SITUATIONS[name](x):
            same(fused, plain, x)
