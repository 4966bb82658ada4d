"""Whole plans on the Triton kernels: their words, their launches and the op that runs them."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from _cases import (
    KINDS,
    draw,
    ops_called,
    plain_and_input,
    plain_stage,
    small_network,
)

import snv2_kernels as snv2
from snv2_kernels.ops import operators
from snv2_kernels.packing import TritonPlan
from snv2_kernels.packing.triton import DW_PW, pitch

# Words ----------------------------------------------------------------------------------------


def plan_of(kind: str, dtype: torch.dtype = torch.float32) -> TritonPlan:
    model, _ = plain_and_input(kind)
    return snv2.fuse(model)._triton_plan(dtype, torch.get_default_device())


@pytest.mark.parametrize("kind", KINDS)
def test_plan(kind: str) -> None:
    """Offsets of matrices are where 16 bytes may be read, and tables are within their buffers."""
    plan = plan_of(kind, torch.float16)
    assert plan.weights.numel() % 16 == 0
    for step in plan.steps:
        assert step.pw.matrix % 16 == step.side_pw.matrix % 16 == 0
        if step.kind == DW_PW and step.target >= 0:
            rows = step.rows + step.side_pw.rows
            planes = plan.tables[step.target_table : step.target_table + rows].tolist()
            assert len(set(planes)) == rows
            assert max(planes) < step.target_planes
        if step.kind == DW_PW and step.result >= 0:
            rows = step.rows + step.side_rows
            channels = plan.tables[step.result_table : step.result_table + rows].tolist()
            assert sorted(channels) == list(range(plan.results[step.result][0]))


# Launches -------------------------------------------------------------------------------------


def _watch_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that names each kernel launched from now on."""
    module = importlib.import_module("snv2_kernels.triton.network")
    names: list[str] = []
    launch = module._launch

    def watched(name: str, *args: Any, **kwargs: Any) -> Any:
        names.append(name)
        return launch(name, *args, **kwargs)

    monkeypatch.setattr(module, "_launch", watched)
    return names


def test_launches_of_a_network(triton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for each unit and three at the ends, also where maps on the way are results."""
    x = draw(1, 3, 9, 9)
    with snv2.use_backend("triton"):
        engine = snv2.Engine(small_network(), tuple(x.shape), taps=("stage2", "stage3"))
        names = _watch_launches(monkeypatch)
        assert ops_called(engine, x) == ["snv2_triton::network_out"]
    assert names == ["stem", *5 * ["pw1", "dw_pw2"], "features", "linear"]


def test_units_of_a_stage_leave_what_passes_through(triton: Any) -> None:
    """Planes of the passthrough half are neither read nor written: their NaN stays where it is."""
    from snv2_kernels.triton.network import Arrays, _Run, _run_dw_pw, _run_pw, allocate

    plain = plain_stage([1, 1, 1], 34, 34)
    plan = snv2.fuse(plain)._triton_plan(torch.float32, torch.device(torch.get_default_device()))
    n, size, pixels = 2, (5, 7), 35
    memory = allocate(plan.weights, plan.steps, n, *size)
    _, pw, dw_pw = plan.steps[:3]
    planes, row = memory.planes[0], pitch(n * pixels)
    rows = planes[: dw_pw.target_planes * row].view(dw_pw.target_planes, row)
    rows.fill_(float("nan"))
    read = plan.tables[pw.table : pw.table + pw.channels].long()
    written = plan.tables[dw_pw.target_table : dw_pw.target_table + dw_pw.rows].long()
    rows[read] = draw(pw.channels, row)
    before = rows.clone()
    arrays = Arrays(plan.weights, plan.parameters, plan.tables)
    call = _Run(torch.empty(n, 34, *size), arrays, memory, [])
    source = call.read(pw.source, size)
    _run_pw(call, pw, source, size)
    _run_dw_pw(call, dw_pw, call.read(dw_pw.source, size), source, size)
    assert rows[written][:, : n * pixels].isfinite().all()
    rows[written] = before[written]
    assert torch.equal(rows.nan_to_num(7.0), before.nan_to_num(7.0))


# The op ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype", "memory_format"),
    [
        pytest.param("stage", torch.float16, torch.channels_last, marks=pytest.mark.slow),
        ("unit-s1", torch.bfloat16, torch.channels_last),
        ("unit-s2", torch.float32, torch.contiguous_format),
    ],
)
def test_opcheck(
    triton: Any, kind: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    plan, (_, x) = plan_of(kind, dtype), plain_and_input(kind)
    x = x.to(dtype, memory_format=memory_format)
    torch.library.opcheck(operators("triton").network.default, (x, *plan.arguments))
    results = [x.new_empty(s) for s in plan.result_shapes(x.shape[0], *x.shape[2:])]
    memory = triton.network.allocate(plan.weights, plan.steps, x.shape[0], *x.shape[2:]).tensors
    arguments = (x, *plan.arrays, plan.step_words, memory, results, [])
    # Memory beside the results may be left in any state, so two runs are not compared.
    torch.library.opcheck(
        operators("triton").network_out.default, arguments, test_utils="test_faketensor"
    )


def test_network_says_that_it_has_no_gradient(triton: Any) -> None:
    plan, (_, x) = plan_of("unit-s1"), plain_and_input("unit-s1")
    out = operators("triton").network(x.requires_grad_(), *plan.arguments)
    with pytest.raises(NotImplementedError, match="no gradient"):
        out.sum().backward()


def test_raw_arguments(triton: Any) -> None:
    plan, (_, x) = plan_of("stage"), plain_and_input("stage")
    good = [x, *plan.arguments]
    words = plan.step_words
    count = len(plan.steps[0].words())
    tapped = dataclasses.replace(plan.steps[0], result=1).words()
    for i, value, message in (
        (0, x[0], "x must have 4 dimensions"),
        (0, x.double(), "x must be float32"),
        (0, x[:, :20], "x has 20 channels, too few"),
        (0, x[..., :0], "at least one pixel"),
        (1, plan.weights.half(), "weights must be a contiguous torch.float32 vector"),
        (1, plan.weights[:-16], "step 5 reads beyond its weights"),
        (2, plan.parameters[::2], "parameters must be a contiguous"),
        (2, plan.parameters[:-16], "step 5 reads beyond its parameters"),
        (3, plan.tables.long(), "tables must be a contiguous torch.int32 vector"),
        (3, plan.tables[:-1], "step 5 reads beyond its tables"),
        (4, [], f"steps must have {count} words each"),
        (4, words[:-1], f"steps must have {count} words each"),
        (4, [9, *words[1:]], "step 0 is not known"),
        (4, [*tapped, *words[len(tapped) :]], "plan must have one result, has 2"),
    ):
        with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
            operators("triton").network(*good[:i], value, *good[i + 1 :])
