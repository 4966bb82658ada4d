"""Runs damaged plans, in a process of its own that a fault would end:

    python _mutations.py BACKEND FIRST END

says the number of each mutation before it runs, and how many ran through behind the last. Each
array of a call ends where a page begins that nobody may touch."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from snv2_kernels import _native, gpu
from snv2_kernels.ops import OPERATORS
from snv2_kernels.packing.units import Unsupported
from snv2_kernels.runners import WORKSPACE_SLACK

_MOST_PLANS = 60
_SECONDS = 60  # of a mutation
_MEMORY = 8 << 30
_MOST_WORKSPACE = 4 << 20
ABSURD = [-(1 << 63), -(1 << 40), -(1 << 24), -17, -3, -2, -1, 0, 1, 2, 3, 15, 16, 17, 255, 256,
          1 << 20, 1 << 24, 1 << 31, 1 << 40, 1 << 60, (1 << 63) - 1]  # fmt: skip

# Memory ---------------------------------------------------------------------------------------


class Fenced:
    """Memory of at most so many bytes, the last of which lies before a page that is closed."""

    def __init__(self, most: int) -> None:
        size = -(-most // mmap.PAGESIZE) * mmap.PAGESIZE
        self._pages = mmap.mmap(-1, size + mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        libc = ctypes.CDLL(None, use_errno=True)
        closed = libc.mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0)
        assert closed == 0, os.strerror(ctypes.get_errno())
        self._size = size

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, aligned: int = 1) -> Tensor:
        """Memory for a tensor, at a multiple of so many bytes."""
        count = math.prod(shape)
        begin = (self._size - count * dtype.itemsize) // aligned * aligned
        assert begin >= 0
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(self._pages, dtype=dtype, count=count, offset=begin)
        return flat.view(shape)

    def copy(self, t: Tensor, aligned: int = 1) -> Tensor:
        return self.tensor(tuple(t.shape), t.dtype, aligned).copy_(t)


# Plans ----------------------------------------------------------------------------------------


def plans(backend: str, count: int) -> list[tuple[Any, Tensor]]:
    """Plans of units, stages, networks, gates and pieces, and an input for each."""
    # Not needed by who only starts the process.
    from _small_networks import BRANCHES, drawn_network, drawn_unit

    made: list[tuple[Any, Tensor]] = []
    for seed in itertools.count():
        random = Random(seed)
        dtype = (torch.float32, torch.float16, torch.bfloat16)[seed % 3]
        if seed % 2:
            network = drawn_network(random)
        else:
            network = drawn_unit(random, BRANCHES[seed // 2 % len(BRANCHES)])
        with contextlib.suppress(Unsupported):
            if backend == "cpu" and seed % 4 == 3:
                plan = network.integer_plan()
            else:
                plan = network.plan(backend, dtype)
            n, h, w = random.randint(1, 2), random.randint(1, 9), random.randint(1, 5)
            x = torch.randn(n, network.channels, h, w).to(dtype)
            if random.random() < 0.5:
                x = x.contiguous(memory_format=torch.channels_last)
            made.append((plan, x))
        if len(made) == count:
            return made
    raise AssertionError


def mutated(words: Tensor, header: int, step: int, random: Random) -> Tensor:
    """A copy with one to three faults."""
    words = words.clone()
    tables = header + step * int(words[1])

    def place() -> int:
        """Of a word; steps are hit most."""
        part = random.random()
        first, end = (0, header) if part < 0.1 else (header, tables)
        if part > 0.75 and tables < len(words):
            first, end = tables, len(words)
        return random.randrange(first, end)

    def flip(at: int) -> int:
        return int(words[at]) ^ (1 << random.randrange(63))

    for _ in range(random.choice([1, 1, 1, 2, 3])):
        kind, at, other = random.randrange(8), place(), place()
        if kind == 0:
            words[at] = flip(at)
        elif kind == 1:
            words[at] = random.choice(ABSURD)
        elif kind == 2:
            words[at] = max(min(int(words[at]), 1 << 62), -(1 << 62)) + random.choice([-16, -1, 1])
        elif kind == 3:
            words[at] = random.randint(-3, 40)
        elif kind == 4:
            words[at] = words[other]
        elif kind == 5:
            words[[at, other]] = words[[other, at]]
        elif kind == 6:
            steps = words[header:tables].view(-1, step)
            i, j = random.randrange(len(steps)), random.randrange(len(steps))
            steps[[i, j]] = steps[[j, i]]
        elif random.random() < 0.5:
            return words[: random.randrange(len(words))]
        else:
            words[at] = random.randrange(1 << 63) * random.choice([-1, 1])
    return words


# Calls ----------------------------------------------------------------------------------------

Run = Callable[[Any, Tensor, Tensor], None]  # plan, input, words


def _results(fences: Iterator[Fenced], plan: Any, x: Tensor) -> list[Tensor]:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    results = []
    for shape in plan.result_shapes(x.shape[0], *x.shape[2:]):
        out = next(fences).tensor(shape, x.dtype)
        if last and len(shape) == 4:
            n, c, h, w = shape
            out = out.view(n, h, w, c).permute(0, 3, 1, 2)
        results.append(out)
    return results


def _fenced_map(fence: Fenced, x: Tensor) -> Tensor:
    if x.is_contiguous():
        return fence.copy(x)
    return fence.copy(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


def on_cpu() -> tuple[int, int, Run]:
    fences = [Fenced(1 << 20) for _ in range(8)]
    memory = Fenced(_MOST_WORKSPACE)
    ops: Any = OPERATORS["cpu"]

    def run(plan: Any, x: Tensor, words: Tensor) -> None:
        n, _, h, w = x.shape
        weights = plan.weights
        size = _native.workspace_bytes(words.numpy(), weights.numel(), n, h, w, 1)
        if size > _MOST_WORKSPACE:
            ops.network_results(x, weights, words, *plan.result_fields)
            return
        free = iter(fences)
        arrays = _fenced_map(next(free), x), next(free).copy(weights), next(free).copy(words)
        workspace = memory.tensor((size // 4,), torch.float32)
        ops.network_out(*arrays, workspace, _results(free, plan, x))

    return _native.HEADER_WORDS, _native.STEP_WORDS, run


def on_the_emulator() -> tuple[int, int, Run]:
    fences = [Fenced(1 << 20) for _ in range(10)]
    memory = Fenced(_MOST_WORKSPACE + WORKSPACE_SLACK)
    ops: Any = OPERATORS["cuda-emulated"]

    def run(plan: Any, x: Tensor, words: Tensor) -> None:
        n, _, h, w = x.shape
        size = gpu.workspace_bytes(words, n, h, w)
        if size > _MOST_WORKSPACE:
            ops.gpu_network_results(x, *plan.arrays[:3], words, *plan.result_fields)
            return
        free = iter(fences)
        arrays = [next(free).copy(t, 16) for t in plan.arrays[:3]]
        x, words = _fenced_map(next(free), x), next(free).copy(words)
        workspace = memory.tensor((size + WORKSPACE_SLACK,), torch.uint8)
        ops.gpu_network_out(x, *arrays, words, workspace, _results(free, plan, x), [], [])

    return _native.GPU_HEADER_WORDS, _native.GPU_STEP_WORDS, run


BACKENDS = {"cpu": on_cpu, "cuda-emulated": on_the_emulator}


def main(backend: str, first: int, end: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    header, step, run = BACKENDS[backend]()
    # A plan takes longer to make than its mutations to run.
    pool, ran = plans(backend, min(_MOST_PLANS, 1 + (end - first) // 16)), 0
    for plan, x in pool:
        run(plan, x, plan.words)
    for seed in range(first, end):
        os.write(1, f"{seed}\n".encode())
        signal.alarm(_SECONDS)
        plan, x = pool[seed % len(pool)]
        words = mutated(plan.words, header, step, Random(seed))
        # Whatever else is raised ends the process too.
        with contextlib.suppress(RuntimeError, ValueError):
            run(plan, x, words)
            ran += 1
    print(f"ran through: {ran}")


def ran_through(backend: str, first: int, end: int, timeout: float) -> int:
    """Of these mutations, how many ran instead of being refused; fails with the number of the one
    that ended the process."""
    child = subprocess.run(
        [sys.executable, __file__, backend, str(first), str(end)], capture_output=True, text=True,
        timeout=timeout, check=False, cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    last = child.stdout.split("\n")[-2:]
    assert child.returncode == 0, (
        f"mutation {last[0]} on {backend} ended the process with {child.returncode}:\n"
        f"{child.stderr[-2000:]}"
    )
    return int(last[0].removeprefix("ran through: "))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
