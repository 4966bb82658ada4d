"""``quantize(model, batches)``: the same model, its fused parts in integers on a CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from snv2_kernels.fuse import fuse
from snv2_kernels.nn.planned import PlannedModule
from snv2_kernels.nn.recognized import Recognized
from snv2_kernels.nn.series import Mixed
from snv2_kernels.packing import PlanBuilder
from snv2_kernels.packing.units import Unsupported
from snv2_kernels.quantization.calibrate import calibrate
from snv2_kernels.quantization.ranges import check_kernels, set_ranges

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
    may change, within the ranges that were found here. What is beyond a range becomes its end, and
    a NaN the least number. In ``train()`` mode, in the backward pass, on a GPU, under
    ``torch.compile`` and in ``torch.jit.trace`` it is the float network; ``torch.export`` keeps the
    integers.

    Args:
        model: in ``eval()`` mode.
        batches: sample inputs of the model, [N, C, H, W] of a floating-point dtype, on which the
            ranges of all maps are found; one tensor or several. Some hundred images of the kind
            and size that the model will see are enough. Each batch is one call; of a model with
            several parts all are kept meanwhile, and the parts are those that the first one calls.
        normalize: mean and standard deviation of each channel, if inputs are images
            ``(bytes / 255 - mean) / std``. The first layer then computes on the bytes themselves,
            and an ``Engine`` with the same ``normalize`` makes no float image. For models that are
            one network as a whole, with means between 0 and 1.
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
    if normalize is not None and not _is_whole(fused):
        raise ValueError("normalize: only a model that is one network as a whole takes images")
    found: dict[str, PlannedModule]
    if _is_whole(fused):
        found, inputs = {"model": fused}, lambda _: batches
    else:
        _undo_partitions(fused)
        listed = _listed(batches)  # which each part reads once
        found, inputs = _called(fused, listed[0]), lambda part: _inputs_of(part, fused, listed)
    reasons = []
    quantized = {}
    for name, part in found.items():
        try:
            if (reason := part.reason()) is not None:
                raise Unsupported(reason)
            ranges = calibrate(part, inputs(part), normalize=normalize, method=method)
            check_kernels(_told(part), ranges)
            quantized[part] = ranges
        except Unsupported as error:
            reasons.append(f"{name}: {error}")
    if not quantized:
        why = "; ".join(reasons) or _why_none(fused)
        raise ValueError(f"model: no part of it runs in integers: {why}")
    # Only now, so that all parts were calibrated on the maps of the float model.
    for part, ranges in quantized.items():
        set_ranges(part, ranges)
    for module in fused.modules():
        if isinstance(module, Mixed):
            module._made = None  # whose series are all in integers or not at all
    return fused


def _is_whole(module: nn.Module) -> TypeGuard[PlannedModule]:
    """Whether a module is one plan."""
    return isinstance(module, PlannedModule) and module._why_not_whole() is None


def _undo_partitions(model: nn.Module) -> None:
    """Let plain forwards call the parts inside, which are those that run in integers."""
    for module in model.modules():
        if isinstance(module, Recognized) and not _is_whole(module):
            module._may_partition = False


def _why_none(model: nn.Module) -> str:
    """Why a model calls no fused part."""
    converted = any(type(m).__module__.startswith("torch.ao.nn.") for m in model.modules())
    if converted:
        return "PyTorch has quantized it; snv2.quantization.from_torch_ao takes such models"
    return "it calls no ShuffleNet V2 part that is fused; see snv2_kernels.explain(model)"


def _listed(batches: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(batches, Tensor):
        return [batches]
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected tensors, got {type(batches).__name__}")
    listed = list(batches)
    for batch in listed:
        if not isinstance(batch, Tensor):
            raise TypeError(f"batches: expected tensors, got {type(batch).__name__}")
    if not listed:
        raise ValueError("batches: expected at least one image, got none")
    return listed


def _called(model: nn.Module, batch: Tensor) -> dict[str, PlannedModule]:
    """Returns the outermost fused parts that run when the model does, by name.

    Those inside a part are looked at only where it is not called itself: a hook on one would make
    the parts around it run plain.
    """
    called: dict[str, PlannedModule] = {}
    looked_at = dict(_outermost(model))
    while looked_at:
        ran = _ran(model, batch, looked_at.values())
        called |= {name: part for name, part in looked_at.items() if part in ran}
        looked_at = {
            inner_name: inner
            for name, part in looked_at.items()
            if part not in ran
            for child_name, child in part.named_children()
            for inner_name, inner in _outermost(child, f"{name}.{child_name}")
        }
    return called


def _ran(model: nn.Module, batch: Tensor, parts: Iterable[nn.Module]) -> set[nn.Module]:
    """Returns those of some modules that are called when the model runs."""
    ran: set[nn.Module] = set()
    hooks = [part.register_forward_pre_hook(lambda part, _: ran.add(part)) for part in parts]
    try:
        with torch.no_grad():
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def _outermost(module: nn.Module, name: str = "") -> Iterator[tuple[str, PlannedModule]]:
    if _is_whole(module):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _outermost(child, f"{name}.{child_name}" if name else child_name)


def _told(part: PlannedModule) -> PlanBuilder:
    builder = PlanBuilder()
    part._tell(builder)
    return builder


def _inputs_of(part: PlannedModule, model: nn.Module, batches: list[Tensor]) -> Iterator[Tensor]:
    """Yields what a part is given when the float model runs on each batch."""
    taken: list[Tensor] = []
    hook = part.register_forward_pre_hook(lambda _, args: taken.append(args[0].detach()))
    try:
        for batch in batches:
            with torch.no_grad():
                model(batch)
            yield from taken
            taken.clear()
    finally:
        hook.remove()
