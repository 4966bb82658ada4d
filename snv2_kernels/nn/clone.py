"""Copies of module trees that share their parameters."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

__all__ = ["CACHES", "clone_tree", "drop_in_of", "original_class"]

CACHES = ("_made", "_mode_set", "_packed_state")  # attributes of drop-ins that no copy takes along

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_DICTS = (dict, OrderedDict)
_ATOMS = (bool, int, str, type(None))


def drop_in_of(cls: type[nn.Module]) -> Any:
    """Returns the drop-in that a class is or derives from, None if there is none."""
    return next((base for base in cls.__mro__ if "_original" in vars(base)), None)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class whose place a drop-in takes, of any other module its own."""
    cls = type(module)
    original: type[nn.Module] = vars(cls).get("_original", cls)
    return original


def clone_tree(
    module: nn.Module,
    new_class: Callable[[nn.Module], type[nn.Module]] = type,
    memo: dict[int, nn.Module] | None = None,
) -> nn.Module:
    """A copy of a module tree that shares all parameters, buffers and other attributes.

    Modules of the tree that attributes hold as well, such as a list of those that a forward goes
    through, are the copies there too.

    Args:
        module: the root.
        new_class: class of the copy of each module.
        memo: is filled with the copies, by the id of their modules; a module that stands in two
            places is copied once.
    """
    memo = {} if memo is None else memo
    cloned = _clone(module, new_class, memo)
    for new in memo.values():
        for name, value in new.__dict__.items():
            if name not in _REGISTRIES and type(value) not in _ATOMS:
                new.__dict__[name] = _redirected(value, memo, {})
    return cloned


def _clone(
    module: nn.Module,
    new_class: Callable[[nn.Module], type[nn.Module]],
    memo: dict[int, nn.Module],
) -> nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    cls = new_class(module)
    if issubclass(cls, torch.fx.GraphModule):  # its class has its code, and is for it alone
        cls = type(cls.__name__, (cls,), {"__qualname__": cls.__qualname__})
    new = object.__new__(cls)
    memo[id(module)] = new
    # One level of copies: hooks, parameters and buffers registered on one do not show on the other.
    new.__dict__.update(
        (key, _copied(value)) for key, value in module.__dict__.items() if key not in CACHES
    )
    for name, child in module._modules.items():
        new._modules[name] = None if child is None else _clone(child, new_class, memo)
    return new


def _copied(value: Any) -> Any:
    """A copy of a dict or set, anything else itself."""
    if type(value) in _DICTS:
        return value.copy()  # in a tenth of copy.copy's time
    return copy.copy(value) if isinstance(value, dict | set) else value


def _redirected(value: Any, memo: dict[int, nn.Module], seen: dict[int, Any]) -> Any:
    """The same, with the copies of modules; itself if it holds none."""
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if isinstance(value, MethodType) and id(value.__self__) in memo:
        return MethodType(value.__func__, memo[id(value.__self__)])
    if id(value) in seen:  # it holds itself
        return seen[id(value)]
    if type(value) in (list, tuple, set):
        seen[id(value)] = value
        parts = [_redirected(part, memo, seen) for part in value]
        same = all(a is b for a, b in zip(parts, value, strict=True))
        return value if same else type(value)(parts)
    if isinstance(value, dict) and value:
        seen[id(value)] = value
        changed = {k: new for k, v in value.items() if (new := _redirected(v, memo, seen)) is not v}
        if changed:
            value = copy.copy(value)
            value.update(changed)
    return value
