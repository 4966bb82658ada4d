"""Shared by all tests: NaN-poisoned allocations, torchvision, the backends under test."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import re
import types
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

# Inductor compiles in the test's own process, not in workers that each import PyTorch first, and
# for this machine's vectors without trying the compiler on each kind.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# Triton's kernels run on the GPU, or where there is none in Triton's interpreter, which is chosen
# before anyone imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from _cases import case_id, in_turn
from _ptx import NAME as CUDA_PTX
from _ptx import PTX

import snv2_kernels as snv2
from snv2_bench.guidelines.networks import torchvision_models
from snv2_bench.peers import Unavailable
from snv2_kernels import _native
from snv2_kernels.backends import DEVICES, EMULATED

_INTERPRETED_ELEMENTS = 12_000  # of a map; the interpreter of Triton takes a second for more


_TRITON = ("triton", "snv2_triton")


def _on_triton(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    values = call.params.values() if call is not None else ()
    backends = (v[0] if isinstance(v, tuple) and v else v for v in values)
    return any(type(backend) is str and backend in _TRITON for backend in backends)


def _is_large(params: dict[str, Any]) -> bool:
    shape = params.get("shape") or params.get("case")
    if isinstance(shape, tuple) and isinstance(shape[-1], tuple):
        shape = shape[-1]
    elements = math.prod(shape) if isinstance(shape, tuple) else 0
    named = any(type(v) is str and re.search(r"x\d_\d", v) for v in params.values())
    return bool("width" in params or named or elements > _INTERPRETED_ELEMENTS)


def _leave_to_the_slow_tests(items: list[pytest.Item]) -> None:
    """On Triton, whose interpreter and compiler take long, all but small cases: so many of a test
    that each value of each parameter has one, or as many as its mark ``on_triton`` says."""
    tests: dict[str, list[tuple[pytest.Item, set[str]]]] = {}
    for item in filter(_on_triton, items):
        params = item.callspec.params  # type: ignore[attr-defined]
        if params.get("size") == 224 and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="takes too long in Triton's interpreter"))
        if _is_large(params):
            item.add_marker(pytest.mark.slow)
        else:
            values = {f"{name}={value}" for name, value in params.items()}
            tests.setdefault(item.nodeid.partition("[")[0], []).append((item, values))
    for cases in tests.values():
        unseen = set().union(*(values for _, values in cases))
        mark = cases[0][0].get_closest_marker("on_triton")
        most = len(cases) if mark is None else mark.args[0]
        while unseen and most > 0:
            best = max(cases, key=lambda case: len(case[1] & unseen))
            cases.remove(best)
            unseen -= best[1]
            most -= 1
        for item, _ in cases:
            item.add_marker(pytest.mark.slow)


def _mark_triton(items: list[pytest.Item]) -> None:
    """Where there is a GPU, Triton's kernels run on it."""
    for item in items:
        if _on_triton(item) or "triton" in item.fixturenames:  # type: ignore[attr-defined]
            item.add_marker("triton")
            if torch.cuda.is_available():
                item.add_marker("gpu")


def _mark_ptx(items: list[pytest.Item]) -> None:
    """Cases on the PTX interpreter are marked, and skipped where it is not there."""
    absent = pytest.mark.skip(reason="no PTX interpreter: `make test-ptx` builds it, with nvcc")
    for item in items:
        call = getattr(item, "callspec", None)
        if call is not None and CUDA_PTX in map(str, call.params.values()):
            item.add_marker("ptx")
        if not PTX and item.get_closest_marker("ptx"):
            item.add_marker(absent)


@pytest.hookimpl(tryfirst=True)  # before markers are looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _mark_triton(items)
    _mark_ptx(items)
    _leave_to_the_slow_tests(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def torchvision() -> types.ModuleType:
    try:
        torchvision_models()
    except Unavailable as reason:
        pytest.skip(str(reason))
    return importlib.import_module("torchvision")


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
def on_the_gpu(backend: str = "cuda") -> Iterator[None]:
    state = snv2.backends()[backend]
    if not state.startswith("ok"):
        pytest.skip(f"{backend}: {state}")
    # Eager PyTorch is the measure, so it is not to round its float32 products to TF32.
    with torch.device("cuda"), torch.backends.cudnn.flags(allow_tf32=False):
        yield


@functools.cache
def round_as_a_gpu() -> None:
    """Triton's interpreter cuts the bits of a float32 off that bfloat16 lacks, where the compiler
    rounds to nearest; and takes long for it."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        types = src.dtype.scalar, dst_type.scalar
        if types == (tl.float32, tl.bfloat16):
            rounded = torch.tensor(src.data, device="cpu").bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            exact = torch.tensor(src.data, device="cpu").view(torch.bfloat16).float()
            return TensorHandle(exact.numpy(), tl.float32)
        return cast(self, src, dst_type)

    InterpreterBuilder.cast_impl = cast_impl


@contextlib.contextmanager
def on_triton() -> Iterator[None]:
    """In the interpreter in tiles so large that it takes a second less often."""
    if DEVICES["triton"] == "cuda":
        with on_the_gpu("triton"):
            yield
        return
    state = snv2.backends()["triton"]
    if not state.startswith("ok"):
        pytest.skip(f"triton: {state}")
    from snv2_kernels.triton import GradientTile, ProductTile, StripTile, Tile, use_tile

    round_as_a_gpu()
    with use_tile(
        Tile(512, 32, 4),
        StripTile(4, 4, 32, 64, 4),
        GradientTile(7, 7, 2, 64, 16, 4),
        ProductTile(64, 256, 64, 4),
    ):
        yield


# Wheels are without the emulator.
needs_emulator = pytest.mark.skipif(not EMULATED, reason="the emulator was not built")
GPU_BACKENDS = [
    *["cuda-emulated"] * EMULATED,
    *[CUDA_PTX] * bool(PTX),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@contextlib.contextmanager
def running_on(name: str) -> Iterator[str]:
    """New tensors lie on the backend's device. A name may end in the CPU's instruction set."""
    backend, _, isa = name.partition("-")
    if name == "cuda":
        with on_the_gpu():
            yield name
    elif name == "triton":
        with on_triton():
            yield name
    elif backend == "cpu" and isa:
        with instruction_set(isa):
            yield backend
    else:
        yield name


def each_of(backends: list[Any]) -> Any:
    """A fixture that runs the test once on each; new tensors lie on its device."""

    def backend(request: pytest.FixtureRequest) -> Iterator[str]:
        with running_on(request.param) as name:
            yield name

    return pytest.fixture(backend, params=backends)


# All that have kernels, the CPU's with each instruction set. Of ops, amx and avx512_bf16 have those
# of avx512, and neon_bf16 those of neon; avx512_vnni has all but those of integers (test_int8.py).
FLOAT_ISAS = [name for name in _native.available_cpu_isas() if name != "avx512_vnni"]
BACKENDS = [*(f"cpu-{isa}" for isa in FLOAT_ISAS), *GPU_BACKENDS, "triton"]
OTHERS_OPS = ("cpu-amx", "cpu-avx512_bf16", "cpu-neon_bf16")
OP_BACKENDS = [name for name in BACKENDS if name not in OTHERS_OPS]
backend = each_of(BACKENDS)


def each_in_turn(
    names: str, *factors: Sequence[Any], backends: Sequence[Any] = BACKENDS
) -> pytest.MarkDecorator:
    """The rows of ``in_turn`` on all backends, each of which begins another turn."""
    rows = []
    for turn, each in enumerate(backends):
        given = each if isinstance(each, type(pytest.param())) else pytest.param(each)
        rows += [
            pytest.param(*given.values, *row, marks=given.marks)
            for row in in_turn(*factors, turn=turn)
        ]
    return pytest.mark.parametrize(f"backend, {names}", rows, indirect=["backend"], ids=case_id)


# One of each kind of kernels.
KERNELS = ["cpu", *GPU_BACKENDS, "triton"]


@pytest.fixture(params=KERNELS)
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
def triton() -> Iterator[types.ModuleType]:
    """The Triton kernels, where they run; new tensors lie there."""
    with running_on("triton"):
        yield importlib.import_module("snv2_kernels.triton")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What other tests compiled is forgotten, and what this one does."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def gpu() -> Iterator[None]:
    """Skips the test where there is no GPU; new tensors lie on it."""
    with on_the_gpu():
        yield
