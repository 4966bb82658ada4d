"""Squeeze-and-excite and shortcuts in a graph, and means of whole maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Graph, Node

from snv2_kernels.graph.elementwise import activation_after
from snv2_kernels.graph.layers import Layer, Layers
from snv2_kernels.graph.nodes import (
    arguments,
    example,
    function_name,
    only_number,
    only_reader,
    readers,
    same_number,
    same_shape,
    shape_of,
    spelled,
    writes,
)
from snv2_kernels.packing import units
from snv2_kernels.packing.units import IDENTITY, Activation

__all__ = ["Gate", "gates", "mean_of", "sums", "viewed"]

_VIEWS = ("view", "reshape", "flatten", "squeeze", "unsqueeze", "contiguous")


@dataclass(frozen=True)
class Gate:
    """``source * expand(reduce(mean of source))``, where ``reduce`` or both may be missing, plus
    ``added`` if that is there, through ``activation``."""

    source: Node
    out: Node
    reduce: Layer | None = None
    expand: Layer | None = None
    activation: Activation = IDENTITY
    added: Node | None = None

    def told(self) -> units.Gate[Layer]:
        return units.Gate(self.reduce, self.expand, self.activation, self.added is not None)


def gates(graph: Graph, layers: Layers) -> Iterator[Gate]:
    """All of a graph that can be told as one or two layers."""
    for node in graph.nodes:
        if spelled(node) in ("mul", "multiply") and (gate := _gate(node, layers)) is not None:
            yield gate


def _gate(product: Node, layers: Layers) -> Gate | None:
    """The gate that ends at a product."""
    factors = product.all_input_nodes
    if len(factors) != 2:
        return None
    for source, scale in (factors, factors[::-1]):
        others = [user for user in readers(source) if user not in (product, scale)]
        if len(others) != 1 or not same_shape(product, source):
            continue
        pooled = mean_of(source, others[0])
        first = layers.after(pooled[-1], "pw", "linear") if pooled else None
        if first is None:
            continue
        second = layers.after(viewed(first.out)[-1], "pw", "linear")
        reduce, expand = (None, first) if second is None else (first, second)
        if expand.activation.kind not in ("sigmoid", "hardsigmoid"):
            continue
        last = viewed(expand.out)[-1]
        if example(last).dim() != 4 or not _is_column(last, source):
            continue
        if function_name(scale) in ("expand", "expand_as") and readers(last) == [scale]:
            last = scale
        if last is scale and readers(scale) == [product]:
            activation, nodes = activation_after(product)
            return Gate(source, (product, *nodes)[-1], reduce, expand, activation)
    return None


def sums(graph: Graph) -> Iterator[tuple[Gate, ...]]:
    """All nodes of a graph that are the sum of two maps, and what follows it: each as a gate that
    adds the second to the first, and one that adds the first to the second."""
    for node in graph.nodes:
        if spelled(node) != "add":
            continue
        given = arguments(node, ("input", "other"), alpha=1)
        maps = [given["input"], given["other"]]
        is_sum = all(isinstance(each, Node) and same_shape(each, node) for each in maps)
        if not is_sum or example(node).dim() != 4 or given["alpha"] != 1 or given.get("out"):
            continue
        activation, nodes = activation_after(node)
        out = (node, *nodes)[-1]
        ways = (maps,) if writes(node) else (maps, maps[::-1])  # in place the first is lost
        yield tuple(Gate(a, out, activation=activation, added=b) for a, b in ways)


def mean_of(source: Node, first: Node) -> tuple[Node, ...] | None:
    """The nodes from a map, beginning with ``first``, to the means of its channels, as [N, C] or
    [N, C, 1, 1]. None if they are of anything else."""
    nodes: tuple[Node, ...] | None = None
    if example(source).dim() != 4:
        return None
    name = function_name(first)
    if name == "mean":
        nodes = _mean(source, first)
    elif name in ("adaptive_avg_pool2d", "avg_pool2d"):
        nodes = (first,) if _pools_all(source, first) else None
    elif name in ("view", "reshape", "flatten"):
        n, c, h, w = shape_of(source)
        shape = shape_of(first)
        is_rows = len(shape) == 3 and all(map(same_number, shape, (n, c, h * w)))
        after = only_reader(first, lambda user: function_name(user) == "mean")
        if is_rows and after is not None and _dims(after, 3) == {2}:
            nodes = first, after
    if nodes is None or not _is_column(nodes[-1], source):
        return None
    return (*nodes, *viewed(nodes[-1])[1:])


def _mean(source: Node, first: Node) -> tuple[Node, ...] | None:
    """In one step or, a dimension at a time, in two."""
    dims = _dims(first, 4)
    if dims == {2, 3}:
        return (first,)
    keeps = example(first).dim() == 4
    after = only_reader(first, lambda user: function_name(user) == "mean")
    if after is None:
        return None
    pairs = {(3, 2), (2, 3)} if keeps else {(3, 2), (2, 2)}
    both = {(a, b) for a in dims for b in _dims(after, 4 if keeps else 3)}
    return (first, after) if len(both) == 1 and both <= pairs else None


def _dims(mean: Node, rank: int) -> set[int]:
    given = arguments(mean, ("input", "dim", "keepdim"), dim=None, dtype=None)
    dim = given.get("axis", given["dim"])
    dims = dim if isinstance(dim, tuple | list) else [dim]
    if given["dtype"] is not None or not all(isinstance(dim, int) for dim in dims):
        return set()
    return {dim % rank for dim in dims}


def _pools_all(source: Node, pool: Node) -> bool:
    if function_name(pool) == "adaptive_avg_pool2d":
        return bool(only_number(arguments(pool, ("input", "output_size"))["output_size"]) == 1)
    names = ("input", "kernel_size", "stride", "padding")
    given = arguments(pool, names, padding=0)
    window = example(given["kernel_size"])
    window = list(window) if isinstance(window, tuple | list) else [window, window]
    sizes = [example(size) for size in window]
    return only_number(given["padding"]) == 0 and all(
        not isinstance(a, str) and same_number(a, b)
        for a, b in zip(sizes, shape_of(source)[2:], strict=True)
    )


def _is_column(node: Node, like: Node) -> bool:
    """Whether a tensor has a number for each image and channel of a map, or a column, as [N, C] or
    [N, C, 1, 1]."""
    value = example(node)
    if not isinstance(value, Tensor) or value.dim() not in (2, 4):
        return False
    sizes = (*shape_of(like)[:2], 1, 1)[: value.dim()]
    return all(map(same_number, shape_of(node), sizes))


def viewed(node: Node) -> list[Node]:
    """A column, and the same in other shapes: each is the only reader of the one before."""
    nodes = [node]
    while (user := only_reader(nodes[-1], _keeps_order)) is not None:
        nodes.append(user)
    while len(nodes) > 1 and not _is_column(nodes[-1], node):
        nodes.pop()
    return nodes


def _keeps_order(node: Node) -> bool:
    if function_name(node) != "getitem":
        return function_name(node) in _VIEWS
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(part in (None, Ellipsis, slice(None)) for part in index)
