"""Shared by all tests: NaN-poisoned allocations, torchvision, the backends under test."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch

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


@pytest.fixture(params=_native.available_cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set of this machine."""
    before = _native.cpu_isa()
    _native.set_cpu_isa(request.param)
    yield request.param
    _native.set_cpu_isa(before)
