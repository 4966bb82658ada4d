"""The structure of a module tree: all that its forward may depend on but the numbers."""

from __future__ import annotations

import collections
import enum
import functools
import hashlib
import inspect
import logging
import re
import threading
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snv2_kernels.graph.nodes import holds_numbers
from snv2_kernels.nn.clone import CACHES, original_class

__all__ = ["Incomparable", "structure"]

_MOST_VALUES = 200_000  # that attributes hold, of a whole tree
_MOST_BYTES = 1 << 16  # of an array or tensor
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_PLAIN_BASES = (object, types.SimpleNamespace)  # of objects that are their attributes
_OWN = frozenset((*CACHES, "_backend", "_given_channels", "_may_partition", "_ranges",
                  "_recognition", "training"))  # fmt: skip
# The repr of these tells them apart, and from those of other types.
_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype,
                    torch.device, torch.layout, torch.memory_format, re.Pattern))  # fmt: skip
# Numbers do not depend on what these hold.
_IGNORED = (type(threading.Lock()), type(threading.RLock()), logging.Logger)
_FOREIGN = ("abc", "builtins", "torch", "typing")  # packages whose classes stay as they are
_BUILTINS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
             types.MethodWrapperType)  # fmt: skip


class Incomparable(Exception):
    """An attribute whose changes cannot be seen; the message is the reason in a few words."""


def structure(module: nn.Module) -> str:
    """Returns a digest that is the same for two states of a module only if they compute the same,
    but for the numbers in parameters and buffers.

    It is of each submodule's class, with the code of its methods, attributes by value, shapes of
    tensors, and which names stand for the same module or tensor.

    Raises:
        Incomparable: if an attribute has a value that cannot be compared.
    """
    return _digest(_Freezer(module).tree)


def _digest(value: Any) -> str:
    return hashlib.blake2b(
        repr(value).encode(errors="backslashreplace"), digest_size=16
    ).hexdigest()


class _Freezer:
    """Turns the attributes of one module tree into tuples of texts and numbers, whose repr tells
    all values apart."""

    def __init__(self, root: nn.Module) -> None:
        self._count = 0
        self._names: dict[int, str] = {}  # of modules, parameters and buffers
        self._classes: dict[type, Any] = {}
        self._open: dict[int, int] = {}  # objects that are being gone through, by their order
        named = list(root.named_modules(remove_duplicate=False))
        for name, module in named:
            self._names.setdefault(id(module), name)
            for registry in (module._parameters, module._buffers):
                for key, t in registry.items():
                    if t is not None:
                        self._names.setdefault(id(t), f"{name}.{key}")
        self.tree = [(name, self._module(name, module)) for name, module in named]

    def _module(self, name: str, module: nn.Module) -> Any:
        first = self._names[id(module)]
        if first != name:
            return first
        try:
            return self._type(original_class(module)), *self._members(module)
        except Incomparable as error:
            raise Incomparable(f"{name}.{error}" if name else str(error)) from None

    def _members(self, module: nn.Module) -> Iterator[Any]:
        for name, value in vars(module).items():
            if name not in _OWN and name not in _base_attributes():
                try:
                    yield name, self.freeze(value)
                except Incomparable as error:
                    raise Incomparable(f"{name} is {error}, whose changes cannot be seen") from None
        for registry in (module._parameters, module._buffers):
            for name, t in registry.items():
                yield name, None if t is None else (tuple(t.shape), self._names[id(t)])
                if t is not None and holds_numbers(t):  # such as an order of channels
                    yield _bytes_of(t.cpu())

    def _type(self, cls: type) -> Any:
        """The name of a class, with a digest of what it and its bases outside of PyTorch hold."""
        if cls not in self._classes:
            name = cls.__module__, cls.__qualname__
            self._classes[cls] = name  # should it hold objects of its own
            forward = inspect.getattr_static(cls, "forward", None)
            held = [(key, self._held(value)) for key, value in _held_by(cls)]
            if held or forward is not None:
                self._classes[cls] = *name, _digest((self._held(forward), held))
        return self._classes[cls]

    def _held(self, value: Any) -> Any:
        try:
            return self.freeze(value)
        except Incomparable:  # such as typing's notes on a class
            return type(value).__qualname__, id(value)

    def freeze(self, value: Any) -> Any:  # noqa: PLR0911
        """Returns what tells a value from others.

        Raises:
            Incomparable: naming the type.
        """
        self._count += 1
        if self._count > _MOST_VALUES:
            raise Incomparable(f"a {type(value).__name__} beside {_MOST_VALUES} other values")
        kind = type(value)
        if kind in _ATOMS or (
            (kind is tuple or kind is list) and _ATOMS.issuperset(map(type, value))
        ):
            return repr(value)
        if id(value) in self._names:
            return "in the tree", self._names[id(value)]
        if isinstance(value, type):
            return "class", self._type(value)
        if isinstance(value, _BUILTINS):
            told = "builtin", str(value.__qualname__), repr(getattr(value, "__module__", None))
            owner = getattr(value, "__self__", None)
            free = owner is None or isinstance(owner, types.ModuleType | type)
            return told if free else (*told, self.freeze(owner))
        if isinstance(value, _IGNORED):
            return (type(value).__name__,)
        if id(value) in self._open:
            return "outer value", self._open[id(value)]
        self._open[id(value)] = len(self._open)
        try:
            return self._type(type(value)), *self._parts(value)
        finally:
            del self._open[id(value)]

    def _all(self, *values: Any) -> list[Any]:
        return [self.freeze(value) for value in values]

    def _parts(self, value: Any) -> Iterator[Any]:
        """What a value consists of."""
        if isinstance(value, enum.Enum):
            yield value.name, self.freeze(value.value)
        elif isinstance(value, Tensor | np.ndarray | np.generic):
            yield tuple(value.shape), str(value.dtype), _bytes_of(value)
        elif isinstance(value, types.FunctionType):
            cells = (c.cell_contents for c in value.__closure__ or () if _is_filled(c))
            yield self._all(value.__code__, value.__defaults__, value.__kwdefaults__, *cells)
        elif isinstance(value, types.CodeType):
            yield value.co_code, value.co_names, value.co_varnames, value.co_freevars
            yield self._all(*value.co_consts)
        elif isinstance(value, types.MethodType):
            yield self._all(value.__func__, value.__self__)
        elif isinstance(value, staticmethod | classmethod | functools._lru_cache_wrapper):
            yield self._all(value.__wrapped__)
        elif isinstance(value, property):
            yield self._all(value.fget, value.fset, value.fdel)
        elif isinstance(value, functools.partial):
            yield self._all(value.func, value.args, value.keywords)
        elif isinstance(value, range | slice):
            yield self._all(value.start, value.stop, value.step)
        else:
            yield from self._contents(value)

    def _contents(self, value: Any) -> Iterator[Any]:
        """The items of a container and the attributes of an object."""
        items: Any = ()
        if isinstance(value, set | frozenset):
            yield sorted(map(repr, self._all(*value)))
        elif isinstance(value, dict | types.MappingProxyType):
            items = [part for item in value.items() for part in item]
        elif isinstance(value, tuple | list | collections.deque):
            items = value
        elif not _is_python_object(value):
            raise Incomparable(f"a {type(value).__name__}")
        yield self._all(*items)
        for name, attribute in _attributes_of(value):
            yield name, self.freeze(attribute)


def _held_by(cls: type) -> Iterator[tuple[str, Any]]:
    """Methods and other attributes of a class and its bases, but for PyTorch's."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] not in _FOREIGN:
            for name, value in vars(base).items():
                if name[:2] != "__" or isinstance(value, types.FunctionType):
                    yield name, value


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.layout is not torch.strided:
            raise Incomparable(f"a tensor on {value.device}")
        value = (
            value.detach().reshape(-1).view(torch.uint8).numpy() if value.numel() else np.empty(0)
        )
    if value.nbytes > _MOST_BYTES or value.dtype.hasobject:
        raise Incomparable(f"an array of {value.nbytes} bytes")
    return bytes(value.tobytes())


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _attributes_of(value: Any) -> Iterator[tuple[str, Any]]:
    for name, attribute in getattr(value, "__dict__", {}).items():
        if not isinstance(value, nn.Module) or name not in _OWN:
            yield name, attribute
    cls: Any = type(value)
    for name in _slots(cls):
        if hasattr(value, name):
            yield name, getattr(value, name)


@functools.cache
def _slots(cls: Any) -> tuple[str, ...]:
    return tuple(
        name
        for base in cls.__mro__
        for name, member in vars(base).items()
        if isinstance(member, types.MemberDescriptorType)
    )


class _Empty:
    pass


def _is_python_object(value: Any) -> bool:
    """Whether attributes are all that an object consists of. One of a class written in C is larger
    than these take."""
    cls: Any = type(value)
    if not all(base in _PLAIN_BASES or base.__flags__ & _HEAP_TYPE for base in cls.__mro__):
        return False
    room = _Empty.__basicsize__ + len(_slots(cls)) * np.dtype(np.intp).itemsize
    return bool(cls.__basicsize__ <= room and cls.__itemsize__ == 0)


@functools.cache
def _base_attributes() -> frozenset[str]:
    return frozenset(vars(nn.Module()))
