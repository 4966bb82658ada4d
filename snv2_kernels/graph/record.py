"""Records what a module computes as a graph that :mod:`~snv2_kernels.graph.recognize` reads.

The forward runs once, on tensors without values, in a mode that sees each call of a torch function
and makes it twice, for inputs of two sizes. Channels are ordinary numbers to the module's code,
which may compute with them, assert and branch; batch, height and width are open
(:mod:`~snv2_kernels.graph.sizes`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes

from snv2_kernels.graph.conditions import ASKED_OF_TENSORS, USUAL, Conditions
from snv2_kernels.graph.contents import Contents
from snv2_kernels.graph.names import Names
from snv2_kernels.graph.nodes import example, positional, same_number, writes
from snv2_kernels.graph.observer import DEPENDS_ON_SIZE, Observer
from snv2_kernels.graph.plain import plain_copy
from snv2_kernels.graph.returned import ONE_MAP, Returned
from snv2_kernels.graph.sizes import SYMBOLS, at, paired

__all__ = ["Call", "Recording", "Untraceable", "record", "without_modes"]

Size = tuple[int, int, int]
_SIZE = (2, 9, 7)  # batch, height, width: all different, none of them one
# To those of the second input: primes, so all remainders differ, and thresholds lie between.
_STEPS = (11, 2011, 3001)
_STRIDES = (32, 16, 8, 4)  # of a network, from its input to an average over a window


class Untraceable(Exception):
    """A forward that cannot be recorded; the message is the reason in a few words."""


@dataclass(frozen=True)
class Call:
    """A call of a submodule."""

    name: str
    given: Node | None  # what makes its only argument, where one node does that
    nodes: tuple[Node, ...]  # that it added to the graph
    result: Node | None  # what makes the tensor that it returns


@dataclass
class Recording:
    """A forward of one map."""

    graph: Graph
    source: Node
    outs: list[Node] = field(default_factory=list)  # what it returns, each once
    returned: Returned = ONE_MAP
    error: str | None = None
    has_effect: bool = False  # which is the error
    channels: dict[str, int] = field(default_factory=dict)  # of the inputs of submodules
    calls: list[Call] = field(default_factory=list)  # those that ended, of submodules called once
    size: Size = _SIZE  # batch, height and width that it was recorded with
    # Averages over a window of a number of pixels, with the map's size, and those that were taken
    # for means of a map: so they are for maps of the window's size alone.
    windows: list[tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=list)
    pools: list[Node] = field(default_factory=list)
    asked: frozenset[str] = frozenset()  # what the forward may depend on, see conditions
    told: tuple[Any, ...] = ()  # the part of the conditions that it was recorded in
    names: Names = field(default_factory=Names)  # that it looks up outside the module


def record(
    module: nn.Module, in_channels: int, conditions: Conditions = USUAL, size: Size = _SIZE
) -> Recording:
    """Record the forward of ``module`` in eval mode on a map of ``in_channels``.

    A parameter or buffer is a get_attr node with its name as target. The module is left as it is.
    Where the map is too small for an average over a window, one is tried that makes it the
    window's size.
    """
    with without_modes():
        return _record(_Subject(module, conditions), in_channels, size)


def _record(subject: _Subject, in_channels: int, size: Size) -> Recording:
    recording = subject.record(in_channels, size)
    if recording.error is None or recording.has_effect or not recording.windows:
        return recording
    stride, before = _STRIDES[0], 0
    while stride != before:
        window, _ = recording.windows[-1]
        height, width = (stride * (extent - 1) + 1 for extent in window)
        larger = subject.record(in_channels, (_SIZE[0], height, width + (width == height)))
        if larger.error is None:
            recording = larger
        if larger.pools or not larger.windows:
            break
        before, (_, (seen, _)) = stride, larger.windows[-1]
        stride = next((s for s in _STRIDES if s < before and -(-height // s) == seen), before)
    return recording


class _Subject:
    """A module whose forward is recorded, once or several times where it has no effects."""

    def __init__(self, module: nn.Module, conditions: Conditions) -> None:
        self._module, self._conditions = module, conditions
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.inference_mode(False):
            self._copy = plain_copy(module, functools.partial(_empty, conditions, self._mode))
        self._calls = _Calls(self._copy)
        self._contents = Contents()
        self._contents.add_module(self._copy)

    def record(self, in_channels: int, size: Size) -> Recording:
        conditions, mode = self._conditions, self._mode
        x, twin = (self._input(in_channels, size, steps) for steps in ((0, 0, 0), _STEPS))
        observer = Observer(self._contents)
        recorder = _Recorder(observer)
        recorder.own(self._copy)
        source = recorder.input(x, twin)
        recording = Recording(recorder.graph, source, size=size, names=observer.names)
        recorder.recording = recording
        self._calls.note_in(recording, recorder)
        attributes, out = set(vars(x)), None
        try:
            with _in(conditions), _quiet(), mode, recorder, observer:
                out = self._copy(x)
        except Untraceable as error:
            recording.error = str(error)
        except Exception as error:  # whatever a module's code may raise
            recording.error = f"cannot be traced: {_first_line(error)}"
        self._calls.end()
        effect = observer.effect()
        if effect is not None:
            recording.error, recording.has_effect = effect, True
        if recording.error is None:
            try:
                _end(recording, recorder, conditions, out)
            except Untraceable as error:
                recording.error = str(error)
        if any(set(vars(t)) - attributes for t in (x, *map(example, recording.outs))):
            recording.error = recording.error or "its forward sets attributes of tensors"
        recording.asked = frozenset(observer.asked)
        recording.told = conditions.about(recording.asked, self._module)
        return recording

    def _input(self, in_channels: int, size: Size, steps: Size) -> Tensor:
        conditions = self._conditions
        n, h, w = (
            1 if one else extent + step
            for one, extent, step in zip(conditions.ones, size, steps, strict=True)
        )
        with torch.inference_mode(False), self._mode:
            return torch.empty(
                (n, in_channels, h, w), dtype=conditions.dtype, device=conditions.device,
                memory_format=conditions.memory_format, requires_grad=conditions.requires_grad,
            )  # fmt: skip


def _end(recording: Recording, recorder: _Recorder, conditions: Conditions, out: Any) -> None:
    """Note what a forward has returned; raise for what is no run of a fused module."""
    returned = Returned.of(out)
    if returned is None:
        raise Untraceable(f"returns {type(out).__name__}, not maps")
    recording.returned, maps = returned
    recording.outs = [recorder.node_of(t) for t in maps]
    _erase_unread(recording)
    _check_results(recording, conditions, maps)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """Hide what runs inside from the modes that are on, such as counters of operations."""
    functions = [_pop_mode() for _ in range(_len_torch_function_stack())]
    try:
        with _disable_current_modes():
            yield
    finally:
        for mode in reversed(functions):
            _push_mode(mode)


@contextlib.contextmanager
def _in(conditions: Conditions) -> Iterator[None]:
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(conditions.grad),
        torch.autocast(conditions.device, enabled=False),
    ):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """An error is the recording's result, and nobody's to see in torch's log."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


def _erase_unread(recording: Recording) -> None:
    """What was only asked for its size would pass for a reader of a map, and so would layers whose
    result nobody takes."""
    kept = {recording.source, *recording.outs}
    for node in reversed(recording.graph.nodes):
        group = _sharing_memory(recording.graph, node) if writes(node) else {node}
        read = any(user not in group for member in group for user in member.users)
        outer = writes(node) and any(member.op != "call_function" for member in group)
        if not read and not outer and kept.isdisjoint(group):
            for member in sorted(group, reverse=True):
                recording.graph.erase_node(member)


def _sharing_memory(graph: Graph, write: Node) -> set[Node]:
    """A node that writes to a tensor, and all whose results are or were a part of that."""
    written = write.kwargs.get("out", (*positional(write)[0], None)[0])
    storages = _storages(written)
    return {write, *(node for node in graph.nodes if storages & _storages(node))}


def _storages(node: Any) -> set[int]:
    value = example(node)
    parts = value if isinstance(value, tuple | list) else [value]
    return {part.untyped_storage()._cdata for part in parts if isinstance(part, Tensor)}


def _check_results(recording: Recording, conditions: Conditions, maps: list[Tensor]) -> None:
    """Raise for what a fused module does not do: compute or leave out gradients by itself."""
    for value in map(example, recording.graph.nodes):
        is_map = isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()
        if is_map and value.dtype != conditions.dtype:
            raise Untraceable(f"computes in {value.dtype} by itself")
    if conditions.grad and not all(t.requires_grad for t in maps):
        raise Untraceable("its result has no gradient")


def _empty(conditions: Conditions, mode: FakeTensorMode, t: Tensor) -> Tensor:
    """A tensor without values in the place of a parameter or buffer."""
    meta = torch.empty(t.shape, dtype=conditions.dtype_of(t), device="meta")
    # It takes a tenth of the time of torch.empty under the mode.
    out = FakeTensor(mode, meta, torch.device(conditions.device))
    return out.requires_grad_(t.requires_grad)


class _Calls:
    """Notes in a recording what the submodules of a module are called with."""

    def __init__(self, module: nn.Module) -> None:
        for name, child in module.named_modules():
            begin, end = functools.partial(self._begin, name), functools.partial(self._end, name)
            child.register_forward_pre_hook(begin, with_kwargs=True)
            child.register_forward_hook(end)

    def note_in(self, recording: Recording, recorder: _Recorder) -> None:
        self._recording, self._recorder = recording, recorder
        # What was given, and the last node before.
        self._open: dict[str, tuple[Node | None, Node]] = {}
        self._known: set[str] = set()

    def end(self) -> None:
        """Let go of the recording, which through the module's hooks would hold itself."""
        del self._recording, self._recorder, self._open

    def _begin(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        x = args[0] if len(args) == 1 else None
        if isinstance(x, Tensor) and x.dim() == 4:
            self._recording.channels[name] = int(x.shape[1])
        given = None if kwargs else self._recorder.made_by(x)
        self._open[name] = given, next(iter(reversed(self._recording.graph.nodes)))

    def _end(self, name: str, _: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        calls = self._recording.calls
        if name in self._known:
            calls[:] = [call for call in calls if call.name != name]
            return
        self._known.add(name)
        given, before = self._open[name]
        nodes = reversed(self._recording.graph.nodes)
        added = tuple(itertools.takewhile(lambda node: node is not before, nodes))
        calls.append(Call(name, given, added, self._recorder.made_by(out)))


class _Recorder(TorchFunctionMode):
    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.graph = Graph()
        self.recording: Recording | None = None
        self._observer = observer
        self._attributes: dict[int, str] = {}
        self._nodes: dict[int, Node | tuple[Node, int]] = {}
        self._twins: dict[int, Tensor] = {}  # at the second input, of tensors at the first
        self._alive: list[Any] = []  # an id is a tensor's for as long as that lives

    def own(self, module: nn.Module) -> None:
        named = (*module.named_parameters(), *module.named_buffers())
        self._attributes = {id(t): name for name, t in named}
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
        elif type(first) is type(second) and first != second:
            if type(first) is int or type(first) is float:
                return paired(first, second, of_tensor)
            if isinstance(first, bool | str):
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

    def node_of(self, value: Any) -> Any:
        """The node that makes a tensor; None for what is no tensor."""
        if not isinstance(value, Tensor):
            return None
        node = self._nodes.get(id(value))
        if isinstance(node, tuple):
            made = self.graph.call_function(operator.getitem, node)
            self._set(value, made)
            return made
        if node is None:
            node = self.graph.get_attr(self._attributes.get(id(value), "_constant"))
            self._set(value, node)
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
            func, args, kwargs = Tensor.mean, (pool["input"], (2, 3), True), {}
        question = func.__self__.__name__ if name == "__get__" else name
        run = _normed if func is F.batch_norm else func
        out = self._at_both(run, args, kwargs, question in ASKED_OF_TENSORS)
        if "dropout" in name and not (given := _dropout(*args, **kwargs))["train"]:
            return given["input"]  # in inference mode the result is another tensor
        self._observer.asked |= ASKED_OF_TENSORS.get(question, set())
        if name != "__setitem__" and not _has_tensors(out):
            if question not in ASKED_OF_TENSORS:
                self._observer.note(f"its forward depends on {question} of a tensor")
            return out

        def traced(value: Any) -> Any:
            if isinstance(value, SYMBOLS):
                return str(value)  # sizes are read from the shapes
            node = self.node_of(value)
            return value if node is None else node

        inputs = map_aggregate(tuple(args), traced), map_aggregate(dict(kwargs), traced)
        # x[0] is Tensor.__getitem__ here and operator.getitem in other graphs.
        target = getattr(operator, name, func) if name.startswith("__") else func
        self._set(out, self.graph.call_function(target, *inputs))
        if pools and self.recording is not None:
            self.recording.pools.append(self.node_of(out))
        return out

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
            raise Untraceable(f"fails at other sizes of its input: {_first_line(error)}") from error

    def _pools_window(
        self, input: Tensor, kernel_size: Any, padding: Any = 0, divisor_override: Any = None,
        **others: Any,
    ) -> bool:  # fmt: skip
        """Whether an average over a window of a number of pixels is one over this map."""
        window = kernel_size
        sizes: Any = (window, window) if isinstance(window, int) else tuple(window)
        if self.recording is None or not all(type(size) is int for size in sizes):
            return False
        map_size: Any = tuple(input.shape[2:])
        self.recording.windows.append((sizes, map_size))
        # At the first size it is a part of most maps.
        fits = self.recording.size != _SIZE and sizes == map_size
        return fits and padding in (0, (0, 0)) and divisor_override is None

    def _is_whole(self, input: Tensor, kernel_size: Any, **others: Any) -> bool:
        """Whether a window is a map's own size."""
        sizes = kernel_size if isinstance(kernel_size, tuple | list) else (kernel_size,)
        is_open = any(isinstance(size, torch.SymInt) for size in sizes)
        extents = self._shape(input)[2:]
        same = len(sizes) == len(extents) and all(map(same_number, sizes, extents))
        return is_open and same and others.keys() <= {"stride"}


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
