"""A fused model and its plain twin go through the same edits, and go on agreeing.

CONTRIBUTING.md says how to repeat a failure.
"""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from _edits import Machine
from _machine import modes, seeds
from _twins import HOOK_REGISTRIES, MODELS, Reading, read, recognizing_once
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import get_state_machine_test, initialize, rule
from torch import nn


class EagerMachine(Machine):
    """Edits of an eager model."""

    @rule()
    def drop(self) -> None:
        """A fused model that nothing refers to any more is freed."""
        old, self.source = weakref.ref(self.fused), None
        self.fused = copy.deepcopy(self.fused)
        gc.collect()
        assert old() is None


class CompiledMachine(Machine):
    """Edits of models that are compiled too, which is slow."""

    @initialize(seed=seeds, mode=modes, what=st.sampled_from(["fused", "plain"]))
    def make(self, seed: int, mode: str, what: str) -> None:
        super().make(seed, mode)
        self.compiled: list[tuple[nn.Module, Any]] = []
        self.compile(what)

    def teardown(self) -> None:
        torch.compiler.reset()

    @rule(what=st.sampled_from(["fused", "plain"]))
    def compile(self, what: str) -> None:
        if what == "fused":
            model, options = self.fused, {"backend": "eager"}
        else:
            model, options = self.plain, {"backend": "snv2", "options": {"inner": "eager"}}
        self.compiled = [pair for pair in self.compiled if pair[0] is not model]
        self.compiled.append((model, torch.compile(model, **options)))

    def check(self, reading: Reading, converted: bool = False) -> None:
        super().check(reading, converted)
        self.compiled = [pair for pair in self.compiled if pair[0] in (self.fused, self.plain)]
        # Hooks that come after torch.compile go unseen; a forward in train() mode moves statistics.
        for module in self.plain.modules():
            if module.training or any(getattr(module, hooks) for hooks in HOOK_REGISTRIES):
                self.compiled.clear()
        for _, compiled in self.compiled:
            x = reading.input(self.kind, self.dtype())
            expected = read(self.plain, x, reading)
            self.assert_agree(read(compiled, x, reading), expected, x, reading)
            self.forget_kept()


def run(machine: type[Machine], kind: str, sequences: int, steps: int) -> None:
    """Runs random sequences of edits, the same every time, of a model of one kind."""
    of_kind = type(machine.__name__, (machine,), {"kind": kind})
    test = get_state_machine_test(
        of_kind,
        settings=settings(
            deadline=None,
            database=None,
            max_examples=sequences,
            stateful_step_count=steps,
            suppress_health_check=list(HealthCheck),
        ),
    )
    gc.collect()
    gc.freeze()  # collecting what a test made takes a millisecond then
    try:
        with recognizing_once():
            seed(f"{kind} {sequences}")(test)()
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("kind", MODELS)
def test_eager(kind: str) -> None:
    run(EagerMachine, kind, MODELS[kind].sequences, steps=6)


def test_compiled() -> None:
    run(CompiledMachine, "unit", 4, steps=4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_eager_at_length(kind: str) -> None:
    run(EagerMachine, kind, 10_000 // len(MODELS) + 1, steps=20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_compiled_at_length(kind: str) -> None:
    run(CompiledMachine, kind, 10, steps=10)
