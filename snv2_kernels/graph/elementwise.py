"""Activations and batch norms in a graph, told by what they compute.

Projects spell h-swish as ``x * relu6(x + 3) / 6``, SiLU as ``x * sigmoid(x)``, a frozen batch norm
as a product and a sum. So the nodes between a map and one that alone carries on what they made of
it are run, in float64, on numbers that tell all known functions apart, and the result is compared.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes

from snv2_kernels.graph.nodes import arguments, example, function_name, readers, same_shape, spelled
from snv2_kernels.packing.units import ACTIVATIONS, IDENTITY, Activation

__all__ = ["Norm", "activation_after", "is_off", "norm_after", "norm_at"]

_FUNCTIONS = {
    "relu", "relu6", "hardtanh", "leaky_relu", "silu", "hardswish", "sigmoid", "hardsigmoid",
    "threshold", "clamp", "clip", "clamp_min", "clamp_max", "add", "sub", "subtract", "rsub", "mul",
    "multiply", "div", "divide", "truediv", "true_divide", "rtruediv", "rdiv", "neg", "negative",
    "abs", "maximum", "minimum", "max", "min", "where", "gt", "lt", "ge", "le", "dropout",
    "dropout2d", "feature_dropout",
}  # fmt: skip
_CASTS = {"to", "float", "type_as"}
_OF_VECTORS = _FUNCTIONS | _CASTS | {
    "rsqrt", "sqrt", "reciprocal", "pow", "square", "view", "reshape", "unsqueeze", "getitem",
    "flatten", "squeeze", "expand",
}  # fmt: skip
_SCALINGS = {"add", "sub", "mul", "div", "truediv"}
_MOST_NODES = 16


@dataclass(frozen=True)
class Norm:
    """A batch norm in eval mode; none at all has no tensors."""

    weight: Any = None
    bias: Any = None
    running_mean: Any = None
    running_var: Any = None
    eps: float = 0.0
    is_spelled: bool = False  # as a product and a sum, which autocast leaves in float32


def activation_after(node: Node) -> tuple[Activation, tuple[Node, ...]]:
    """The activation of a map and its nodes, the last of which is the result."""
    found: tuple[Activation, tuple[Node, ...]] = IDENTITY, ()
    for nodes in _exits(node, _is_function):
        activation = _activation(node, nodes)
        if activation is not None:
            found = activation, nodes
    return found


def norm_after(node: Node) -> tuple[Norm, tuple[Node, ...]] | None:
    """The same of a batch norm; None for one that has no inference form."""
    user = readers(node)[0] if len(readers(node)) == 1 else None
    if user is not None and function_name(user) == "batch_norm":
        norm = norm_at(user)
        return None if norm is None else (norm, (user,))
    found: tuple[Norm, tuple[Node, ...]] = Norm(), ()
    for nodes in _exits(node, _is_scaling):
        norm = _frozen_norm(node, nodes)
        if norm is not None:
            found = norm, nodes
    return found


def is_off(node: Node) -> bool:
    """Whether a dropout does nothing."""
    return not arguments(node, ("input", "p", "training"), training=True)["training"]


# Regions --------------------------------------------------------------------------------------


def _exits(source: Node, allowed: Callable[[Node, Node], bool]) -> Iterator[tuple[Node, ...]]:
    """Nodes after ``source``, as far as all are allowed, up to one that alone is read by others."""
    inside = {source}
    while len(inside) <= _MOST_NODES:
        outside = {user for node in inside for user in readers(node)} - inside
        if not outside or not allowed(first := min(outside), source):
            return
        inside.add(first)
        if all(user in inside for node in inside - {first} for user in readers(node)):
            yield tuple(sorted(inside - {source}))


def _is_function(node: Node, source: Node) -> bool:
    """Whether a node computes each number from those in the same place."""
    if spelled(node) == "prelu":
        return True
    if "dropout" in function_name(node) and not is_off(node):
        return False
    return spelled(node) in _FUNCTIONS and same_shape(node, source)


def _is_scaling(node: Node, source: Node) -> bool:
    """Whether it may also read vectors of a number for each channel."""
    return spelled(node) in _SCALINGS and same_shape(node, source)


def _run(nodes: tuple[Node, ...], known: Mapping[Node, Tensor]) -> Tensor | None:
    """The last node's result in float64, None if that cannot be told. In the graph's order, so
    what works in place does here."""
    values: dict[Node, Any] = dict(known)

    def value(node: Node) -> Any:
        if node in values:
            return values[node]
        number = example(node)
        if isinstance(number, int | float | torch.SymInt | torch.SymFloat):
            return float(number)
        raise LookupError(node)

    try:
        with torch.no_grad(), _disable_current_modes():
            for node in nodes:
                args, kwargs = map_arg((node.args, node.kwargs), value)
                if function_name(node) in _CASTS:
                    values[node] = args[0]
                elif isinstance(node.target, str):
                    values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
                else:
                    function: Any = node.target
                    values[node] = function(*args, **kwargs)
    except Exception:  # whatever a function says to arguments that it was not traced with
        return None
    out = values[nodes[-1]]
    return out if isinstance(out, Tensor) and out.dtype == torch.float64 else None


def _same(a: Tensor, b: Tensor) -> bool:
    """Up to the order of roundings in float64; NaN where the other is."""
    return torch.allclose(a, b, rtol=1e-12, atol=1e-15, equal_nan=True)


# Activations ----------------------------------------------------------------------------------


def _activation(source: Node, nodes: tuple[Node, ...]) -> Activation | None:
    if spelled(nodes[-1]) == "prelu":
        given = arguments(nodes[-1], ("input", "weight"))
        return Activation("prelu", given["weight"]) if given["input"] is source else None
    key = _key(source, nodes)
    if key not in _found:
        found = _computed(source, nodes)
        if key is None:
            return found
        _found[key] = found
    return _found[key]


_found: dict[Any, Activation | None] = {}  # of single calls of torch's functions


def _key(source: Node, nodes: tuple[Node, ...]) -> Any:
    """All that decides what a node makes of its first argument; None where that may be more."""
    (node, *others) = nodes
    given = (*node.args[1:], *node.kwargs.values())
    alone = not others and function_name(node) and node.args and node.args[0] is source
    if not alone or not all(type(value) in (bool, int, float, type(None)) for value in given):
        return None
    numbers = tuple((type(value), repr(value)) for value in given)
    return node.op, node.target, numbers, tuple(node.kwargs)


def _computed(source: Node, nodes: tuple[Node, ...]) -> Activation | None:
    x, known = _known_activations()
    y = _run(nodes, {source: x.clone()})
    if y is None or y.shape != x.shape:
        return None
    for activation, expected in known:
        if _same(y, expected):
            return activation
    leaky = Activation("leaky_relu", -float(y[0]))  # x[0] is -1
    return leaky if _same(y, leaky(x)) else None


@functools.cache
def _known_activations() -> tuple[Tensor, list[tuple[Activation, Tensor]]]:
    """Numbers, and what each activation makes of them. All kinks lie at multiples of 1/2."""
    with _disable_current_modes():
        near = torch.arange(-8 * 32, 8 * 32 + 1, dtype=torch.float64, device="cpu") / 32
        far = 10.0 ** torch.arange(1, 38, dtype=torch.float64, device="cpu")
        special = far.new_tensor([float("nan"), float("inf"), -float("inf")])
        x = torch.cat([-torch.ones_like(far[:1]), near, far, -far, special])
        kinds = [kind for kind in ACTIVATIONS if kind not in ("leaky_relu", "prelu")]
        return x, [(Activation(kind), Activation(kind)(x)) for kind in kinds]


# Batch norms ----------------------------------------------------------------------------------

_AFFINE, _STATISTICS = ("weight", "bias"), ("running_mean", "running_var")
_F_NORM = ("input", *_STATISTICS, *_AFFINE, "training", "momentum", "eps")
_ATEN_NORM = ("input", *_AFFINE, *_STATISTICS, "training", "momentum", "eps")
_ROLES = (*_AFFINE, *_STATISTICS)


def norm_at(node: Node) -> Norm | None:
    """The batch norm that a call of ``batch_norm`` is; None for one of the batch's statistics."""
    names = _ATEN_NORM if isinstance(node.target, torch._ops.OpOverload) else _F_NORM
    told = arguments(node, names, weight=None, bias=None, training=False, eps=1e-5)
    told["eps"] = example(told["eps"])
    if told["training"] or told["running_mean"] is None:
        return None
    if not isinstance(told["eps"], float | torch.SymFloat):
        return None
    return Norm(**{name: told[name] for name in (*_ROLES, "eps")})


def _frozen_norm(source: Node, nodes: tuple[Node, ...]) -> Norm | None:
    """A batch norm that is spelled out: which vector has which part in it is tried."""
    shape = example(source).shape
    vectors = _vectors(source, nodes, shape[1])
    if vectors is None:
        return None
    leaves, between = vectors
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64, device="cpu") + 0.5

    with _disable_current_modes():
        x = draw(2, shape[1], *[1] * (len(shape) - 2))
        numbers = {leaf: draw(*example(leaf).shape) for leaf in leaves}
        y = _run((*between, *nodes), {source: x.clone(), **numbers})
        if y is None or y.shape != x.shape:
            return None
        constants = dict.fromkeys(
            c for node in (*between, *nodes) for c in map(example, node.args)
            if isinstance(c, float | torch.SymFloat)
        )  # fmt: skip
        for roles in itertools.permutations(_ROLES, len(leaves)):
            told = dict(zip(roles, leaves, strict=True))
            if ("running_mean" in told) != ("running_var" in told):
                continue
            for eps in (*constants, 0.0) if "running_var" in told else (0.0,):
                tensors = {role: numbers[leaf].flatten() for role, leaf in told.items()}
                if _same(y, _normed(x, tensors, float(eps))):
                    return Norm(**told, eps=eps, is_spelled=True)  # type: ignore[arg-type]
    return None


def _normed(x: Tensor, tensors: Mapping[str, Tensor], eps: float) -> Tensor:
    shape = -1, *[1] * (x.dim() - 2)
    scale = tensors.get("weight", x.new_ones(1))
    if "running_var" in tensors:
        scale = scale * (tensors["running_var"] + eps).rsqrt()
    shift = tensors.get("bias", x.new_zeros(1)) - tensors.get("running_mean", 0) * scale
    return x * scale.view(shape) + shift.view(shape)


def _vectors(
    source: Node, nodes: tuple[Node, ...], channels: int
) -> tuple[list[Node], list[Node]] | None:
    """The vectors of ``channels`` numbers that nodes read and no others compute, and the nodes from
    there; None if they read anything else."""
    leaves: list[Node] = []
    between: set[Node] = set()
    waiting = [n for node in nodes for n in node.all_input_nodes if n not in (source, *nodes)]
    while waiting:
        node = waiting.pop()
        value = example(node)
        if node in between or node in leaves or not isinstance(value, Tensor):
            continue
        if value.numel() != channels or len(between) + len(leaves) > _MOST_NODES:
            return None
        if node.op in ("get_attr", "placeholder"):
            leaves.append(node)
        elif spelled(node) in _OF_VECTORS:
            between.add(node)
            waiting.extend(node.all_input_nodes)
        else:
            return None
    return (sorted(leaves), sorted(between)) if 0 < len(leaves) <= len(_ROLES) else None
