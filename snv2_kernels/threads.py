"""Runs torch's functions in the calling thread alone."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["one_thread"]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keep small operations from waking threads, which spin where a processor is busy.

    The settings of OpenMP and MKL are each thread's own here, so others go on with as many threads
    as they had, and none can see or undo the change; those of torch.set_num_threads are the
    process's. Where torch is built with neither, nothing changes.
    """
    torch.get_num_threads()  # a thread's first call takes over what the process has set
    openmp = _function("omp_set_num_threads"), _function("omp_get_max_threads")
    mkl = _function("MKL_Set_Num_Threads_Local")
    threads = openmp[1]() if all(openmp) else None
    if threads is not None:
        openmp[0](1)
    local = None if mkl is None else mkl(1)  # which returns what was set before
    try:
        yield
    finally:
        if threads is not None:
            openmp[0](threads)
        if mkl is not None:
            mkl(local)


@functools.cache
def _function(name: str) -> Any:
    """A C function of the libraries that torch has loaded, None where there is none."""
    try:
        return getattr(ctypes.CDLL(torch._C.__file__), name)
    except (AttributeError, OSError):
        return None
