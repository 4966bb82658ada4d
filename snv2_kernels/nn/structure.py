"""The structure of a module tree: all that its forward may depend on but the numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["structure"]

_OWN = ("_packed_state", "_backend", "_shares_parameters", "_recognition", "training")


def structure(module: nn.Module) -> dict[str, Any]:
    """All that a forward may depend on but the numbers. Equal ones compute the same."""
    return {
        name: (
            getattr(child, "_original", type(child)),
            dict(_attributes(child)),
        )
        for name, child in module.named_modules(remove_duplicate=False)
    }


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name not in _OWN and name not in _base_attributes():
            simple = value is None or callable(value) or isinstance(value, str | int | float)
            yield name, value if simple else _frozen(value)
    for registry in (module._parameters, module._buffers):
        for name, t in registry.items():
            yield name, None if t is None else tuple(t.shape)


def _frozen(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_frozen(part) for part in value]
    return value if isinstance(value, str | int | float | None) else type(value)


@functools.cache
def _base_attributes() -> frozenset[str]:
    return frozenset(vars(nn.Module()))
