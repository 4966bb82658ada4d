"""Where the channels of a map come from, through whatever splits, joins and shuffles them.

A graph spells a channel shuffle in many ways: view, transpose, view; reshape, permute, select;
stack, flatten. All of them only move channels, and here they are followed as such: a value is a
list of *origins*, (node, channel), and dimensions made of *factors* that count through that list.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from snv2_kernels.graph.nodes import (
    example,
    function_name,
    numbers_of,
    positional,
    same_number,
    shape_of,
)

__all__ = ["MOST_CHANNELS", "MOVES", "Follower", "Origin", "Value", "channels_of"]

# The channel, and above it the number that its follower gave to the node.
Origin = int
_BITS = 24  # for the channel
MOST_CHANNELS = 1 << _BITS  # of a map, as in a recipe


@dataclass(frozen=True)
class Factor:
    """Part of a dimension: batch, height and width as they are, or steps through the channels."""

    size: Any  # int, or a SymInt but for channels
    stride: int = 0  # in the list of origins; 0 for what is no channel
    name: str = ""  # n, h or w; empty for channels

    @property
    def is_channels(self) -> bool:
        return not self.name


@dataclass(frozen=True)
class Value:
    """A tensor that holds channels of other maps, each whole, in some order."""

    origins: tuple[Origin, ...]
    dims: tuple[tuple[Factor, ...], ...]
    offset: int = 0

    def channels(self) -> tuple[Origin, ...] | None:
        """Origins in order, if this is a map [N, C, H, W]."""
        return self._channels

    @functools.cached_property
    def _channels(self) -> tuple[Origin, ...] | None:
        dims = [[f for f in dim if not same_number(f.size, 1)] for dim in self.dims]
        if len(dims) != 4 or not all(f.is_channels for f in dims[1]):
            return None
        for name, dim in (("n", dims[0]), ("h", dims[2]), ("w", dims[3])):
            if [f.name for f in dim] not in ([], [name]):
                return None
        positions = _positions(tuple(dims[1]), self.offset)
        return tuple(map(self.origins.__getitem__, positions))


@functools.lru_cache(maxsize=64)  # units of a stage have the same
def _positions(factors: tuple[Factor, ...], offset: int) -> tuple[int, ...]:
    positions = [offset]
    for factor in factors:
        positions = [p + i * factor.stride for p in positions for i in range(factor.size)]
    return tuple(positions)


def channels_of(origins: Iterable[Origin]) -> tuple[int, ...]:
    """Returns the numbers of the channels, each in its node's map."""
    return tuple([origin % MOST_CHANNELS for origin in origins])


class Follower:
    """Values of the nodes of a graph, which are to be asked for in the graph's order."""

    def __init__(self) -> None:
        self._values: dict[Node, Any] = {}  # Value, a tuple of them, None, or _ITSELF
        self._followed: list[Node] = []  # the keys, in the graph's order
        self._numbers: dict[Node, int] = {}
        self._makers: list[Node] = []  # by their numbers

    def cut(self, node: Node) -> None:
        """From here on a node is its own origin."""
        while self._followed and not self._followed[-1] < node:
            del self._values[self._followed.pop()]
        self._put(node, _ITSELF)

    def follow(self, node: Node) -> None:
        """Work out the value of the next node of a graph."""
        if node not in self._values:
            moved = self.moved(node)
            self._put(node, _ITSELF if moved is None else moved)

    def _put(self, node: Node, value: Any) -> None:
        self._values[node] = value
        if not self._followed or self._followed[-1] < node:
            self._followed.append(node)
        else:
            bisect.insort(self._followed, node)

    def value(self, node: Any) -> Any:
        """A Value, a tuple of them for what gives several tensors, None for what is neither."""
        if not isinstance(node, Node):
            return None
        self.follow(node)
        if self._values[node] is _ITSELF:  # few are asked for: they are long
            self._values[node] = self._own(node)
        return self._values[node]

    def origins(self, node: Node, count: int) -> range:
        """The first channels of a node's map, as their own origins."""
        number = self._numbers.setdefault(node, len(self._makers))
        if number == len(self._makers):
            self._makers.append(node)
        return range(number << _BITS, (number << _BITS) + count)

    def makers(self, origins: Iterable[Origin]) -> list[Node]:
        """The nodes whose channels these are, each once, in the order of their first."""
        numbers = dict.fromkeys([origin >> _BITS for origin in origins])
        return [self._makers[number] for number in numbers]

    def _own(self, node: Node) -> Value | None:
        """A map that is its own origin."""
        map_ = example(node)
        if not isinstance(map_, Tensor) or map_.dim() != 4:
            return None
        n, c, h, w = map(_known, shape_of(node))
        if not isinstance(c, int) or c > MOST_CHANNELS:
            return None
        sizes = (Factor(n, name="n"), Factor(c, 1), Factor(h, name="h"), Factor(w, name="w"))
        return Value(tuple(self.origins(node, c)), tuple((size,) for size in sizes))

    def moved(self, node: Node) -> Any:
        """The value of a node that only moves channels, None for others."""
        rule = _RULES.get(function_name(node))
        if rule is None:
            return None
        try:
            args, kwargs = positional(node)
            return rule(self, node, *args, **kwargs)
        except (_Unknown, TypeError):  # another signature than the one that is known
            return None

    def numbers(self, value: Any) -> list[int]:
        """Numbers of channels, in a list or a tensor that does not depend on the input."""
        if isinstance(value, Node):
            tensor = numbers_of(value)
            value = None if tensor is None or tensor.dim() != 1 else tensor.tolist()
        if not isinstance(value, list | tuple) or not all(type(i) is int for i in value):
            raise _Unknown
        return list(value)

    def _one(self, node: Any) -> Value:
        value = self.value(node)
        if not isinstance(value, Value):
            raise _Unknown
        return value


_ITSELF = object()  # a map that is its own origin


class _Unknown(Exception):
    """A use of a function that is not followed."""


# Rules ----------------------------------------------------------------------------------------
#
# Each takes what the function takes. Shapes are read from the example, where none is left open.


def _dim(value: Value, dim: Any) -> int:
    if not isinstance(dim, int):
        raise _Unknown
    return dim % len(value.dims)


def _same(follower: Follower, node: Node, x: Any, *args: Any, **kwargs: Any) -> Value:
    return follower._one(x)


def _permuted(value: Value, order: Sequence[int]) -> Value:
    return Value(value.origins, tuple(value.dims[d] for d in order), value.offset)


def _permute(follower: Follower, node: Node, x: Any, *order: Any, dims: Any = None) -> Value:
    value = follower._one(x)
    order = dims or (order[0] if len(order) == 1 else order)
    return _permuted(value, [_dim(value, d) for d in order])


def _transpose(follower: Follower, node: Node, x: Any, *pair: Any, **named: Any) -> Value:
    value = follower._one(x)
    order = list(range(len(value.dims)))
    a, b = (_dim(value, d) for d in (*pair, *named.values()))
    order[a], order[b] = order[b], order[a]
    return _permuted(value, order)


def _reshape(follower: Follower, node: Node, x: Any, *args: Any, **kwargs: Any) -> Value:
    """Factors in order, handed out to the dimensions of the result."""
    value = follower._one(x)
    left = [factor for dim in value.dims for factor in dim if not same_number(factor.size, 1)]
    dims = []
    for size in map(_known, shape_of(node)):
        dim: list[Factor] = []
        while not same_number(_product(dim), size):
            if not left:
                raise _Unknown
            factor = left.pop(0)
            wanted = _quotient(size, _product(dim))
            if factor.is_channels and wanted is not None and wanted < factor.size:
                if factor.size % wanted:
                    raise _Unknown
                inner = factor.size // wanted
                left.insert(0, Factor(inner, factor.stride))
                factor = Factor(wanted, factor.stride * inner)
            dim.append(factor)
        dims.append(tuple(dim))
    if left:
        raise _Unknown
    return Value(value.origins, tuple(dims), value.offset)


def _product(factors: Sequence[Factor]) -> Any:
    return math.prod(factor.size for factor in factors)


def _quotient(size: Any, divisor: Any) -> int | None:
    """Where a size is a multiple of another one, whatever the input is."""
    quotient = _hint(size) // _hint(divisor)
    return quotient if same_number(divisor * quotient, size) else None


def _known(size: Any) -> Any:
    """An int, where a SymInt can be only one."""
    if isinstance(size, int):
        return size
    only = size.node.maybe_as_int()
    return size if only is None else only


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _taken(value: Value, dim: int, indices: range) -> Value:
    """A range of a dimension that is all channels."""
    factors = value.dims[dim]
    if not all(factor.is_channels for factor in factors):
        raise _Unknown
    positions = _positions(factors, 0)
    taken = [positions[i] for i in indices]
    step = taken[1] - taken[0] if len(taken) > 1 else 1
    if not taken or step < 1 or taken != list(range(taken[0], taken[-1] + 1, step)):
        return _listed(value, dim, taken)
    dims = list(value.dims)
    dims[dim] = (Factor(len(taken), step),)
    return Value(value.origins, tuple(dims), value.offset + taken[0])


def _listed(value: Value, dim: int, positions: Sequence[int]) -> Value:
    """A choice of channels that no stride describes; of a map alone."""
    if not positions or dim != 1 or value.channels() is None:
        raise _Unknown
    origins = tuple([value.origins[value.offset + p] for p in positions])
    dims = list(value.dims)
    dims[1] = (Factor(len(origins), 1),)
    return Value(origins, tuple(dims))


def _indexed(value: Value, dim: int, indices: Sequence[int]) -> Value:
    """Channels by their numbers, in any order."""
    factors = value.dims[dim]
    size = _product(factors)
    if not all(f.is_channels for f in factors) or not all(-size <= i < size for i in indices):
        raise _Unknown
    positions = _positions(factors, 0)
    return _listed(value, dim, [positions[i] for i in indices])


def _chunks(value: Value, dim: int, sizes: Sequence[int]) -> tuple[Value, ...]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(
        _taken(value, dim, range(start, start + size))
        for start, size in zip(starts, sizes, strict=True)
    )


def _split(
    follower: Follower, node: Node, x: Any, split: Any = None, dim: Any = 0, **kwargs: Any
) -> tuple[Value, ...]:
    """chunk, split, split_with_sizes and tensor_split: the sizes are those of the results."""
    value = follower._one(x)
    axis = _dim(value, dim)
    sizes = [_known(shape[axis]) for shape in shape_of(node)]
    if not all(isinstance(size, int) for size in sizes):
        raise _Unknown
    return _chunks(value, axis, sizes)


def _select(follower: Follower, node: Node, x: Any, dim: Any, index: Any) -> Value:
    return _selected(follower._one(x), dim, index)


def _selected(value: Value, dim: Any, index: Any) -> Value:
    axis = _dim(value, dim)
    size = _product(value.dims[axis])
    if not isinstance(index, int) or not isinstance(size, int):
        raise _Unknown
    taken = _taken(value, axis, range(index % size, index % size + 1))
    dims = taken.dims[:axis] + taken.dims[axis + 1 :]
    return Value(taken.origins, dims, taken.offset)


def _unbind(follower: Follower, node: Node, x: Any, dim: Any = 0) -> tuple[Value, ...]:
    value = follower._one(x)
    size = _product(value.dims[_dim(value, dim)])
    if not isinstance(size, int):
        raise _Unknown
    return tuple(_selected(value, dim, i) for i in range(size))


def _narrow(follower: Follower, node: Node, x: Any, dim: Any, start: Any, length: Any) -> Value:
    value = follower._one(x)
    if not isinstance(start, int) or not isinstance(length, int):
        raise _Unknown
    return _taken(value, _dim(value, dim), range(start, start + length))


def _slice(
    follower: Follower, node: Node, x: Any, dim: Any = 0, start: Any = None, end: Any = None,
    step: Any = 1,
) -> Value:  # fmt: skip
    return _sliced(follower._one(x), dim, slice(start, end, step))


def _sliced(value: Value, dim: Any, part: slice) -> Value:
    axis = _dim(value, dim)
    size = _product(value.dims[axis])
    if part == slice(None):
        return value
    bounds = (part.start, part.stop, part.step)
    if not isinstance(size, int) or not all(b is None or isinstance(b, int) for b in bounds):
        raise _Unknown
    return _taken(value, axis, range(*part.indices(size)))


def _getitem(follower: Follower, node: Node, x: Any, index: Any) -> Any:
    value = follower.value(x)
    if isinstance(value, tuple):
        return value[index]
    if not isinstance(value, Value):
        raise _Unknown
    axis = 0
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, int):
            value = _selected(value, axis, part)
        elif isinstance(part, slice):
            value = _sliced(value, axis, part)
            axis += 1
        else:  # of several lists, which count together, none is a list of all channels
            value = _indexed(value, axis, follower.numbers(part))
            axis += 1
    return value


def _index_select(follower: Follower, node: Node, x: Any, dim: Any, index: Any) -> Value:
    value = follower._one(x)
    return _indexed(value, _dim(value, dim), follower.numbers(index))


def _maps(follower: Follower, tensors: Any) -> list[tuple[Origin, ...]]:
    maps = [follower._one(t).channels() for t in tensors]
    known = [channels for channels in maps if channels is not None]
    if len(known) != len(maps) or not known:
        raise _Unknown
    return known


def _cat(follower: Follower, node: Node, tensors: Any, dim: Any = 0, **kwargs: Any) -> Value:
    maps = _maps(follower, tensors)
    if _dim(follower._one(tensors[0]), kwargs.get("axis", dim)) != 1:
        raise _Unknown
    first = follower._one(tensors[0]).dims
    origins = tuple(itertools.chain.from_iterable(maps))
    return Value(origins, (first[0], (Factor(len(origins), 1),), *first[2:]))


def _stack(follower: Follower, node: Node, tensors: Any, dim: Any = 0) -> Value:
    maps = _maps(follower, tensors)
    count = len(maps[0])
    first = follower._one(tensors[0]).dims
    channels, which = (Factor(count, 1),), (Factor(len(maps), count),)
    pair = {1: (which, channels), 2: (channels, which)}.get(dim % 5)
    if pair is None or any(len(channels) != count for channels in maps):
        raise _Unknown
    origins = tuple(itertools.chain.from_iterable(maps))
    return Value(origins, (first[0], *pair, *first[2:]))


def _channel_shuffle(follower: Follower, node: Node, x: Any, groups: Any) -> Value:
    value = follower._one(x)
    channels = value.channels()
    if channels is None or not isinstance(groups, int) or len(channels) % groups:
        raise _Unknown
    width = len(channels) // groups
    origins = tuple(channels[g * width + i] for i in range(width) for g in range(groups))
    return Value(origins, (value.dims[0], (Factor(len(origins), 1),), *value.dims[2:]))


_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("contiguous", "clone", "detach", "alias"), _same),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten"), _reshape),
    **dict.fromkeys(("unsqueeze", "squeeze"), _reshape),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), _split),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "permute": _permute,
    "select": _select,
    "index_select": _index_select,
    "unbind": _unbind,
    "narrow": _narrow,
    "slice": _slice,
    operator.getitem.__name__: _getitem,
    "hstack": functools.partial(_cat, dim=1),
    "stack": _stack,
    "channel_shuffle": _channel_shuffle,
}

MOVES = frozenset(_RULES)  # functions that may do nothing but move channels
