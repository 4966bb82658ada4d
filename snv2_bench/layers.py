"""Where the time of an engine goes on the CPU, kernel by kernel."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snv2_kernels import _native
from snv2_kernels.runners import CpuRunner

if TYPE_CHECKING:
    from torch import Tensor

    from snv2_kernels.engine import Engine
    from snv2_kernels.packing.cpu_plan import Product

__all__ = ["Layer", "layer_times"]


@dataclass
class Layer:
    """The work of one kernel in one step of a plan, in one call of the engine."""

    step: str  # "stem", "stage2.0" to "stage4.3", "head"
    kernel: str  # the products that it computes, as "pw1 + dw"
    multiply_adds: int
    moved_bytes: int  # at least: the maps that it reads and writes, and its weights
    milliseconds: float  # of all threads, over their number


def layer_times(engine: Engine, x: Tensor, calls: int) -> tuple[list[Layer], float]:
    """Means of the faster half of several calls of an engine, each after one that is not timed.

    A product whose weights no kernel came with was computed by the kernel before.

    Returns:
        the layers in order, and the milliseconds of a call: what the layers leave of them is
        waiting for other threads and what runs between the kernels.

    Raises:
        ValueError: if the engine does not run on the CPU backend.
    """
    runner = engine._runner
    if not isinstance(runner, CpuRunner):
        raise ValueError("engine: expected one of the cpu backend")
    samples: list[tuple[float, dict[int, float]]] = []
    for _ in range(calls):
        engine(x)
        _native.start_kernel_times()
        try:
            start = time.perf_counter()
            engine(x)
            whole = (time.perf_counter() - start) * 1e3
        finally:
            times = _native.stop_kernel_times()
        samples.append((whole, {k: ns / 1e6 / runner.threads for k, (_, ns) in times.items()}))
    samples.sort(key=lambda sample: sample[0])
    del samples[(calls + 1) // 2 :]
    layers: list[Layer] = []
    plan = runner.plan
    size = plan.element.itemsize
    last: Product | None = None
    batch, _, height, width = engine.input_shape
    for product in plan.products(height, width):
        address = plan.weights.data_ptr() + product.weights * plan.weights.element_size()
        work = batch * product.multiply_adds
        moved = size * (batch * (product.read + product.written) + product.parameters)
        if address in samples[0][1]:
            mean = statistics.fmean(kernels[address] for _, kernels in samples)
            layers.append(Layer(product.step, product.name, work, moved, mean))
        else:
            assert last is not None  # what lies between the two is not moved
            layers[-1].kernel += f" + {product.name}"
            layers[-1].multiply_adds += work
            layers[-1].moved_bytes += moved - size * batch * (last.written + product.read)
        last = product
    return layers, statistics.fmean(whole for whole, _ in samples)
