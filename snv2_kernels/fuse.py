"""``fuse(model)``: the same model with its ShuffleNet V2 parts replaced by fused modules."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from snv2_kernels import models
from snv2_kernels.backends import check_backend
from snv2_kernels.nn import FusedModule, InvertedResidual, ShuffleNetV2, Stage
from snv2_kernels.nn.clone import clone_tree
from snv2_kernels.nn.methods import why_replaced
from snv2_kernels.nn.network import STAGES
from snv2_kernels.nn.recognized import Recognized, recognized_class
from snv2_kernels.nn.series import Mixed, Series, has_series
from snv2_kernels.nn.sharing import note_sharing
from snv2_kernels.nn.structure import structure
from snv2_kernels.recognition import find, holds_unit, is_depthwise

__all__ = ["Explanation", "Part", "explain", "fuse"]

M = TypeVar("M", bound=nn.Module)


def fuse(model: nn.Module, backend: str = "auto", verify: bool = True) -> nn.Module:
    """A new module with the same outputs and state_dict, faster in ``eval()`` mode.

    Recognised are torchvision's and this package's ``InvertedResidual``, ``nn.Sequential`` runs
    of them, and ``ShuffleNetV2``, anywhere in ``model``; and every other module whose forward
    computes such units, one or several in sequence, however it is written: its class derives from
    the module's own and keeps its attributes and submodules. One that returns maps of units on the
    way, in a tuple, list or dict, as backbones do, is one op call too. In an ``nn.Sequential`` of
    other modules too, units that follow each other run as one. The rest is copied as it is, and
    :func:`explain` tells which is which.

    Parameters and buffers are shared with ``model``, which is left as it was: training one
    trains the other. A conversion (``.half()``, ``.to(device)``) of a fused module ends the
    sharing for that module; a conversion of a model that has unfused parts too still converts
    the parameters of those parts in both, as with any two modules that share. Where ``model`` is
    gone by then, the parameters are converted in place, and optimizers follow.

    Args:
        model: any module. To recognise modules of other classes their forwards are run on copies,
            on tensors without values.
        backend: ``"auto"``, or the backend that the fused modules should run on.
        verify: whether what was recognised in a module of another class is compared with its own
            forward, once, on a copy with random numbers in float64 and a random input
            [2, C, 9, 7], on the CPU; a larger one where the module averages over a window of a
            number of pixels. One that differs is left as it is.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if a lazy module in ``model`` has not run yet.
        ValueError, RuntimeError: if ``backend`` does not exist or is not available.
    """
    check_backend(backend)
    fused, _ = _fused_copy(model, verify)
    for module in fused.modules():
        if isinstance(module, FusedModule):
            module._backend = backend
    return fused


def _fused_copy(
    model: nn.Module, verify: bool = True, explained: bool = False
) -> tuple[nn.Module, dict[nn.Module, str]]:
    """The copy, and why modules in it that hold the layers of a unit were not recognised.

    Parts that are fused already keep their backend.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        lazy: Any = module
        if isinstance(module, LazyModuleMixin) and lazy.has_uninitialized_params():
            raise ValueError(f"model: {name or 'it'} is lazy and has no shape; run a forward first")
    found, reasons = find(model, _is_known, _is_unit, verify, explained)

    def new_class(module: nn.Module) -> type[nn.Module]:
        return recognized_class(type(module)) if id(module) in found else _fused_class(module)

    copies: dict[int, nn.Module] = {}
    fused = clone_tree(model, new_class, copies)
    for key, recognition in found.items():
        copy: Any = copies[key]
        copy._recognition = replace(recognition, structure=structure(copy))
    parts = [module for module in fused.modules() if isinstance(module, FusedModule)]
    inside = {module for part in parts for module in part.modules()}
    pairs = [(module, copies[id(module)]) for module in model.modules()]
    note_sharing(pairs, (copy for _, copy in pairs if copy not in inside))
    for module in fused.modules():
        if type(module) is nn.Sequential and has_series(module):
            module.__class__ = Mixed
    return fused, {copies[key]: reason for key, reason in reasons.items()}


def _is_known(module: nn.Module) -> bool:
    """Whether its class says all that it computes. The classifier may have other units."""
    if isinstance(module, FusedModule | Mixed):
        return True
    known = _fused_class(module)
    if known is ShuffleNetV2:
        return all(_is_stage(module._modules.get(name)) for name in STAGES)
    return known is not type(module)


def _is_plain(module: nn.Module, name: str) -> bool:
    """Whether the module is torchvision's or this package's class ``name``, with its own methods.

    A subclass is not: its methods would be lost with its class. torchvision is never imported:
    if it is not loaded, ``model`` holds none of its classes.
    """
    known = (models.__name__, "torchvision.models.shufflenetv2")
    if type(module) not in [getattr(sys.modules.get(m), name, None) for m in known]:
        return False
    return why_replaced(module, inside=False) is None


def _fused_class(module: nn.Module) -> type[nn.Module]:
    if _is_plain(module, "InvertedResidual"):
        return InvertedResidual
    if _is_plain(module, "ShuffleNetV2"):
        return ShuffleNetV2
    return Stage if type(module) is nn.Sequential and _is_stage(module) else type(module)


def _is_stage(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Sequential) and len(module) > 0 and all(map(_is_unit, module))


def _is_unit(module: nn.Module) -> bool:
    return isinstance(module, InvertedResidual) or _is_plain(module, "InvertedResidual")


@dataclass(frozen=True)
class Part:
    """One line of an :class:`Explanation`."""

    name: str  # of the module; "" is the model itself
    kind: str  # network, backbone, stage, unit, or a class name that was not recognised
    reason: str | None  # why it does not run fused; None if it does

    def __str__(self) -> str:
        state = "fused" if self.reason is None else f"not fused: {self.reason}"
        return f"{self.name or '(model)'}: {self.kind}: {state}"


@dataclass(frozen=True)
class Explanation:
    """Which parts of a model were recognised, and what stops those that do not run fused."""

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        if not self.parts:
            return "no ShuffleNet V2 parts found"
        return "\n".join(map(str, self.parts))


_KINDS: dict[type[nn.Module], str] = {
    ShuffleNetV2: "network",
    Stage: "stage",
    InvertedResidual: "unit",
}


def explain(model: nn.Module) -> Explanation:
    """Which units, stages and networks of ``model`` run fused, and why others do not.

    ``model`` may be fused already. Also listed, as not recognised, are modules that hold a
    depthwise convolution outside all recognised parts.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    fused, reasons = _fused_copy(model, explained=True)
    fused.eval()  # flags only, and the copies have their own
    parts: list[Part] = []
    inside: list[str] = []  # prefixes of recognised parts
    joined: list[str] = []  # prefixes of containers whose modules are in series across them
    for name, module in fused.named_modules():
        if isinstance(module, FusedModule):
            parts.append(Part(name, _kind(module), module.reason()))
            inside.append(f"{name}." if name else "")
        elif isinstance(module, Mixed) and not any(name.startswith(prefix) for prefix in joined):
            joined.append(f"{name}." if name else "")
            for step, series in module.steps().items():
                if isinstance(series, Series):
                    place = f"{name}.{step}" if name else step
                    parts.append(Part(place, "stage", series.reason()))
    seen: set[str] = set()
    for name, module in fused.named_modules():
        if not is_depthwise(module) or any(name.startswith(prefix) for prefix in inside):
            continue
        owner = _owner(fused, name)
        if owner not in seen:
            seen.add(owner)
            part = fused.get_submodule(owner)
            reason = reasons.get(part, "not recognised as a ShuffleNet V2 unit")
            parts.append(Part(owner, type(part).__name__, reason))
    return Explanation(tuple(parts))


def _kind(module: FusedModule) -> str:
    if isinstance(module, Recognized) and module._recognition is not None:
        return module._recognition.kind
    return _KINDS.get(type(module), type(module).__name__)


def _owner(model: nn.Module, name: str) -> str:
    """The nearest module above ``name`` that has the convolutions of the paper's unit, else the
    nearest, apart from torch's containers."""
    above = [name[:i] for i, letter in enumerate(name) if letter == "."][::-1]
    own = [
        parent
        for parent in above
        if type(model.get_submodule(parent)) not in (nn.Sequential, nn.ModuleList)
    ] + [""]
    return next((p for p in own if holds_unit(model.get_submodule(p), 2)), own[0])
