"""Why there is no unit in a graph, in the few words that :func:`snv2_kernels.explain` prints."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import Graph, Node

from snv2_kernels.graph.channels import example, function_name

__all__ = ["why_no_unit"]

_ACTIVATIONS = {
    name.lower(): name for name in nn.modules.activation.__all__ if "Attention" not in name
}
_POOLS = ("mean", "adaptive_avg_pool2d", "avg_pool2d")


def why_no_unit(graph: Graph) -> str:
    """What the first depthwise convolution lacks of a unit."""
    depthwise = [node for node in graph.nodes if _shape(node) is not None and _is_depthwise(node)]
    for check in (_window, _after, _before):
        for node in depthwise:
            reason = check(node)
            if reason is not None:
                return reason
    return "not recognised as a ShuffleNet V2 unit"


def _shape(node: Node) -> tuple[int, ...] | None:
    """Of a convolution's weight."""
    if function_name(node) != "conv2d":
        return None
    weight = example(_argument(node, 1, "weight"))
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def _argument(node: Node, position: int, name: str, default: object = None) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _is_depthwise(node: Node) -> bool:
    shape = _shape(node)
    assert shape is not None
    groups = _argument(node, 6, "groups", 1)
    return groups != 1 and shape[1] == 1


def _is_pointwise(node: Node) -> bool:
    shape = _shape(node)
    return shape is not None and shape[2:] == (1, 1) and _argument(node, 6, "groups", 1) == 1


def _window(node: Node) -> str | None:
    shape = _shape(node)
    assert shape is not None
    outputs, _, *kernel = shape
    if function_name(_argument(node, 0, "input")) == "pad":
        return "padding apart from the depthwise convolution"
    if kernel != [3, 3]:
        return f"depthwise {kernel[0]}x{kernel[1]}"
    if outputs != _argument(node, 6, "groups", 1):
        return "a depthwise multiplier"
    for position, name, allowed in (
        (5, "dilation", (1,)),
        (4, "padding", (1,)),
        (3, "stride", (1, 2)),
    ):
        value = _argument(node, position, name, {"padding": 0}.get(name, 1))
        values = {*value} if isinstance(value, tuple | list) else {value}
        if not values & set(allowed) or len(values) > 1:
            return f"depthwise with {name} {value}"
    return None


def _activation(node: Node | None) -> str | None:
    """The name of an activation that is no ReLU, as of torch's module for it."""
    name = function_name(node).strip("_").replace("_", "")
    if (
        node is not None
        and name == "hardtanh"
        and {0.0, 6.0} <= {*node.args, *node.kwargs.values()}
    ):
        return "ReLU6"
    return None if name == "relu" else _ACTIVATIONS.get(name)


def _users(node: Node) -> list[Node]:
    """What reads the result of a convolution and its batch norm."""
    users = list(node.users)
    if len(users) == 1 and function_name(users[0]) == "batch_norm":
        return list(users[0].users)
    return users


def _after(node: Node) -> str | None:
    users = _users(node)
    if len(users) > 1:
        what = "the depthwise convolution's result is read more than once"
        return "squeeze-and-excite between dw and pw2" if _is_pooled(users) else what
    if not users or not _is_pointwise(users[0]):
        return _instead(users[0]) if users else None
    users = _users(users[0])
    activations = [a for a in map(_activation, users) if a is not None]
    if activations:
        return f"activation {activations[0]}"
    if not users or any(_is_relu(user) for user in users):
        return None
    return "squeeze-and-excite after pw2" if _is_pooled(users) else "no activation after pw2"


def _instead(node: Node) -> str:
    """What stands where pw2 should."""
    activation = "ReLU" if _is_relu(node) else _activation(node)
    if activation is not None:
        return f"activation {activation} after the depthwise convolution"
    return f"{function_name(node)} after the depthwise convolution"


def _is_relu(node: Node) -> bool:
    return function_name(node).strip("_") == "relu"


def _is_pooled(users: list[Node]) -> bool:
    return any(function_name(user) in _POOLS for user in users)


def _before(node: Node) -> str | None:
    before = _argument(node, 0, "input")
    assert isinstance(before, Node)
    if (activation := _activation(before)) is not None:
        return f"activation {activation}"
    if function_name(before) in ("batch_norm", "conv2d"):
        return "no activation between pw1 and dw"
    return None
