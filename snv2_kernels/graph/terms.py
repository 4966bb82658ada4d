"""Linear layers of one map whose results are summed, as RepVGG and MobileOne train them.

``bn(conv(x)) + bn(conv1x1(x)) + bn(x)`` is one convolution: its terms are folded into one another
where a layer's batch norm is folded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.fx import Graph, Node

from snv2_kernels.graph.elementwise import Norm, activation_after, norm_at
from snv2_kernels.graph.nodes import arguments, example, function_name, readers, same_shape, spelled

if TYPE_CHECKING:
    from snv2_kernels.graph.layers import Conv, Layer

__all__ = ["Term", "summed"]


@dataclass(frozen=True)
class Term:
    """``norm(conv(x))``, or ``norm(x)`` without a convolution."""

    conv: Conv | None
    norm: Norm


def summed(graph: Graph, by_last: dict[Node, Layer]) -> Iterator[tuple[Layer, list[Layer]]]:
    """Layers with what is added to them before their activation, and the layers that are terms."""
    for node in graph.nodes:
        if not _adds(node) or any(_adds(user) for user in readers(node)):
            continue
        sums, leaves = _leaves(node)
        layers = [by_last[leaf] for leaf in leaves if leaf in by_last]
        if (found := _summed(node, sums, leaves, layers)) is not None:
            yield found, layers


def _summed(node: Node, sums: list[Node], leaves: list[Node], layers: list[Layer]) -> Layer | None:
    """The layer of a sum; None unless all terms are linear layers of the same map."""
    kinds = {layer.kind for layer in layers} - {"scale"}
    if len(leaves) < 2 or len(kinds) != 1 or not kinds <= {"dw", "pw"}:
        return None
    main = max(layers, key=lambda layer: (layer.kind in kinds, layer.kernel))
    source, terms, nodes = main.source, [], list(main.nodes)
    for leaf in leaves:
        layer = next((layer for layer in layers if layer.out is leaf), None)
        if layer is main:
            continue
        term = _term(leaf, source) if layer is None else _linear(layer, main)
        if term is None or (leaf is not source and len(readers(leaf)) != 1):
            return None
        if layer is None and not same_shape(node, source):
            return None
        terms.append(term)
        nodes += () if leaf is source else (leaf,) if layer is None else layer.nodes
    if len(readers(main.out)) != 1 or not _is_linear(main):
        return None
    activation, functions = activation_after(node)
    return main.with_terms(terms, activation, (*nodes, *sums[::-1], *functions))


def _adds(node: Node) -> bool:
    if spelled(node) != "add" or len(node.all_input_nodes) != 2:
        return False
    given = arguments(node, ("input", "other"), alpha=1)
    return given["alpha"] == 1 and isinstance(example(node), Tensor) and example(node).dim() == 4


def _leaves(node: Node) -> tuple[list[Node], list[Node]]:
    """The sums by which a node is one, the last first, and what is summed."""
    sums: list[Node] = [node]
    leaves: list[Node] = []
    for each in sums:
        for part in each.all_input_nodes:
            alone = _adds(part) and len(readers(part)) == 1
            (sums if alone else leaves).append(part)
    return sums, leaves


def _is_linear(layer: Layer) -> bool:
    plain = not layer.keeps_input and layer.shuffle is None and not layer.terms
    return plain and layer.activation.kind == "identity"


def _linear(layer: Layer, main: Layer) -> Term | None:
    """A layer as a term of another one."""
    alike = layer.source is main.source and layer.stride == main.stride
    kind = layer.kind if layer.kind != "scale" else "dw"
    grid = layer.kernel == 1 or layer.dilation == main.dilation  # of the taps
    same = layer.conv.groups == main.conv.groups and kind == main.kind
    fits = alike and same and grid and _is_linear(layer)
    return Term(layer.conv, layer.norm) if fits else None


def _term(leaf: Node, source: Node) -> Term | None:
    """A term without a convolution."""
    if leaf is source:
        return Term(None, Norm())
    norm = norm_at(leaf) if function_name(leaf) == "batch_norm" else None
    return None if norm is None or leaf.all_input_nodes[0] is not source else Term(None, norm)
