"""Average pools in a graph, as they stand beside a branch of ShuffleNet v1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Graph, Node

from snv2_kernels.graph.elementwise import activation_after
from snv2_kernels.graph.nodes import arguments, function_name, only_number
from snv2_kernels.packing.units import Activation

__all__ = ["Pool", "pools"]


@dataclass(frozen=True)
class Pool:
    """``activation(avg_pool2d(source, 3, stride, 1, count_include_pad=counts_padding))``."""

    source: Node
    out: Node
    stride: int
    counts_padding: bool
    activation: Activation


_NAMES = (
    "input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
    "divisor_override",
)  # fmt: skip


def pools(graph: Graph) -> Iterator[Pool]:
    """All average pools of 3x3 with padding."""
    for node in graph.nodes:
        if function_name(node) != "avg_pool2d":
            continue
        given = arguments(
            node, _NAMES, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
            divisor_override=None,
        )  # fmt: skip
        window = [only_number(given[name]) for name in ("kernel_size", "padding")]
        stride = only_number(given["stride"])
        plain = not given["ceil_mode"] and given["divisor_override"] is None
        if window == [3, 1] and stride in (1, 2) and plain:
            activation, nodes = activation_after(node)
            out = (node, *nodes)[-1]
            yield Pool(given["input"], out, stride, bool(given["count_include_pad"]), activation)
