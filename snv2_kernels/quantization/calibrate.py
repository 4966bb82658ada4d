"""From sample images to the ranges of all maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from snv2_kernels.packing.common import FoldingBuilder
from snv2_kernels.quantization.equalize import equalized
from snv2_kernels.quantization.histogram import Histogram
from snv2_kernels.quantization.network import Step, steps
from snv2_kernels.quantization.numbers import LARGEST_BYTE, Affine, Ranges
from snv2_kernels.quantization.observe import Statistics, observe
from snv2_kernels.runners import checked_normalize

__all__ = ["Method", "calibrate", "calibrate_builder"]

Method = Literal["mse", "percentile", "minmax"]
_ENDS: dict[str, Callable[[Histogram], tuple[Tensor, Tensor]]] = {
    "mse": Histogram.least_error,
    "percentile": lambda histogram: histogram.percentile(99.99),
    "minmax": Histogram.minmax,
}
# Over the square root of a count. Measured by benchmarks/quantization_accuracy.py: with half of it
# ranges found on few images clip others, with twice as much steps are coarse.
_HEADROOM = 8.0
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LEAST = 1 / 256  # scale of a channel, of the widest one's


def calibrate(
    fused: nn.Module,
    batches: Tensor | Iterable[Tensor],
    *,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    method: Method = "mse",
) -> Ranges:
    """Returns the ranges of all maps of a network, as they are on sample images.

    Args:
        fused: a module that :func:`snv2_kernels.fuse` made, one op as a whole.
        batches: sample inputs, [N, C, H, W] of a floating-point dtype; one tensor or several. They
            are read one after the other, once, and not kept.
        normalize: mean and standard deviation of each channel, if the inputs are
            ``(bytes / 255 - mean) / std``. Their integers are then the original bytes.
        method: what ends the range of a channel: ``"mse"`` the least mean squared error,
            ``"percentile"`` all but 0.01% of what is on each side of 0, ``"minmax"`` the extremes.

    Raises:
        TypeError: if ``fused`` is no such module, or ``batches`` are no floating-point tensors.
        ValueError: if ``batches`` are empty, of another shape or not finite; for another
            ``method``, or a ``normalize`` that does not fit.
        Unsupported: naming the first layer that has no integer form.
    """
    # Packing may know integer layers, so this module can be loaded before it.
    from snv2_kernels.nn.planned import PlannedModule
    from snv2_kernels.packing import PlanBuilder

    if not isinstance(fused, PlannedModule):
        raise TypeError(f"fused: expected a module fused as a whole, got {type(fused).__name__}")
    if not isinstance(method, str) or method not in _ENDS:
        raise ValueError(f"method: expected one of {sorted(_ENDS)}, got {method!r}")
    builder = PlanBuilder()
    fused._tell(builder)
    return calibrate_builder(builder, batches, normalize=normalize, method=method)


def calibrate_builder(
    builder: FoldingBuilder,
    batches: Tensor | Iterable[Tensor],
    *,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    method: Method = "mse",
) -> Ranges:
    """See :func:`calibrate`; of a network that ``builder`` was told."""
    layers = [step for step in steps(builder) if step.kind != "fc"]
    channels = builder.in_channels
    image = None if normalize is None else _of_bytes(normalize, channels)
    statistics = Statistics(Histogram(channels))
    for batch in _checked(batches, channels):
        observe(builder, statistics, batch)
    if not statistics.input.total:
        raise ValueError("batches: expected at least one image, got none")
    given = image or _of_input(statistics.input, is_image=builder._stem is not None)
    ends = {step.key: _ends(step, statistics.results[step.key], method) for step in layers}
    scales = equalized(
        builder,
        given.scale,
        {key: _scale(*found) for key, found in ends.items()},
        {key: moments.variance for key, moments in statistics.moments.items()},
    )
    return Ranges(
        given,
        {step.key: _affine(step, ends[step.key], scales[step.key]) for step in layers},
        {key: moments.mean for key, moments in statistics.moments.items()},
    )


def _checked(batches: Tensor | Iterable[Tensor], channels: int) -> Iterator[Tensor]:
    """Yields batches in float32 on the CPU."""
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected tensors, got {type(batches).__name__}")
    for i, batch in enumerate([batches] if isinstance(batches, Tensor) else batches):
        name = "batches" if isinstance(batches, Tensor) else f"batches[{i}]"
        if not isinstance(batch, Tensor) or batch.dtype not in _DTYPES:
            got = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
        if batch.layout != torch.strided or batch.is_meta:
            kind = "without values" if batch.is_meta else f"of layout {batch.layout}"
            raise TypeError(f"{name}: expected a dense tensor, got one {kind}")
        if batch.dim() != 4 or batch.shape[1] != channels or 0 in batch.shape[2:]:
            raise ValueError(f"{name}: expected [N, {channels}, H, W], got {list(batch.shape)}")
        single = batch.detach().float().cpu()
        if not bool(single.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got some that are not")
        if len(single):
            yield single


def _of_bytes(normalize: Any, channels: int) -> Affine:
    mean, std = checked_normalize(normalize, channels)
    if not all(0 <= m <= 1 for m in mean):
        # What pads the image is a byte.
        raise ValueError(f"normalize: expected a mean between 0 and 1, got {mean}")
    scales, means = (torch.tensor(numbers, dtype=torch.float64) for numbers in (std, mean))
    return Affine(1 / (LARGEST_BYTE * scales), LARGEST_BYTE * means)


def _of_input(histogram: Histogram, is_image: bool) -> Affine:
    """Around 0 and with whole zero points, so that padding is exact. All of an image is kept as it
    is: its levels are often bytes already."""
    low, high = histogram.minmax()
    widened = torch.ones_like(low) if is_image else _headroom(histogram)
    low, high = low.clamp(max=0) * widened, high.clamp(min=0) * widened
    scale = _scale(low, high)
    return Affine(scale, (-low / scale).round())


def _headroom(histogram: Histogram) -> Tensor:
    """How much further the numbers of each channel reach than a sample of them, [C].

    Zeros tell nothing of it: a channel that was rarely above 0 is known by the few times it was.
    """
    return 1 + _HEADROOM / histogram.nonzero().clamp(min=1).sqrt()


def _ends(step: Step, histogram: Histogram, method: Method) -> tuple[Tensor, Tensor]:
    low, high = _ENDS[method](histogram)
    if step.clamps:
        low = torch.zeros_like(low)
    beyond = (_headroom(histogram) - 1) * (high - low)
    if step.clamps:
        return low, (high + beyond).clamp(max=_most(step))
    return low - beyond / 2, high + beyond / 2


def _most(step: Step) -> float:
    """The largest result that a layer can have."""
    return 6.0 if step.folded.activation.kind == "relu6" else torch.inf


def _scale(low: Tensor, high: Tensor) -> Tensor:
    """Least scale of channels between these ends.

    One that was silent, or nearly, may be louder on other images: it has a 256th of the widest
    range, or any if all were silent.
    """
    scale = (high - low) / LARGEST_BYTE
    widest = float(scale.max())
    return scale.clamp(min=widest * _LEAST if widest > 0 else 1 / LARGEST_BYTE)


def _affine(step: Step, ends: tuple[Tensor, Tensor], scale: Tensor) -> Affine:
    """Of a scale that may be larger than the ends need, which are then in its middle."""
    low, high = ends
    scale = scale.clamp(max=_most(step) / LARGEST_BYTE)
    if step.clamps:
        return Affine(scale, torch.zeros_like(scale))
    middle = (low + high) / 2
    return Affine(scale, LARGEST_BYTE / 2 - middle / scale)
