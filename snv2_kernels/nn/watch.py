"""Notices that a module has changed since its weights were packed."""

from __future__ import annotations

from operator import attrgetter

from torch import nn

from snv2_kernels._native import Snapshot

__all__ = ["Watch", "hook_owner"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_requires_grad = attrgetter("requires_grad")


def hook_owner(module: nn.Module) -> str | None:
    """Name of a submodule that has hooks, which a fused forward would not call."""
    name: str
    for name, child in module.named_modules():
        if child is not module and any(getattr(child, hooks) for hooks in _HOOKS):
            return name
    return None


class Watch:
    """A snapshot of a module tree that can tell cheaply whether it still holds.

    A tensor has changed if another object stands in its place, if its version counter moved (any
    in-place operation that autograd sees), or if it points to other memory (``p.data = q``, as
    ``.half()`` and ``.to()`` do). Only a write through ``p.data`` or a NumPy view moves nothing;
    :meth:`FusedModule.train`, and so ``eval()``, therefore drops the packed weights as well.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        children = modules[1:]  # the module's own hooks run around its forward
        own = [(*m._parameters.values(), *m._buffers.values()) for m in modules]
        tensors = [t for of_module in own for t in of_module if t is not None]
        self.parameters = [t for t in tensors if isinstance(t, nn.Parameter)]
        # Counters of batches do not enter the packed weights, and may count.
        watched = [t for t in tensors if t.is_floating_point()]
        # Memory that is freed may be handed out again at the same address.
        self._alive = [t.detach() for t in watched]
        self._snapshot = Snapshot(
            dicts=[d for m in modules for d in (m._parameters, m._buffers, m._modules) if d],
            tensors=watched,
            hooks=[getattr(m, hooks) for m in children for hooks in _HOOKS],
            modules=children,
            norms=[m for m in modules if "eps" in vars(m)],
        )

    def holds(self) -> bool:
        """Whether no parameter, buffer or submodule has changed."""
        return self._snapshot.holds()

    def runs_plain(self) -> bool:
        """Whether a submodule has hooks or is in ``train()`` mode: only its own forward will do."""
        return self._snapshot.runs_plain()

    def requires_grad(self) -> bool:
        return any(map(_requires_grad, self.parameters))
