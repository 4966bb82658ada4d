"""Which backend runs what: availability, selection and the override for a block of code.

Selection, the first that says something wins: :func:`use_backend`, the ``backend`` argument of
an op or of :func:`snv2_kernels.fuse`, the environment variable ``SNV2_BACKEND``, and ``auto``,
which takes the fastest backend of the tensor's device.
"""

from __future__ import annotations

import contextlib
import os
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from snv2_kernels import _native

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["NAMES", "backends", "check_backend", "resolve", "use_backend"]

torch.ops.load_library(str(Path(__file__).parent / "libsnv2_torch.so"))

NAMES = ("auto", "reference", "cpu", "cuda", "triton")

_override: ContextVar[str | None] = ContextVar("snv2_backend", default=None)


def backends() -> dict[str, str]:
    """State of each backend: ``"ok"``, with detail, or why it is not there."""
    cpu = f"ok ({_native.cpu_isa()})"
    wanted = os.environ.get("SNV2_CPU_ISA")
    if wanted and wanted not in _native.available_cpu_isas():
        cpu += f", SNV2_CPU_ISA={wanted} is not available on this machine"
    return {
        "reference": "ok",
        "cpu": cpu,
        "cuda": "not built: this version has no CUDA kernels",
        "triton": "not built: this version has no Triton kernels",
    }


def check_backend(name: str) -> str:
    """``name`` if it can be used.

    Raises:
        ValueError: if there is no such backend.
        RuntimeError: if this installation lacks it, with the reason.
    """
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    if name != "auto":
        state = backends()[name]
        if not state.startswith("ok"):
            raise RuntimeError(f"backend: {name!r} is not available: {state}")
    return name


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
    override = None if torch.compiler.is_compiling() else _override.get()
    name = override or requested
    if name in (None, "auto"):
        name = os.environ.get("SNV2_BACKEND") or "auto"
    if name == "auto":
        return "cpu" if device.type == "cpu" else "reference"
    if name == "cpu" and device.type == "cpu":  # the common case needs no look-up
        return name
    check_backend(name)
    if name == "cpu":
        raise ValueError(f"backend: 'cpu' cannot run a tensor on device {device}")
    return name
