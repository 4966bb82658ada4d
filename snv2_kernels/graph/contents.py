"""Contents of containers, to be compared and put back after foreign code has run."""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import operator
import sys
from collections import deque
from types import CellType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

__all__ = ["Contents", "owning"]

_MOST = 100_000  # parts that are looked at, lest a whole program is reachable
_KINDS: tuple[Any, ...] = (list, tuple, deque, set, frozenset)
_WHOLE = frozenset((bool, int, float, str, type(None), Tensor, nn.Parameter))  # without parts
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_Cache = type(functools.lru_cache(len))


class Contents:
    """Containers that are reachable from some values, and what was in them."""

    def __init__(self) -> None:
        self._kept: list[tuple[str, Any, Any]] = []
        self._caches: list[tuple[Any, Any]] = []
        self._seen: dict[int, Any] = {}  # an id is an object's for as long as that lives
        self._left = _MOST

    def add(self, name: str, value: Any) -> None:
        """Keep what is in a value and its parts; ``name`` is for :meth:`changed`."""
        waiting = [(name, value)]
        while waiting:
            name, value = waiting.pop()
            if id(value) in self._seen or issubclass(type(value), type):
                continue
            if type(value) is _Cache:
                self._caches.append((value, value.cache_info()))
            parts = _parts(value)
            if parts is None or len(parts) > self._left:
                continue
            self._left -= len(parts)
            self._seen[id(value)] = value
            if not issubclass(type(value), tuple | frozenset | FunctionType):
                self._kept.append((name, value, parts))
            if isinstance(parts, dict):
                name = "" if isinstance(value, FunctionType) else name
                waiting += [
                    (_joined(name, key), part)
                    for key, part in parts.items() if type(part) not in _WHOLE
                ]  # fmt: skip
            else:
                waiting += [(name, part) for part in parts if type(part) not in _WHOLE]

    def add_module(self, module: nn.Module) -> None:
        """Keep the attributes of all modules of a tree and of their classes outside of PyTorch."""
        for name, child in module.named_modules():
            self.add(name, vars(child))
        for cls in {base for child in module.modules() for base in type(child).__mro__}:
            if cls.__module__.partition(".")[0] not in _LIBRARIES:
                self._kept.append((cls.__name__, cls, _parts(cls)))
                for name, value in vars(cls).items():
                    self.add(f"{cls.__name__}.{name}", value)

    def cells(self) -> list[CellType]:
        """Variables that functions among the values take from enclosing ones."""
        return [value for _, value, _ in self._kept if isinstance(value, CellType)]

    def hold_numbers(self) -> bool:
        """Whether there are modules or tensors among the values."""
        parts = [self._seen.values(), *map(_parts, self._seen.values())]
        found = itertools.chain(*(p.values() if isinstance(p, dict) else p for p in parts))
        return any(isinstance(part, nn.Module | Tensor) for part in found)

    def changed(self) -> str | None:
        """A verb and the name of the first value that holds other objects than it did."""
        for name, value, was in self._kept:
            now = _parts(value)
            if _same(now, was):
                continue
            missing = object()
            keys = [*was, *now] if isinstance(was, dict) else []
            keys = [k for k in keys if was.get(k, missing) is not now.get(k, missing)]
            sets = keys or isinstance(value, CellType)
            return f"{'sets' if sets else 'changes'} {_joined(name, keys[0]) if keys else name!r}"
        return None

    def restore(self) -> None:
        """Put back what was in the containers that have changed."""
        for _, value, was in self._kept:
            if not _same(_parts(value), was):
                _refill(value, was)

    def clear_caches(self) -> None:
        """Empty the caches that were filled."""
        for cache, info in self._caches:
            if cache.cache_info() != info:
                cache.cache_clear()


def is_full(cell: CellType) -> bool:
    """Whether a variable of an enclosing function has been assigned."""
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _joined(name: str, key: Any) -> str:
    return name if key in _REGISTRIES else f"{name}.{key}" if name else str(key)


def _parts(value: Any) -> Any:
    """A list or dict of what a container holds, None for other values; runs no code of theirs."""
    cls = type(value)  # not isinstance, which asks a proxy
    if cls in _WHOLE:
        return None
    if issubclass(cls, dict):
        return dict(dict.items(value))
    kind = next((kind for kind in _KINDS if issubclass(cls, kind)), None)
    if kind is not None:
        return list(kind.__iter__(value))
    if issubclass(cls, CellType):
        return [value.cell_contents] if is_full(value) else []
    return _attributes(value, cls)


def _attributes(value: Any, cls: type) -> dict[str, Any] | None:
    """Attributes of a class, what a function encloses and its defaults, or attributes of an object
    of a class that is no library's."""
    owner = value if issubclass(cls, type | FunctionType) else cls
    if str(owner.__module__).partition(".")[0] in _LIBRARIES and cls not in _NAMESPACES:
        return None
    if issubclass(cls, FunctionType):
        cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
        return {**cells, value.__name__: (value.__defaults__, value.__kwdefaults__)}
    plain = cls.__dictoffset__ and not issubclass(cls, ModuleType | Tensor)
    return dict(vars(value)) if plain else None


_NAMESPACES = (SimpleNamespace, argparse.Namespace)
_LIBRARIES = {*sys.stdlib_module_names, "numpy", "snv2_kernels", "torch"}


def _same(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if not a:
        return True
    if isinstance(a, dict):
        return all(map(operator.is_, a, b)) and all(map(operator.is_, a.values(), b.values()))
    return all(map(operator.is_, a, b))


def _refill(value: Any, parts: Any) -> None:
    if isinstance(value, list):
        list.__setitem__(value, slice(None), parts)
    elif isinstance(value, deque):
        deque.clear(value)
        deque.extend(value, parts)
    elif isinstance(value, set):
        set.clear(value)
        set.update(value, parts)
    elif isinstance(value, CellType):
        value.cell_contents = parts[0]
    elif isinstance(value, type):
        for name in [*parts, *vars(value)]:
            if name not in parts:
                delattr(value, name)
            elif vars(value).get(name) is not parts[name]:
                setattr(value, name, parts[name])
    else:
        space = value if isinstance(value, dict) else vars(value)
        dict.clear(space)
        dict.update(space, parts)


def owning(value: Any, memo: dict[int, Any]) -> Any:
    """The same with containers of its own; what they hold is shared."""
    if id(value) in memo:
        return memo[id(value)]
    if type(value) is tuple:
        return tuple(owning(part, memo) for part in value)
    if isinstance(value, dict | list | set | deque):
        try:
            new = memo[id(value)] = copy.copy(value)
        except Exception:  # a class of its own
            return value
        parts = _parts(value)
        if isinstance(parts, dict):
            _refill(new, {key: owning(part, memo) for key, part in parts.items()})
        else:
            _refill(new, [owning(part, memo) for part in parts])
        return new
    return value
