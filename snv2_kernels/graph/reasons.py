"""Why there is no unit in a graph, in the few words that :func:`snv2_kernels.explain` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.fx import Graph, Node

from snv2_kernels.graph.gates import mean_of
from snv2_kernels.graph.layers import CONCATENATIONS, Layer, convolution
from snv2_kernels.graph.nodes import example, function_name, only_number, readers, spelled, writes
from snv2_kernels.graph.recognize import (
    Units,
    are_of_others,
    as_projection,
    is_branch,
    runs_of,
)

__all__ = ["described", "why_no_unit"]

_ACTIVATIONS = {
    name.lower(): name for name in nn.modules.activation.__all__ if "Attention" not in name
}
_JOINS = (*CONCATENATIONS, "stack")


def why_no_unit(graph: Graph, units: Units | None = None) -> str:
    """What stops the whole graph from being units: the first that holds of a unit near a depthwise
    convolution, or what it computes beside units. ``units`` are those of the graph, if they were
    looked for."""
    found = Units(graph) if units is None else units.returning(())
    runs = runs_of(found, ())
    inside = {node for run in runs for node in run.nodes}
    depthwise = [node for node in graph.nodes if _is_depthwise(node) and node not in inside]

    def first(*checks: Callable[[Units, Node], str | None]) -> str | None:
        reasons = (check(found, node) for check in checks for node in depthwise)
        return next(filter(None, reasons), None)

    if found.units and not runs:
        if are_of_others(found.units):
            return "its units join nothing but the sum of their branch and their input"
        return "computes in several dtypes or on several devices"
    reason = first(_after, _window, _before)
    if reason is None and depthwise:
        reason = _written(found, graph) or first(_strides, _join)
    if reason is not None:
        return reason
    if not runs:
        return "its forward runs no depthwise convolution"
    beside = next(
        (node for node in graph.nodes if function_name(node) and node not in inside), None
    )
    if beside is None:
        return f"{len(runs)} runs of units side by side"
    return f"computes more than units: {described(beside)}"


def described(node: Node) -> str:
    """What a node computes, and of which module if it reads that module's weights."""
    name = spelled(node) or str(getattr(node.target, "__name__", node.target)).strip("_")
    weights = (str(n.target) for n in (node, *node.all_input_nodes) if n.op == "get_attr")
    module = next((weight.rpartition(".")[0] for weight in weights), "")
    return f"{name} ({module})" if module else name


def _read_twice(layer: Layer, out: Node) -> str:
    names = " and ".join(dict.fromkeys(map(described, readers(out))))
    return f"the result of {described(layer.nodes[0])} is read by {names}"


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
    if only_number(kernel) is None or kernel[0] % 2 == 0 or kernel[0] == 1:
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
            return _read_twice(layer, out)
        if users and users[0] not in found.layers.by_first:
            return _strange(found, users[0], out)
    return None


def _before(found: Units, node: Node) -> str | None:
    """What comes before that no unit has."""
    source, reader = convolution(node)["input"], found.layers.by_first.get(node)
    while (layer := found.layers.by_last.get(source)) is not None:
        begins = [user in found.layers.by_first for user in readers(source)]
        alone = reader is not None and reader.reads_alone
        if len(begins) > 1 and not all(begins) and not alone:
            return _read_twice(layer, source)
        reader, source = layer, layer.source
    for before in source.all_input_nodes:
        layer = found.layers.by_last.get(before)
        if layer is not None and layer.kind in ("pw", "dw"):
            return _strange(found, source, before)
    return None


def _strange(found: Units, node: Node, source: Node) -> str | None:
    """What is neither a layer nor moves channels, and reads ``source``."""
    name = spelled(node)
    if name.replace("_", "") in _ACTIVATIONS:
        return f"activation {_ACTIVATIONS[name.replace('_', '')]}"
    if name == "conv2d":
        given = convolution(node)
        height, width = example(given["weight"]).shape[2:]
        return f"convolution {height}x{width} with {given['groups']} groups in a branch"
    if node.op == "output" or name in _JOINS or found.follower.moved(node) is not None:
        return None
    others = [described(n) for n in node.all_input_nodes if n is not source and n.op != "get_attr"]
    return f"{described(node)} in a branch" + (f", with {others[0]}" if others else "")


def _written(found: Units, graph: Graph) -> str | None:
    inside = {node for layer in found.layers.by_first.values() for node in layer.nodes}
    inside.update(found.gates)
    names = (function_name(n) for n in graph.nodes if writes(n) and n not in inside)
    name = next(names, None)
    return None if name is None else f"a map is written in place: {name}"


def _strides(found: Units, node: Node) -> str | None:
    layers = [layer for layer, _ in _parts_after(found, node)]
    if sum(layer.kind == "dw" and layer.stride != 1 for layer in layers) > 1:
        return "two depthwise convolutions with a stride in a branch"
    return None


def _join(found: Units, node: Node) -> str | None:
    """Why no join with what passes by or with a projection follows."""
    outs = [out for _, out in _parts_after(found, node)]
    out = outs[-1] if outs else node
    join = _join_after(found, out)
    if join is None:
        return f"the result of {described(node)} is joined with nothing"
    value = found.follower.moved(join)
    makers = found.follower.makers(value.origins) if value else []
    if len(makers) != 2 or out not in makers:
        maps = f"{len(makers)} maps" if makers else "what are not all channels"
        return f"{described(join)} of {maps}"
    other = makers[makers[0] is out]
    branch = found.branch(out)
    if not is_branch(branch):
        return f"a branch of {described(node)} without a pointwise convolution"
    read = found.follower.makers(found.map_of(branch[0].source))
    if other in read:
        strided = any(isinstance(part, Layer) and part.stride > 1 for part in branch)
        return f"{described(join)} of a branch " + (
            "with a stride and its input" if strided else "and its input, not of each channel once"
        )
    if as_projection(found.branch(other)) is None:
        return f"{described(join)} with {described(other)}, which is no projection of dw and pw"
    return f"{described(join)} of branches that do not fit together"


def _join_after(found: Units, out: Node) -> Node | None:
    """The first join of what a branch made, through what only moves channels."""
    waiting = readers(out)
    while waiting:
        node = waiting.pop(0)
        if spelled(node) in _JOINS:
            return node
        if found.follower.moved(node) is not None:
            waiting += readers(node)
    return None
