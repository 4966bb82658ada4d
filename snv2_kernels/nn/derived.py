"""Classes of drop-ins that derive from the class of the module in whose place they stand."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from torch import nn

from snv2_kernels.nn.recognition import NotRecognized
from snv2_kernels.nn.recognized import Recognized

__all__ = ["recognized_class", "reduces_itself", "without_state"]


def reduces_itself(original: type[nn.Module]) -> bool:
    """Whether a class has its own way to be copied and pickled."""
    plain = original.__reduce_ex__ is object.__reduce_ex__
    return not plain or original.__reduce__ is not object.__reduce__


def without_state(original: type[nn.Module], base: type[Recognized]) -> nn.Module:
    """A drop-in as pickle makes one, before its attributes are set."""
    return object.__new__(recognized_class(original, base=base))


def recognized_class(
    original: type[nn.Module], attributes: Iterable[str] = (), base: type[Recognized] = Recognized
) -> type[Recognized]:
    """The class of the drop-in for modules of a class, derived from ``base`` and that class.

    Raises:
        NotRecognized: if the class, or an instance's attribute, has a name that the drop-in needs.
    """
    if issubclass(original, Recognized):
        return original
    classes: tuple[Any, Any] = original, base
    for name in _reserved(classes[1]):
        if name in attributes or hasattr(original, name):
            raise NotRecognized(f"its attribute {name!r} has another meaning in a drop-in")
    made: type[Recognized] = _derived(*classes)
    return made


@functools.cache
def _reserved(base: Any) -> frozenset[str]:
    return frozenset(dir(base)) - frozenset(dir(nn.Module))


@functools.cache
def _derived(original: Any, base: Any) -> Any:
    names = {"_original": original, "_base": base, "__module__": original.__module__}
    try:
        made = type(original.__name__, (base, original), names)
    except TypeError as error:  # a metaclass of its own, or a layout that does not fit
        raise NotRecognized(f"its class cannot be derived from: {error}") from None
    made.__qualname__ = original.__qualname__
    return made
