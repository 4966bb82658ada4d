"""Names of submodules and buffers, from those of a file's nodes and tensors."""

from __future__ import annotations

import re

from torch import nn

from snv2_kernels.nn.recognized import Recognized

__all__ = ["Names"]

_SUFFIXES = ("_quantized", ".weight", "_weight")
_PREFIX = "ConvBnFusion_W_"  # of ONNX Runtime's folded batch norms
_MOST_LENGTH = 200
_MOST_PARTS = 12


class Names:
    """Hands out names, each once."""

    def __init__(self) -> None:
        self._leaves: set[tuple[str, ...]] = set()
        self._inner: set[tuple[str, ...]] = set()
        self._numbers: dict[tuple[str, ...], int] = {}

    def of_layer(self, node: str, kind: str, weight: str) -> tuple[str, ...]:
        """The path of a submodule.

        Args:
            node: its name. TorchScript's exporter writes modules into it:
                ``/stage2/stage2.0/branch1/branch1.0/Conv``.
            kind: its operator.
            weight: the name of the layer's weight, if it has one.
        """
        scopes = node.split("/")[1:-1] if node.startswith("/") else []
        weight = weight.removeprefix(_PREFIX)
        for suffix in _SUFFIXES:
            weight = weight.removesuffix(suffix)
        if scopes:
            parts: list[str] = []
            for before, scope in zip(["", *scopes], scopes, strict=False):
                parts += scope.removeprefix(f"{before}.").split(".")
        elif weight and "::" not in weight:
            parts = weight.split(".")
        else:
            parts = [node or kind.lower()]
        return self._free(parts)

    def of_tensor(self, name: str) -> str:
        """The name of a buffer of the whole."""
        return self._free([name])[0]

    def _free(self, parts: list[str]) -> tuple[str, ...]:
        path = list(map(_valid, parts[:_MOST_PARTS]))
        for i in range(len(path) - 1):
            while tuple(path[: i + 1]) in self._leaves:
                path[i] += "_"
        first = found = tuple(path)
        while found in self._leaves or found in self._inner:
            self._numbers[first] = self._numbers.get(first, 1) + 1
            found = *first[:-1], f"{first[-1]}_{self._numbers[first]}"
        self._leaves.add(found)
        self._inner.update(found[:i] for i in range(1, len(found)))
        return found


_TAKEN = frozenset((*dir(Recognized), *vars(nn.Module())))


def _valid(part: str) -> str:
    """A name that a module may have in place of any text."""
    name = re.sub(r"\W", "_", part, flags=re.ASCII)[:_MOST_LENGTH].strip("_") or "layer"
    return f"{name}_" if name in _TAKEN else name
