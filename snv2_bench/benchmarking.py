"""Timing a network run in several ways, side by side.

The ways (*peers*) take turns, one call each in random order, so that a machine that slows down
slows all of them. Each turn is one call that is not timed, which brings the peer's own weights
back into the caches and wakes its threads, and one that is. A turn starts when the threads of the
one before have stopped spinning, so each may spin as long as it likes to. Nothing is timed whose
output was not checked first, and that of each timed call is checked too. Then it is overwritten
with NaN, so that a later call cannot pass with what an earlier one left in memory.
"""

from __future__ import annotations

import functools
import math
import random
import time
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from snv2_bench.peers import INT8_PEERS, Unavailable, peers_of
from snv2_kernels.testing import float64_reference, max_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

__all__ = [
    "Comparison", "Measurement", "Turns", "one_line", "percentiles_of", "rms_error",
    "wait_until_idle", "wrong_output",
]  # fmt: skip

# Profiling executors and autotuners settle within this many calls.
_WARM_UP_CALLS = 3
# Systems count the time of a running thread in steps of up to 10 ms.
_IDLE_SECONDS = 0.01
_MAX_WAITS = 50
_PERCENTILES = (0, 10, 50, 90, 99, 100)
_RATIO_PERCENTILES = (10, 50, 90)


def one_line(error: BaseException) -> str:
    """The type of an exception and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def wrong_output(error: float, bound: float) -> str | None:
    """The reason not to tell a time, if an error is beyond its bound or NaN."""
    return None if error <= bound else f"wrong output: error {error:.1e}, allowed {bound:.1e}"


def rms_error(actual: Tensor, expected: Tensor) -> float:
    """The root mean square of ``actual - expected`` over that of ``expected``, in float64.

    Raises:
        ValueError: if the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(
            f"actual: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
        )
    expected = expected.double()
    scale = expected.square().mean().clamp_min(torch.finfo(torch.float64).tiny)
    return float(((actual.double() - expected).square().mean() / scale).sqrt())


def wait_until_idle() -> None:
    """Wait until this process's threads use no processor time, or for half a second."""
    for _ in range(_MAX_WAITS):
        before = time.process_time()
        time.sleep(_IDLE_SECONDS)
        if time.process_time() - before < _IDLE_SECONDS / 10:
            return


def percentiles_of(values: Sequence[float], points: Sequence[int]) -> dict[str, float]:
    """``{"p50": ...}`` for each of ``points``; empty without values."""
    if not values:
        return {}
    found = np.percentile(values, points).tolist()
    return {f"p{point}": value for point, value in zip(points, found, strict=True)}


@dataclass
class Measurement:
    """What is known about one peer."""

    peer: str
    error: float | None = None  # of its output, against float64; None before the check
    reason: str | None = None  # why it was not timed
    samples: list[float] = field(default_factory=list)  # milliseconds

    def percentiles(self) -> dict[str, float]:
        """Milliseconds at p0 (the minimum) to p100; empty without samples."""
        return percentiles_of(self.samples, _PERCENTILES)

    @property
    def median(self) -> float | None:
        """Milliseconds, None without samples."""
        return self.percentiles().get("p50")

    def paired(self, other: Measurement) -> dict[str, float]:
        """How often this peer's time the other's was, in rounds that both have: p10, p50, p90.

        What slows the machine for a while slows both, so these spread less than the times.
        """
        rounds = zip(other.samples, self.samples, strict=False)
        return percentiles_of([theirs / ours for theirs, ours in rounds], _RATIO_PERCENTILES)


class Turns:
    """Calls that are timed side by side.

    Add and prepare each, then time as many rounds as wanted; :attr:`rows` holds what is known at
    any moment, so that an interrupted run keeps what it has.

    Args:
        device: where the calls run. On a GPU a sample is the mean of ``burst`` calls between two
            waits for it, on a CPU that of one.
        burst: see ``device``.
    """

    def __init__(self, device: torch.device | None = None, burst: int = 20) -> None:
        self.rows: dict[str, Measurement] = {}
        self._gpu = device is not None and device.type == "cuda"
        self._calls = burst if self._gpu else 1
        self._entries: dict[str, _Entry] = {}
        self._ready: dict[str, _Ready] = {}
        self._random = random.Random(0)

    def add(
        self,
        name: str,
        build: Callable[[], Callable[[], Tensor]],
        exact: Callable[[], Tensor],
        bound: float,
        error_of: Callable[[Tensor, Tensor], float] | None = None,
    ) -> None:
        """One more that takes turns.

        Args:
            name: its key in :attr:`rows`.
            build: makes it ready, and returns what is timed.
            exact: its output in float64.
            bound: the largest error that its output may have.
            error_of: the error of an output, given that in float64 as well; by default
                :func:`~snv2_kernels.testing.max_error`.
        """
        self.rows[name] = Measurement(name)
        self._entries[name] = _Entry(build, exact, bound, error_of or max_error)

    @torch.inference_mode()
    def prepare(self, name: str) -> None:
        """Build one, warm it up and check its output; a failure becomes its row's reason."""
        row, entry = self.rows[name], self._entries[name]
        try:
            with warnings.catch_warnings():
                # The jit API is deprecated, and tracers doubt what the check below settles.
                warnings.simplefilter("ignore")
                call = entry.build()
                ready = _Ready(call, entry.exact(), entry.bound, entry.error_of)
                right = all(ready.passes(call(), row) for _ in range(_WARM_UP_CALLS))
        except Unavailable as error:
            row.reason = str(error)
            return
        except Exception as error:  # compilers raise anything, and the others go on
            row.reason = one_line(error)
            return
        if right:
            self._ready[name] = ready

    @torch.inference_mode()
    def time_round(self) -> None:
        """Time each that is ready once."""
        names = list(self._ready)
        self._random.shuffle(names)
        for name in names:
            row, ready = self.rows[name], self._ready[name]
            call = ready.call
            if not self._gpu:
                wait_until_idle()
            call()
            self._wait()
            start = time.perf_counter_ns()
            for _ in range(self._calls):
                out = call()
            self._wait()
            elapsed = time.perf_counter_ns() - start
            row.samples.append(elapsed / self._calls / 1e6)
            if not ready.passes(out, row):
                row.samples.clear()
                del self._ready[name]

    def _wait(self) -> None:
        if self._gpu:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class _Entry:
    build: Callable[[], Callable[[], Tensor]]
    exact: Callable[[], Tensor]
    bound: float
    error_of: Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class _Ready:
    call: Callable[[], Tensor]
    exact: Tensor
    bound: float
    error_of: Callable[[Tensor, Tensor], float]

    def passes(self, out: Tensor, row: Measurement) -> bool:
        """Check an output, note its error in the row, and overwrite it."""
        row.error = self.error_of(out, self.exact)
        row.reason = wrong_output(row.error, self.bound)
        out.fill_(math.nan)
        return row.reason is None


class Comparison(Turns):
    """A model on one input, run by several peers.

    Args:
        model: in ``eval()`` mode, in the dtype of ``x``.
        x: [N, 3, H, W].
        peers: names from :func:`~snv2_bench.peers.peers_of` of the device of ``x``.
        bound: the largest error that an output may have; where batches are given, by
            :func:`rms_error`.
        batches: for a comparison in int8, what each peer quantizes the model after. Those that
            run no int8 say so.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        peers: Sequence[str],
        bound: float,
        batches: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(x.device)
        ways = peers_of(x.device)
        self.exact = exact = float64_reference(model)(x)
        for name in peers:
            if batches is None:
                self.add(name, functools.partial(ways[name], model, x), lambda: exact, bound)
            else:
                way = INT8_PEERS.get(name, _no_int8)
                build = functools.partial(way, model, x, batches)
                self.add(name, build, lambda: exact, bound, rms_error)


def _no_int8(model: nn.Module, x: Tensor, batches: Sequence[Tensor]) -> Callable[[], Tensor]:
    raise Unavailable("has no int8 here")
