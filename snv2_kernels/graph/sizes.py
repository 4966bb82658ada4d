"""Sizes that follow those of a forward's input, at two inputs at once.

A forward is recorded on two inputs side by side, whose batch, height and width all differ, and so
do their remainders by small numbers. Python code sees a size as torch's SymInt, which neither
converts nor compares without calling its node; here that node is a pair of numbers. A pair whose
numbers are the same is taken for a constant only where it is a tensor's size, or made of such by
sums and products: a quotient or a remainder may be the same at two inputs by chance. A node also
knows how it was computed, so that it can be computed again at another input.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# It gives SymInt and its like their operators.
import torch.fx.experimental.sym_node

__all__ = ["SYMBOLS", "Made", "SizeNode", "at", "paired", "same_at_all"]

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Made:
    """A call that gives a size, or a tuple in which ``path`` leads to it."""

    function: Callable[..., Any]
    args: tuple[Any, ...]  # numbers, SizeNodes, symbols, and nodes of a graph for tensors
    kwargs: dict[str, Any] = field(default_factory=dict)
    path: tuple[int, ...] = ()


class SizeNode:
    """The node of a SymInt, SymFloat or SymBool: its value at each input.

    ``factor`` is a number that divides a sum of products of tensors' sizes, whatever these are;
    None for what is no such sum. ``made`` is how it was computed, None for a constant.
    """

    def __init__(
        self, values: tuple[Any, Any], factor: int | None = None, made: Made | None = None
    ) -> None:
        self.values, self.factor, self.made = values, factor, made

    def is_int(self) -> bool:
        return type(self.values[0]) is int

    def is_float(self) -> bool:
        return type(self.values[0]) is float

    def is_bool(self) -> bool:
        return type(self.values[0]) is bool

    def is_constant(self) -> bool:
        return self.factor is not None and self.values[0] == self.values[1]

    def is_nested_int(self) -> bool:
        return False

    def maybe_as_int(self) -> int | None:
        return None

    @staticmethod
    def _of_constant(value: Any) -> SizeNode:
        return SizeNode((value, value), abs(value) if type(value) is int else None)

    wrap_int = wrap_float = wrap_bool = _of_constant

    def value(self, *_: Any) -> Any:
        """The value at the first input, which conversions give; the observer sees them."""
        return self.values[0]

    int_ = bool_ = guard_int = guard_float = guard_bool = value
    hint = property(value)

    def _graph_repr(self) -> str:
        return "|".join(map(str, self.values))


def _factor(name: str, a: SizeNode, b: SizeNode | None) -> int | None:
    """The factor of a function of two nodes, or of one."""
    if b is None:
        return a.factor if name in ("neg", "pos") else None
    if a.factor is None or b.factor is None:
        return None
    factors = {"add": math.gcd(a.factor, b.factor), "mul": a.factor * b.factor}
    factors["sub"] = factors["add"]
    if b.is_constant() and b.factor and a.factor % b.factor == 0:
        factors["int_floordiv"] = a.factor // b.factor
    if a.values == b.values:  # so two sums are the same at all inputs
        factors |= dict.fromkeys(_COMPARISONS, 1)
    return factors.get(name)


_COMPARISONS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **_COMPARISONS,
    **{name: getattr(operator, name) for name in (
        "abs", "add", "lshift", "mod", "mul", "neg", "pos", "rshift", "sub",
    )},
    "bitwise_and": operator.and_, "bitwise_or": operator.or_, "bitwise_xor": operator.xor,
    "sym_and": operator.and_, "sym_or": operator.or_, "sym_not": operator.not_,
    "int_floordiv": operator.floordiv, "int_truediv": operator.truediv,
    "float_truediv": operator.truediv, "pow_by_natural": operator.pow, "float_pow": operator.pow,
    "ceil": math.ceil, "floor": math.floor, "trunc": math.trunc, "round": round,
    "is_integer": float.is_integer, "sym_float": float, "sym_min": min, "sym_max": max,
}  # fmt: skip


def _method(name: str, function: Callable[..., Any]) -> Callable[..., SizeNode]:
    def method(self: SizeNode, other: SizeNode | None = None) -> SizeNode:
        nodes = (self,) if other is None else (self, other)
        first, second = (function(*(node.values[i] for node in nodes)) for i in range(2))
        return SizeNode((first, second), _factor(name, self, other), Made(function, nodes))

    return method


for _name, _function in _FUNCTIONS.items():
    setattr(SizeNode, _name, _method(_name, _function))


def at(value: Any, i: int) -> Any:
    """What stands for a value at the first or second input."""
    return value.node.values[i] if isinstance(value, SYMBOLS) else value


def same_at_all(a: Any, b: Any) -> bool | None:
    """Whether two integers are the same at all inputs; None where neither is a pair."""
    nodes = [
        value.node if isinstance(value, torch.SymInt) else SizeNode.wrap_int(value)
        for value in (a, b)
    ]
    if not all(isinstance(node, SizeNode) for node in nodes):
        return None
    exact = all(node.factor is not None for node in nodes)
    return exact and nodes[0].values == nodes[1].values


def paired(first: Any, second: Any, of_tensor: bool) -> Any:
    """What Python code sees of a number that is one thing at the first input and another at the
    second; ``of_tensor`` says whether a tensor has it."""
    if type(first) is int:
        return torch.SymInt(SizeNode((first, second), 1 if of_tensor else None))
    return torch.SymFloat(SizeNode((first, second)))
