"""Which backend runs: availability, selection, the environment."""

from __future__ import annotations

import contextvars
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from _cases import draw, ops_called, runs_fused, small_network
from torch import Tensor

import snv2_kernels as snv2
from snv2_kernels import _native
from snv2_kernels.backends import resolve

CPU = torch.device("cpu")
UNAVAILABLE = [name for name, state in snv2.backends().items() if not state.startswith("ok")]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SNV2_BACKEND", raising=False)


def ran() -> str:
    """Name of the backend that an op runs on."""
    a = draw(1, 3, 5, 5)
    names = ops_called(snv2.ops.cat_shuffle, a, a)
    return "cpu" if "snv2::cat_shuffle" in names else "reference"


def test_backends() -> None:
    states = snv2.backends()
    assert list(states) == ["reference", "cpu", "cuda", "triton"]
    assert states["reference"] == "ok"
    assert states["cpu"] == f"ok ({_native.cpu_isa()})"
    for name in UNAVAILABLE:
        assert len(states[name]) > len("not built: ")


def test_auto_takes_the_fastest() -> None:
    assert resolve(CPU) == resolve(CPU, "auto") == "cpu"
    assert resolve(torch.device("meta")) == "reference"
    assert ran() == "cpu"


def test_use_backend_nests_and_restores() -> None:
    with snv2.use_backend("reference"):
        assert ran() == "reference"
        with snv2.use_backend("cpu"):
            assert ran() == "cpu"
            with snv2.use_backend("auto"):
                assert ran() == "cpu"
        assert ran() == "reference"
        with pytest.raises(ZeroDivisionError), snv2.use_backend("cpu"):
            raise ZeroDivisionError
        assert ran() == "reference"
    assert ran() == "cpu"


def test_use_backend_wins_over_the_argument() -> None:
    a = draw(1, 3, 5, 5)

    def op(x: Tensor) -> Tensor:
        return snv2.ops.cat_shuffle(x, x, backend="cpu")

    assert "snv2::cat_shuffle" in ops_called(op, a)
    with snv2.use_backend("reference"):
        assert "snv2::cat_shuffle" not in ops_called(op, a)


def test_use_backend_holds_for_one_thread() -> None:
    with snv2.use_backend("reference"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(ran).result() == "cpu"
        copied = contextvars.copy_context()
        assert pool.submit(copied.run, ran).result() == "reference"
    assert ran() == "cpu"


def test_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNV2_BACKEND", "reference")
    assert resolve(CPU) == resolve(CPU, "auto") == "reference"
    assert resolve(CPU, "cpu") == "cpu"
    assert ran() == "reference"
    with snv2.use_backend("cpu"):
        assert ran() == "cpu"
    monkeypatch.setenv("SNV2_BACKEND", "cpu")
    assert resolve(CPU, "reference") == "reference"
    assert ran() == "cpu"


@pytest.mark.parametrize("value", ["", "auto"], ids=["empty", "auto"])
def test_environment_without_a_wish(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SNV2_BACKEND", value)
    assert resolve(CPU) == "cpu"


def test_environment_with_a_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNV2_BACKEND", "gpu")
    with pytest.raises(ValueError, match="'gpu'"):
        ran()


def test_fuse_for_one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_network()
    x = draw(1, 3, 33, 33)
    for backend, fused in (("auto", True), ("cpu", True), ("reference", False)):
        assert runs_fused(snv2.fuse(model, backend), x) == fused
    with snv2.use_backend("reference"):
        module = snv2.fuse(model)
        assert not runs_fused(module, x)
        assert torch.equal(module(x), model(x))
    assert runs_fused(module, x)
    monkeypatch.setenv("SNV2_BACKEND", "reference")
    assert not runs_fused(module, x)


def _use(name: Any) -> None:
    with snv2.use_backend(name):
        pass


ASK = {
    "use_backend": _use,
    "op": lambda name: snv2.ops.cat_shuffle(draw(1, 2, 3, 3), draw(1, 2, 3, 3), backend=name),
    "fuse": lambda name: snv2.fuse(small_network(), backend=name),
}


@pytest.mark.parametrize("ask", ASK)
@pytest.mark.parametrize("name", ["gpu", "CPU", "cpu ", "avx2", "openvino"])
def test_name_of_no_backend(ask: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"backend: expected one of auto, .*got '{name}'"):
        ASK[ask](name)
    assert ran() == "cpu"


@pytest.mark.parametrize("ask", ASK)
@pytest.mark.parametrize("name", UNAVAILABLE)
def test_backend_that_is_not_there(ask: str, name: str) -> None:
    with pytest.raises(RuntimeError) as error:
        ASK[ask](name)
    assert name in str(error.value)
    assert snv2.backends()[name] in str(error.value)  # the reason
    assert ran() == "cpu"


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_environment_with_a_backend_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("SNV2_BACKEND", name)
    with pytest.raises(RuntimeError, match=name):
        ran()


def test_cpu_backend_for_a_tensor_elsewhere() -> None:
    x = torch.empty(1, 2, 3, 3, device="meta")
    with pytest.raises(ValueError, match="backend: 'cpu' cannot run a tensor on device meta"):
        snv2.ops.cat_shuffle(x, x, backend="cpu")
    assert snv2.ops.cat_shuffle(x, x).shape == (1, 4, 3, 3)


# Instruction sets -----------------------------------------------------------------------------


def test_set_cpu_isa() -> None:
    before = _native.cpu_isa()
    try:
        for name in _native.available_cpu_isas():
            _native.set_cpu_isa(name)
            assert _native.cpu_isa() == name
            assert snv2.backends()["cpu"] == f"ok ({name})"
        with pytest.raises(ValueError, match="name: this machine cannot run 'sse9'"):
            _native.set_cpu_isa("sse9")
    finally:
        _native.set_cpu_isa(before)


PROGRAM = "import snv2_kernels as snv2; print(snv2.backends()['cpu'])"


@pytest.mark.parametrize("name", [*_native.available_cpu_isas(), "", "sse9"])
def test_environment_chooses_the_instruction_set(name: str) -> None:
    environment = {**os.environ, "SNV2_CPU_ISA": name}
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment, capture_output=True, text=True, check=True, timeout=120,
    ).stdout.strip()  # fmt: skip
    best = _native.available_cpu_isas()[0]
    if name == "sse9":
        assert out.startswith(f"ok ({best})")
        assert "SNV2_CPU_ISA=sse9 is not available" in out
    else:
        assert out == f"ok ({name or best})"
