"""Shared by all tests: NaN-poisoned allocations, torchvision, the backends under test."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator

import pytest
import torch

import snv2_kernels as snv2
from snv2_kernels import _native

# A CPU build of torch beside PyPI's torchvision lacks the operators that torchvision's binary
# would define, and its import fails for their absence. The models need none of them.
_torchvision_ops = torch.library.Library("torchvision", "DEF")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def torchvision() -> types.ModuleType:
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        try:
            _torchvision_ops.define(schema)
        except RuntimeError:  # a torchvision that brought its own
            break
    return pytest.importorskip("torchvision")


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """Every torch.empty, in C++ too, is NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = _native.cpu_isa()
    _native.set_cpu_isa(name)
    try:
        yield
    finally:
        _native.set_cpu_isa(before)


@pytest.fixture(params=_native.available_cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set of this machine."""
    with instruction_set(request.param):
        yield request.param


@contextlib.contextmanager
def on_the_gpu() -> Iterator[None]:
    state = snv2.backends()["cuda"]
    if not state.startswith("ok"):
        pytest.skip(f"cuda: {state}")
    # Eager PyTorch is the measure, so it is not to round its float32 products to TF32.
    with torch.device("cuda"), torch.backends.cudnn.flags(allow_tf32=False):
        yield


GPU_BACKENDS = ["cuda-emulated", pytest.param("cuda", marks=pytest.mark.gpu)]


@contextlib.contextmanager
def running_on(name: str) -> Iterator[str]:
    """New tensors lie on the backend's device. A name may end in the CPU's instruction set."""
    backend, _, isa = name.partition("-")
    if name == "cuda":
        with on_the_gpu():
            yield name
    elif backend == "cpu" and isa:
        with instruction_set(isa):
            yield backend
    else:
        yield name


@pytest.fixture(params=[*(f"cpu-{isa}" for isa in _native.available_cpu_isas()), *GPU_BACKENDS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each backend that has kernels, the CPU's with each instruction set.
    New tensors lie on its device."""
    with running_on(request.param) as name:
        yield name


@pytest.fixture(params=["cpu", *GPU_BACKENDS])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each backend that has kernels, and everything inside it there."""
    with running_on(request.param) as name, snv2.use_backend(name):
        yield name


@pytest.fixture(params=GPU_BACKENDS)
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same for the CUDA kernels alone."""
    with running_on(request.param) as name, snv2.use_backend(name):
        yield name


@pytest.fixture
def gpu() -> Iterator[None]:
    """Skips the test where there is no GPU; new tensors lie on it."""
    with on_the_gpu():
        yield
