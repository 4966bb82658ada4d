"""The ways to run a network that benchmarks compare: each computes in each call, on memory that
it may read, and nobody's time is told whose output is wrong."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _cases import draw, small_network
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_bench import benchmarking
from snv2_bench.benchmarking import rms_error
from snv2_bench.cli.rule import INT8_BOUND, upper_bound
from snv2_bench.peers import INT8_PEERS, PEERS, Unavailable, engines, quantized, xnnpack
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
    copies = peer in ("channels_last", "openvino", "ncnn", "mnn", "litert")
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


@pytest.mark.parametrize("peer", INT8_PEERS)
def test_quantized_peer_writes_its_output_in_each_call(peer: str) -> None:
    """And is about right."""
    model, x = small_network(), draw(2, 3, 33, 45)
    exact = float64_reference(model)(x)
    batches = [draw(2, 3, 33, 45, seed=seed) for seed in range(1, 5)]
    with torch.inference_mode():
        try:
            call = INT8_PEERS[peer](model, x, batches)
        except Unavailable as reason:
            pytest.skip(str(reason))
        for _ in range(2):
            out = call()
            assert out.dtype == torch.float32
            assert upper_bound("network", torch.float32) < rms_error(out, exact) < INT8_BOUND / 2
            out.fill_(torch.nan)


@pytest.mark.parametrize("make", [quantized.quantized_fused, quantized.quantized_engine])
def test_ours_are_quantized_after_the_batches(
    monkeypatch: pytest.MonkeyPatch, make: Callable[..., Callable[[], Tensor]]
) -> None:
    model, x, batches = small_network(), draw(1, 3, 32, 32), [draw(1, 3, 32, 32)]
    other = small_network(seed=1)

    def quantize(handed: nn.Module, after: Sequence[Tensor]) -> nn.Module:
        assert handed is model
        assert after is batches
        return other

    monkeypatch.setattr(snv2, "quantize", quantize, raising=False)
    bound = upper_bound("network", torch.float32)
    with torch.inference_mode():
        out = make(model, x, batches)()
    assert max_error(out, float64_reference(other)(x)) <= bound


def test_a_file_is_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the model, the shape or what it is quantized after is another."""
    made: list[str] = []

    def convert(kind: str, folder: str) -> None:
        made.append(kind)
        assert (Path(folder) / "net.pt2").is_file()
        (Path(folder) / "net.tflite").write_bytes(b"%d" % len(made))

    monkeypatch.setattr(xnnpack, "convert", convert)
    monkeypatch.setattr(xnnpack, "_latest", {})
    model, other, x = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1), draw(1, 3, 8, 8)
    for net, image, batches, expected in [
        (model, x, [], b"1"), (model, x, [], b"1"), (model, draw(1, 3, 8, 9), [], b"2"),
        (model, x, [x], b"3"), (model, x, [x * 2], b"4"), (other, x, [x * 2], b"5"),
    ]:  # fmt: skip
        with torch.inference_mode():
            assert xnnpack._converted("litert", net, image, batches) == expected


def test_a_conversion_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('noise')\nraise ValueError('no such op')")
    monkeypatch.setattr(engines.converters, "__file__", str(script))
    with pytest.raises(RuntimeError, match="conversion for mnn: ValueError: no such op"):
        engines.convert("mnn", str(tmp_path))


def test_silenced(capfd: pytest.CaptureFixture[str]) -> None:
    def print_and_fail() -> None:
        print("library")
        os.write(1, b"library in C")
        os.write(2, b"its warnings")
        raise KeyError

    with pytest.raises(KeyError), engines.silenced():
        print_and_fail()
    print("ours")
    os.write(2, b"ours too")
    assert capfd.readouterr() == ("ours\n", "ours too")


def test_rms_error() -> None:
    exact = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert rms_error(torch.tensor([3.0, -4.0]), exact) == 0
    assert rms_error(torch.tensor([6.0, -8.0]), exact) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"actual: expected shape \(2,\), got \(1, 2\)"):
        rms_error(torch.zeros(1, 2), exact)


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
