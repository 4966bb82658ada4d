"""Timing a network run in several ways, side by side.

The ways (*peers*) take turns, one call each in random order, so that a machine that slows down
slows all of them. Each turn is one call that is not timed, which brings the peer's own weights
back into the caches, and one that is. Nothing is timed whose output was not checked first.
"""

from __future__ import annotations

import copy
import random
import time
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from snv2_kernels.engine import Engine
from snv2_kernels.fuse import fuse
from snv2_kernels.testing import float64_reference, max_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["PEERS", "Comparison", "Measurement", "one_line"]

# Profiling executors and autotuners settle within this many calls.
_WARM_UP_CALLS = 3
_PERCENTILES = (0, 5, 10, 25, 50, 75, 90, 95, 100)


def one_line(error: BaseException) -> str:
    """The type of an exception and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _eager(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: model(x)


def _channels_last(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.contiguous(memory_format=torch.channels_last)
    return lambda: model(x)


def _jit(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    traced: Any = torch.jit.trace(model, x, check_trace=False)
    frozen: Any = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
    return lambda: frozen(x)


def _compile(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    torch.compiler.reset()  # else a second shape would be compiled with dynamic sizes
    compiled = torch.compile(model, dynamic=False, options={"freezing": True})
    return lambda: compiled(x)


def _fused(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    fused = fuse(model)
    return lambda: fused(x)


def _engine(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    n, c, h, w = x.shape
    engine = Engine(model, input_shape=(n, c, h, w))
    return lambda: engine(x)


# Each makes ready to run a model in eval() mode on one input; a call runs it once.
PEERS: dict[str, Callable[[nn.Module, Tensor], Callable[[], Tensor]]] = {
    "eager": _eager,
    "channels_last": _channels_last,
    "jit": _jit,
    "compile": _compile,
    "fused": _fused,
    "engine": _engine,
}


@dataclass
class Measurement:
    """What is known about one peer."""

    peer: str
    error: float | None = None  # of its output, against float64; None before the check
    reason: str | None = None  # why it was not timed
    samples: list[float] = field(default_factory=list)  # milliseconds

    def percentiles(self) -> dict[str, float]:
        """Milliseconds at p0 (the minimum) to p100; empty without samples."""
        if not self.samples:
            return {}
        values = np.percentile(self.samples, _PERCENTILES).tolist()
        return {f"p{p}": value for p, value in zip(_PERCENTILES, values, strict=True)}

    @property
    def median(self) -> float | None:
        """Milliseconds, None without samples."""
        return self.percentiles().get("p50")


class Comparison:
    """A model on one input, run by several peers.

    Prepare each peer, then time as many rounds as wanted; :attr:`rows` holds what is known at
    any moment, so that an interrupted run keeps what it has.

    Args:
        model: in ``eval()`` mode, in the dtype of ``x``.
        x: [N, 3, H, W].
        peers: names from :data:`PEERS`.
        bound: the largest error that an output may have.
    """

    def __init__(self, model: nn.Module, x: Tensor, peers: Sequence[str], bound: float) -> None:
        self.rows = {name: Measurement(name) for name in peers}
        self._model = model
        self._x = x
        self._bound = bound
        self._exact = float64_reference(model)(x)
        self._ready: dict[str, Callable[[], Tensor]] = {}
        self._random = random.Random(0)

    @torch.inference_mode()
    def prepare(self, name: str) -> None:
        """Build a peer, warm it up and check its output; a failure becomes its row's reason."""
        row = self.rows[name]
        try:
            with warnings.catch_warnings():
                # The jit API is deprecated, and tracers doubt what the check below settles.
                warnings.simplefilter("ignore")
                call = PEERS[name](self._model, self._x)
                for _ in range(_WARM_UP_CALLS):
                    out = call()
            row.error = max_error(out, self._exact)
        except Exception as error:  # compilers raise anything, and the other peers go on
            row.reason = one_line(error)
            return
        if row.error <= self._bound:
            self._ready[name] = call
        else:
            row.reason = f"wrong output: error {row.error:.1e}, allowed {self._bound:.1e}"

    @torch.inference_mode()
    def time_round(self) -> None:
        """Time one call of each peer that is ready."""
        names = list(self._ready)
        self._random.shuffle(names)
        for name in names:
            call = self._ready[name]
            call()
            start = time.perf_counter_ns()
            call()
            self.rows[name].samples.append((time.perf_counter_ns() - start) / 1e6)
