"""Notices that a module has changed since its weights were packed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from snv2_kernels._native import Snapshot, Stamps, count_optimizer_step
from snv2_kernels.graph.constant import constant_to_dynamo

__all__ = [
    "Watch",
    "beside",
    "has_mode",
    "has_own_hooks",
    "note_mode",
    "reads_flags",
    "stamps",
    "why_plain",
]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MOST_STATISTICS = 1 << 16  # elements of a tensor whose contents are compared
_requires_grad = attrgetter("requires_grad")
# What operators have packed from tensors, by the first of them and a text, for as long as it lives.
beside: Any = WeakTensorKeyDictionary()


def note_mode(module: Any) -> None:
    """Lets those that packed a drop-in's tensors, alone or with others, pack again: a network that
    it is a part of, and operators."""
    if torch.compiler.is_compiling():
        return
    module._mode_set = object()
    if beside:
        addresses = {t.data_ptr() for t in (*module.parameters(), *module.buffers())}
        for entries in list(beside.values()):
            for text in [t for t, entry in entries.items() if entry.reads(addresses)]:
                del entries[text]


register_optimizer_step_post_hook(count_optimizer_step)


def has_own_hooks(module: nn.Module) -> bool:
    """Whether there are hooks around its forward, its own or global ones."""
    own = any(getattr(module, hooks) for hooks in _HOOKS)
    return own or any(getattr(torch_module, f"_global{hooks}") for hooks in _HOOKS)


@constant_to_dynamo
def has_mode(cls: Any) -> bool:
    """Whether a module of a class may compute something else in ``train()`` mode: where its code
    reads the flag, or is the user's."""
    return _by_flags(cls)[0]


@constant_to_dynamo
def reads_flags(cls: Any) -> bool:
    """Whether a class is the user's and its code reads the flag of some module."""
    return _by_flags(cls)[1]


@functools.lru_cache(maxsize=1024)
def _by_flags(cls: Any) -> tuple[bool, bool]:
    own = reads = False
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        library = base.__module__.partition(".")[0]
        if library == __name__.partition(".")[0]:
            continue  # the same in both modes but for what it holds
        is_users = library not in ("torch", "torchvision")
        functions = [f for f in vars(base).values() if isinstance(f, FunctionType)]
        mentions = any("training" in f.__code__.co_names for f in functions)
        own, reads = own or is_users or mentions, reads or (is_users and mentions)
    return own, reads


def why_plain(module: nn.Module) -> str | None:
    """Why only a module's own forward will do: its mode, or what makes :meth:`Watch.runs_plain`
    true; None if nothing does."""
    if module.training:
        return "it is in train() mode"
    # Dynamo follows this walk, and takes several times as long for named_modules() and any().
    left = [module]
    while left:
        for child in left.pop()._modules.values():
            if child is None:
                continue
            if child.training and (has_mode(type(child)) or _any_reads_flags(module)):
                return f"submodule {_name_in(module, child)!r} is in train() mode"
            before_or_behind = child._forward_hooks or child._forward_pre_hooks
            if before_or_behind or child._backward_hooks or child._backward_pre_hooks:
                return f"submodule {_name_in(module, child)!r} has hooks"
            left.append(child)
    if any(getattr(torch_module, f"_global{hooks}") for hooks in _HOOKS):
        return "there are global module hooks"
    return None


def _any_reads_flags(module: nn.Module) -> bool:
    return any(reads_flags(type(child)) for child in module.modules())


def _name_in(module: nn.Module, child: nn.Module) -> str:
    found: str = next(name for name, other in module.named_modules() if other is child)
    return found


def stamps(tensors: Sequence[Tensor], statistics: Sequence[Tensor]) -> Stamps:
    """Returns the versions and addresses of tensors, with the contents of some of them.

    Batch norm writes its statistics without moving their versions, so ``statistics``, as far as
    they lie in the CPU's memory, are compared by content.
    """
    return Stamps(tensors, _compared_bytes(tensors, statistics))


def _compared_bytes(tensors: Sequence[Tensor], statistics: Sequence[Tensor]) -> list[int]:
    compared = {id(t) for t in statistics if _is_comparable(t)}
    return [t.nbytes if id(t) in compared else 0 for t in tensors]


def _is_comparable(t: Tensor) -> bool:
    kind = t.is_floating_point() or (t.dim() > 0 and not t.is_complex())  # or numbers of channels
    small = kind and t.numel() <= _MOST_STATISTICS
    return small and t.device.type == "cpu" and t.layout is torch.strided and t.is_contiguous()


class Watch:
    """A snapshot of a module tree that can tell cheaply whether it still holds.

    A tensor has changed if another object stands in its place, if its version counter moved (any
    in-place operation that autograd sees), if it points to other memory (``p.data = q``, as
    ``.half()`` and ``.to()`` do), or if any optimizer took a step; a buffer in the CPU's memory
    also if its contents did. A module has changed if any of its attributes or its class did. A
    write to a parameter through ``p.data``, a NumPy view or another process shows nowhere;
    :meth:`FusedModule.train`, and so ``eval()``, therefore drops the packed weights.

    The tree's root owns its watch. The watch does not own the root, which is passed in, so that a
    module is freed as soon as it is dropped.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        children = modules[1:]  # the module's own hooks run around its forward
        every = any(reads_flags(type(m)) for m in modules)
        tensors = [
            t
            for m in modules
            for d in (m._parameters, m._buffers)
            for t in d.values()
            if t is not None
        ]
        # A tied one stands once, else its gradient would count once for each of its names.
        self.parameters = list(
            dict.fromkeys(t for m in modules for t in m._parameters.values() if t is not None)
        )
        # Memory that is freed may be handed out again at the same address.
        self._alive = [t.detach() for t in tensors]
        buffers = [t for m in modules for t in m._buffers.values() if t is not None]
        self.snapshot = Snapshot(
            modules=modules,
            registries=[d for m in modules for d in (m._parameters, m._buffers, m._modules)],
            tensors=tensors,
            bytes=_compared_bytes(tensors, buffers),
            hooks=[getattr(m, hooks) for m in children for hooks in _HOOKS]
            + [getattr(torch_module, f"_global{hooks}") for hooks in _HOOKS],
            modes=[vars(m) for m in children if every or has_mode(type(m))],
        )

    def holds(self, root: nn.Module) -> bool:
        """Whether no class, parameter, buffer, submodule or attribute has changed."""
        self.snapshot.prefetch()
        return self.snapshot.holds(root)

    def runs_plain(self, root: nn.Module) -> bool:
        """Whether a submodule has hooks or a ``train()`` mode that matters: only its own forward
        will do."""
        return self.snapshot.runs_plain(root)

    def requires_grad(self) -> bool:
        return any(map(_requires_grad, self.parameters))
