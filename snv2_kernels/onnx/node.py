"""A node of an ONNX graph as its operator reads it, and the table of operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import AttributeProto
from torch import nn

from snv2_kernels.onnx.reader import Array, array_of, described
from snv2_kernels.onnx.steps import Draft
from snv2_kernels.onnx.values import Constant, Dim, Map, Quantization, Value

if TYPE_CHECKING:
    from snv2_kernels.onnx.importer import Importer

__all__ = ["OPERATORS", "Node", "operator"]

_MOST_FOLDED = 1 << 24  # elements of a constant that is computed
_DOMAINS = {"": "ai.onnx"}

Operator = Callable[["Node"], None]
OPERATORS: dict[tuple[str, str], Operator] = {}


def operator(*names: str, inputs: tuple[int, int], domain: str = "", outputs: int = 1) -> Any:
    """Registers a function that imports nodes of some operators.

    Args:
        names: of the operators.
        inputs: the least and the most number of inputs.
        domain: of the operators.
        outputs: the most number of outputs.
    """

    def register(function: Operator) -> Operator:
        def run(node: Node) -> None:
            least, most = inputs
            if not least <= len(node.inputs) <= most or "" in node.inputs[:least]:
                raise ValueError(f"{len(node.inputs)} inputs, expected {least} to {most}")
            if not 1 <= len(node.outputs) <= outputs or not node.outputs[0]:
                raise ValueError(f"{len(node.outputs)} outputs, expected at most {outputs}")
            function(node)

        OPERATORS.update({(domain, name): run for name in names})
        return function

    return register


class Node:
    """A node, whose attributes and inputs are checked as they are read."""

    def __init__(self, importer: Importer, proto: Any, index: int) -> None:
        self.importer, self.kind, self.name = importer, proto.op_type, proto.name
        self.domain = "" if proto.domain == "ai.onnx" else proto.domain
        self.version = importer.file.opsets.get(self.domain, 0)
        self.inputs, self.outputs = list(proto.input), list(proto.output)
        while self.outputs and not self.outputs[-1]:
            self.outputs.pop()
        self._index = index
        self._attributes = {a.name: a for a in proto.attribute}
        self._repeated = len(self._attributes) != len(proto.attribute)
        self._read: set[str] = set()

    def error(self, reason: str) -> ValueError:
        """An error that names the node."""
        name = described(self.name) if self.name else f"number {self._index}"
        domain = described(_DOMAINS.get(self.domain, self.domain))[1:-1]
        kind = described(self.kind)[1:-1]
        where = f"node {name} ({kind}, domain {domain}, opset {self.version or 'unknown'})"
        return ValueError(f"{where}: {reason}")

    # Attributes ----------------------------------------------------------------------------------

    def _attribute(self, name: str, kind: int) -> Any:
        """The attribute's message, None if it is not there."""
        self._read.add(name)
        found = self._attributes.get(name)
        if found is not None and found.type != kind:
            raise ValueError(f"attribute {name} has type {found.type}, expected {kind}")
        return found

    def integer(self, name: str, default: int) -> int:
        found = self._attribute(name, AttributeProto.INT)
        return default if found is None else int(found.i)

    def integers(self, name: str, count: int | None = None) -> tuple[int, ...] | None:
        """Numbers, so many of them; None if they are not there."""
        found = self._attribute(name, AttributeProto.INTS)
        if found is None:
            return None
        if count is not None and len(found.ints) != count:
            raise ValueError(f"attribute {name} has {len(found.ints)} numbers, expected {count}")
        return tuple(map(int, found.ints))

    def real(self, name: str, default: float) -> float:
        found = self._attribute(name, AttributeProto.FLOAT)
        value = default if found is None else float(found.f)
        if not math.isfinite(value):
            raise ValueError(f"attribute {name} is {value}")
        return value

    def text(self, name: str, default: str) -> str:
        found = self._attribute(name, AttributeProto.STRING)
        return default if found is None else bytes(found.s).decode(errors="replace")

    def tensor(self, name: str) -> Array | None:
        found = self._attribute(name, AttributeProto.TENSOR)
        return None if found is None else array_of(found.t, None)

    def has(self, name: str) -> bool:
        return name in self._attributes

    def expect(self, name: str, value: Any, default: Any = None) -> None:
        """Raise unless an attribute has the only value that is supported."""
        default = value if default is None else default
        found = (self.real if isinstance(value, float) else self.integer)(name, default)
        if found != value:
            raise ValueError(f"{name} is {found}, only {value} is supported")

    def ignore(self, *names: str) -> None:
        """Attributes that change no result."""
        self._read.update(names)

    def check_all_read(self) -> None:
        unknown = sorted(self._attributes.keys() - self._read)
        if unknown or self._repeated:
            what = f"attribute {described(unknown[0])} is not supported" if unknown else (
                "an attribute stands twice")  # fmt: skip
            raise self.error(what)

    # Inputs --------------------------------------------------------------------------------------

    def value(self, i: int) -> Value | None:
        """An input, None where it is left out."""
        name = self.inputs[i] if i < len(self.inputs) else ""
        if not name:
            return None
        found = self.importer.values.get(name)
        if found is None:
            raise ValueError(f"reads {described(name)}, which nothing makes before it")
        return found

    def any_map(self, i: int) -> Map:
        """An input that is a map, perhaps of integers."""
        found = self.value(i)
        if not isinstance(found, Map):
            raise ValueError(f"its input {i} is a constant, expected a map")
        return found

    def map(self, i: int) -> Map:
        """An input that is a map of floats."""
        found = self.any_map(i)
        if found.quantization is not None:
            raise ValueError(f"its input {i} is quantized, which it does not take")
        return found

    def constant(self, i: int) -> Constant | None:
        found = self.value(i)
        if isinstance(found, Map):
            raise ValueError(f"its input {i} is computed from the image, expected a constant")
        return found

    def array(self, i: int) -> Array | None:
        """A constant input that is the same for all images."""
        found = self.constant(i)
        if found is not None and found.array is None:
            raise ValueError(f"its input {i} depends on the size of the image")
        return None if found is None else found.array

    def weight(self, i: int, rank: int, kind: str = "", make: Any = None) -> nn.Parameter:
        """A constant input as a parameter."""
        found = self.constant(i)
        if found is None or found.arrays[0].ndim != rank:
            raise ValueError(f"its input {i} is missing or has not {rank} dimensions")
        return self.importer.parameter(found, kind, make or (lambda array: array))

    def numbers(self, i: int, attribute: str, since: int) -> tuple[int, ...] | None:
        """Integers that became an input in a later opset."""
        if self.version < since:
            return self.integers(attribute)
        array = self.array(i)
        if array is None:
            return None
        if array.dtype.kind != "i" or array.ndim > 1:
            raise ValueError(f"its input {i} has type {array.dtype}, expected integers")
        return tuple(int(v) for v in array.reshape(-1))

    # Outputs -------------------------------------------------------------------------------------

    def alias(self, value: Value) -> None:
        """Let the first output be a value that is there."""
        self.importer.define(self.outputs[0], value)

    def fold(self, arrays: Sequence[Array]) -> None:
        """Let the first output be a constant."""
        if any(array.size > _MOST_FOLDED for array in arrays):
            raise ValueError("makes a constant that is too large")
        same = all(np.array_equal(arrays[0], array) for array in arrays)
        self.alias(Constant(tuple(arrays[:1] if same else arrays)))

    def call(
        self,
        function: Callable[..., Any],
        maps: Sequence[Map],
        *constants: Any,
        is_positive: bool = False,
        quantization: Quantization | None = None,
        dims: Sequence[Dim] | None = None,
        by_element: bool = False,
    ) -> Map:
        """Adds a step that calls a function, perhaps one of each element; returns its result."""
        draft = Draft(tuple(m.id for m in maps), function, constants)

        def run(*given: Any) -> Any:
            return function(*given, *constants)

        (result,) = self.importer.emit(
            draft,
            None if by_element else run,
            maps,
            is_positive=is_positive,
            quantization=quantization,
            dims=dims,
        )
        return result

    def call_for_several(
        self, function: Callable[..., Any], x: Map, count: int, *constants: Any, **kept: Any
    ) -> list[Map]:
        """The same with a function of one map that returns so many."""
        draft = Draft((x.id,), function, constants)
        return self.importer.emit(
            draft, lambda t: function(t, *constants), [x], count=count, **kept
        )

    def layer(
        self,
        module: nn.Module,
        x: Map,
        weight: str = "",
        *,
        is_positive: bool = False,
        quantization: Quantization | None = None,
        by_element: bool = False,
    ) -> Map:
        """Adds a step that calls a submodule, without tensors or with ones on the meta device;
        returns its result."""
        name = self.importer.names.of_layer(self.name, self.kind, weight)
        draft = Draft((x.id,), module=module, name=name)
        (result,) = self.importer.emit(
            draft,
            None if by_element else module.eval(),
            [x],
            is_positive=is_positive,
            quantization=quantization,
        )
        return result
