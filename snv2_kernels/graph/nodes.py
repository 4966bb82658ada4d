"""What a node of a graph says of itself, whoever captured the graph."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

__all__ = [
    "arguments",
    "example",
    "function_name",
    "holds_numbers",
    "is_size",
    "numbers_of",
    "only_number",
    "only_reader",
    "positional",
    "readers",
    "same_number",
    "same_shape",
    "shape_of",
    "spelled",
    "storages",
    "writes",
    "written",
]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_MOST_NUMBERS = 1 << 16  # of a list of channels


def example(node: Any) -> Any:
    """What a node was traced with: Dynamo's name for it, or torch.export's."""
    if not isinstance(node, Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


def shape_of(node: Any) -> Any:
    """The sizes of a node's tensor, or of each of several; those that follow the input's are
    symbols."""
    if "shape" in node.meta:
        return node.meta["shape"]
    value = example(node)
    return value.shape if isinstance(value, Tensor) else tuple(part.shape for part in value)


def holds_numbers(t: Tensor) -> bool:
    """Whether a buffer may be a list of channels, which a forward's structure depends on."""
    real = type(t) is Tensor and t.device.type != "meta"
    return real and t.dtype in _INTEGERS and t.dim() > 0 and t.numel() <= _MOST_NUMBERS


def numbers_of(node: Node) -> Tensor | None:
    """The integers of a tensor that is the same at all inputs, where the recording knows them: such
    as a list of channels, in a buffer or computed. None for others."""
    if "numbers" not in node.meta:
        node.meta["numbers"] = _numbers(node)
    numbers: Tensor | None = node.meta["numbers"]
    return numbers


def _numbers(node: Node) -> Tensor | None:
    value = example(node)
    if (
        not isinstance(value, Tensor)
        or value.dtype not in _INTEGERS
        or value.numel() > _MOST_NUMBERS
    ):
        return None
    if type(value) is Tensor and node.op == "get_attr":  # no parameter or buffer
        return value.detach().cpu()
    name = function_name(node)
    drawn = name.startswith(("rand", "empty", "new_empty")) or name in ("bernoulli", "multinomial")
    if "call" not in node.meta or drawn or _is_written_to(node):
        return None
    function, args, kwargs = node.meta["call"]
    known = {each: numbers_of(each) for each in node.all_input_nodes}
    if None in known.values():
        return None
    try:
        given = map_aggregate((args, kwargs), lambda v: known[v] if isinstance(v, Node) else v)
        made = function(*given[0], **{**given[1], **({"device": "cpu"} if not known else {})})
    except Exception:  # such as a size that follows the input's
        return None
    return made if isinstance(made, Tensor) else None


def _is_written_to(node: Node) -> bool:
    """Whether a function writes to a node's memory."""
    memory = storages(node)
    return any(writes(other) and memory & written(other) for other in node.graph.nodes)


def function_name(node: Any) -> str:
    """``"cat"`` for torch.cat, Tensor's methods and aten's operators alike; empty for others."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return ""
    target = node.target
    if isinstance(target, str):
        return target
    name = _names.get(target)
    if name is None:
        name = _name_of(target)
        if name:  # others may be functions of a model, which are not to be kept
            _names[target] = name
    return name


_names: dict[Any, str] = {}  # of functions of torch


def _name_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return name if namespace == "aten" else ""
    if target is F.max_pool2d:  # a function that chooses another
        return "max_pool2d"
    name = getattr(target, "__name__", "")
    known = (torch, Tensor, F, torch._C._nn, operator)
    return name if any(getattr(space, name, None) is target for space in known) else ""


def spelled(node: Any) -> str:
    """The function's name, the same for what works in place and for operators."""
    name = function_name(node).strip("_")
    return _OPERATORS.get(name, name)


_OPERATORS = {
    **{f"i{name}": name for name in ("add", "sub", "mul", "truediv")},
    **{f"r{name}": name for name in ("add", "mul")},
}


def arguments(node: Node, names: Sequence[str], **defaults: Any) -> dict[str, Any]:
    """By name, whether or not they were passed so."""
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


_FIRST = ("input", "tensor", "tensors", "self")


def positional(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, of which the first is never passed by its name."""
    kwargs = dict(node.kwargs)
    args = node.args or tuple(kwargs.pop(name) for name in _FIRST if name in kwargs)
    return args, kwargs


def only_number(value: Any) -> Any:
    """The number that all numbers of a tuple are, None if there is none."""
    values = set(value) if isinstance(value, tuple | list) else {value}
    return values.pop() if len(values) == 1 else None


def is_size(node: Node) -> bool:
    """Whether a node is a number, or some: what only asks for those reads no map."""
    value = example(node)
    parts = value if isinstance(value, tuple | list) else [value]
    return bool(parts) and all(
        isinstance(part, int | float | torch.SymInt | torch.SymFloat) for part in parts
    )


def readers(node: Node) -> list[Node]:
    """What reads more of a node than its shape."""
    return [user for user in node.users if not is_size(user)]


def only_reader(node: Node, choose: Callable[[Node], bool]) -> Node | None:
    """What alone reads a node, as its first argument, if it is of the right kind."""
    found = readers(node)
    if len(found) != 1 or not choose(found[0]):
        return None
    args, _ = positional(found[0])
    return found[0] if args and args[0] is node else None


def same_number(a: Any, b: Any) -> bool:
    """Whether two sizes are the same whatever the input is."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    from snv2_kernels.graph.sizes import same_at_all

    same = same_at_all(a, b)
    if same is not None:
        return same
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(a == b))


def same_shape(a: Node, b: Node) -> bool:
    """Of two tensors, whatever the input is."""
    x, y = example(a), example(b)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.dim() != y.dim():
        return False
    return all(map(same_number, shape_of(a), shape_of(b)))


def writes(node: Node) -> bool:
    """Whether a node changes its input, so that it matters when the others read it."""
    name = function_name(node)
    return (
        (name.endswith("_") and not name.endswith("__"))
        or name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod")
        or bool(_argument(node, "inplace"))
        or node.kwargs.get("out") is not None
    )


def storages(node: Any) -> set[int]:
    """What tells the memory of a node's tensors from that of others, in a recorded graph."""
    value = example(node)
    parts = value if isinstance(value, tuple | list) else [value]
    return {part.untyped_storage()._cdata for part in parts if isinstance(part, Tensor)}


def written(node: Node) -> set[int]:
    """The memory that a node writes to, in a recorded graph."""
    out = node.kwargs.get("out")
    given = [*node.args[:1], *node.kwargs.values()][:1] if out is None else [out]
    memory: set[int] = set()
    for each in given:
        parts = each if isinstance(each, tuple | list) else (each,)
        memory.update(*map(storages, parts))
    return memory


def _argument(node: Node, name: str) -> Any:
    """Of a function of torch.nn.functional, by name or by position."""
    if name not in node.kwargs and isinstance(node.target, FunctionType):
        try:
            names = list(inspect.signature(node.target).parameters)
        except ValueError:  # of what wraps a builtin, as Tensor.__pow__
            names = []
        if name in names and names.index(name) < len(node.args):
            return node.args[names.index(name)]
    return node.kwargs.get(name)
