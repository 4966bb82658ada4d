"""What bounds the time of a network on this CPU: how fast it multiplies and copies, measured."""

from __future__ import annotations

import copy
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

from snv2_kernels import _native

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

__all__ = ["Floor", "least_bytes", "measure_floor", "multiply_adds"]

_BURST = 400_000_000  # multiply-adds of a thread, from which their rate is known
_SECONDS = 0.01  # of a thread, beside which to start it takes nothing
_COPIED_BYTES = 1 << 27  # more than caches hold
_CACHED_BYTES = 1 << 18  # for each thread; read and written it fits a core's own cache
_CACHED_COPIES = 200
_TRIES = 10


@dataclass(frozen=True)
class Floor:
    """Peaks of a number of threads together."""

    threads: int
    element: str  # what is multiplied: "float32" or "bfloat16"
    multiply_adds_per_s: float  # in registers, with the instruction set of the kernels
    copy_bytes_per_s: float  # read and written, by torch's copy, through memory
    cached_copy_bytes_per_s: float  # the same within the cores' own caches

    def __str__(self) -> str:
        return (
            f"{self.threads} thread{'s' if self.threads > 1 else ''}: "
            f"{self.multiply_adds_per_s / 1e9:.1f} G multiply-adds/s in {self.element}, "
            f"copies {self.copy_bytes_per_s / 1e9:.1f} GB/s, "
            f"{self.cached_copy_bytes_per_s / 1e9:.1f} GB/s in caches"
        )

    def least_ms(self, multiply_adds: int, moved_bytes: int) -> float:
        """The longer of both times. Bytes count at the rate of caches: a call that follows another
        finds there what fits."""
        return 1e3 * max(
            multiply_adds / self.multiply_adds_per_s, moved_bytes / self.cached_copy_bytes_per_s
        )


def _fastest(run: Callable[[], float]) -> float:
    """Units/s of the best of several runs; ``run`` returns how many units it did."""
    rates = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        units = run()
        rates.append(units / (time.perf_counter() - start))
    return max(rates)


@functools.cache
def measure_floor(threads: int, element: torch.dtype = torch.float32) -> Floor:
    """The floor of ``threads`` threads for maps of ``element``, float32 or, where the instruction
    set in use has it, bfloat16; measured once in a process."""
    work = functools.partial(_native.run_multiply_adds, bfloat16=element == torch.bfloat16)
    source, target = torch.zeros(2, _COPIED_BYTES, dtype=torch.uint8, device="cpu")
    near_source, near_target = torch.zeros(2, threads * _CACHED_BYTES, dtype=torch.uint8)

    def copy() -> float:
        target.copy_(source)
        return 2.0 * _COPIED_BYTES

    def cached_copy() -> float:
        for _ in range(_CACHED_COPIES):
            near_target.copy_(near_source)
        return 2.0 * threads * _CACHED_BYTES * _CACHED_COPIES

    with ThreadPoolExecutor(threads) as pool:
        burst = max(_BURST, int(_SECONDS * _fastest(lambda: float(work(_BURST)))))
        multiply_adds = _fastest(lambda: float(sum(pool.map(work, [burst] * threads))))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        name = str(element).removeprefix("torch.")
        return Floor(threads, name, multiply_adds, _fastest(copy), _fastest(cached_copy))
    finally:
        torch.set_num_threads(before)


def least_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of a network's input and parameters, which a call reads at least once each.

    Its scores are left out, 4 KB an image; maps between layers need not be moved far.
    """
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return parameters + x.numel() * x.element_size()


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """Multiply-adds of convolutions and linear layers; nothing is computed."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(x.to("meta", torch.float32))
    return int(counter.get_total_flops()) // 2
