"""The mode under which a forward is recorded: each call of a torch function becomes a node."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from snv2_kernels.graph.conditions import ASKED_OF_TENSORS
from snv2_kernels.graph.nodes import same_number
from snv2_kernels.graph.observer import DEPENDS_ON_SIZE, Observer
from snv2_kernels.graph.sizes import SYMBOLS, Made, at, paired

__all__ = ["Recorder", "Untraceable", "first_line"]


_SIZES = ("shape", "size", "numel", "nelement", "__len__", "stride", "nbytes", "is_same_size")


class Untraceable(Exception):
    """A forward that cannot be recorded; the message is the reason in a few words."""


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Recorder(TorchFunctionMode):
    """Makes each call of a torch function twice, at two inputs, and writes it down once.

    Args:
        observer: looks away meanwhile, and is told what the calls show.
        fits_window: whether the input was made for an average over a window of a number of pixels,
            so that one of its map's size is a mean of that map.
    """

    def __init__(self, observer: Observer, fits_window: bool) -> None:
        super().__init__()
        self.graph = Graph()
        # Averages over a window of a number of pixels, with the map's size.
        self.windows: list[tuple[tuple[int, int], tuple[int, int]]] = []
        self.pools: list[Node] = []  # those that were taken for means of a map
        self.measured: set[Node] = set()  # tensors whose sizes the forward knows
        self._observer = observer
        self._fits_window = fits_window
        self._attributes: dict[int, str] = {}
        self._numbers: dict[str, Tensor] = {}
        self._nodes: dict[int, Node | tuple[Node, int]] = {}
        self._twins: dict[int, Tensor] = {}  # at the second input, of tensors at the first
        self._alive: list[Any] = []  # an id is a tensor's for as long as that lives

    def own(self, module: nn.Module, numbers: dict[str, Tensor]) -> None:
        """Take a module's tensors for attributes; ``numbers`` are those of integer buffers."""
        named = (*module.named_parameters(), *module.named_buffers())
        self._attributes = {id(t): name for name, t in named}
        self._numbers = numbers
        self._alive.append(named)

    def input(self, x: Tensor, twin: Tensor) -> Node:
        node = self.graph.placeholder("x")
        self._set(self._paired(x, twin, False), node)
        return node

    def _paired(self, first: Any, second: Any, of_tensor: bool) -> Any:
        """The results of a function at the first and the second input, as what a forward sees."""
        if isinstance(first, Tensor):
            if first is not second:
                self._alive += first, second
                self._twins[id(first)] = second
        elif isinstance(first, tuple | list):
            pairs = zip(first, second, strict=True)
            parts = [self._paired(a, b, of_tensor) for a, b in pairs]
            if any(part is not a for part, a in zip(parts, first, strict=True)):
                return type(first)(parts)
        elif type(first) is type(second) and (first != second or not of_tensor):
            # What is the same of two tensors is taken for a constant, which a partition checks;
            # what functions make of sizes may be the same by chance.
            if type(first) is int or type(first) is float:
                return paired(first, second, of_tensor)
            if isinstance(first, bool | str) and first != second:
                self._observer.note(DEPENDS_ON_SIZE)
        return first

    def _shape(self, value: Any) -> Any:
        """Sizes of a tensor, or of those in a tuple or list."""
        if isinstance(value, tuple | list):
            return tuple(map(self._shape, value))
        if not isinstance(value, Tensor):
            return None
        twin = self._twins.get(id(value))
        return value.shape if twin is None else self._paired(value.shape, twin.shape, True)

    def _set(self, value: Any, node: Node) -> None:
        node.meta["example_value"] = value
        node.meta["shape"] = self._shape(value)
        self._alive.append(value)
        parts = enumerate(value) if isinstance(value, tuple | list) else ()
        for i, part in parts:
            if isinstance(part, Tensor):
                self._nodes[id(part)] = node, i
        if isinstance(value, Tensor):
            self._nodes[id(value)] = node

    def made_by(self, value: Any) -> Node | None:
        """The node whose result a value is, as a whole."""
        node = self._nodes.get(id(value))
        return node if isinstance(node, Node) else None

    def channels_of(self, value: Any) -> int | None:
        """The channels of a map, None for what is none; as if the forward asked for them."""
        if not isinstance(value, Tensor):
            return None
        with torch._C.DisableTorchFunction():
            shape, twin = value.shape, self._twins.get(id(value), value)
            if len(shape) != 4:
                return None
            if twin.shape[1] != shape[1]:
                self._observer.note(DEPENDS_ON_SIZE)
        made = self._nodes.get(id(value))
        if made is not None:
            self.measured.add(made[0] if isinstance(made, tuple) else made)
        return int(shape[1])

    def node_of(self, value: Any) -> Any:
        """The node that makes a tensor; None for what is no tensor."""
        if not isinstance(value, Tensor):
            return None
        node = self._nodes.get(id(value))
        if isinstance(node, tuple):
            made = self._add(operator.getitem, node, {})
            self._set(value, made)
            return made
        if node is None:
            node = self.graph.get_attr(self._attributes.get(id(value), "_constant"))
            self._set(value, node)
            if (numbers := self._numbers.get(str(node.target))) is not None:
                node.meta["numbers"] = numbers
        return node

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self._observer.pause()
        try:
            return self._call(func, args, kwargs or {})
        finally:
            self._observer.resume()

    def _call(self, func: Any, args: Sequence[Any], kwargs: Any) -> Any:
        name = getattr(func, "__name__", "")
        pool = dict(zip(_POOL, args, strict=False), **kwargs) if name == "avg_pool2d" else None
        pools = pool is not None and self._pools_window(**pool)
        if pool is not None and (pools or self._is_whole(**pool)):
            # Its own signature takes numbers, and would fix the size of the map.
            asked = func, args, kwargs
            func, args, kwargs = Tensor.mean, (pool["input"], (2, 3), True), {}
        question = func.__self__.__name__ if name == "__get__" else name
        run = _normed if func is F.batch_norm else func
        out = self._at_both(run, args, kwargs, question in ASKED_OF_TENSORS)
        if "dropout" in name and not (given := _dropout(*args, **kwargs))["train"]:
            return given["input"]  # in inference mode the result is another tensor
        self._observer.asked |= ASKED_OF_TENSORS.get(question, set())
        if question == "_set_grad_enabled" and args[0]:
            self._observer.asked.add("enables gradients")
        if name != "__setitem__" and not _has_tensors(out):
            if question not in ASKED_OF_TENSORS:
                self._observer.note(f"its forward depends on {question} of a tensor")
            self._tell_sizes(out, func, args, kwargs)
            if question in _SIZES:
                made = (self._nodes.get(id(arg)) for arg in args)
                self.measured.update(m[0] if isinstance(m, tuple) else m for m in made if m)
            return out
        # x[0] is Tensor.__getitem__ here and operator.getitem in other graphs.
        target = getattr(operator, name, func) if name.startswith("__") else func
        node = self._add(target, *self._traced(args, kwargs))
        self._set(out, node)
        if pools:
            node.meta["call"] = asked[0], *self._traced(*asked[1:])
            self.pools.append(node)
        return out

    def _traced(self, args: Sequence[Any], kwargs: Any) -> Any:
        """Arguments with nodes in the place of tensors."""

        def traced(value: Any) -> Any:
            node = self.node_of(value)
            return value if node is None else node

        return map_aggregate(tuple(args), traced), map_aggregate(dict(kwargs), traced)

    def _add(self, target: Any, args: Any, kwargs: Any) -> Node:
        """A node with its call in ``meta``. Sizes are texts in the node's own arguments: who reads
        these takes them from the shapes."""
        texts = map_aggregate((args, kwargs), lambda v: str(v) if isinstance(v, SYMBOLS) else v)
        node = self.graph.call_function(target, *texts)
        node.meta["call"] = target, args, kwargs
        return node

    def _tell_sizes(self, out: Any, func: Any, args: Sequence[Any], kwargs: Any) -> None:
        """Note how the sizes that a function gave were computed."""
        sizes = list(_sizes_in(out))
        if sizes:
            given, named = self._traced(args, kwargs)
            for path, size in sizes:
                size.node.made = size.node.made or Made(func, given, named, path)

    def _at_both(self, func: Any, args: Sequence[Any], kwargs: Any, of_tensor: bool) -> Any:
        """Call a function at both inputs, or once where it is given nothing that differs."""
        differs = False

        def second(value: Any) -> Any:
            nonlocal differs
            there = self._twins.get(id(value)) if isinstance(value, Tensor) else at(value, 1)
            differs = differs or not (there is None or there is value)
            return value if there is None else there

        others = map_aggregate((tuple(args), dict(kwargs)), second)
        if not differs:
            return func(*args, **kwargs)
        given: Any = map_aggregate((tuple(args), dict(kwargs)), lambda value: at(value, 0))
        out = func(*given[0], **given[1])
        try:
            return self._paired(out, func(*others[0], **others[1]), of_tensor)
        except Exception as error:
            raise Untraceable(f"fails at other sizes of its input: {first_line(error)}") from error

    def _pools_window(
        self, input: Tensor, kernel_size: Any, padding: Any = 0, divisor_override: Any = None,
        **others: Any,
    ) -> bool:  # fmt: skip
        """Whether an average over a window of a number of pixels is one over this map."""
        window = kernel_size
        sizes: Any = (window, window) if isinstance(window, int) else tuple(window)
        if not all(type(size) is int for size in sizes):
            return False
        map_size: Any = tuple(input.shape[2:])
        self.windows.append((sizes, map_size))
        return (
            self._fits_window
            and sizes == map_size
            and padding in (0, (0, 0))
            and divisor_override is None
        )

    def _is_whole(self, input: Tensor, kernel_size: Any, **others: Any) -> bool:
        """Whether a window is a map's own size."""
        sizes = kernel_size if isinstance(kernel_size, tuple | list) else (kernel_size,)
        is_open = any(isinstance(size, torch.SymInt) for size in sizes)
        extents = self._shape(input)[2:]
        same = len(sizes) == len(extents) and all(map(same_number, sizes, extents))
        return is_open and same and others.keys() <= {"stride"}


def _sizes_in(value: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Symbols in a number or a tuple, with the path to each."""
    if isinstance(value, SYMBOLS):
        yield path, value
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from _sizes_in(part, (*path, i))


def _normed(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The result of F.batch_norm, which is slow on tensors without values."""
    given = dict(zip(_NORM, args, strict=False), **kwargs)
    vectors = [given.get(name) for name in _NORM[:4]]
    shapes = {None if t is None else t.shape for t in vectors}
    fits = input.dim() == 4 and shapes <= {None, input.shape[1:2]}
    fits = fits and not any(t is None for t in vectors[:2])
    in_order = input.is_contiguous() or input.is_contiguous(memory_format=torch.channels_last)
    usual = given.keys() <= {*_NORM} and not given.get("training")
    if fits and in_order and usual and not torch.is_grad_enabled():
        return torch.empty_like(input)
    return F.batch_norm(input, *args, **kwargs)


_NORM = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_POOL = (
    "input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
    "divisor_override",
)  # fmt: skip


def _dropout(
    input: Any, p: Any = 0.5, training: bool = True, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """The input of a dropout, and whether it drops anything: torch's functions say ``train``,
    those of torch.nn.functional ``training``."""
    return {"input": input, "train": kwargs.get("train", training)}


def _has_tensors(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(isinstance(part, Tensor) for part in value)
    return isinstance(value, Tensor)
