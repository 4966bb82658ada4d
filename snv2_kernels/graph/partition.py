"""A forward cut into regions, each a run of units for the kernels, and torch functions between.

The functions are those that were recorded, as Python code that calls them again. A size among
their arguments is computed from the tensors at hand, as the forward computed it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from snv2_kernels.graph.channels import MOVES
from snv2_kernels.graph.nodes import (
    example,
    function_name,
    shape_of,
    storages,
    writes,
    written,
)
from snv2_kernels.graph.reasons import described
from snv2_kernels.graph.recipe import RecipeBuilder
from snv2_kernels.graph.recognize import Run
from snv2_kernels.graph.record import Recording
from snv2_kernels.graph.sizes import SizeNode

__all__ = [
    "OtherInput", "Partition", "Region", "Uncut", "constant_sizes", "cut", "functions",
]  # fmt: skip


_MOST_TOLD, _MOST_LAYERS = 6, 4
_CONSTANTS = (float, torch.dtype, torch.device, torch.layout, torch.memory_format, type(...))


class Uncut(Exception):
    """A forward that cannot be cut into regions; the message is the reason in a few words."""


class OtherInput(Exception):
    """An input that a partition is not right for."""


@dataclass(frozen=True)
class Region:
    """A run of units, told by a recipe."""

    recipe: str
    names: tuple[str, ...]  # of the recipe's state among parameters and buffers


@dataclass(frozen=True)
class Partition:
    """Regions, and the code that calls them and what is between.

    The code is a function of the input that returns the tensors that the forward returns, each
    once. It names regions ``r0``, ``r1``, ..., tensors of the module ``t0``, ... and all other
    values that are no literals ``c0``, ...
    """

    regions: tuple[Region, ...]
    names: tuple[str, ...]  # of the module's tensors
    code: str
    constants: tuple[Any, ...]
    # Height and width of the least input. A size that was the same at two inputs is taken for a
    # constant, and may be one only where a map has so many pixels, as behind ``x[:, :, :4]``.
    least: tuple[int, int]
    # Whether it is right for maps in contiguous order alone: in another order functions may return
    # their input where they return a copy in this one, and what is written to would tell.
    in_order: bool
    beside: tuple[str, ...]  # what functions compute between the regions, for people

    def told(self) -> str:
        """Returns the functions beside the regions, in a few words."""
        layers = [told for told in self.beside if "(" in told]
        others = [told for told in self.beside if "(" not in told]
        shown = [*layers[:_MOST_LAYERS], *others[: _MOST_TOLD - len(layers[:_MOST_LAYERS])]]
        more = len(self.beside) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more > 0 else "")

    def first_outside(self) -> str:
        """Returns what PyTorch runs first of what is in no region."""
        return next(iter(self.beside), "a function that only moves channels")

    def why_not_whole(self) -> str:
        return f"PyTorch runs a part of it: {self.told()}"

    def bind(
        self, regions: Sequence[Callable[[Tensor], Any]], tensors: Sequence[Tensor]
    ) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """Returns the forward with these regions and tensors.

        Args:
            regions: take the region's input and return its results, a tensor or a tuple of several.
            tensors: by the order of ``names``.
        """
        named: dict[str, Any] = {}
        for letter, values in (("r", regions), ("t", tensors), ("c", self.constants)):
            named.update((f"{letter}{i}", value) for i, value in enumerate(values))
        exec(compile(self.code, "<partition>", "exec"), named)  # written below
        # Else the function and its names would hold each other, and the weights.
        bound: Callable[[Tensor], tuple[Tensor, ...]] = named.pop("forward")
        return bound


def cut(recording: Recording, runs: Sequence[Run], own: frozenset[str]) -> Partition:
    """The partition of a forward into runs and what is between.

    Args:
        recording: of the forward, without an error.
        runs: as :func:`snv2_kernels.graph.recognize.runs_of` finds them with ``taps``.
        own: names of the module's parameters and buffers.

    Raises:
        Uncut: if what is between cannot be told apart from the runs, or computed again.
    """
    if any(pool in run.nodes for run in runs for pool in recording.pools):
        raise Uncut("a head that averages over a window of a number of pixels")
    return _Writer(recording, runs, own).partition()


def functions(nodes: Iterable[Node]) -> frozenset[Node]:
    """Returns the calls of functions among nodes that are still in the graph."""
    return frozenset(node for node in nodes if node.op == "call_function" and not node._erased)


class _Writer:
    """Writes the code of a partition, a line for each node that is needed."""

    def __init__(self, recording: Recording, runs: Sequence[Run], own: frozenset[str]) -> None:
        self._recording, self._runs, self._own = recording, runs, own
        self._begins = {min(_after_source(run)): run for run in runs}
        self._outs = {out for run in runs for out in _results(run)}
        every = [(node, run) for run in runs for node in run.nodes if node.op != "get_attr"]
        self._source_of = {node: run.source for node, run in every}
        self._inside = self._source_of.keys() - self._outs
        self._regions: list[Region] = []
        self._tensors: dict[str, str] = {}  # variable of each name
        self._constants: list[Any] = []
        self._places: dict[int, int] = {}  # in the constants, by the id of each
        self._variables: dict[Any, str] = {}  # by node, and by the id of a size's node
        self._sizes: list[SizeNode] = []  # keeps ids from being handed out again
        self._lines: list[tuple[list[str], str, list[str]]] = []  # variables set, code, those read
        self._beside: dict[str, None] = {}
        self._check_writes()

    def partition(self) -> Partition:
        needed = self._needed()
        for node in self._recording.graph.nodes:
            if node in self._begins:
                self._write_region(self._begins[node])
            own = node not in self._inside or _moves(node)
            is_call = node.op == "call_function"
            if is_call and node in needed and own and node not in self._outs:
                self._write(node)
        for node in sorted(self._recording.measured - self._variables.keys() - self._inside):
            if any(constant_sizes(node)):
                self._read(node)  # and check it, though nothing else may read it
        outs = [self._read(out) for out in self._recording.outs]
        self._lines.append(([], f"return {_tuple(outs)}", outs))
        return Partition(
            tuple(self._regions), tuple(self._tensors), self._code(), tuple(self._constants),
            self._recording.size[1:], self._tells_order(needed), tuple(self._beside),
        )  # fmt: skip

    def _needed(self) -> set[Node]:
        """The nodes that results depend on, also by what is written to them. What a run moves and
        others read too is among them, and is moved again, at its place."""
        writers: dict[int, list[Node]] = {}  # by the memory that they write to
        for node in filter(writes, self._recording.graph.nodes):
            for memory in written(node):
                writers.setdefault(memory, []).append(node)
        needed: set[Node] = set()
        waiting = list(self._recording.outs)
        while waiting:
            node = waiting.pop()
            if node in needed:
                continue
            needed.add(node)
            waiting += [each for memory in storages(node) for each in writers.get(memory, ())]
            if node in self._outs or (node in self._inside and not _moves(node)):
                waiting.append(self._source_of[node])
            else:
                waiting += [*node.all_input_nodes, *self._asked_by(node)]
        return needed

    def _tells_order(self, needed: set[Node]) -> bool:
        """Whether functions between the regions may depend on the order in memory of their maps."""
        group: dict[Node, set[Node]] = {}  # what may share memory
        for node in self._recording.graph.nodes:
            if node not in needed or node in self._inside:
                continue
            group[node] = {node}
            if writes(node) or _may_alias(node):
                for each in node.all_input_nodes:
                    joined = group[node] | group.get(each, {each})
                    group.update(dict.fromkeys(joined, joined))
        written_to = [members for node, members in group.items() if writes(node)]
        asks = any(function_name(node) == "as_strided" for node in group)
        return asks or any(any(map(_may_alias, members)) for members in written_to)

    def _asked_by(self, node: Node) -> Iterator[Node]:
        """Nodes whose sizes are among a node's arguments."""
        sizes: list[SizeNode] = []
        _visit(node.meta.get("call", ())[1:], sizes)
        seen: set[int] = set()
        while sizes:
            made = sizes.pop().made
            if made is None or id(made) in seen:
                continue
            seen.add(id(made))
            yield from _visit((made.args, made.kwargs), sizes)

    def _check_writes(self) -> None:
        """Raise for functions that write to what the forward was given, or to what a run reads
        while it is computed: a region is computed at once, where its run begins."""
        nodes = list(self._recording.graph.nodes)
        given = set().union(*(storages(n) for n in nodes if n.op != "call_function"), ())
        writers = [node for node in nodes if writes(node) and node not in self._source_of]
        # Where the runs that read or make it begin and end, and results of runs, by memory.
        spans: dict[int, list[tuple[Node, Node]]] = {}
        outs: dict[int, list[Node]] = {}
        for run in self._runs if writers else ():
            inside = _after_source(run)
            span = min(inside), max(inside)
            for place in set().union(storages(run.source), *map(storages, inside)):
                spans.setdefault(place, []).append(span)
        for out in self._outs if writers else ():
            for place in storages(out):
                outs.setdefault(place, []).append(out)
        for node in writers:
            memory = written(node)
            if given & memory:
                raise Uncut(f"writes to its input or its state: {described(node)}")
            near = (span for place in memory for span in spans.get(place, ()))
            if any(begin < node < end for begin, end in near):
                raise Uncut(f"a map is written in place: {described(node)}")
            if len({out for place in memory for out in outs.get(place, ())}) > 1:
                raise Uncut(f"several maps are written in place: {described(node)}")

    # Lines ------------------------------------------------------------------------------------

    def _write_region(self, run: Run) -> None:
        builder: Any = RecipeBuilder()  # of nodes in the place of tensors
        source = self._read(run.source)
        run.tell(builder)
        names = tuple(self._name(node) for node in builder.state)
        place = f"r{len(self._regions)}"
        self._regions.append(Region(builder.text, names))
        results = [self._variable(out) for out in _results(run)]
        target = results[0] if len(results) == 1 else _tuple(results)
        self._lines.append((results, f"{target} = {place}({source})", [source]))

    def _write(self, node: Node) -> None:
        function, args, kwargs = node.meta["call"]
        if function_name(node) not in MOVES:
            self._beside[described(node)] = None
        variable = self._variable(node)
        self._call(variable, function, args, kwargs)
        expected = [(1, 1)] if node in self._recording.pools else constant_sizes(node)
        if any(expected):
            check = _SizeCheck(tuple(expected))
            self._lines.append(([], f"{self._named(check)}({variable})", [variable]))

    def _call(self, variable: str, function: Any, args: Any, kwargs: Any, path: Any = ()) -> None:
        read: list[str] = []

        def text(value: Any) -> str:
            return self._text(value, read)

        given = [*map(text, args), *(f"{key}={text(value)}" for key, value in kwargs.items())]
        called = f"{self._named(function)}({', '.join(given)})"
        index = "".join(f"[{i}]" for i in path)
        self._lines.append(([variable], f"{variable} = {called}{index}", read))

    def _code(self) -> str:
        """All lines, each of which lets go of what is read no more."""
        later = {"x", *self._tensors.values()}
        lines: list[str] = []
        for variables, line, read in reversed(self._lines):
            dead = sorted({*variables, *read} - later)
            later.update(read)
            drop = f"; del {', '.join(dead)}" if dead and not line.startswith("return") else ""
            lines.append(f"    {line}{drop}")
        return "\n".join(["def forward(x):", *reversed(lines)])

    # Values -----------------------------------------------------------------------------------

    def _name(self, node: Node) -> str:
        if node.op != "get_attr" or node.target not in self._own:
            raise Uncut(f"a weight that is no parameter: {described(node)}")
        return str(node.target)

    def _variable(self, key: Any) -> str:
        return self._variables.setdefault(key, f"v{len(self._variables)}")

    def _named(self, value: Any) -> str:
        if id(value) not in self._places:
            self._places[id(value)] = len(self._constants)
            self._constants.append(value)
        return f"c{self._places[id(value)]}"

    def _read(self, node: Node) -> str:
        """The variable of a node. What was only asked for its size is computed here."""
        if node.op == "placeholder":
            return "x"
        if node.op == "get_attr":
            return self._tensors.setdefault(self._name(node), f"t{len(self._tensors)}")
        if node not in self._variables:
            if node in self._inside:
                raise Uncut(f"reads {described(node)} of a unit")
            self._write(node)
        return self._variables[node]

    def _text(self, value: Any, read: list[str]) -> str:  # noqa: PLR0911
        """A value as Python code; ``read`` takes the variables in it."""
        if isinstance(value, Node):
            read.append(self._read(value))
            return read[-1]
        if isinstance(value, torch.SymInt | torch.SymFloat):
            value = value.node
        if isinstance(value, SizeNode):
            text = self._size(value)
            if text.startswith("v"):
                read.append(text)
            return text
        if type(value) in (tuple, torch.Size):
            return _tuple([self._text(part, read) for part in value])
        if isinstance(value, list):
            return f"[{', '.join(self._text(part, read) for part in value)}]"
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(self._text(part, read) for part in parts)})"
        if isinstance(value, dict):
            items = (f"{key!r}: {self._text(part, read)}" for key, part in value.items())
            return f"{{{', '.join(items)}}}"
        finite = not isinstance(value, float) or math.isfinite(value)
        if value is None or (type(value) in (bool, int, float, str) and finite):
            return repr(value)
        if not isinstance(value, _CONSTANTS) and not callable(value):
            raise Uncut(f"an argument of type {type(value).__name__}")
        return self._named(value)

    def _size(self, size: SizeNode) -> str:
        """A number that follows from the sizes of tensors at hand."""
        if size.is_constant():
            return repr(size.values[0])
        made = size.made
        if made is None:
            if size.values[0] != size.values[1]:
                raise Uncut("computes with a size in a way that is not known")
            return repr(size.values[0])
        if id(made) not in self._variables:
            self._sizes.append(size)
            variable = self._variable(id(made))
            self._call(variable, made.function, made.args, made.kwargs, made.path)
        return self._variables[id(made)]


def constant_sizes(node: Node) -> list[tuple[int | None, ...]]:
    """The shape of a node's tensor, or of each of several, with None for sizes that follow the
    input's; only where others, the same at two inputs, may be another number at a third. They are
    not where as many sizes follow the input's as in what the node reads."""
    if "call" not in node.meta:
        return []
    shape = shape_of(node)
    several = isinstance(example(node), tuple | list)
    given = shape if several else [shape]
    shapes = [tuple(map(_constant, each)) for each in given if each is not None]
    sizes: list[SizeNode] = []
    read = _visit(node.meta["call"][1:], sizes)
    of_read = [shape_of(each) for each in read if isinstance(example(each), Tensor)]
    most = max((sum(_constant(size) is None for size in each) for each in of_read), default=0)
    least = min((each.count(None) for each in shapes), default=0)
    moved = function_name(node) in MOVES and not several and bool(of_read)
    if moved and _count(shapes[0]) == _count(map(_constant, of_read[0])):
        return []  # as many channels as before, so pixels are as many as they are
    is_made = bool(sizes) and not of_read  # of sizes alone
    return shapes if several or is_made or least < most else []


def _count(shape: Iterable[int | None]) -> int:
    """The product of the sizes that are constants."""
    return math.prod(size for size in shape if size is not None)


def _constant(size: Any) -> int | None:
    return size if isinstance(size, int) else None


@dataclass(frozen=True)
class _SizeCheck:
    """Raises where what was the same at two inputs is another number at this one."""

    expected: tuple[tuple[int | None, ...], ...]  # of each tensor, from its last dimension on

    def __call__(self, value: Any) -> None:
        values = value if isinstance(value, tuple | list) else (value,)
        if len(values) != len(self.expected):
            raise OtherInput
        for tensor, sizes in zip(values, self.expected, strict=True):
            shape = tensor.shape[len(tensor.shape) - len(sizes) :]
            if any(a is not None and a != b for a, b in zip(sizes, shape, strict=True)):
                raise OtherInput


def _moves(node: Node) -> bool:
    return function_name(node) in MOVES and not writes(node)


_ALIASING = MOVES | {
    "to", "type", "type_as", "view_as", "reshape_as", "expand", "expand_as", "float", "half",
    "double", "bfloat16", "ravel", "movedim", "moveaxis", "diagonal", "as_strided", "unfold",
    "hsplit", "vsplit", "real", "unflatten", "narrow", "broadcast_to", "atleast_1d",
}  # fmt: skip


def _may_alias(node: Node) -> bool:
    """Whether a result may share memory with what a function was given, in some order of it. What
    has no name here may be anything."""
    name = function_name(node)
    return node.op == "call_function" and not writes(node) and (not name or name in _ALIASING)


def _results(run: Run) -> list[Node]:
    """Maps on the way, in the order of a plan's results, and the last result."""
    return [*(unit.out for unit in run.units if unit.out in run.taps), run.out]


def _after_source(run: Run) -> list[Node]:
    return [node for node in run.nodes if node.op == "call_function" and node > run.source]


def _visit(value: Any, sizes: list[SizeNode]) -> list[Node]:
    """The nodes in a nest of arguments; ``sizes`` takes the sizes."""
    found: list[Node] = []

    def look(part: Any) -> Any:
        if isinstance(part, Node):
            found.append(part)
        elif isinstance(part, torch.SymInt | torch.SymFloat):
            sizes.append(part.node)
        elif isinstance(part, SizeNode):
            sizes.append(part)
        return part

    map_aggregate(value, look)
    return found


def _tuple(texts: Sequence[str]) -> str:
    return f"({', '.join(texts)},)" if texts else "()"
