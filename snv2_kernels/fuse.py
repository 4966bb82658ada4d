"""``fuse(model)``: the same model with its ShuffleNet V2 parts replaced by fused modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from snv2_kernels.backends import check_backend
from snv2_kernels.memory import no_collections
from snv2_kernels.nn import FusedModule
from snv2_kernels.nn.clone import clone_tree
from snv2_kernels.nn.known import KnownModule
from snv2_kernels.nn.network import drop_in_class
from snv2_kernels.nn.series import Mixed, has_series
from snv2_kernels.nn.sharing import note_sharing
from snv2_kernels.nn.structure import structure
from snv2_kernels.recognition import replace_recognized

__all__ = ["fuse", "fused_copy"]


def fuse(model: nn.Module, backend: str = "auto", verify: bool = True) -> nn.Module:
    """A new module with the same outputs and state_dict, faster in ``eval()`` mode.

    Recognised are torchvision's and this package's ``InvertedResidual``, ``nn.Sequential`` runs
    of them, and ``ShuffleNetV2``, anywhere in ``model``; and every other module whose forward
    computes such units, one or several in sequence, however it is written: its class derives from
    the module's own and keeps its attributes and submodules. One that returns maps of units on the
    way, in a tuple, list or dict, as backbones do, is one op call too. A classifier of several
    layers behind a network runs as it is after that call. Where other layers stand among units
    (attention, a feature pyramid, another stem), each run of units is one op call, and PyTorch
    runs what is between as the forward does. In an ``nn.Sequential`` of other modules too, units
    that follow each other run as one. The rest is copied as it is, and :func:`explain` tells which
    is which.

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
            [2, C, 9, 7], or [1, C, 18, 14] where other layers stand among units, on the CPU; a
            larger one where the module averages over a window of a number of pixels. One that
            differs is left as it is.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if a lazy module in ``model`` has not run yet.
        ValueError, RuntimeError: if ``backend`` does not exist or is not available.
    """
    check_backend(backend)
    fused, _ = fused_copy(model, verify)
    for module in fused.modules():
        if isinstance(module, FusedModule):
            module._backend = backend
    return fused


def fused_copy(
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
    copies: dict[int, nn.Module] = {}
    fused = clone_tree(model, drop_in_class, copies)
    # Scripted modules do not tell who is inside them.
    pairs = [(each, copies[id(each)]) for each in model.modules() if id(each) in copies]
    with no_collections():
        recognized, reasons = replace_recognized(fused, verify, explained)
    told = _told(fused)
    for module, copy in pairs:
        if copy not in told and isinstance(copy, KnownModule):
            own: Any = type(module)
            copy.__class__ = own  # which looks for no changes before each forward
    parts = [module for module in fused.modules() if isinstance(module, FusedModule)]
    inside = {module for part in parts for module in part.modules()}
    note_sharing(pairs, (copy for _, copy in pairs if copy not in inside))
    for module in fused.modules():
        if type(module) is nn.Sequential and has_series(module):
            module.__class__ = Mixed
    for module in recognized:
        assert module._recognition is not None
        module._recognition = replace(module._recognition, structure=structure(module))
    return fused, reasons


def _told(fused: nn.Module) -> set[nn.Module]:
    """Drop-ins that a class or a recognition tells, and the modules inside these."""
    told: set[nn.Module] = set()
    for module in fused.modules():
        if module in told or not isinstance(module, FusedModule):
            continue
        if not isinstance(module, KnownModule) or module._known() or module.fits_class():
            told.update(module.modules())
    return told
