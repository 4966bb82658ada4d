"""Layers in a graph: a convolution or linear layer, its batch norm, its activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from snv2_kernels.graph.elementwise import Norm, activation_after, norm_after
from snv2_kernels.graph.nodes import arguments, example, function_name, only_number, readers
from snv2_kernels.graph.terms import Term, summed
from snv2_kernels.packing import units
from snv2_kernels.packing.units import Activation

__all__ = ["CONCATENATIONS", "Conv", "Layer", "Layers", "convolution", "kind_of"]

CONCATENATIONS = ("cat", "concat", "concatenate", "hstack")


@dataclass(frozen=True)
class Conv:
    """A convolution or linear layer whose numbers are nodes; what a builder asks of a module."""

    weight: Node
    bias: Node | None
    in_channels: int
    out_channels: int
    groups: int = 1

    @property
    def out_features(self) -> int:
        return self.out_channels


@dataclass(frozen=True)
class Layer:
    """``activation(norm(conv(source)))``, with terms added before the activation, behind ``source``
    itself if it keeps that, or with its channels shuffled."""

    source: Node
    conv: Conv
    norm: Norm
    activation: Activation
    kind: str  # pw, dw, scale (dw of 1x1, which is a term of others only), stem or linear
    kernel: int
    stride: int
    dilation: int
    nodes: tuple[Node, ...]
    keeps_input: bool = False
    shuffle: tuple[int, ...] | None = None
    terms: tuple[Term, ...] = ()

    def with_terms(
        self, terms: Sequence[Term], activation: Activation, nodes: tuple[Node, ...]
    ) -> Layer:
        return replace(self, terms=tuple(terms), activation=activation, nodes=nodes)

    @property
    def out(self) -> Node:
        return self.nodes[-1]

    @property
    def channels(self) -> int:
        return self.conv.out_channels * (1 + self.keeps_input)

    @property
    def reads_alone(self) -> bool:
        """Whether nothing else reads its source."""
        return set(readers(self.source)) <= set(self.nodes)

    @property
    def leaves_float32(self) -> bool:
        """Whether its result may be float32 under autocast."""
        keeps_dtype = any(term.conv is None for term in self.terms)
        return keeps_dtype or self.norm.is_spelled or any(t.norm.is_spelled for t in self.terms)

    def told(self) -> units.Layer:
        """For a builder that takes nodes for tensors."""
        conv: Any = self.conv
        norm: Any = self.norm
        kernel = self.kernel if self.kind == "dw" else 1
        shape = kernel, self.dilation, self.keeps_input, self.shuffle
        pairs: Any = ((term.conv, term.norm) for term in self.terms)
        terms = tuple(units.Term(*pair) for pair in pairs)
        return units.Layer(conv, norm, self.activation, *shape, terms)


class Layers:
    """All layers of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.by_first: dict[Node, Layer] = {}
        self.by_last: dict[Node, Layer] = {}
        for node in graph.nodes:
            if (layer := _layer(node)) is not None:
                self.by_first[node] = layer
                self.by_last[layer.out] = layer
        for layer, parts in list(summed(graph, self.by_last)):
            for part in parts:
                del self.by_first[part.nodes[0]], self.by_last[part.out]
            self.by_first[layer.nodes[0]] = self.by_last[layer.out] = layer
        for layer in list(self.by_last.values()):
            if layer.kind == "dw" and (join := _join_with_input(layer)) is not None:
                del self.by_last[layer.out]
                kept = replace(layer, nodes=(*layer.nodes, join), keeps_input=True)
                self.by_first[layer.nodes[0]] = self.by_last[join] = kept

    def after(self, node: Node, *kinds: str) -> Layer | None:
        """The layer of one group, or depthwise, that alone reads a node."""
        layer = next((self.by_first[n] for n in readers(node) if n in self.by_first), None)
        if layer is None or layer.source is not node or layer.kind not in kinds:
            return None
        grouped = layer.kind != "dw" and layer.conv.groups > 1
        return layer if layer.reads_alone and not grouped else None


def _join_with_input(layer: Layer) -> Node | None:
    """The node ``cat([source, result], 1)`` of a layer, if nothing else reads either."""
    users = readers(layer.out)
    join = users[0] if len(users) == 1 else None
    if function_name(join) not in CONCATENATIONS or join is None:
        return None
    given = arguments(join, ("tensors", "dim"), dim=int(function_name(join) == "hstack"))
    tensors = list(given["tensors"])
    along_channels = given.get("axis", given["dim"]) in (1, -3) and layer.stride == 1
    if tensors != [layer.source, layer.out] or not along_channels:
        return None
    return join if set(readers(layer.source)) == {layer.nodes[0], join} else None


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def convolution(node: Node) -> dict[str, Any]:
    """The arguments of a convolution."""
    return arguments(node, _CONV, bias=None, stride=1, padding=0, dilation=1, groups=1)


def _layer(node: Node) -> Layer | None:
    """The layer that begins at a node."""
    if function_name(node) not in ("conv2d", "linear"):
        return None
    given = convolution(node)
    weight = example(given["weight"])
    kind = kind_of(given, weight)
    if kind is None:
        return None
    found = norm_after(node)
    if found is None:
        return None
    norm, scaling = found
    activation, functions = activation_after(scaling[-1] if scaling else node)
    groups = given["groups"]
    conv = Conv(given["weight"], given["bias"], weight.shape[1] * groups, weight.shape[0], groups)
    kernel = 1 if kind == "linear" else int(weight.shape[2])
    stride, dilation = only_number(given["stride"]), only_number(given["dilation"])
    nodes = node, *scaling, *functions
    return Layer(
        given["input"], conv, norm, activation, kind, kernel, stride, dilation if kernel > 1 else 1,
        nodes,
    )  # fmt: skip


def kind_of(given: dict[str, Any], weight: Any) -> str | None:
    """pw, dw, scale, stem or linear, for those that the kernels compute, alone or summed."""
    rank = weight.dim() if isinstance(weight, Tensor) else 0
    if rank != 4:
        return "linear" if rank == 2 else None
    outputs, depth, *window = weight.shape
    kernel, stride, dilation = map(only_number, (window, given["stride"], given["dilation"]))
    groups, padding = given["groups"], only_number(given["padding"])
    if kernel is None or kernel % 2 == 0 or dilation is None:
        return None
    if padding not in (kernel // 2 * dilation, "same" if stride == 1 else None):
        return None
    kinds = {
        "scale": kernel == depth == 1 and groups == outputs > 1 and stride in (1, 2),
        "pw": kernel == stride == 1 and (groups == 1 or 1 < groups < outputs),
        "dw": kernel > 1 and depth == 1 and groups == outputs > 1 and stride in (1, 2),
        "stem": (groups, kernel, stride, dilation) == (1, 3, 2, 1),
    }
    return next((kind for kind, fits in kinds.items() if fits), None)
