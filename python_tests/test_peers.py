"""The ways to run a network that benchmarks compare: each computes in each call, on memory that
it may read, and nobody's time is told whose output is wrong."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _cases import draw, small_network
from torch import Tensor

from snv2_bench import benchmarking
from snv2_bench.cli.rule import upper_bound
from snv2_bench.peers import PEERS, Unavailable, engines
from snv2_kernels.testing import float64_reference, max_error

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


# Engines that take float32 alone get a copy of an input in bfloat16.
@pytest.mark.parametrize(
    ("peer", "dtype"),
    [(peer, "float32") for peer in PEERS if peer not in ("compile", "openvino", "ncnn")]
    + [(peer, "bfloat16") for peer in ("openvino", "ncnn", "engine")],
)
def test_peer_reads_its_input_and_writes_its_output_in_each_call(peer: str, dtype: str) -> None:
    """Also when what it did not keep has been overwritten."""
    element = getattr(torch, dtype)
    model, x = small_network().to(element), draw(2, 3, 33, 45, dtype=element)
    copies = peer in ("channels_last", "openvino", "ncnn")
    inputs = x.clone(), x.flip(3).clone()
    exact = float64_reference(model)
    with torch.inference_mode():
        try:
            call = PEERS[peer](model, x)
        except Unavailable as reason:
            pytest.skip(str(reason))
        freed = [torch.full(x.shape, torch.nan) for _ in range(20)]
        for used in (inputs[0], inputs[0] if copies else inputs[1]):
            out = call()
            assert max_error(out, exact(used)) <= upper_bound("network", element)
            out.fill_(torch.nan)
            x.copy_(inputs[1])
    assert freed[0].isnan().all()


def test_memory_that_openvino_reads_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[int] = []

    def shared(array: Any, shared_memory: bool) -> None:
        assert shared_memory
        handed.append(array.ctypes.data)

    request = SimpleNamespace(
        set_input_tensor=lambda _: None, set_output_tensor=lambda _: None, infer=lambda: None
    )
    network = SimpleNamespace(
        get_property=lambda _: SimpleNamespace(to_string=lambda: "bf16"),
        create_infer_request=lambda: request, output=lambda _: SimpleNamespace(shape=[1, 10]),
    )  # fmt: skip
    openvino = SimpleNamespace(
        convert_model=lambda *_, **__: None, Tensor=shared,
        Core=lambda: SimpleNamespace(compile_model=lambda *_: network),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    call = engines.openvino(small_network().bfloat16(), draw(1, 3, 8, 8, dtype=torch.bfloat16))
    kept = [value for value in vars(call).values() if isinstance(value, Tensor)]
    assert [t.data_ptr() for t in kept] == handed
    assert [tuple(t.shape) for t in kept] == [(1, 3, 8, 8), (1, 10)]


def _written_once(x: Tensor) -> Callable[[], Tensor]:
    out = x.clone()
    return lambda: out


def _written_four_times(x: Tensor) -> Callable[[], Tensor]:
    """The warm-up, and what comes before the first timed call."""
    out, calls = x.clone(), itertools.count()
    return lambda: out.copy_(x) if next(calls) < 4 else out


@pytest.mark.parametrize(
    ("make", "samples"),
    [(lambda x: x.clone, 3), (lambda x: lambda: x * 2, 0), (_written_once, 0),
     (_written_four_times, 0)],
    ids=["right", "wrong", "written once", "written four times"],
)  # fmt: skip
def test_no_time_is_told_of_a_wrong_output(
    make: Callable[[Tensor], Callable[[], Tensor]], samples: int
) -> None:
    x = draw(2, 3)
    turns = benchmarking.Turns()
    turns.add("peer", lambda: make(x), x.double, 1e-6)
    turns.prepare("peer")
    for _ in range(3):
        turns.time_round()
    row = turns.rows["peer"]
    assert len(row.samples) == samples
    assert (row.reason or "").startswith("" if samples else "wrong output: error")
