"""What comes before the units of a network, and what comes after them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Node

from snv2_kernels.graph.elementwise import is_off
from snv2_kernels.graph.gates import mean_of, viewed
from snv2_kernels.graph.layers import Conv, Layer, Layers
from snv2_kernels.graph.nodes import (
    arguments,
    example,
    function_name,
    only_number,
    only_reader,
    readers,
)

__all__ = ["Head", "Stem", "head_after", "stem_before"]


@dataclass(frozen=True)
class Stem:
    """``max_pool2d(layer(x), 3, 2, 1)``."""

    layer: Layer
    nodes: tuple[Node, ...]  # after the layer


@dataclass(frozen=True)
class Head:
    """``linear(layer(x).mean([2, 3]))``, with the layer or without, or the means as [N, C]
    themselves."""

    layer: Layer | None
    linear: Conv | None
    nodes: tuple[Node, ...]  # after the layer


def stem_before(pool: Node, layers: Layers) -> Stem | None:
    """The stem that makes the input of units, for them alone."""
    if function_name(pool) != "max_pool2d":
        return None
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = arguments(pool, names, stride=None, padding=0, dilation=1)
    window = [only_number(given[name]) for name in names[1:5]]
    layer = layers.by_last.get(given["input"])
    if window != [3, 2, 1, 1] or given.get("ceil_mode") or given.get("return_indices"):
        return None
    if layer is None or layer.kind != "stem" or len(readers(layer.out)) != 1:
        return None
    return Stem(layer, (pool,))


def head_after(out: Node, layers: Layers, returned: Collection[Node] = ()) -> Head | None:
    """The head that alone reads the result of units. It ends with means that are returned."""
    layer = layers.after(out, "pw")
    features = out if layer is None else layer.out
    if len(readers(features)) != 1:
        return None
    nodes = mean_of(features, readers(features)[0])
    if nodes is None:
        return None
    channels = int(example(features).shape[1])
    while (
        nodes[-1] not in returned and (user := only_reader(nodes[-1], _is_idle_dropout)) is not None
    ):
        nodes = *nodes, *viewed(user)
    if example(nodes[-1]).dim() != 2:
        return None
    linear = only_reader(nodes[-1], lambda user: function_name(user) == "linear")
    if linear is None or nodes[-1] in returned:
        return Head(layer, None, nodes)
    given = arguments(linear, ("input", "weight", "bias"), bias=None)
    weight = example(given["weight"])
    if not isinstance(weight, Tensor) or weight.shape[1] != channels:
        return Head(layer, None, nodes)
    scores = Conv(given["weight"], given["bias"], channels, int(weight.shape[0]))
    return Head(layer, scores, (*nodes, linear))


def _is_idle_dropout(node: Node) -> bool:
    return function_name(node) == "dropout" and is_off(node)
