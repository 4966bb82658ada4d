"""``quantize(model, batches)``: the same model, its fused parts in integers on a CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from snv2_kernels.backends import use_backend
from snv2_kernels.fuse import fuse
from snv2_kernels.nn.planned import PlannedModule
from snv2_kernels.packing import PlanBuilder
from snv2_kernels.packing.units import Unsupported
from snv2_kernels.quantization.calibrate import calibrate
from snv2_kernels.quantization.numbers import integer_layers

if TYPE_CHECKING:
    from snv2_kernels.quantization.calibrate import Method

__all__ = ["quantize"]


def quantize(
    model: nn.Module,
    batches: Tensor | Iterable[Tensor],
    *,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    method: Method = "mse",
) -> nn.Module:
    """Returns :func:`snv2_kernels.fuse` of a model, with its parts in integers: int8 weights and
    bytes for maps, from the input of a part to its result, on a CPU.

    Where a map of float32 is ``x``, one in integers is ``(q - zero[c]) * scale[c]`` with a byte
    ``q``, and a layer is
    ``q = clamp(round(multiplier[o] * sum_k(weight[o, k] * q[k]) + offset[o]), 0, 255)``, with an
    exact sum. Input and results stay floats. The model is one like any other afterwards: it goes
    into :class:`snv2_kernels.Engine`, :func:`snv2_kernels.explain` and pickles, and its parameters
    may change, within the ranges that were found here. In ``train()`` mode, with gradients (in the
    backward pass), on a GPU and under ``torch.compile`` it is the float network.

    Args:
        model: in ``eval()`` mode.
        batches: sample inputs of the model, [N, C, H, W] of a floating-point dtype, on which the
            ranges of all maps are found; one tensor or several. Some hundred images of the kind
            that the model will see are enough.
        normalize: mean and standard deviation of each channel, if inputs are images
            ``(bytes / 255 - mean) / std``. The first layer then computes on the bytes themselves,
            and an ``Engine`` with the same ``normalize`` makes no float image. For models that are
            one network as a whole.
        method: what ends a range: ``"mse"`` the least mean squared error, ``"percentile"`` all but
            0.01 % of what is on each side of zero, ``"minmax"`` the extremes.

    Raises:
        TypeError: if ``model`` is no module, or ``batches`` are no floating-point tensors.
        ValueError: if ``model`` is in ``train()`` mode or has no part that runs in integers, with
            the reason; if ``batches`` are empty or not finite; for another ``method``, or a
            ``normalize`` that does not fit.

    Source: integer arithmetic as in Jacob et al., "Quantization and Training of Neural Networks for
    Efficient Integer-Arithmetic-Only Inference", CVPR 2018.
    """
    fused = fuse(model)
    if fused.training:
        raise ValueError("model: expected eval() mode; call model.eval() first")
    parts = list(_parts(fused))
    reasons = [f"{name or 'model'}: {reason}" for name, part in parts if (reason := part.reason())]
    parts = [(name, part) for name, part in parts if part.reason() is None]
    whole = len(parts) == 1 and parts[0][1] is fused
    if normalize is not None and not whole:
        raise ValueError("normalize: only a model that is one network as a whole takes images")
    if not isinstance(batches, Tensor) and len(parts) > 1:
        batches = list(batches)  # which each part reads once
    quantized = {}
    for name, part in parts:
        inputs = batches if whole else _inputs_of(part, fused, batches)
        try:
            ranges = calibrate(part, inputs, normalize=normalize, method=method)
            _check(part, ranges)
            quantized[part] = ranges
        except Unsupported as error:
            reasons.append(f"{name or 'model'}: {error}")
    if not quantized:
        found = "; ".join(reasons) or "it has no ShuffleNet V2 parts"
        raise ValueError(f"model: no part of it runs in integers: {found}")
    # Only now, so that all parts were calibrated on the maps of the float model.
    for part, ranges in quantized.items():
        part._ranges = ranges
        part._packed_state = None
    return fused


def _parts(module: nn.Module, name: str = "") -> Iterator[tuple[str, PlannedModule]]:
    """The outermost fused parts, by name."""
    if isinstance(module, PlannedModule):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _parts(child, f"{name}.{child_name}" if name else child_name)


def _check(part: PlannedModule, ranges: object) -> None:
    """Packs the part in integers, which raises Unsupported where no kernel computes it."""
    builder = PlanBuilder()
    part._tell(builder)
    builder.build_integers(integer_layers(builder, ranges))  # type: ignore[arg-type]


def _inputs_of(
    part: PlannedModule, model: nn.Module, batches: Tensor | Iterable[Tensor]
) -> Iterator[Tensor]:
    """What a part is given when the float model runs on each batch."""
    taken: list[Tensor] = []
    hook = part.register_forward_pre_hook(lambda _, args: taken.append(args[0].detach()))
    try:
        for batch in [batches] if isinstance(batches, Tensor) else batches:
            if not isinstance(batch, Tensor):
                raise TypeError(f"batches: expected tensors, got {type(batch).__name__}")
            with torch.no_grad(), use_backend("auto"):
                model(batch)
            yield from taken
            taken.clear()
    finally:
        hook.remove()
