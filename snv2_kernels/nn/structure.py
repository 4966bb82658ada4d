"""The structure of a module tree: all that its forward may depend on but the numbers."""

from __future__ import annotations

import collections
import enum
import functools
import inspect
import logging
import re
import threading
import types
import weakref
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snv2_kernels.nn.clone import CACHES

__all__ = ["Incomparable", "structure"]

_MOST_VALUES = 20_000  # that attributes hold, of a whole tree
_MOST_ARRAY_BYTES = 1 << 16
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_PLAIN_BASES = (object, types.SimpleNamespace)  # of objects that are their attributes
_OWN = frozenset((*CACHES, "_backend", "_recognition", "training"))
_ATOMS = (type(None), str, int, bytes, complex, type(...), torch.dtype, torch.device, torch.layout,
          torch.memory_format, re.Pattern)  # fmt: skip
# Numbers do not depend on what these hold.
_IGNORED = (type(threading.Lock()), type(threading.RLock()), logging.Logger)
_FOREIGN = ("abc", "builtins", "torch", "typing")  # packages whose classes stay as they are
_FUNCTIONS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType,
              types.MethodWrapperType, functools._lru_cache_wrapper)  # fmt: skip
_DESCRIPTORS = (staticmethod, classmethod, property)


class Incomparable(Exception):
    """An attribute whose changes cannot be seen; the message is the reason in a few words."""


def structure(module: nn.Module) -> Hashable:
    """Returns a value that is equal for two states of a module only if they compute the same, but
    for the numbers in parameters and buffers.

    It consists of each submodule's class, with what the class holds, attributes by value, shapes
    of tensors, and which names stand for the same module or tensor. It refers to nothing that
    refers to the module.

    Raises:
        Incomparable: if an attribute has a value that cannot be compared.
    """
    return _Freezer(module).tree


class _Same:
    """Equal where the object is the same one, which it does not keep alive where it need not."""

    def __init__(self, value: Any) -> None:
        self._hash = id(value)
        try:
            self._get: Any = weakref.ref(value)
        except TypeError:
            self._get = lambda: value

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._get() is other._get() is not None


class _Freezer:
    """Turns the attributes of one module tree into hashable values."""

    def __init__(self, root: nn.Module) -> None:
        self._count = 0
        self._names: dict[int, str] = {}  # of modules, parameters and buffers
        self._classes: dict[type, Hashable] = {}
        self._open: dict[int, int] = {}  # objects that are being gone through, by their order
        named = list(root.named_modules(remove_duplicate=False))
        for name, module in named:
            self._names.setdefault(id(module), name)
            for key, t in _registered(module):
                self._names.setdefault(id(t), f"{name}.{key}")
        self.tree: Hashable = tuple(
            (name, self._module(name, module) if self._names[id(module)] == name
             else self._names[id(module)])
            for name, module in named
        )  # fmt: skip

    def _module(self, name: str, module: nn.Module) -> Hashable:
        cls = getattr(module, "_original", type(module))
        try:
            attributes = self._attributes(module)
            return _Same(cls), self._class(cls), attributes, tuple(self._tensors(module))
        except Incomparable as error:
            raise Incomparable(f"{name}.{error}" if name else str(error)) from None

    def _attributes(self, module: nn.Module) -> Hashable:
        values = []
        for name, value in vars(module).items():
            if name not in _OWN and name not in _base_attributes():
                try:
                    values.append((name, self.freeze(value)))
                except Incomparable as error:
                    raise Incomparable(f"{name} is {error}, whose changes cannot be seen") from None
        return tuple(values)

    def _tensors(self, module: nn.Module) -> Iterator[Hashable]:
        for registry in (module._parameters, module._buffers):
            for name, t in registry.items():
                yield name, None if t is None else (tuple(t.shape), self._names[id(t)])

    def _class(self, cls: type) -> Hashable:
        """The forward of a class and what else classes outside of PyTorch hold."""
        if cls not in self._classes:
            self._classes[cls] = (
                _Same(inspect.getattr_static(cls, "forward", None)),
                tuple(
                    (key, self._descriptor(value))
                    for base in cls.__mro__
                    if base.__module__.partition(".")[0] not in _FOREIGN
                    for key, value in vars(base).items()
                    if callable(value) or isinstance(value, _DESCRIPTORS) or key[:2] != "__"
                ),
            )  # fmt: skip
        return self._classes[cls]

    def _descriptor(self, value: Any) -> Hashable:
        if isinstance(value, (types.FunctionType, type, *_DESCRIPTORS)):
            return _Same(value)
        try:
            return self.freeze(value)
        except Incomparable:  # such as typing's and Dynamo's notes on a class
            return _Same(value)

    def freeze(self, value: Any) -> Hashable:  # noqa: PLR0911
        """Returns a hashable value that is equal for equal ones.

        Raises:
            Incomparable: naming the type.
        """
        self._count += 1
        if self._count > _MOST_VALUES:
            raise Incomparable(f"a {type(value).__name__} beside {_MOST_VALUES} other values")
        if type(value) is float:
            return float, value.hex()
        if id(value) in self._names:
            return "in the tree", self._names[id(value)]
        if isinstance(value, enum.Enum):
            return _Same(type(value)), value.name, self.freeze(value.value)
        if type(value) in _ATOMS or type(value) is bool:
            return type(value), value
        if isinstance(value, (type, *_FUNCTIONS)):
            return _Same(value)
        if isinstance(value, _IGNORED):
            return _Same(type(value))
        if id(value) in self._open:
            return "outer value", self._open[id(value)]
        self._open[id(value)] = len(self._open)
        try:
            return _Same(type(value)), *self._parts(value)
        finally:
            del self._open[id(value)]

    def _all(self, *values: Any) -> tuple[Hashable, ...]:
        return tuple(map(self.freeze, values))

    def _parts(self, value: Any) -> Iterator[Hashable]:
        """What a value consists of."""
        if isinstance(value, Tensor):
            if value.is_inference():
                raise Incomparable("an inference tensor")
            yield _Same(value)
            yield value._version
        elif isinstance(value, np.ndarray | np.generic):
            if value.nbytes > _MOST_ARRAY_BYTES or value.dtype.hasobject:
                raise Incomparable(f"an array of {value.nbytes} bytes")
            yield value.shape, value.dtype.str, value.tobytes()
        elif isinstance(value, types.FunctionType):
            cells = (c.cell_contents for c in value.__closure__ or () if _is_filled(c))
            yield _Same(value)
            yield self._all(value.__defaults__, value.__kwdefaults__, *cells)
            yield value.__code__
        elif isinstance(value, types.MethodType):
            yield self._all(value.__func__, value.__self__)
        elif isinstance(value, functools.partial):
            yield self._all(value.func, value.args, value.keywords)
        elif isinstance(value, range | slice):
            yield value.start, value.stop, value.step
        else:
            yield from self._contents(value)

    def _contents(self, value: Any) -> Iterator[Hashable]:
        """The items of a container and the attributes of an object."""
        items: Any = ()
        if isinstance(value, set | frozenset):
            yield frozenset(self._all(*value))
        elif isinstance(value, dict | types.MappingProxyType):
            items = [part for item in value.items() for part in item]
        elif isinstance(value, tuple | list | collections.deque):
            items = value
        elif not _is_python_object(value):
            raise Incomparable(f"a {type(value).__name__}")
        yield self._all(*items)
        for name, attribute in _attributes_of(value):
            yield name, self.freeze(attribute)


def _registered(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for registry in (module._parameters, module._buffers):
        yield from ((name, t) for name, t in registry.items() if t is not None)


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
    for name in _slots(type(value)):
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
    cls = type(value)
    if not all(base in _PLAIN_BASES or base.__flags__ & _HEAP_TYPE for base in cls.__mro__):
        return False
    room = _Empty.__basicsize__ + len(_slots(cls)) * np.dtype(np.intp).itemsize
    return cls.__basicsize__ <= room and cls.__itemsize__ == 0


@functools.cache
def _base_attributes() -> frozenset[str]:
    return frozenset(vars(nn.Module()))
