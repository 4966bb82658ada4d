"""Counted steps of the first ``fuse`` of a model grow with its depth, not with the square of it."""

from __future__ import annotations

import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from _mixed_networks import BlockAttention, Network, Size, SqueezeExcite, Unit
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels import recognition, verification
from snv2_kernels.graph import record, recorder

DEPTHS = (4, 8, 16)
_ROOT = snv2.__file__.removesuffix("__init__.py")


def network(depth: int, **named: Any) -> nn.Module:
    unit = functools.partial(Unit, **named)
    return Network(unit, size=Size((8, 16), (depth,), 24, 5)).eval()


def with_tail(depth: int) -> nn.Module:
    model: Any = network(depth)
    model.fc = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))
    return model


class Shared(nn.Module):
    """One activation for all units, in place; units that are not recognised, of grouped layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(depth))
        self.depthwise = nn.ModuleList(
            nn.Conv2d(16, 16, 3, padding=1, groups=16) for _ in range(depth)
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        for conv, depthwise in zip(self.convs, self.depthwise, strict=True):
            x = torch.tanh(x + depthwise(self.act(conv(x))))
        return x


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "network": network,
    "gates": functools.partial(network, inside=SqueezeExcite),
    "gates between units": functools.partial(network, behind=SqueezeExcite),
    "attention in branches": functools.partial(network, inside=BlockAttention),
    "tail": with_tail,
    "other family": Shared,
}


def count(patch: pytest.MonkeyPatch, counts: Counter[str], owner: Any, name: str) -> None:
    original = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return original(*args, **kwargs)

    patch.setattr(owner, name, counting)


def counted(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a first look at a model does: steps in each function of this package, and some calls."""
    counts: Counter[str] = Counter()

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            counts[
                f"{frame.f_code.co_filename.removeprefix(_ROOT)} {frame.f_code.co_qualname}"
            ] += 1
        return on_line

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_ROOT):
            return None
        frame.f_trace_opcodes = True
        return on_line

    with monkeypatch.context() as patch:
        patch.setattr(recognition, "_recent", recognition._Recent(most=1))
        count(patch, counts, record._Subject, "record")
        count(patch, counts, recorder.Recorder, "_add")
        count(patch, counts, recognition, "Units")
        count(patch, counts, recognition, "why_wrong")
        count(patch, counts, verification, "_convolved")
        before = sys.gettrace()
        sys.settrace(on_call)
        try:
            snv2.fuse(model)
        finally:
            sys.settrace(before)
    return counts


# Others take half a minute each.
QUICK = ("gates", "other family")
SLOW = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else SLOW) for name in MODELS]
)
def test_grows_with_depth(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    snv2.fuse(MODELS[name](2))  # what is worked out once in a process
    small, middle, large = (counted(MODELS[name](depth), monkeypatch) for depth in DEPTHS)
    for kind in large:
        more = [b[kind] - a[kind] for a, b in itertools.pairwise((small, middle, large))]
        assert more[1] <= 2.2 * max(more[0], 1000), (kind, small[kind], middle[kind], large[kind])
    told = [counts[kind] for kind in ("record", "Units") for counts in (small, large)]
    assert told == [1] * 4
    assert small["why_wrong"] == large["why_wrong"] == (name != "other family")


def test_verification_multiplies_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward and its formula ask for the same products of many groups: each is computed once."""
    model = network(8)
    depthwise = sum(isinstance(m, nn.Conv2d) and m.groups > 1 for m in model.modules())
    assert counted(model, monkeypatch)["_convolved"] == depthwise
