"""Memory that a forward streams through: in huge pages where the system has them, which save the
walks of page tables."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

__all__ = ["empty_floats"]

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
