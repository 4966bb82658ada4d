"""A machine that holds a fused model and its plain twin, edits both alike and compares them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from _twins import (
    HOOK_REGISTRIES,
    MODELS,
    MODES,
    Reading,
    Result,
    Unit,
    assert_agree,
    assert_equal,
    assert_same_state,
    exact,
    read,
    twins,
)
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.nn import FusedModule
from snv2_kernels.ops import KERNEL_DTYPES

__all__ = ["TwinMachine", "at", "edit", "modes", "seeds"]

at = st.integers(0, 63)  # a place among those that fit
seeds = st.integers(0, 3)
modes = st.sampled_from(["no_grad", "grad", "input_grad"])


def edit(
    shares: bool = False, covered: bool = True, **arguments: Any
) -> Callable[[Callable[..., Any]], Any]:
    """A rule that changes the fused model and the plain one alike. It may raise in both.

    Args:
        shares: whether the fused model still has the tensors of the one that it was made from.
        covered: whether the kernels cover all that it may make of the model.
        arguments: of the rule.
    """

    def decorated(function: Callable[..., Any]) -> Any:
        def change(self: TwinMachine, **drawn: Any) -> None:
            if not shares:
                self.source = None
            self.covered &= covered
            raised = []
            for model in (self.fused, self.plain):
                try:
                    function(self, model, **drawn)
                    raised.append(None)
                except Exception as error:
                    raised.append(error)
            assert (raised[0] is None) == (raised[1] is None), raised
            if raised[0] is not None:
                self.covered = False
                self.copy_statistics()

        change.__name__ = change.__qualname__ = function.__name__
        return rule(**arguments)(change)

    return decorated


class TwinMachine(RuleBasedStateMachine):
    """Two models that stay alike, and the comparison of the two."""

    kind = "unit"
    source: nn.Module | None  # whose parameters and buffers the fused one shares
    fused: nn.Module
    plain: nn.Module

    @initialize(seed=seeds, mode=modes)
    def make(self, seed: int, mode: str) -> None:
        self.reading = Reading(mode)  # after each step
        self.unread = 0
        self.covered = True  # by the kernels, but for hooks, modes and dtypes
        self.source, self.fused = twins(self.kind, seed)
        self.plain = copy.deepcopy(self.source)
        if self.kind == "split":
            self.source = None

    # Places -----------------------------------------------------------------------------------

    def names(self, *classes: type[nn.Module]) -> list[str]:
        """Names of submodules of some classes, of all if there are none given."""
        return [
            name
            for name, module in self.plain.named_modules(remove_duplicate=False)
            if name and (not classes or isinstance(module, classes))
        ]

    def name(self, at: int, *classes: type[nn.Module]) -> str | None:
        names = self.names(*classes)
        return names[at % len(names)] if names else None

    def unit(self, at: int) -> str | None:
        """The name of a hand-written unit, maybe of the root."""
        names = [name for name, m in self.plain.named_modules() if isinstance(m, Unit)]
        return names[at % len(names)] if names else None

    def pair(self, at: int, *classes: type[nn.Module]) -> tuple[str, str] | None:
        """Names of two submodules that could stand in each other's place."""
        alike: dict[str, list[str]] = {}
        for name in self.names(*classes):
            alike.setdefault(repr(self.plain.get_submodule(name)), []).append(name)
        groups = [names for names in alike.values() if len(names) > 1]
        if not groups:
            return None
        names = groups[at % len(groups)]
        first = at // len(groups) % len(names)
        return names[first], names[first - 1]

    def parameter(self, model: nn.Module, at: int) -> nn.Parameter:
        parameters = list(model.parameters())
        return parameters[at % len(parameters)]

    def part(self, model: nn.Module, at: int) -> nn.Module:
        """The root or a submodule."""
        return model.get_submodule(["", *self.names()][at % (1 + len(self.names()))])

    def fused_part(self, at: int) -> str:
        """The name of a fused part, "" for the root, which it is where names share parameters."""
        names = [name for name, m in self.fused.named_modules() if isinstance(m, FusedModule)]
        named = list(self.plain.named_parameters(remove_duplicate=False))
        alone = len(named) == len(list(self.plain.parameters()))
        return names[at % len(names)] if names and alone else ""

    def dtype(self) -> torch.dtype:
        return next(self.plain.parameters()).dtype

    # Comparing --------------------------------------------------------------------------------

    @invariant()
    def agree(self) -> None:
        if self.unread:
            self.unread -= 1
        else:
            self.check(self.reading)

    def check(self, reading: Reading, converted: bool = False) -> None:
        """Compares the results of both models, and their states after it.

        Args:
            reading: the way to run them.
            converted: whether a part has another dtype than the rest.
        """
        x = reading.input(self.kind, self.dtype())
        expected = read(self.plain, x, reading)
        actual = read(self.fused, x, reading, counts=True)
        self.same_list_of_kept()
        if self.plain.training:
            assert_equal(actual, expected)
        else:
            self.assert_agree(actual, expected, x, reading)
        if expected.error is not None:
            self.copy_statistics()
        elif not converted:
            self.assert_runs_fused(actual.calls, reading)
        with torch.no_grad():
            assert_same_state(self.fused, self.plain)

    def assert_agree(self, actual: Result, expected: Result, x: Tensor, reading: Reading) -> None:
        def truth() -> list[Tensor]:
            return exact(self.plain, x, reading)

        bounds = MODELS[self.kind].bounds
        assert_agree(actual, expected, bounds, truth, narrow=reading.mode == "autocast")

    def assert_runs_fused(self, calls: int, reading: Reading) -> None:
        """A module that says that it runs fused does, and does say so where all is covered."""
        if not self.may_run_fused():
            return
        if self.covered:
            assert calls == MODELS[self.kind].calls, snv2.explain(self.fused)
        elif isinstance(self.fused, FusedModule) and reading == Reading():
            looks = any(
                m.looks_at != "nothing" for m in self.plain.modules() if isinstance(m, Unit)
            )
            assert looks or calls == 1 or self.fused.reason() is not None

    def may_run_fused(self) -> bool:
        """Whether neither modes, hooks nor the dtype keep the kernels from running."""
        watched = any(
            m.training or any(getattr(m, hooks) for hooks in HOOK_REGISTRIES)
            for m in self.plain.modules()
        )
        return self.dtype() in KERNEL_DTYPES and not watched

    def same_list_of_kept(self) -> None:
        """Compares what the forwards left in a list of the user's."""
        lists = [
            [m.kept for m in model.modules() if isinstance(m, Unit)]
            for model in (self.fused, self.plain)
        ]
        kinds = [[[type(t) for t in kept] for kept in found] for found in lists]
        self.forget_kept()
        assert kinds[0] == kinds[1]

    def forget_kept(self) -> None:
        for model in (self.fused, self.plain):
            for m in model.modules():
                if isinstance(m, Unit):
                    m.kept.clear()

    def copy_statistics(self) -> None:
        """A forward that raises may have moved some of them, before or after."""
        with torch.no_grad():
            for a, b in zip(self.fused.buffers(), self.plain.buffers(), strict=True):
                if not torch.equal(a, b):
                    a.copy_(b)

    @rule(
        mode=st.sampled_from(MODES),
        channels_last=st.booleans(),
        batch=st.integers(1, 3),
        wider=st.integers(0, 1),
    )
    def look(self, mode: str, channels_last: bool, batch: int, wider: int) -> None:
        self.check(Reading(mode, channels_last, batch, wider))

    @rule(mode=st.sampled_from(MODES))
    def look_at_the_reference(self, mode: str) -> None:
        """The plain forward of the fused model, which runs the same operations."""
        if any(m.training for m in self.plain.modules()):
            return
        reading = Reading(mode)
        x = reading.input(self.kind, self.dtype())
        with snv2.use_backend("reference"):
            assert_equal(read(self.fused, x, reading), read(self.plain, x, reading))
        self.same_list_of_kept()

    @rule(steps=st.integers(1, 3))
    def look_away(self, steps: int) -> None:
        """The next steps follow each other without a forward in between."""
        self.unread = steps + 1
