"""What a call of a fused module does beside the kernels, and what it looks at each time."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from _backbones import Looked
from _cases import FP32_BOUND, draw, drop_in
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels import _native
from snv2_kernels.testing import max_error, randomize_


def python_calls(run: Callable[[], Any]) -> list[str]:
    calls: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            calls.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def is_short(fused: nn.Module, x: Tensor) -> bool:
    long = {"FusedModule._eager", "FusedModule._compiled"}
    return long.isdisjoint(python_calls(lambda: fused(x)))


@pytest.fixture(params=["network", "unit-s1", "stage"])
def ready(request: pytest.FixtureRequest) -> Any:
    plain, fused, x = drop_in(request.param)
    with torch.no_grad():
        fused(x)
        assert is_short(fused, x)
        yield plain, fused, x


def test_call_like_the_last_runs_few_python_functions(ready: Any) -> None:
    _, fused, x = ready
    assert len(python_calls(lambda: fused(x))) <= 6


def test_results_of_a_backbone() -> None:
    plain = randomize_(Looked()).eval()
    fused, x = snv2.fuse(plain), draw(1, 3, 64, 64)
    with torch.no_grad():
        for _ in range(2):
            found = fused(x)
        assert is_short(fused, x)
        for a, b in zip(found, plain(x), strict=True):
            assert max_error(a, b) < FP32_BOUND


def environment(name: str, value: str) -> AbstractContextManager[Any]:
    return mock.patch.dict(os.environ, {name: value})


CIRCUMSTANCES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradients": torch.enable_grad,
    "backend": lambda: snv2.use_backend("reference"),
    "environment": lambda: environment("SNV2_BACKEND", "reference"),
    "compiler": lambda: mock.patch.object(torch.compiler, "_is_compiling_flag", new=True),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "forward mode": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("circumstance", CIRCUMSTANCES)
def test_other_circumstances_take_the_long_way(ready: Any, circumstance: str) -> None:
    _, fused, x = ready
    with CIRCUMSTANCES[circumstance]():
        assert not is_short(fused, x)
    fused(x)
    assert is_short(fused, x)


def test_transforms_and_tracers_take_the_long_way(ready: Any) -> None:
    _, fused, x = ready
    fused.requires_grad_(requires_grad=False)  # which a tracer refuses
    fused(x)
    seen: list[bool] = []

    def function(t: Tensor) -> Tensor:
        seen.append(is_short(fused, t))
        return t

    torch.vmap(function)(x[None])
    fused(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.trace(function, (x,), check_trace=False)
    assert seen == [False, False]


def test_other_inputs_take_the_long_way(ready: Any) -> None:
    plain, fused, x = ready
    for other in (torch.cat([x, x]), nn.Parameter(x), x[..., :-1]):
        fused(x)
        assert not is_short(fused, other)
        assert max_error(fused(other), plain(other)) < FP32_BOUND
    fused(x)
    with pytest.raises(TypeError, match="float32"):
        fused(x.half())


@pytest.mark.parametrize("left", [0, 100])
@pytest.mark.parametrize("case", ["network", "unit-s1", "stage"])
def test_memory_that_was_given_back_is_not_read(case: str, left: int) -> None:
    """By the first call, and by one like the last."""
    _, fused, x = drop_in(case)
    with torch.no_grad():
        for _ in range(2):
            emptied = x.clone()
            emptied.untyped_storage().resize_(left)
            with pytest.raises(RuntimeError, match="storage"):
                fused(emptied)
            fused(x)


def test_instruction_set_of_before_is_not_run(ready: Any) -> None:
    _, fused, x = ready
    before = _native.cpu_isa()
    try:
        for isa in _native.available_cpu_isas():
            fused(x)
            if isa != _native.cpu_isa():
                _native.set_cpu_isa(isa)
                assert not is_short(fused, x)
    finally:
        _native.set_cpu_isa(before)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "weight": lambda m: next(m.parameters()).add_(0.1),
    "mode": lambda m: next(c for c in m.modules() if type(c) is nn.BatchNorm2d).train(),
    "hook": lambda m: next(c for c in m.modules() if type(c) is nn.Conv2d).register_forward_hook(
        lambda *_: None
    ),
    "attribute": lambda m: setattr(
        next(c for c in m.modules() if type(c) is nn.BatchNorm2d), "eps", 0.5
    ),
    "step": lambda m: torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1).step(),
    "order of memory": lambda m: transpose_data(m.branch2[0].weight),
}  # fmt: skip


def transpose_data(weight: nn.Parameter) -> None:
    weight.data = weight.data.transpose(0, 1)


@pytest.mark.parametrize("change", CHANGES)
def test_change_takes_the_long_way(change: str) -> None:
    plain, fused, x = drop_in("unit-s1")
    with torch.no_grad():
        for _ in range(2):
            fused(x)
        for model in (plain, fused):
            CHANGES[change](model)
        assert not is_short(fused, x)
        assert max_error(fused(x), plain(x)) < FP32_BOUND


def test_copy_has_its_own_way() -> None:
    _, fused, x = drop_in("unit-s1")
    with torch.no_grad():
        fused(x)
        other = copy.deepcopy(fused)
        vars(other)["_packed_state"] = vars(fused)["_packed_state"]
        assert not is_short(other, x)
