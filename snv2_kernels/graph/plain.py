"""Copies of modules to be run in the place of the modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from snv2_kernels.graph.contents import owning
from snv2_kernels.nn.clone import clone_tree, original_class

__all__ = ["plain_copy"]

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip


def plain_copy(module: nn.Module, tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy in eval mode without hooks, on other tensors and with containers of its own.

    Args:
        module: the root, left as it is.
        tensor: makes what takes a tensor's place.
    """
    copied = clone_tree(module, original_class)
    made: dict[int, Tensor] = {}
    containers: dict[int, Any] = {}
    base = vars(nn.Module()).keys()
    for child in copied.modules():
        child.training = False
        for hooks in _HOOKS:
            getattr(child, hooks).clear()
        for registry in (child._parameters, child._buffers):
            for name, t in registry.items():
                if t is not None:
                    if id(t) not in made:
                        made[id(t)] = tensor(t)
                    registry[name] = made[id(t)]  # type: ignore[assignment]
        for name in vars(child).keys() - base:
            vars(child)[name] = owning(vars(child)[name], containers)
    return copied
