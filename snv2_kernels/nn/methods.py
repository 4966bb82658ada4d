"""Methods that are not those that a module's class was written with."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn

from snv2_kernels.graph.constant import constant_to_dynamo
from snv2_kernels.nn.clone import drop_in_of

__all__ = ["why_class_replaced", "why_replaced"]

_DROP_INS = f"{__package__}."
_TORCH = Path(torch.__file__).parent
_METHODS = (
    "forward", "_forward_impl", "_conv_forward", "_check_input_dim", "__call__", "_call_impl",
    "_wrapped_call_impl",
)  # fmt: skip


def why_replaced(module: nn.Module, inside: bool = True) -> str | None:
    """Why classes do not say what a tree of modules computes, None if they do.

    A method may be an instance's own, come from another file than its class, or be overridden in a
    class derived from a drop-in; a function that a forward names may come from another folder.

    Args:
        module: of classes that are known.
        inside: whether to look at the modules inside, too.
    """
    seen: set[type] = set()
    for name, child in module.named_modules() if inside else [("", module)]:
        if (
            own := next((method for method in _METHODS if method in vars(child)), None)
        ) is not None:
            return f"{name or 'the module'} has a {own} of its own"
        if type(child) not in seen:
            seen.add(type(child))
            if reason := why_class_replaced(type(child), child is module):
                return reason
    return None


@constant_to_dynamo
def why_class_replaced(cls: Any, calls_base: bool = False) -> str:
    """Why a class does not say what its modules compute; empty if it does.

    Args:
        cls: of a module; of a drop-in it is the class whose place that takes which is looked at.
        calls_base: whether a forward in a class derived from a drop-in may be another, as it is
            the one of the drop-in that asks.
    """
    drop_in = drop_in_of(cls)
    if drop_in is None:
        cls = next(base for base in cls.__mro__ if not base.__module__.startswith(_DROP_INS))
    else:
        for name in _METHODS[calls_base:]:
            if getattr(cls, name, None) is not getattr(drop_in, name, None):
                return f"{cls.__name__} has a {name} of its own"
        cls = drop_in._original
    replaced = _replaced_in(cls)
    return "" if replaced is None else f"{cls.__name__}.{replaced} was replaced"


def _replaced_in(cls: Any) -> str | None:
    methods = tuple(getattr(cls, name, None) for name in _METHODS)
    helpers: dict[str, FunctionType] = {}
    forward = getattr(cls, "forward", None)  # TorchScript's classes give none
    if isinstance(forward, FunctionType):
        names, space = forward.__code__.co_names, forward.__globals__
        helpers = {n: space[n] for n in names if isinstance(space.get(n), FunctionType)}
    return _replaced(cls, methods, tuple(helpers.items()))


@functools.lru_cache(maxsize=1024)
def _replaced(
    cls: type, methods: tuple[Any, ...], helpers: tuple[tuple[str, FunctionType], ...]
) -> str | None:
    file = ""
    for name, method in zip(_METHODS[::-1], methods[::-1], strict=True):
        owner: Any = next((base for base in cls.__mro__ if name in vars(base)), None)
        if owner is not None:
            file = sys.modules[owner.__module__].__file__ or ""
            if not isinstance(method, FunctionType):
                return name
            # Tracers of PyTorch replace methods of its Module while they run.
            is_tracers = owner is nn.Module and Path(method.__code__.co_filename).is_relative_to(
                _TORCH
            )
            if method.__code__.co_filename != file and not is_tracers:
                return name
    folder = Path(file).parent  # of the forward, the last
    return next((n for n, f in helpers if Path(f.__code__.co_filename).parent != folder), None)
