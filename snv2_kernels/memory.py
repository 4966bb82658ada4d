"""Memory: huge pages for what a forward streams through, which save the walks of page tables, and
no search for garbage meanwhile."""

from __future__ import annotations

import contextlib
import gc
import mmap
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["empty_floats", "no_collections"]

_HUGE_PAGE = 2 << 20


def empty_floats(count: int) -> Tensor:
    """An uninitialised float32 tensor [count] on the CPU."""
    size = 4 * count
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=torch.float32, device="cpu")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=flags)
    with contextlib.suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    return torch.frombuffer(memory, dtype=torch.float32, count=count, offset=-address % _HUGE_PAGE)


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Keep what makes many small objects, and lets go of them by itself, from being searched for
    cycles again and again, with all that a process has."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
