"""What only moves channels, and arithmetic on shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from snv2_kernels.onnx import functions
from snv2_kernels.onnx.node import Node, operator
from snv2_kernels.onnx.reader import Array
from snv2_kernels.onnx.values import Constant, Dim, Factor, Map, extent

__all__ = ["concatenated"]

_MOST_SIZES = 4096
_INTEGERS = {6: np.int32, 7: np.int64}  # by ONNX's element type
_FLOATS = {1: "torch.float32", 10: "torch.float16", 11: "torch.float64"}


# Constants ------------------------------------------------------------------------------------


@operator("Constant", inputs=(0, 0))
def _constant(node: Node) -> None:
    found = [name for name in ("value", "value_float", "value_floats", "value_int", "value_ints")
             if node.has(name)]  # fmt: skip
    if len(found) != 1:
        raise ValueError("expected one value, a tensor or numbers")
    array: Any = node.tensor("value") if found == ["value"] else None
    if found == ["value_int"]:
        array = np.array(node.integer("value_int", 0))
    elif found == ["value_ints"]:
        array = np.array(node.integers("value_ints"), np.int64)
    elif found == ["value_float"]:
        array = np.array(node.real("value_float", 0.0), np.float32)
    elif array is None:
        raise ValueError("a list of floats is not supported")
    node.importer.define(node.outputs[0], Constant((array,), node.outputs[0]))


@operator("Shape", inputs=(1, 1))
def _shape(node: Node) -> None:
    x = node.any_map(0)
    part = slice(0, None)
    if node.version >= 15:
        part = slice(node.integer("start", 0), node.integer("end", len(x.shape)))
    shapes = [x.shape if t is None else tuple(t.shape) for t in x.examples]
    node.fold([np.array(shape[part], np.int64) for shape in shapes])


def _folded(node: Node, function: Callable[[Array], Array], i: int = 0) -> bool:
    """Whether an input is a constant; then the output is what a function makes of it."""
    found = node.value(i)
    if not isinstance(found, Constant):
        return False
    node.fold([np.asarray(function(array)) for array in found.arrays])
    return True


@operator("Cast", inputs=(1, 1))
def _cast(node: Node) -> None:
    to = node.integer("to", 0)
    node.ignore("saturate", "round_mode")
    if to in _INTEGERS and _folded(node, lambda array: _as_integers(array, _INTEGERS[to])):
        return
    x = node.map(0)
    if _FLOATS.get(to) != str(x.example.dtype):
        raise ValueError(f"casts a map to element type {to}, which is not supported")
    node.alias(x)


def _as_integers(array: Array, dtype: Any) -> Array:
    if array.dtype.kind not in "ib":
        raise ValueError(f"casts a constant of type {array.dtype}")
    return array.astype(dtype)


@operator("Gather", inputs=(2, 2))
def _gather(node: Node) -> None:
    axis, found = node.integer("axis", 0), node.value(0)
    indices = node.array(1)
    if indices is None or indices.dtype.kind != "i":
        raise ValueError("its indices are no integers")
    if isinstance(found, Constant):
        if indices.size > _MOST_SIZES or found.arrays[0].size > _MOST_SIZES:
            raise ValueError("takes parts of a constant that is no shape")
        _folded(node, lambda array: np.take(array, indices, axis))
        return
    x = node.any_map(0)
    axis = _axis(axis, x)
    size = x.fixed(axis)
    if indices.ndim or size is None or not -size <= int(indices) < size:
        raise ValueError("takes channels in any order, which is not supported; only one of a group")
    dims = x.dims[:axis] + x.dims[axis + 1 :]
    index = int(indices) % size
    node.alias(node.call(functions.select, [x], axis, index, dims=dims, **_kept(x)))


def _kept(x: Map) -> dict[str, Any]:
    return {"is_positive": x.is_positive, "quantization": x.quantization}


def _axis(axis: int, x: Map) -> int:
    rank = len(x.shape)
    if not -rank <= axis < rank:
        raise ValueError(f"axis is {axis} of {rank} dimensions")
    return axis % rank


# Joins and parts ------------------------------------------------------------------------------


@operator("Concat", inputs=(1, 64))
def _concat(node: Node) -> None:
    values = [node.value(i) for i in range(len(node.inputs))]
    axis = node.integer("axis", 1 if node.version < 4 else -100)
    if all(isinstance(value, Constant) for value in values):
        constants: Any = values
        worlds = range(max(len(c.arrays) for c in constants))
        if sum(c.arrays[0].size for c in constants) > _MOST_SIZES:
            raise ValueError("joins constants that are no shapes")
        node.fold([np.concatenate([c.in_world(w) for c in constants], axis) for w in worlds])
        return
    node.alias(concatenated(node, [node.map(i) for i in range(len(values))], axis))


def concatenated(node: Node, maps: Sequence[Map], axis: int) -> Map:
    """Maps one after the other along an axis."""
    axis = _axis(axis, maps[0])
    if len({len(m.shape) for m in maps}) != 1 or any(m.fixed(axis) is None for m in maps):
        raise ValueError(f"joins along axis {axis}, whose size depends on the image")
    is_positive = all(m.is_positive for m in maps)
    return node.call(functions.concatenate, maps, axis, is_positive=is_positive)


@operator("Split", inputs=(1, 2), outputs=64)
def _split(node: Node) -> None:
    x = node.any_map(0)
    axis = _axis(node.integer("axis", 0), x)
    sizes = node.numbers(1, "split", since=13)
    count = len(node.outputs)
    if node.version >= 18 and node.integer("num_outputs", count) != count:
        raise ValueError(f"num_outputs is not {count}, the number of its outputs")
    whole = x.fixed(axis)
    if whole is None:
        raise ValueError(f"splits along axis {axis}, whose size depends on the image")
    if sizes is None:
        part = -(-whole // count)
        sizes = tuple(min(part, whole - i * part) for i in range(count))
    if len(sizes) != count or sum(sizes) != whole or min(sizes) < 1:
        raise ValueError(f"splits {whole} into {list(sizes)[:8]}, with {count} outputs")
    names = [name for name in node.outputs if name]
    if len(names) != count:
        raise ValueError("an output has no name")
    parts = node.call_for_several(functions.split, x, count, sizes, axis, **_kept(x))
    for name, made in zip(names, parts, strict=True):
        node.importer.define(name, made)


@operator("Slice", inputs=(1, 5))
def _slice(node: Node) -> None:
    starts, ends = node.numbers(1, "starts", 10), node.numbers(2, "ends", 10)
    axes = node.numbers(3, "axes", 10)
    steps = node.numbers(4, "steps", 10) if node.version >= 10 else None
    if starts is None or ends is None or len(starts) != len(ends):
        raise ValueError("its starts and ends do not fit together")
    axes = tuple(range(len(starts))) if axes is None else axes
    if len(axes) != len(starts) or not axes or (steps and set(steps) != {1}):
        raise ValueError("its axes do not fit, or it takes steps, which is not supported")
    parts = [slice(*pair) for pair in zip(starts, ends, strict=True)]
    if _folded(node, lambda array: _sliced(array, axes, parts)):
        return
    x = node.any_map(0)
    for axis, part in zip(axes, parts, strict=True):
        at = _axis(axis, x)
        size = x.fixed(at)
        if size is None:
            raise ValueError(f"takes a part of axis {at}, whose size depends on the image")
        start, end, _ = part.indices(size)
        if start >= end:
            raise ValueError(f"takes {start} to {end} of {size}")
        if (start, end) != (0, size):
            x = node.call(functions.take, [x], at, start, end - start, **_kept(x))
    node.alias(x)


def _sliced(array: Array, axes: Sequence[int], parts: Sequence[slice]) -> Array:
    if array.ndim != 1 or len(axes) != 1 or axes[0] not in (0, -1):
        raise ValueError("takes parts of a constant that is no shape")
    return array[parts[0]]


@operator("Transpose", inputs=(1, 1))
def _transpose(node: Node) -> None:
    perm = node.integers("perm")
    if _folded(node, lambda array: np.transpose(array, perm)):
        return
    x = node.any_map(0)
    rank = len(x.shape)
    perm = tuple(range(rank))[::-1] if perm is None else perm
    if sorted(perm) != list(range(rank)):
        raise ValueError(f"perm is {list(perm)[:8]} for {rank} dimensions")
    dims = [x.dims[axis] for axis in perm]
    node.alias(node.call(functions.permute, [x], perm, dims=dims, **_kept(x)))


# Other shapes ---------------------------------------------------------------------------------


@operator("Reshape", inputs=(1, 2))
def _reshape(node: Node) -> None:
    node.ignore("consumed_inputs")
    if node.version < 5:
        attribute = node.integers("shape")
        wanted = None if attribute is None else Constant((np.array(attribute, np.int64),))
    else:
        wanted = node.constant(1)
    if wanted is None or wanted.arrays[0].ndim != 1 or wanted.arrays[0].dtype != np.int64:
        raise ValueError("its shape is missing, or no list of integers")
    copies = not (node.version >= 14 and node.integer("allowzero", 0))
    if _folded(node, lambda array: array.reshape(_shape_of(array.shape, wanted.arrays[0], copies))):
        return
    x = node.any_map(0)
    shapes = [
        x.shape if t is None else _shape_of(tuple(t.shape), wanted.in_world(world), copies)
        for world, t in enumerate(x.examples)
        if world < len(wanted.arrays)
    ]
    reshaped(node, x, shapes)


def _shape_of(shape: tuple[int, ...], wanted: Array, copies: bool) -> tuple[int, ...]:
    """A shape whose zeros are those of the input, and -1 what is left."""
    sizes = [int(size) for size in wanted]
    if copies:
        sizes = [shape[i] if size == 0 and i < len(shape) else size for i, size in enumerate(sizes)]
    rest = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or min(sizes, default=1) < -1 or rest < 1 or math.prod(shape) % rest:
        raise ValueError(f"makes {wanted[:8].tolist()} of shape {shape}")
    sizes = [math.prod(shape) // rest if size == -1 else size for size in sizes]
    if math.prod(sizes) != math.prod(shape) or len(sizes) > 8:
        raise ValueError(f"makes {sizes[:8]} of shape {shape}")
    return tuple(sizes)


@operator("Flatten", inputs=(1, 1))
def _flatten(node: Node) -> None:
    x = node.any_map(0)
    axis = node.integer("axis", 1)
    if not -len(x.shape) <= axis <= len(x.shape):
        raise ValueError(f"axis is {axis} of {len(x.shape)} dimensions")
    axis = axis + len(x.shape) if axis < 0 else axis
    reshaped(node, x, [(math.prod(s[:axis]), math.prod(s[axis:])) for s in _shapes(x)])


@operator("Squeeze", inputs=(1, 2))
def _squeeze(node: Node) -> None:
    axes = node.numbers(1, "axes", since=13)
    if _folded(node, lambda array: np.squeeze(array, axes)):
        return
    x = node.any_map(0)
    rank = len(x.shape)
    if not axes or any(not -rank <= a < rank or x.fixed(a % rank) != 1 for a in axes):
        raise ValueError(f"squeezes axes {axes} of shape {x.shape}")
    gone = {axis % rank for axis in axes}
    reshaped(node, x, [tuple(n for i, n in enumerate(s) if i not in gone) for s in _shapes(x)])


@operator("Unsqueeze", inputs=(1, 2))
def _unsqueeze(node: Node) -> None:
    axes = node.numbers(1, "axes", since=13)
    if not axes or len(axes) > 4:
        raise ValueError("its axes are missing")
    if _folded(node, lambda array: np.expand_dims(array, axes)):
        return
    x = node.any_map(0)
    rank = len(x.shape) + len(axes)
    new = {axis % rank for axis in axes}
    if len(new) != len(axes) or not all(-rank <= axis < rank for axis in axes):
        raise ValueError(f"unsqueezes axes {axes} of shape {x.shape}")
    shapes = []
    for shape in _shapes(x):
        left = iter(shape)
        shapes.append(tuple(1 if i in new else next(left) for i in range(rank)))
    reshaped(node, x, shapes)


def _shapes(x: Map) -> list[tuple[int, ...]]:
    return [x.shape if t is None else tuple(t.shape) for t in x.examples]


def reshaped(node: Node, x: Map, shapes: Sequence[tuple[int, ...]]) -> None:
    """Let the node's output be a map in another shape.

    Args:
        node: the node.
        x: the map.
        shapes: in each world, or the file's own alone: then sizes that are the map's own in the
            first world become the map's.
    """
    dims = _dims(x.dims, shapes[0])
    for world, shape in enumerate(shapes):
        found = tuple(extent(dim, world) for dim in dims)
        if x.examples[world] is not None and found != shape:
            raise ValueError(f"makes {shape} of {_shapes(x)[world]}: sizes are computed strangely")
    if dims == x.dims:
        node.alias(x)
        return
    before = next(i for i, pair in enumerate((*zip(x.dims, dims, strict=False), ((), (0,))))
                  if pair[0] != pair[1])  # fmt: skip
    pairs = zip(x.dims[before:][::-1], dims[before:][::-1], strict=False)
    after = next((i for i, pair in enumerate(pairs) if pair[0] != pair[1]), None)
    after = min(len(x.dims), len(dims)) - before if after is None else after
    if before and before + after == min(len(x.dims), len(dims)):  # only ones come or go
        before -= 1
    old, new = x.dims[before : len(x.dims) - after], dims[before : len(dims) - after]
    is_open = [not all(isinstance(f, int) for f in dim) for dim in new]
    kept = {"dims": dims, **_kept(x)}
    if len(new) == 1 and len(old) > 1:
        node.alias(node.call(functions.flatten, [x], before, before + len(old) - 1, **kept))
        return
    first_open = is_open.index(True) if any(is_open) else -1
    if len(old) == 1 and len(new) > 1 and sum(is_open) <= 1:
        sizes = tuple(-1 if i == first_open else extent(dim, 0) for i, dim in enumerate(new))
        node.alias(node.call(functions.unflatten, [x], before, sizes, **kept))
        return
    _reshape_all(node, x, dims, kept)


def _reshape_all(node: Node, x: Map, dims: Sequence[Dim], kept: dict[str, Any]) -> None:
    """To sizes of which some are read from maps."""
    others: list[Map] = []
    sizes: list[Any] = []
    for dim in dims:
        factors = [f for f in dim if isinstance(f, Factor)]
        if not factors:
            sizes.append(extent(dim, 0))
        elif -1 not in sizes:
            sizes.append(-1)
        else:
            parts: list[Any] = [math.prod(f for f in dim if isinstance(f, int))]
            for factor in factors:
                others.append(node.importer.map_of(factor.value))
                parts.append((len(others) - 1, factor.axis))
            sizes.append(tuple(parts))
    node.alias(node.call(functions.reshape, [x, *others], tuple(sizes), **kept))


def _dims(dims: Sequence[Dim], shape: Sequence[int]) -> tuple[Dim, ...]:
    """The factors of a shape, handed out in order to the sizes of another."""
    left: list[int | Factor] = [f for dim in dims for f in dim if f != 1]
    made: list[Dim] = []
    for size in shape:
        dim: list[int | Factor] = []
        rest = size
        while left:
            factor = left[0]
            if rest == 1 and not (not dim and not isinstance(factor, int) and _native(factor) == 1):
                break
            wanted = _native(factor)
            if rest % wanted == 0:
                dim.append(left.pop(0))
                rest //= wanted
            elif isinstance(factor, int) and wanted % rest == 0:
                dim.append(rest)
                left[0] = wanted // rest
                rest = 1
            else:
                raise ValueError(f"makes shape {tuple(shape)}, which splits height, width or batch")
        if rest != 1:
            raise ValueError(f"makes shape {tuple(shape)}, which does not fit")
        made.append(_product(dim))
    if left and made:
        made[-1] = _product([*made[-1], *left])
    return tuple(made)


def _native(factor: int | Factor) -> int:
    return factor if isinstance(factor, int) else int(factor.sizes[0] or 0)


def _product(factors: Sequence[int | Factor]) -> Dim:
    """Numbers next to each other as one."""
    made: list[int | Factor] = []
    for factor in factors:
        last = made[-1] if made else None
        if isinstance(factor, int) and isinstance(last, int):
            made[-1] = last * factor
        else:
            made.append(factor)
    return tuple(made) or (1,)
