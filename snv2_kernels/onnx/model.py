"""The modules that an ONNX file becomes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snv2_kernels.onnx import functions

__all__ = ["OnnxModel", "OnnxNetwork", "Step"]


class Step(NamedTuple):
    """One line of a forward: ``outputs = call(inputs, constants)``, in numbered places."""

    path: tuple[str, ...]  # of the submodule that is called; empty for a function
    function: Callable[..., Any] | None
    inputs: tuple[int, ...]
    constants: tuple[Any, ...]
    outputs: tuple[int, ...]


_AFFINE = (
    functions.add, functions.subtract, functions.multiply, functions.divide,
    functions.subtract_from,
)  # fmt: skip


class OnnxNetwork(nn.Module):
    """The graph of an ONNX file, whose layers are submodules named as the file names them.

    The forward goes through a list of steps, each a submodule or a function of torch's.

    Args:
        steps: in order.
        operands: place and name of buffers that steps read.
        results: places of what is returned, as a tensor or, if there are several, a tuple.
        places: how many there are; the input is in place 0.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        operands: Sequence[tuple[int, str]],
        results: Sequence[int],
        places: int,
    ) -> None:
        super().__init__()
        self._steps, self._operands = tuple(steps), tuple(operands)
        self._results, self._places = tuple(results), places

    def forward(self, x: Tensor) -> Any:
        values: list[Any] = [None] * self._places
        values[0] = x
        for place, name in self._operands:
            values[place] = self._buffers[name]
        for path, function, inputs, constants, outputs in self._steps:
            given = [values[place] for place in inputs]
            if path:
                layer: Any = self
                for key in path:
                    layer = layer._modules[key]
                out = layer(*given)
            else:
                assert function is not None
                out = function(*given, *constants)
            if len(outputs) == 1:
                values[outputs[0]] = out
            else:
                for place, part in zip(outputs, out, strict=True):
                    values[place] = part
        if len(self._results) == 1:
            return values[self._results[0]]
        return tuple(values[place] for place in self._results)

    def scale_and_shift(self, channels: int) -> tuple[list[float], list[float]] | None:
        """One number of each for each channel, if the forward does nothing else; else None."""
        constant = {place for place, _ in self._operands}
        for step in self._steps:
            if step.function not in _AFFINE or len(set(step.inputs) - constant) != 1:
                return None
        module = copy.deepcopy(self).double().cpu()
        zero = torch.zeros(1, channels, 1, 1, dtype=torch.float64)
        with torch.no_grad():
            shift, both = module(zero), module(zero + 1)
        if shift.shape != zero.shape:
            return None
        return (both - shift).flatten().tolist(), shift.flatten().tolist()

    def extra_repr(self) -> str:
        return f"{len(self._steps)} steps"


class OnnxModel(nn.Sequential):
    """A network with what a file computes before its first convolution, ``normalization``, and
    after its last linear layer, ``tail``; one of the two may be missing."""

    def __init__(
        self, normalization: nn.Module | None, network: nn.Module, tail: nn.Module | None
    ) -> None:
        parts = ("normalization", normalization), ("network", network), ("tail", tail)
        super().__init__(OrderedDict((name, part) for name, part in parts if part is not None))

    def ends(self) -> tuple[nn.Module | None, nn.Module, nn.Module | None]:
        """The three parts, as they are now."""
        modules: dict[str, Any] = dict(self._modules)
        return modules.get("normalization"), modules["network"], modules.get("tail")
