"""What a forward makes of the maps that it returns: one of them, or containers of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

__all__ = ["ONE_MAP", "Returned"]

_CONTAINERS = (tuple, list, dict, OrderedDict)


@dataclass(frozen=True)
class _Container:
    """A container with a place, a constant or another container for each of its values."""

    kind: type
    keys: tuple[Any, ...]  # of a dict
    parts: tuple[Any, ...]


@dataclass(frozen=True)
class _Constant:
    value: Any


@dataclass(frozen=True)
class Returned:
    """A map, or containers of maps inside each other, each map one of the results of a plan."""

    shape: Any = 0  # the place of a map among the results, or a _Container

    @staticmethod
    def of(out: Any) -> tuple[Returned, list[Tensor]] | None:
        """What was returned, and its maps, each once; None for anything else. Tuples, lists, dicts,
        named tuples and None are known."""
        maps: list[Tensor] = []
        try:
            shape = _shape_of(out, maps, {})
        except TypeError:
            return None
        return (Returned(shape), maps) if maps else None

    @property
    def container(self) -> type | None:
        """That of all; None where a map is returned itself."""
        return self.shape.kind if isinstance(self.shape, _Container) else None

    @property
    def is_nested(self) -> bool:
        """Whether what is in the container is not only maps."""
        parts = self.shape.parts if isinstance(self.shape, _Container) else ()
        return not all(type(part) is int for part in parts)

    @property
    def places(self) -> tuple[int, ...]:
        """Of each map that is returned, in order."""
        return tuple(_places(self.shape))

    def moved(self, places: Sequence[int]) -> Returned:
        """The same with ``places[i]`` for the place ``i``."""
        return Returned(_moved(self.shape, places))

    def filled(self, results: Any) -> Any:
        """The same with a plan's results, a tensor or a tuple of several."""
        results = (results,) if isinstance(results, Tensor) else results
        if type(self.shape) is int:
            return results[self.shape]
        return _filled(self.shape, results)

    def results(self, out: Any) -> Any:
        """The results that are in what a forward returned, as a plan gives them."""
        if self.container is None:
            return out
        found = dict(_found(self.shape, out))
        results = tuple(found[place] for place in range(len(found)))
        return results if len(results) > 1 else results[0]


def _shape_of(value: Any, maps: list[Tensor], places: dict[int, int]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in places:
            places[id(value)] = len(maps)
            maps.append(value)
        return places[id(value)]
    if value is None:
        return _Constant(None)
    kind = type(value)
    if kind not in _CONTAINERS and not _is_named_tuple(kind):
        raise TypeError(kind)
    is_dict = isinstance(value, dict)
    parts = [_shape_of(part, maps, places) for part in (value.values() if is_dict else value)]
    return _Container(kind, tuple(value) if is_dict else (), tuple(parts))


def _is_named_tuple(kind: type) -> bool:
    return issubclass(kind, tuple) and kind.__bases__ == (tuple,) and hasattr(kind, "_fields")


def _moved(shape: Any, places: Sequence[int]) -> Any:
    if isinstance(shape, _Container):
        return replace(shape, parts=tuple(_moved(part, places) for part in shape.parts))
    return places[shape] if type(shape) is int else shape


def _filled(shape: Any, results: Sequence[Tensor]) -> Any:
    if type(shape) is int:
        return results[shape]
    if isinstance(shape, _Constant):
        return shape.value
    parts = [_filled(part, results) for part in shape.parts]
    if issubclass(shape.kind, dict):
        return shape.kind(zip(shape.keys, parts, strict=True))
    return shape.kind(parts) if shape.kind in _CONTAINERS else shape.kind(*parts)


def _found(shape: Any, out: Any) -> Iterator[tuple[int, Tensor]]:
    """The map in each place of what a forward has returned."""
    if type(shape) is int:
        yield shape, out
    elif isinstance(shape, _Container):
        parts = out.values() if isinstance(out, dict) else out
        for inner, part in zip(shape.parts, parts, strict=True):
            yield from _found(inner, part)


def _places(shape: Any) -> Iterator[int]:
    if type(shape) is int:
        yield shape
    elif isinstance(shape, _Container):
        for part in shape.parts:
            yield from _places(part)


ONE_MAP = Returned()
