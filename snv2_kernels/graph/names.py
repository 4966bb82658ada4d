"""Guards on names outside a module that the code of its forward looks up."""

from __future__ import annotations

import operator
import sys
from types import CellType, CodeType, ModuleType
from typing import Any

from torch import Tensor, nn

from snv2_kernels.graph.contents import Contents, is_full

__all__ = ["Names", "is_library"]


def is_library(module: str) -> bool:
    """Whether a module belongs to the standard library, torch, what torch computes sizes with, or
    this package but its models."""
    root = module.partition(".")[0]
    if root == "snv2_kernels":
        return not module.startswith("snv2_kernels.models")
    return root in ("torch", "sympy", "mpmath") or root in sys.stdlib_module_names


class Names:
    """Globals and variables of enclosing functions, and the objects that they stood for."""

    def __init__(self) -> None:
        self._spaces: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}  # by the space's id
        self._cells: list[tuple[CellType, Any]] = []
        self._absent: list[tuple[dict[str, Any], str]] = []
        self._contents = Contents()
        self._elsewhere = False  # in another process

    def add_code(self, code: CodeType, space: dict[str, Any]) -> None:
        """Add the globals that code names, and what it names in modules among them."""
        self._absent += [(space, name) for name in code.co_names if name not in space]
        waiting, seen = [space], {id(space)}
        while waiting:
            space = waiting.pop()
            for name in code.co_names:
                if name not in space:
                    continue
                _, known = self._spaces.setdefault(id(space), (space, {}))
                value = known.setdefault(name, space[name])
                self._contents.add(name, value)
                if isinstance(value, ModuleType) and id(vars(value)) not in seen:
                    seen.add(id(vars(value)))
                    waiting.append(vars(value))

    def settle(self, contents: Contents) -> None:
        """Add the variables of enclosing functions that were found in other values and here, once
        the forward has ended."""
        self._absent.clear()
        self._contents.clear_caches()
        cells = [*contents.cells(), *self._contents.cells()]
        self._cells = [(cell, cell.cell_contents) for cell in cells if is_full(cell)]

    def hold_numbers(self) -> bool:
        """Whether to keep the names keeps modules or tensors alive."""
        values = [value for _, known in self._spaces.values() for value in known.values()]
        values += [value for _, value in self._cells]
        return self._contents.hold_numbers() or any(
            isinstance(value, nn.Module | Tensor) for value in values
        )

    def hold(self) -> bool:
        """Whether all names stand for the same objects."""
        for space, known in self._spaces.values():
            if not all(map(operator.is_, map(space.get, known), known.values())):
                return False
        cells = self._cells
        return not self._elsewhere and all(cell.cell_contents is was for cell, was in cells)

    def changed(self) -> str | None:
        """A verb and the first name that stands for another object or one that holds others."""
        for space, known in self._spaces.values():
            if (name := next((n for n in known if space.get(n) is not known[n]), None)) is not None:
                return f"sets {name!r}"
        if not self.hold():
            return "sets a variable of a function around it"
        appeared = next((name for space, name in self._absent if name in space), None)
        return self._contents.changed() if appeared is None else f"sets {appeared!r}"

    def restore(self) -> None:
        """Let all names stand for the same objects as before, and these hold the same."""
        for space, known in self._spaces.values():
            if not all(map(operator.is_, map(space.get, known), known.values())):
                space.update(known)
        for space, name in self._absent:
            space.pop(name, None)
        self._contents.restore()

    def __deepcopy__(self, memo: Any) -> Names:
        return self

    def __reduce__(self) -> Any:
        return _elsewhere, ()


def _elsewhere() -> Names:
    names = Names()
    names._elsewhere = True
    return names
