"""Which backend runs: availability, selection, the environment."""

from __future__ import annotations

import contextvars
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from _cases import (
    FP32_BOUND,
    draw,
    drop_in,
    each_drop_in,
    ops_called,
    run_fused,
    runs_fused,
    small_network,
)
from torch import Tensor

import snv2_kernels as snv2
from snv2_kernels import _native, libraries
from snv2_kernels.backends import resolve
from snv2_kernels.testing import max_error

backends = importlib.import_module(
    "snv2_kernels.backends"
)  # the package has a function of that name
CPU = torch.device("cpu")
OPERATORS = {"cpu": "snv2::cat_shuffle", "cuda-emulated": "snv2_emulated::cat_shuffle"}
UNAVAILABLE = [name for name, state in snv2.backends().items() if not state.startswith("ok")]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SNV2_BACKEND", raising=False)


def ran() -> str:
    """Name of the backend that an op runs on."""
    a = draw(1, 3, 5, 5)
    names = ops_called(snv2.ops.cat_shuffle, a, a)
    ran = [name for name, op in OPERATORS.items() if op in names]
    assert len(ran) <= 1
    return ran[0] if ran else "reference"


def on(name: str) -> Tensor:
    return snv2.ops.cat_shuffle(draw(1, 2, 3, 3), draw(1, 2, 3, 3), backend=name)


def test_backends() -> None:
    states = snv2.backends()
    assert list(states) == ["reference", "cpu", "cuda", "cuda-emulated", "triton"]
    assert states["reference"] == "ok"
    assert states["cpu"] == f"ok ({_native.cpu_isa()})"
    assert states["cuda-emulated"].startswith("ok (for tests")
    for name in UNAVAILABLE:
        assert states[name].startswith(("not built: ", "built for ", "not installed: ", "triton "))


def test_auto_takes_the_fastest() -> None:
    assert resolve(CPU) == resolve(CPU, "auto") == "cpu"
    assert resolve(torch.device("meta")) == "reference"
    assert ran() == "cpu"


@pytest.mark.parametrize("name", ["reference", "cpu", "cuda-emulated"])
def test_each_way_to_ask(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    a = draw(1, 3, 5, 5)
    with snv2.use_backend(name):
        assert ran() == name
    called = ops_called(lambda x: snv2.ops.cat_shuffle(x, x, backend=name), a)
    assert OPERATORS.keys() & {name} == {n for n, op in OPERATORS.items() if op in called}
    monkeypatch.setenv("SNV2_BACKEND", name)
    assert ran() == name


def test_choice_is_not_packed() -> None:
    model, x = snv2.fuse(small_network()), draw(1, 3, 33, 33)
    with snv2.use_backend("reference"):
        assert model.reason() == "backend 'reference' runs it plain"
    assert model.reason() is None
    assert runs_fused(model, x)


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


# Modules ---------------------------------------------------------------------------------------

EMULATED = {"split": "snv2_emulated::split_dw_cat_shuffle"}


@each_drop_in
def test_modules_on_two_backends_in_turn(kind: str) -> None:
    """Each with weights of its own, packed once."""
    plain, module, x = drop_in(kind)
    with torch.no_grad():
        expected = plain(x)
        packed = module.packed()
        for _ in range(2):
            with snv2.use_backend("cuda-emulated"):
                assert module.reason() is None
                module(x)  # packs
                names = ops_called(module, x)
                assert names == [EMULATED.get(kind, "snv2_emulated::gpu_network")]
                assert max_error(module(x), expected) < FP32_BOUND
            assert module.reason() is None
            assert not any(n.startswith("snv2_emulated") for n in ops_called(module, x))
            assert max_error(module(x), expected) < FP32_BOUND
            with snv2.use_backend("reference"):
                assert torch.equal(module(x), expected)
            assert module.packed() is packed
        assert len(packed._weights) == (1 if kind == "split" else 2)


@each_drop_in
def test_weights_of_all_backends_are_packed_again(kind: str) -> None:
    plain, module, x = drop_in(kind)
    backends = ("cpu", "cuda-emulated")
    with torch.no_grad():
        for scale in (1.0, 1.5):
            for m in (plain, module):
                for p in m.parameters():
                    p.mul_(scale)
            for name in backends:
                with snv2.use_backend(name):
                    assert max_error(run_fused(module, x), plain(x)) < FP32_BOUND


def test_fuse_for_the_emulator() -> None:
    model, x = small_network(), draw(1, 3, 33, 33)
    module = snv2.fuse(model, "cuda-emulated")
    with torch.no_grad():
        assert max_error(module(x), model(x)) < FP32_BOUND
        assert ops_called(module, x) == ["snv2_emulated::gpu_network"]
    assert {part.reason for part in snv2.explain(module).parts} == {None}


@pytest.mark.parametrize("kind", ["split", "unit-s1", "unit-s2", "stage"])
def test_gradients_of_a_module_on_the_emulator(kind: str) -> None:
    plain, module, x = drop_in(kind)
    grads = []
    for m in (plain, module):
        image = x.clone().requires_grad_()
        with snv2.use_backend("cuda-emulated"):
            m(image).square().mean().backward()
        grads.append(image.grad)
    assert max_error(grads[1], grads[0]) < FP32_BOUND


@pytest.mark.parametrize("name", ["reference", "cpu", "cuda-emulated"])
def test_engine_is_fixed_to_the_backend_of_its_making(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def make() -> snv2.Engine:
        return snv2.Engine(small_network(), (1, 3, 33, 33))

    monkeypatch.setenv("SNV2_BACKEND", name)
    if name == "reference":
        with pytest.raises(RuntimeError, match="device: the backend 'reference', which is set"):
            make()
        return
    engine = make()
    monkeypatch.delenv("SNV2_BACKEND")
    with snv2.use_backend(name):
        other = make()
    for e in (engine, other):
        assert e.report().backend == name
        names = ops_called(e, draw(1, 3, 33, 33))
        assert names == ["snv2::network_out" if name == "cpu" else "snv2_emulated::gpu_network_out"]


# Errors ---------------------------------------------------------------------------------------


def _use(name: Any) -> None:
    with snv2.use_backend(name):
        pass


ASK = {
    "use_backend": _use,
    "op": on,
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


@pytest.mark.parametrize("name", ["cpu", "cuda-emulated"])
def test_backend_for_a_tensor_elsewhere(name: str) -> None:
    x = torch.empty(1, 2, 3, 3, device="meta")
    with pytest.raises(ValueError, match=f"backend: '{name}' cannot run a tensor on device meta"):
        snv2.ops.cat_shuffle(x, x, backend=name)
    assert snv2.ops.cat_shuffle(x, x).shape == (1, 4, 3, 3)


# CUDA -----------------------------------------------------------------------------------------
#
# What machines differ in is pretended, since few have it all.


@dataclass(frozen=True)
class FakeGpu:
    name: str
    major: int
    minor: int


@pytest.fixture
def cuda_built_for(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends a build with CUDA kernels, and perhaps a GPU."""

    def pretend(*targets: str, gpu: FakeGpu | None = None) -> None:
        monkeypatch.setattr(backends, "_cuda_targets", targets)
        monkeypatch.setattr(backends, "_cuda_failure", None)
        monkeypatch.setattr(backends, "_known_gpu_state", backends._gpu_state)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)

    return pretend


def test_cuda_state_of_a_gpu(cuda_built_for: Callable[..., None]) -> None:
    cuda_built_for("sm_80", "sm_90", gpu=FakeGpu("NVIDIA H100", 9, 0))
    assert snv2.backends()["cuda"] == "ok (NVIDIA H100, sm_90)"
    gpu = torch.device("cuda", 0)
    assert resolve(gpu) == resolve(gpu, "cuda") == "cuda"
    assert resolve(CPU) == "cpu"
    with pytest.raises(ValueError, match="backend: 'cuda' cannot run a tensor on device cpu"):
        on("cuda")
    with pytest.raises(ValueError, match="backend: 'cpu' cannot run a tensor on device cuda:0"):
        resolve(gpu, "cpu")


def test_cuda_state_without_a_gpu(cuda_built_for: Callable[..., None]) -> None:
    cuda_built_for("sm_80", "sm_90")
    assert snv2.backends()["cuda"] == "built for sm_80, sm_90, but there is no GPU"


@pytest.mark.parametrize(
    ("targets", "capability", "runs"),
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 9), True),
        (["sm_80"], (9, 0), False),
        (["sm_86"], (8, 0), False),
        (["sm_80", "compute_80"], (9, 0), True),
        (["sm_80", "compute_80"], (12, 0), True),
        (["compute_90"], (8, 9), False),
        (["sm_90a"], (9, 0), True),
        (["compute_90a"], (10, 0), False),
        (["compute_100f"], (10, 3), True),
        (["compute_100f"], (12, 0), False),
        (["sm_100"], (10, 3), True),
    ],
    ids=str,
)
def test_cuda_targets(
    cuda_built_for: Callable[..., None], targets: list[str], capability: tuple[int, int], runs: bool
) -> None:
    cuda_built_for(*targets, gpu=FakeGpu("GPU", *capability))
    state = snv2.backends()["cuda"]
    gpu = torch.device("cuda", 0)
    if runs:
        assert state == f"ok (GPU, sm_{capability[0]}{capability[1]})"
        assert resolve(gpu) == "cuda"
    else:
        assert state.startswith(f"built for {', '.join(targets)}, but the GPU is GPU, sm_")
        assert resolve(gpu) == "reference"
        with pytest.raises(RuntimeError, match="backend: 'cuda' is not available: built for"):
            resolve(gpu, "cuda")


def test_cuda_library_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(libraries, "FOLDER", tmp_path)
    library = libraries.library("cuda")
    monkeypatch.setattr(backends, "_cuda_targets", ("sm_90",))
    assert str(backends._load_cuda()).startswith("not built: ")
    library.write_bytes(b"not a library")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backends._load_cuda() == "built for sm_90, but this PyTorch has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert str(backends._load_cuda()).startswith("built for sm_90, but it does not load: ")


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


@pytest.mark.parametrize("name", ["portable", "", "sse9"])
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
