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


@pytest.fixture(
    params=[
        *(f"cpu-{isa}" for isa in _native.available_cpu_isas()),
        "cuda-emulated",
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each backend that has the ops, the CPU's with each instruction set.
    New tensors lie on its device."""
    name, _, isa = request.param.partition("-")
    if request.param == "cuda":
        with on_the_gpu():
            yield name
    elif name == "cpu":
        with instruction_set(isa):
            yield name
    else:
        yield request.param


@pytest.fixture
def gpu() -> Iterator[None]:
    """Skips the test where there is no GPU; new tensors lie on it."""
    with on_the_gpu():
        yield
