"""Turns the nodes of an ONNX graph into the steps and submodules of a forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snv2_kernels.onnx.names import Names
from snv2_kernels.onnx.node import OPERATORS, Node
from snv2_kernels.onnx.reader import Array, File, described
from snv2_kernels.onnx.steps import Draft
from snv2_kernels.onnx.values import Constant, Dim, Map, Quantization, Value, own_dims

__all__ = ["Importer"]

_FLOATS = {1: torch.float32, 10: torch.float16, 11: torch.float64}  # by ONNX's element type
_SIZE = 224  # of an image whose height or width is left open
_LARGER = (0, 64, 128)  # how much larger another image is: batch, height and width all differ
_MOST_EXTENT = 1 << 16


class Importer:
    """Imports one graph."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.values: dict[str, Value] = {
            name: Constant((array,), name) for name, array in file.tensors.items()
        }
        self.drafts: list[Draft] = []
        self.names = Names()
        self.buffers: dict[int, tuple[str, Tensor]] = {}  # by the value that a buffer is
        self.ranges: dict[int, Quantization] = {}  # of each map that the file has as integers
        self.makers: dict[int, nn.Conv2d] = {}  # of a convolution's result, and of what follows it
        self.is_of_one_size = False  # whether the file says the height and width of images
        self._maps: list[Map] = []
        self._parameters: dict[tuple[str, str], nn.Parameter] = {}
        self._aliases: dict[int, list[str]] = {}  # names of each map
        self._reads = Counter(name for node in file.graph.node for name in node.input)
        self._reads.update(info.name for info in file.graph.output)

    def run(self) -> tuple[Map, list[Map]]:
        """Import all nodes; returns the input and what is returned.

        Raises:
            ValueError: naming the node that cannot be imported.
        """
        source = self._input()
        for index, proto in enumerate(self.file.graph.node):
            node = Node(self, proto, index)
            operator = OPERATORS.get((node.domain, proto.op_type))
            if operator is None:
                raise node.error("an unknown operator")
            try:
                operator(node)
            except Exception as error:  # whatever torch says to sizes that do not fit
                raise node.error(_first_line(error)) from None
            node.check_all_read()
        return source, self._results()

    # The graph's ends ----------------------------------------------------------------------------

    def _input(self) -> Map:
        inputs = [v for v in self.file.graph.input if v.name not in self.file.tensors]
        if len(inputs) != 1:
            names = described([v.name for v in inputs])
            raise ValueError(f"{len(inputs)} inputs, expected one, an image: {names}")
        info = inputs[0]
        told = info.type.tensor_type
        if told.elem_type not in _FLOATS:
            raise ValueError(f"the input has element type {told.elem_type}, expected a float")
        sizes = _declared(told)
        if sizes is None or len(sizes) != 4 or sizes[1] is None:
            shape = described(sizes)
            raise ValueError(f"the input has shape {shape}, expected [N, C, H, W] with C known")
        n, _, h, w = sizes
        self.is_of_one_size = h is not None and w is not None
        first = (n or 1, sizes[1], h or _SIZE, w or _SIZE)
        if not all(0 < size < _MOST_EXTENT for size in first):
            raise ValueError(f"the input has shape {described(first)}, which is absurd")
        n, c, h, w = first
        worlds = (first, (n + 1, c, h, w), (n, c, h + _LARGER[1], w + _LARGER[2]))
        dtype = _FLOATS[told.elem_type]
        examples = tuple(torch.empty(shape, dtype=dtype, device="meta") for shape in worlds)
        source = self._new_map(examples, own_dims(0, examples))
        self.define(info.name, source)
        return source

    def _results(self) -> list[Map]:
        results = []
        if not self.file.graph.output:
            raise ValueError("the graph has no output")
        for info in self.file.graph.output:
            value = self.values.get(info.name)
            if not isinstance(value, Map):
                raise ValueError(f"no node makes the output {described(info.name)}")
            if value.quantization is not None:
                raise ValueError(f"the output {described(info.name)} is quantized")
            declared = _declared(info.type.tensor_type)
            if declared is not None and not _agrees(declared, value.shape):
                expected = f"the graph says {described(declared)}"
                raise ValueError(f"the output has shape {value.shape}, but {expected}")
            results.append(value)
        return results

    # Of operators --------------------------------------------------------------------------------

    def _new_map(self, examples: tuple[Tensor | None, ...], dims: tuple[Dim, ...]) -> Map:
        self._maps.append(Map(len(self._maps), examples, dims))
        return self._maps[-1]

    def map_of(self, value: int) -> Map:
        return self._maps[value]

    def define(self, name: str, value: Value) -> None:
        """Give a value a name of the file's."""
        if name in self.values:
            raise ValueError(f"two values named {described(name)}")
        self.values[name] = value
        if isinstance(value, Map):
            self._aliases.setdefault(value.id, []).append(name)

    def uses(self, value: Map) -> int:
        """How often a map is read under all of its names so far, but for giving it another."""
        names = self._aliases.get(value.id, [])
        return sum(self._reads[name] for name in names) - max(len(names) - 1, 0)

    def operand(self, name: str, array: Array) -> Map:
        """A constant that steps read, as a buffer."""
        tensor = torch.from_numpy(array.copy())
        examples = (tensor.to("meta"),) * len(self._maps[0].examples)
        made = self._new_map(examples, tuple((size,) for size in array.shape))
        self.buffers[made.id] = self.names.of_tensor(name), tensor
        return made

    def parameter(
        self, constant: Constant, kind: str, make: Callable[[Array], Array]
    ) -> nn.Parameter:
        """The parameter of an initializer, the same for all that read it in the same way."""
        array = constant.array
        if array is None:
            raise ValueError("a weight that depends on the size of the image")
        key = constant.name, kind
        if not constant.name or key not in self._parameters:
            tensor = torch.from_numpy(np.array(make(array), order="C"))
            self._parameters[key] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        return self._parameters[key]

    def emit(
        self,
        draft: Draft,
        call: Callable[..., Any] | None,
        maps: Sequence[Map],
        *,
        count: int | None = None,
        is_positive: bool = False,
        quantization: Quantization | None = None,
        dims: Sequence[Dim] | None = None,
    ) -> list[Map]:
        """Adds a step, and runs it on tensors without values in each world.

        Args:
            draft: the step, which is told what it makes.
            call: runs it; None where the result is like the first input, which takes no time then.
            maps: its inputs.
            count: of results, where it returns a tuple.
            is_positive: whether results are never negative.
            quantization: of the results.
            dims: of the result, where they are not those of the inputs or the network's own.
        """
        worlds = len(maps[0].examples)
        made: list[Any] = []
        for world in range(worlds):
            given = [m.examples[world] for m in maps]
            if call is None or any(t is None for t in given):
                made.append(given[0] if call is None else None)
                continue
            try:
                made.append(call(*given))
            except Exception:
                if world == 0:
                    raise
                made.append(None)  # it runs with images of the file's own size
        results = []
        for i in range(1 if count is None else count):
            examples = tuple(t if t is None or count is None else t[i] for t in made)
            checked = _checked(examples)
            value = len(self._maps)
            known = own_dims(value, checked, maps) if dims is None else tuple(dims)
            made_map = Map(value, checked, known, is_positive, quantization)
            self._maps.append(made_map)
            results.append(made_map)
            follows = call is None or isinstance(draft.module, nn.BatchNorm2d)
            if isinstance(draft.module, nn.Conv2d):
                self.makers[value] = draft.module
            elif follows and len(maps) == 1 and maps[0].id in self.makers:
                self.makers[value] = self.makers[maps[0].id]
        draft.outputs = tuple(m.id for m in results)
        self.drafts.append(draft)
        return results


def _checked(examples: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    first = examples[0]
    if not isinstance(first, Tensor) or first.numel() == 0:
        raise ValueError("its result is empty")
    return examples


def _declared(told: Any) -> list[int | None] | None:
    """A shape as the file has it, None for what it leaves open."""
    if not told.HasField("shape"):
        return None
    return [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None
            for d in told.shape.dim]  # fmt: skip


def _agrees(declared: Sequence[int | None], shape: Sequence[int]) -> bool:
    return len(declared) == len(shape) and all(
        a in (None, b) for a, b in zip(declared, shape, strict=True)
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
