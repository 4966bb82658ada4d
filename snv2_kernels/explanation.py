"""``explain(model)``: which parts of a model run fused, and what stops the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from snv2_kernels.fuse import fused_copy
from snv2_kernels.nn import FusedModule
from snv2_kernels.nn.planned import PlannedModule
from snv2_kernels.nn.recognition import NotRecognized
from snv2_kernels.nn.recognized import Recognized
from snv2_kernels.nn.series import Mixed, Series
from snv2_kernels.recognition import CONTAINERS, holds_unit, is_depthwise, recognize_module

__all__ = ["Explanation", "Part", "explain"]


@dataclass(frozen=True)
class Part:
    """One line of an :class:`Explanation`."""

    name: str  # of the module; "" is the model itself
    # network, backbone, stage, unit, "partition of ..." or a class name that was not recognised
    kind: str
    reason: str | None  # why it does not run fused; None if it does
    beside: str = ""  # what PyTorch runs of a part that runs fused but for that

    def __str__(self) -> str:
        state = "fused" if self.reason is None else f"not fused: {self.reason}"
        if self.reason is None and self.beside:
            state += f", but for {self.beside}"
        return f"{self.name or '(model)'}: {self.kind}: {state}"


@dataclass(frozen=True)
class Explanation:
    """Which parts of a model were recognised, and what stops those that do not run fused."""

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        if not self.parts:
            return "no ShuffleNet V2 parts found"
        return "\n".join(map(str, self.parts))


def explain(model: nn.Module) -> Explanation:
    """Which units, stages and networks of ``model`` run fused, and why others do not.

    ``model`` may be fused already, and is described as it is: what is in ``train()`` mode runs
    plain. A partition is a module of units among other layers, whose part tells what PyTorch runs
    of it (``beside``); a chain is depthwise and pointwise layers in a row. Also listed are modules
    that hold a depthwise convolution outside all recognised parts, and those that hold other layers
    beside recognised parts.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    fused, reasons = fused_copy(model, explained=True)
    parts: list[Part] = []
    joined: list[str] = []  # prefixes of containers whose modules are in series across them
    for name, module in fused.named_modules():
        if isinstance(module, FusedModule):
            beside = module._beside() if isinstance(module, Recognized) else ""
            parts.append(Part(name, _kind(module), module.reason(), beside))
            inner, tail = module._tail() if isinstance(module, Recognized) else ("", None)
            if tail is not None:
                place = f"{name}.{inner}" if name else inner
                parts.append(Part(place, type(tail).__name__, _BEHIND))
        elif isinstance(module, Mixed) and not any(name.startswith(prefix) for prefix in joined):
            joined.append(f"{name}." if name else "")
            for step, series in module.steps().items():
                if isinstance(series, Series):
                    place = f"{name}.{step}" if name else step
                    parts.append(Part(place, _in_dtype("stage", series), series.reason()))
    return Explanation((*parts, *_plain_parts(fused, reasons)))


def _kind(module: FusedModule) -> str:
    kind = module.kind() if isinstance(module, Recognized) else type(module).__name__
    return _in_dtype(kind, module)


def _in_dtype(kind: str, module: FusedModule) -> str:
    in_integers = isinstance(module, PlannedModule) and module._ranges is not None
    return f"{kind} in int8" if in_integers else kind


# What runs plain ------------------------------------------------------------------------------

_MOST_NAMES = 6
_BEHIND = "it follows a network, and is no part of one"


def _plain_parts(fused: nn.Module, reasons: dict[nn.Module, str]) -> Iterator[Part]:
    """Modules with a depthwise convolution outside recognised parts, then those with other layers
    beside such parts."""
    names = {module: name for name, module in fused.named_modules()}
    paths: dict[nn.Module, tuple[nn.Module, ...]] = {}
    for module, path in _outside(fused, ()):
        paths.setdefault(module, path)
    beside: dict[nn.Module, dict[str, None]] = {
        _owner(path or (module,)): {} for module, path in paths.items() if is_depthwise(module)
    }
    units = set(beside)
    for module, path in paths.items():
        if isinstance(module, _ConvNd | nn.Linear) and units.isdisjoint(path):
            holders = [part for part in path if _holds_part(part)]
            owner = next((part for part in holders[::-1] if type(part) not in CONTAINERS), None)
            if owner is not None:
                top = (*path, module)[len(holders)]
                below = names[top].removeprefix(f"{names[owner]}." if names[owner] else "")
                beside.setdefault(owner, {})[below] = None
    for owner, layers in beside.items():
        reason = reasons.get(owner) or _why_plain(owner)
        kind = nn.Sequential if isinstance(owner, Mixed) else type(owner)
        yield Part(names[owner], kind.__name__, reason + _listed(list(layers)))


def _listed(names: list[str]) -> str:
    if not names:
        return ""
    more = len(names) - _MOST_NAMES
    shown = ", ".join(names[:_MOST_NAMES])
    return f"; plain: {shown}" + (f" and {more} more" if more > 0 else "")


def _outside(
    module: nn.Module, path: tuple[nn.Module, ...]
) -> Iterator[tuple[nn.Module, tuple[nn.Module, ...]]]:
    """Modules outside recognised parts, each with those that it is in, the outermost first."""
    if not isinstance(module, FusedModule):
        yield module, path
        for child in module.children():
            yield from _outside(child, (*path, module))


def _holds_part(module: nn.Module) -> bool:
    return any(isinstance(child, FusedModule) for child in module.modules())


def _owner(path: tuple[nn.Module, ...]) -> nn.Module:
    """The nearest module of a path that has the convolutions of the paper's unit, else the nearest,
    apart from torch's containers."""
    own = [part for part in path if type(part) not in (*CONTAINERS, nn.Sequential, Mixed)][::-1]
    own = own or [path[0]]
    return next((part for part in own if holds_unit(part, 2)), own[0])


def _why_plain(module: nn.Module) -> str:
    """Why a module that was not tried is not recognised."""
    try:
        recognize_module(module)
    except NotRecognized as error:
        return str(error)
    return "it has changed since it was fused; fuse it again"
