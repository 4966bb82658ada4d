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
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_function_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.overrides import _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes

from snv2_kernels.graph.conditions import USUAL, Conditions
from snv2_kernels.graph.contents import Contents
from snv2_kernels.graph.fake import LightMode
from snv2_kernels.graph.names import Names
from snv2_kernels.graph.nodes import example, holds_numbers, positional, storages, writes
from snv2_kernels.graph.observer import Observer
from snv2_kernels.graph.plain import plain_copy
from snv2_kernels.graph.recorder import Recorder, Untraceable, first_line
from snv2_kernels.graph.returned import ONE_MAP, Returned

__all__ = ["DEFAULT_SIZE", "Call", "Recording", "Untraceable", "record", "without_modes"]

Size = tuple[int, int, int]
DEFAULT_SIZE = (2, 9, 7)  # batch, height, width: all different, none of them one
# To those of the second input: primes, so all remainders differ, and thresholds lie between.
_STEPS = (11, 2011, 3001)
_STRIDES = (32, 16, 8, 4)  # of a network, from its input to an average over a window


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
    size: Size = DEFAULT_SIZE  # batch, height and width that it was recorded with
    # Averages over a window of a number of pixels, with the map's size, and those that were taken
    # for means of a map: so they are for maps of the window's size alone.
    windows: list[tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=list)
    pools: list[Node] = field(default_factory=list)
    measured: set[Node] = field(default_factory=set)  # tensors whose sizes the forward knows
    asked: frozenset[str] = frozenset()  # what the forward may depend on, see conditions
    told: tuple[Any, ...] = ()  # the part of the conditions that it was recorded in
    names: Names = field(default_factory=Names)  # that it looks up outside the module


def record(
    module: nn.Module, in_channels: int, conditions: Conditions = USUAL, size: Size = DEFAULT_SIZE
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
        larger = subject.record(in_channels, (DEFAULT_SIZE[0], height, width + (width == height)))
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
        self._mode = LightMode()
        with torch.inference_mode(False):
            self._copy = plain_copy(module, functools.partial(_empty, conditions, self._mode))
        self._calls = _Calls(self._copy)
        self._numbers = {
            name: t.detach().cpu() for name, t in module.named_buffers() if holds_numbers(t)
        }
        self._contents = Contents()
        self._contents.add_module(self._copy)

    def record(self, in_channels: int, size: Size) -> Recording:
        conditions, mode = self._conditions, self._mode
        x, twin = (self._input(in_channels, size, steps) for steps in ((0, 0, 0), _STEPS))
        observer = Observer(self._contents)
        recorder = Recorder(
            observer, fits_window=size != DEFAULT_SIZE
        )  # there it is a part of most maps
        recorder.own(self._copy, self._numbers)
        recording = Recording(
            recorder.graph, recorder.input(x, twin), size=size, names=observer.names,
            windows=recorder.windows, pools=recorder.pools, measured=recorder.measured,
        )  # fmt: skip
        self._calls.note_in(recording, recorder)
        attributes, out = set(vars(x)), None
        try:
            with _in(conditions), _quiet(), mode, recorder, observer:
                out = self._copy(x)
        except Untraceable as error:
            recording.error = str(error)
        except Exception as error:  # whatever a module's code may raise
            recording.error = f"cannot be traced: {first_line(error)}"
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


def _end(recording: Recording, recorder: Recorder, conditions: Conditions, out: Any) -> None:
    """Note what a forward has returned; raise for what is no run of a fused module."""
    returned = Returned.of(out)
    if returned is None:
        raise Untraceable(f"returns {type(out).__name__}, not maps")
    recording.returned, maps = returned
    recording.outs = [recorder.node_of(t) for t in maps]
    _erase_unread(recording)
    _check_results(recording, conditions, maps)


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
    sharing: dict[int, list[Node]] = {}  # by memory: all whose results are or were a part of it
    for node in recording.graph.nodes:
        for memory in storages(node):
            sharing.setdefault(memory, []).append(node)
    for node in reversed(recording.graph.nodes):
        group = {node}
        if writes(node):
            target = storages(node.kwargs.get("out", (*positional(node)[0], None)[0]))
            group.update(
                each for memory in target for each in sharing.get(memory, ()) if not each._erased
            )
        read = any(user not in group for member in group for user in member.users)
        outer = writes(node) and any(member.op != "call_function" for member in group)
        if not read and not outer and kept.isdisjoint(group):
            for member in sorted(group, reverse=True):
                recording.graph.erase_node(member)


def _check_results(recording: Recording, conditions: Conditions, maps: list[Tensor]) -> None:
    """Raise for what a fused module does not do: compute or leave out gradients by itself."""
    for value in map(example, recording.graph.nodes):
        is_map = isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()
        if is_map and value.dtype != conditions.dtype:
            raise Untraceable(f"computes in {value.dtype} by itself")
    if conditions.grad and not all(t.requires_grad for t in maps):
        raise Untraceable("its result has no gradient")


def _empty(conditions: Conditions, mode: LightMode, t: Tensor) -> Tensor:
    """A tensor without values in the place of a parameter or buffer."""
    meta = torch.empty(t.shape, dtype=conditions.dtype_of(t), device="meta")
    # It takes a tenth of the time of torch.empty under the mode.
    out = FakeTensor(mode, meta, torch.device(conditions.device))
    return out.requires_grad_(t.requires_grad)


# Of whose calls nobody asks: they are no units, and of a map alone no tail of a network.
_SINGLE_LAYERS = (nn.Conv2d, nn.BatchNorm2d)


class _Calls:
    """Notes in a recording what the submodules of a module are called with."""

    def __init__(self, module: nn.Module) -> None:
        for name, child in module.named_modules():
            if type(child) in _SINGLE_LAYERS:
                continue
            begin, end = functools.partial(self._begin, name), functools.partial(self._end, name)
            child.register_forward_pre_hook(begin, with_kwargs=True)
            child.register_forward_hook(end)

    def note_in(self, recording: Recording, recorder: Recorder) -> None:
        self._recording, self._recorder = recording, recorder
        # What was given, and the last node before.
        self._open: dict[str, tuple[Node | None, Node]] = {}
        self._ended: dict[str, Call | None] = {}  # None of what is called more than once

    def end(self) -> None:
        """Let go of the recording, which through the module's hooks would hold itself."""
        self._recording.calls = [call for call in self._ended.values() if call is not None]
        del self._recording, self._recorder, self._open, self._ended

    def _begin(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        x = args[0] if len(args) == 1 else None
        channels = self._recorder.channels_of(x)
        if channels is not None:
            self._recording.channels[name] = channels
        given = None if kwargs else self._recorder.made_by(x)
        self._open[name] = given, next(iter(reversed(self._recording.graph.nodes)))

    def _end(self, name: str, _: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if name in self._ended:
            self._ended[name] = None
            return
        given, before = self._open[name]
        nodes = reversed(self._recording.graph.nodes)
        added = tuple(itertools.takewhile(lambda node: node is not before, nodes))
        self._ended[name] = Call(name, given, added, self._recorder.made_by(out))
