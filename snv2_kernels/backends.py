"""Which backend runs what: availability, selection and the override for a block of code.

Selection, the first that says something wins: :func:`use_backend`, the ``backend`` argument of
an op or of :func:`snv2_kernels.fuse`, the environment variable ``SNV2_BACKEND``, and ``auto``,
which takes the fastest backend of the tensor's device: on a GPU ``cuda``, else ``triton``.

``cuda-emulated`` is for tests, and never chosen by ``auto``: it runs the CUDA kernels on CPU
tensors, checks each of their memory accesses, and is slow. Where ``TRITON_INTERPRET=1`` is set
before this package is imported, ``triton`` is likewise: Triton's interpreter runs its kernels on
CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

from snv2_kernels import _native, cuda_kernels
from snv2_kernels.libraries import has_library, load_library

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["DEVICES", "EMULATED", "NAMES", "backends", "check_backend", "resolve", "use_backend"]

_TRITON_CAPABILITY = (8, 0)  # the oldest GPU that Triton has bfloat16 for


def is_set(variable: str) -> bool:
    """As Triton reads its variables."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y")


_triton_interpreted = is_set("TRITON_INTERPRET")

# Type of the device whose tensors a backend of kernels takes.
DEVICES = {
    "cpu": "cpu",
    "cuda": "cuda",
    "cuda-emulated": "cpu",
    "triton": "cpu" if _triton_interpreted else "cuda",
}

_override: ContextVar[str | None] = ContextVar("snv2_backend", default=None)

# Availability ---------------------------------------------------------------------------------

_cuda_targets = cuda_kernels.targets()


def _built_for() -> str:
    return f"built for {', '.join(_cuda_targets)}"


def _load_cuda() -> str | None:
    """Load the CUDA kernels, or say why not. Importing must work on every machine."""
    if not (_cuda_targets and has_library("cuda")):
        return "not built: install again with SNV2_CUDA=1 where a CUDA toolkit (nvcc) is installed"
    if torch.version.cuda is None:
        return f"{_built_for()}, but this PyTorch has no CUDA"
    try:
        load_library("cuda")
    except OSError as error:
        return f"{_built_for()}, but it does not load: {error.__cause__ or error}"
    return None


load_library("torch")
_cuda_failure = _load_cuda()
# Whether the emulator of a GPU is there: it is built for tests, and wheels are without.
EMULATED = has_library("emulated_torch")
if EMULATED:
    load_library("emulated_torch")


def _covers(target: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``target`` runs on a GPU: machine code (sm_80) within its major version,
    PTX (compute_80) on all later ones; ending in f likewise within the major version, ending in a
    on that GPU only."""
    kind, _, number = target.partition("_")
    digits = number.rstrip("af")
    built = (int(digits[:-1]), int(digits[-1]))
    if number.endswith("a"):
        return capability == built
    later = kind == "compute" and number == digits
    return capability >= built and (later or capability[0] == built[0])


def _gpu_state(index: int) -> str:
    gpu = torch.cuda.get_device_properties(index)
    name = f"{gpu.name}, sm_{gpu.major}{gpu.minor}"
    if any(_covers(target, (gpu.major, gpu.minor)) for target in _cuda_targets):
        return f"ok ({name})"
    return f"{_built_for()}, but the GPU is {name}"


_known_gpu_state = functools.cache(_gpu_state)


def _cuda_state(index: int | None = None) -> str:
    """State of ``cuda`` on a GPU, the current one by default."""
    if _cuda_failure is not None:
        return _cuda_failure
    if index is None:
        if not torch.cuda.is_available():
            return f"{_built_for()}, but there is no GPU"
        index = torch.cuda.current_device()
    # The compiler knows what to make of torch's functions, but not of a cache.
    return (_gpu_state if torch.compiler.is_compiling() else _known_gpu_state)(index)


def _find_triton() -> str | None:
    """Version of the Triton that is installed, without importing it."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # built in some other way
        return "of unknown version"


_triton_version = _find_triton()


def _triton_state(index: int | None = None) -> str:
    """State of ``triton`` on a GPU, the current one by default."""
    if _triton_version is None:
        return "not installed: pip install triton"
    name = f"triton {_triton_version}"
    if _triton_interpreted:
        return f"ok ({name}, interpreted on the CPU for tests, slowly)"
    if torch.version.cuda is None:
        return f"{name}, but this PyTorch has no CUDA"
    if index is None:
        if not torch.cuda.is_available():
            return f"{name}, but there is no GPU"
        index = torch.cuda.current_device()
    gpu = torch.cuda.get_device_properties(index)
    if (gpu.major, gpu.minor) < _TRITON_CAPABILITY:
        return f"{name}, but the GPU is {gpu.name}, sm_{gpu.major}{gpu.minor}"
    return f"ok ({name})"


def _cpu_state() -> str:
    state = f"ok ({_native.cpu_isa()})"
    wanted = os.environ.get("SNV2_CPU_ISA")
    if wanted and wanted not in _native.available_cpu_isas():
        state += f", SNV2_CPU_ISA={wanted} is not available on this machine"
    return state


def _emulated_state() -> str:
    if EMULATED:
        return "ok (for tests: the CUDA kernels on the CPU, slowly)"
    return "not built: for tests, which run in a checkout"


# Functions, since the state of a GPU is not asked for before someone wants to know.
_STATES: dict[str, Callable[[], str]] = {
    "reference": lambda: "ok",
    "cpu": _cpu_state,
    "cuda": _cuda_state,
    "cuda-emulated": _emulated_state,
    "triton": _triton_state,
}
NAMES = ("auto", *_STATES)


def backends() -> dict[str, str]:
    """State of each backend: ``"ok"``, with detail, or why it is not there."""
    return {name: state() for name, state in _STATES.items()}


# Selection ------------------------------------------------------------------------------------


def check_backend(name: str) -> str:
    """``name`` if it can be used.

    Raises:
        ValueError: if there is no such backend.
        RuntimeError: if this installation lacks it, with the reason.
    """
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    if name != "auto":
        _check_state(name, _STATES[name]())
    return name


def _check_state(name: str, state: str) -> None:
    if not state.startswith("ok"):
        raise RuntimeError(f"backend: {name!r} is not available: {state}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run everything inside the ``with`` block on one backend, whatever else was chosen.

    It holds for the current thread (or asyncio task) only.

    Raises:
        ValueError: if there is no such backend.
        RuntimeError: if this installation lacks it, with the reason.
    """
    token = _override.set(check_backend(name))
    try:
        yield
    finally:
        _override.reset(token)


def _fastest(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    if device.type == "cuda":
        if _cuda_state(device.index).startswith("ok"):
            return "cuda"
        if DEVICES["triton"] == "cuda" and _triton_state(device.index).startswith("ok"):
            return "triton"
    return "reference"


def resolve(device: torch.device, requested: str | None = None) -> str:
    """Name of the backend that runs a tensor on ``device``; never ``"auto"``.

    Args:
        device: where the data lies.
        requested: the caller's wish; None for none.

    Raises:
        ValueError: if a backend was asked for that does not exist or cannot run on ``device``.
        RuntimeError: if a backend was asked for that this installation lacks.
    """
    # A compiled function keeps the choice that held when it was compiled.
    compiling = torch.compiler.is_compiling()
    # ONNX has none of the kernels' operators, so an exported model is the formula.
    if (compiling or torch._C._is_tracing()) and torch.onnx.is_in_onnx_export():
        return "reference"
    name = (None if compiling else _override.get()) or requested
    if name in (None, "auto"):
        # The compiler sets a guard on what it sees of os.environ.
        wanted = os.environ.get("SNV2_BACKEND") if compiling else _native.requested_backend()
        name = wanted or "auto"
    if name == "auto":
        return _fastest(device)
    # The common cases need no look-up.
    if name == "cpu" and device.type == "cpu":
        return name
    if name == "cuda" and device.type == "cuda":
        _check_state(name, _cuda_state(device.index))
        return name
    if name == "triton" and device.type == DEVICES["triton"]:
        _check_state(name, _triton_state(device.index))
        return name
    check_backend(name)
    if name in DEVICES and DEVICES[name] != device.type:
        raise ValueError(f"backend: {name!r} cannot run a tensor on device {device}")
    return name
