"""Float evaluation of a folded network that shows each layer to an observer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from snv2_kernels.packing.common import FoldingBuilder
from snv2_kernels.packing.units import Unsupported
from snv2_kernels.quantization.histogram import Histogram
from snv2_kernels.quantization.network import Key, Step, evaluate

__all__ = ["Moments", "Statistics", "float_results", "observe"]

Observer = Callable[[Step, Tensor, Tensor], None]  # is shown a layer, its input and its result


class Moments:
    """Mean and variance of what each column of a layer's weight multiplies."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: Tensor | None = None  # [2, K], or [2, O, 9] of a depthwise layer

    def add(self, step: Step, x: Tensor) -> None:
        """Counts the input ``x`` of the layer."""
        taps = _taps(step, x)
        self._count += taps[0][:, 0].numel()
        flat = [tap.double().transpose(0, 1).flatten(1) for tap in taps]
        powers = [[(tap**p).sum(1) for tap in flat] for p in (1, 2)]
        sums = torch.stack([torch.stack(p, 1) for p in powers])  # [2, C, taps]
        if step.kind == "stem":
            sums = sums.flatten(1)
        elif step.kind != "depthwise":
            sums = sums[:, :, 0]
        self._sums = sums if self._sums is None else self._sums + sums

    @property
    def mean(self) -> Tensor:
        assert self._sums is not None
        return self._sums[0] / self._count

    @property
    def variance(self) -> Tensor:
        assert self._sums is not None
        return self._sums[1] / self._count - self.mean**2


def _taps(step: Step, x: Tensor) -> list[Tensor]:
    """What each of the 9 taps of a window reads, [N, C, H', W'], or all there is of a pointwise or
    linear layer, [N, C, ...]."""
    if step.kind not in ("stem", "depthwise"):
        return [x]
    height, width = x.shape[2:]
    padded, stride = F.pad(x, (1, 1, 1, 1)), step.stride
    return [
        padded[:, :, i : i + height : stride, j : j + width : stride]
        for i in range(3)
        for j in range(3)
    ]


@dataclass
class Statistics:
    """What calibration counts of a network.

    Attributes:
        input: of the image or the caller's map.
        results: of each layer but ``"fc"``.
        moments: of each layer's input.
    """

    input: Histogram
    results: dict[Key, Histogram] = field(default_factory=dict)
    moments: dict[Key, Moments] = field(default_factory=dict)

    def __call__(self, step: Step, x: Tensor, result: Tensor) -> None:
        """Counts one layer; raises :class:`Unsupported` if its results are not finite."""
        if not bool(result.isfinite().all()):
            raise Unsupported(f"{step.name}: its results on these inputs are not finite")
        self.moments.setdefault(step.key, Moments()).add(step, x)
        if step.kind != "fc":
            new = Histogram(result.shape[1], signed=not step.clamps)
            self.results.setdefault(step.key, new).add(result)


class _Floats:
    """Evaluator of the network in the dtype of its maps."""

    def __init__(self, observer: Observer | None, dtype: torch.dtype) -> None:
        self.observer = observer
        self.dtype = dtype

    def layer(self, step: Step, x: Tensor) -> Tensor:
        weight, bias = step.folded.weight.to(self.dtype), step.folded.bias.to(self.dtype)
        result = step.folded.activation(_convolved(step, x, weight, bias))
        if step.kind == "features":
            result = result.mean((2, 3))
        if self.observer is not None:
            self.observer(step, x, result)
        return result

    def max_pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, 1)

    def take(self, x: Tensor, channels: Sequence[int]) -> Tensor:
        return x[:, list(channels)]

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), 1)


def _convolved(step: Step, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if step.kind == "fc":
        return F.linear(x, weight, bias)
    if step.kind == "stem":
        return F.conv2d(x, weight.view(len(weight), -1, 3, 3), bias, 2, 1)
    if step.kind == "depthwise":
        weight = weight.view(-1, 1, 3, 3)
        return F.conv2d(x, weight, bias, step.stride, 1, groups=len(weight))
    return F.conv2d(x, weight[:, :, None, None], bias)


@torch.no_grad()
def float_results(
    builder: FoldingBuilder, x: Tensor, observer: Observer | None = None
) -> list[Tensor]:
    """Returns the results of the folded network in the dtype of ``x``, [N, C, H, W]: tapped maps,
    then the last one."""
    return evaluate(builder, x, _Floats(observer, x.dtype))


def observe(builder: FoldingBuilder, statistics: Statistics, x: Tensor) -> None:
    """Counts everything that the network makes of ``x``, float32 [N, C, H, W]."""
    statistics.input.add(x)
    float_results(builder, x, statistics)
