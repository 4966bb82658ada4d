"""Why there is no unit in a graph, in the few words that :func:`snv2_kernels.explain` prints."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.fx import Graph, Node

from snv2_kernels.graph.gates import mean_of
from snv2_kernels.graph.layers import Layer, convolution
from snv2_kernels.graph.nodes import example, function_name, only_number, readers, spelled, writes
from snv2_kernels.graph.recognize import Units, recognize

__all__ = ["why_no_unit"]

_ACTIVATIONS = {
    name.lower(): name for name in nn.modules.activation.__all__ if "Attention" not in name
}
_READ_TWICE = "the result of a convolution is read more than once"
_OTHERS = ("add", "sub", "mul", "div", "max_pool2d", "avg_pool2d", "interpolate", "pad")


def why_no_unit(graph: Graph) -> str:
    """What stops the whole graph from being units: the first that holds of a unit near a depthwise
    convolution, or what it computes beside units."""
    found = Units(graph)
    inside = {node for run in recognize(graph) for node in run.nodes}
    depthwise = [node for node in graph.nodes if _is_depthwise(node) and node not in inside]
    checks = _window, _after, _before, _written, _strides
    reasons = (check(found, node) for check in checks for node in depthwise)
    if (reason := next(filter(None, reasons), None)) is not None:
        return reason
    if inside:
        names = (function_name(node) for node in graph.nodes if node not in inside)
        beside = next((name.strip("_") for name in names if name), "several results")
        return f"computes more than units: {beside}"
    if depthwise:
        return "no join of a branch with what passes by or a projection of dw and pw"
    return "not recognised as a ShuffleNet V2 unit"


def _is_depthwise(node: Node) -> bool:
    if function_name(node) != "conv2d":
        return False
    given = convolution(node)
    weight = example(given["weight"])
    return isinstance(weight, Tensor) and given["groups"] != 1 and weight.shape[1] == 1


def _window(found: Units, node: Node) -> str | None:
    """What no depthwise convolution of a unit has."""
    given = convolution(node)
    outputs, _, *kernel = example(given["weight"]).shape
    if function_name(given["input"]) == "pad":
        return "padding apart from the depthwise convolution"
    if only_number(kernel) is None or kernel[0] % 2 == 0:
        return f"depthwise {kernel[0]}x{kernel[1]}"
    if outputs != given["groups"]:
        return "a depthwise multiplier"
    dilation = only_number(given["dilation"])
    wrong = {
        "dilation": dilation is None,
        "padding": only_number(given["padding"]) not in (kernel[0] // 2 * (dilation or 1), "same"),
        "stride": only_number(given["stride"]) not in (1, 2),
    }
    name = next((name for name, is_wrong in wrong.items() if is_wrong), None)
    if name is not None:
        return f"depthwise with {name} {given[name]}"
    return None if node in found.layers.by_first else "a batch norm of the batch's own statistics"


def _parts_after(found: Units, node: Node) -> Iterator[tuple[Layer, Node]]:
    """Layers from a convolution on, each for the next alone, and the results of their gates."""
    gates = {gate.source: gate for gate in found.gates.values()}
    layer = found.layers.by_first.get(node)
    while layer is not None:
        out = gates[layer.out].out if layer.out in gates else layer.out
        yield layer, out
        layer = found.layers.after(out, "pw", "dw")


def _after(found: Units, node: Node) -> str | None:
    """What follows that no unit has."""
    for layer, out in _parts_after(found, node):
        if layer.activation.kind in ("sigmoid", "hardsigmoid"):
            return f"activation {_ACTIVATIONS[layer.activation.kind]}"
        users = readers(out)
        if any(mean_of(out, user) for user in users):
            return "squeeze-and-excite in a form that is not known"
        if len(users) > 1:
            return _READ_TWICE
        if users and users[0] not in found.layers.by_first:
            return _strange(users[0])
    return None


def _before(found: Units, node: Node) -> str | None:
    """What comes before that no unit has."""
    source, reader = convolution(node)["input"], found.layers.by_first.get(node)
    while (layer := found.layers.by_last.get(source)) is not None:
        begins = [user in found.layers.by_first for user in readers(source)]
        alone = reader is not None and reader.reads_alone
        if len(begins) > 1 and not all(begins) and not alone:
            return _READ_TWICE
        reader, source = layer, layer.source
    return _strange(source) if function_name(source) else None


def _strange(node: Node) -> str | None:
    """What is neither a layer nor moves channels."""
    name = spelled(node)
    if name.replace("_", "") in _ACTIVATIONS:
        return f"activation {_ACTIVATIONS[name.replace('_', '')]}"
    if name == "conv2d":
        given = convolution(node)
        height, width = example(given["weight"]).shape[2:]
        return f"convolution {height}x{width} with {given['groups']} groups in a branch"
    return f"{name} in a branch" if name in _OTHERS or name.endswith("_norm") else None


def _written(found: Units, node: Node) -> str | None:
    inside = {node for layer in found.layers.by_first.values() for node in layer.nodes}
    inside.update(found.gates)
    names = [function_name(n) for n in node.graph.nodes if writes(n) and n not in inside]
    return f"a map is written in place: {names[0]}" if names else None


def _strides(found: Units, node: Node) -> str | None:
    layers = [layer for layer, _ in _parts_after(found, node)]
    if sum(layer.kind == "dw" and layer.stride != 1 for layer in layers) > 1:
        return "two depthwise convolutions with a stride in a branch"
    return None
