"""Modules inside a recognised one, which are looked at when they are first asked; and threads."""

from __future__ import annotations

import copy
import pickle
import threading
from unittest import mock

import pytest
import torch
from _cases import assert_close, draw, runs_fused
from _styles import Loop, Wrapped, styled, three
from torch import nn

import snv2_kernels as snv2
from snv2_kernels import recognition
from snv2_kernels.nn.recognized import Recognized
from snv2_kernels.testing import randomize_
from snv2_kernels.threads import one_thread

INSIDE = {"megvii": 2, "renamed": 3, "wrapped": 3, "inner-forward": 3, "listed": 3}


@pytest.mark.parametrize("style", INSIDE)
def test_only_the_outer_module_is_recorded(style: str) -> None:
    model, x = styled(style)
    with mock.patch.object(recognition, "record", wraps=recognition.record) as record:
        fused = snv2.fuse(model)
        assert runs_fused(fused, x)
        looked = record.call_count
        unseen = [m for m in fused.modules() if isinstance(m, Recognized) and m.is_unseen()]
        assert len(unseen) >= INSIDE[style]
        assert record.call_count == looked


def test_inner_module_is_recognised_when_it_is_asked() -> None:
    model, x = randomize_(Loop(three(Wrapped))).eval(), draw(2, 28, 9, 7)
    fused = snv2.fuse(model)
    for made in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        unit = made.units[1]
        assert unit.is_unseen()
        assert runs_fused(unit, x)
        assert not unit.is_unseen()
        assert_close(unit, model.units[1], x)


def test_inner_module_that_was_changed_before_it_is_asked() -> None:
    model, x = randomize_(Loop(three(Wrapped))).eval(), draw(2, 28, 9, 7)
    fused = snv2.fuse(model)
    for m in (fused, model):
        m.units[1].main[0].activate = nn.GELU().eval()
    assert_close(fused.units[1], model.units[1], x)
    assert not runs_fused(fused.units[1], x)
    assert_close(fused, model, draw(2, 10, 9, 7))


def test_explain_looks_inside() -> None:
    model = randomize_(Loop(three(Wrapped))).eval()
    for explained in (model, snv2.fuse(model)):
        lines = str(snv2.explain(explained)).splitlines()
        assert lines == ["(model): stage: fused", *(f"units.{i}: unit: fused" for i in range(3))]


def test_one_thread_is_the_callers_alone() -> None:
    counts: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_thread():
            counts.append(torch.get_num_threads())
            other = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
            other.start()
            other.join()
        counts.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert counts == [1, 3, 3]
