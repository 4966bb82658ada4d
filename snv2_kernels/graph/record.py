"""Records what a module computes as a graph that :mod:`~snv2_kernels.graph.recognize` reads.

The forward runs once, on tensors without values whose batch, height and width are open, in a mode
that sees each call of a torch function. Sizes are therefore ordinary numbers to the module's code,
which may compute with them, assert and branch on channels.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from snv2_kernels.graph.nodes import writes
from snv2_kernels.graph.returned import ONE_MAP, Returned
from snv2_kernels.nn.clone import clone_tree

__all__ = ["Recording", "Untraceable", "inner_state", "plain_copy", "record"]

_SIZE = (2, 9, 7)  # batch, height, width: all different, none of them one
_STRIDES = (32, 16, 8, 4)  # of a network, from its input to an average over a window
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip


class Untraceable(Exception):
    """A forward that cannot be recorded; the message is the reason in a few words."""


@dataclass
class Recording:
    """A forward of one map."""

    graph: Graph
    source: Node
    outs: list[Node] = field(default_factory=list)  # what it returns, each once
    returned: Returned = ONE_MAP
    error: str | None = None
    channels: dict[str, int] = field(default_factory=dict)  # of the inputs of submodules
    size: tuple[int, int, int] = _SIZE  # batch, height and width that it was recorded with
    # Averages over a window of a number of pixels, with the map's size, and those that were taken
    # for means of a map: so they are for maps of the window's size alone.
    windows: list[tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=list)
    pools: list[Node] = field(default_factory=list)


def record(module: nn.Module, in_channels: int) -> Recording:
    """The forward of ``module`` in eval mode on a map of ``in_channels``, in float32.

    A parameter or buffer is a get_attr node with its name as target. The module is left as it is.
    Where the map is too small for an average over a window, one is tried that makes it the
    window's size.
    """
    recording = _record(module, in_channels, _SIZE)
    if recording.error is None or not recording.windows:
        return recording
    stride, before = _STRIDES[0], 0
    while stride != before:
        window, _ = recording.windows[-1]
        height, width = (stride * (extent - 1) + 1 for extent in window)
        larger = _record(module, in_channels, (_SIZE[0], height, width + (width == height)))
        if larger.error is None:
            recording = larger
        if larger.pools or not larger.windows:
            break
        before, (_, (seen, _)) = stride, larger.windows[-1]
        stride = next((s for s in _STRIDES if s < before and -(-height // s) == seen), before)
    return recording


def _record(module: nn.Module, in_channels: int, size: tuple[int, int, int]) -> Recording:
    shapes = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    n, h, w = size
    real = torch.empty(n, in_channels, h, w, device="meta")
    open_sizes: Any = StatelessSymbolicContext(
        [DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.DYNAMIC]
    )
    from torch._dynamo.source import ConstantSource  # it brings Dynamo, and with it Triton

    sizes = mode.from_tensor(real, source=ConstantSource("x"), symbolic_context=open_sizes).shape
    with mode:
        x = torch.empty(sizes, device="cpu")
        copied = plain_copy(module)
    recorder = _Recorder(shapes)
    recorder.own(copied)
    recording = Recording(recorder.graph, recorder.input(x), size=size)
    recorder.recording = recording
    for name, child in copied.named_modules():
        child.register_forward_pre_hook(_noting(recording.channels, name))
    before = inner_state(copied)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), _quiet(), mode, recorder:
            out = copied(x)
        _check_unchanged(before, inner_state(copied))
        recorder.check_sizes()
        returned = Returned.of(out)
        if returned is None:
            raise Untraceable(f"returns {type(out).__name__}, not maps")
        recording.returned, maps = returned
        recording.outs = [recorder.node_of(t) for t in maps]
        _erase_unread(recording)
    except Untraceable as error:
        recording.error = str(error)
    except Exception as error:  # whatever a module's code may raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        recording.error = f"cannot be traced: {first}"
    return recording


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
    """What was only asked for its size would pass for a reader of a map."""
    for node in reversed(recording.graph.nodes):
        kept = node in (recording.source, *recording.outs) or node.users or writes(node)
        if not kept:
            recording.graph.erase_node(node)


def plain_copy(module: nn.Module, tensor: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """A copy in eval mode without hooks, on other tensors.

    Args:
        module: the root, left as it is.
        tensor: makes what takes a tensor's place; by default one without values, on the CPU,
            float32 if it is of any floating dtype.
    """
    copied = clone_tree(module)
    made: dict[int, Tensor] = {}
    for child in copied.modules():
        child.training = False
        for hooks in _HOOKS:
            getattr(child, hooks).clear()
        for registry in (child._parameters, child._buffers):
            for name, t in registry.items():
                if t is not None:
                    if id(t) not in made:
                        made[id(t)] = (tensor or _empty)(t)
                    registry[name] = made[id(t)]  # type: ignore[assignment]
    return copied


def _empty(t: Tensor) -> Tensor:
    dtype = torch.float32 if t.is_floating_point() else t.dtype
    return torch.empty(t.shape, dtype=dtype, device="cpu")


def inner_state(module: nn.Module) -> dict[str, Any]:
    """All attributes, tensors and submodules of a tree, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, child in module.named_modules()
        for registry in (vars(child), child._parameters, child._buffers)
        for name, value in registry.items()
        if name not in nn.Module().__dict__
    }


def _check_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, value in after.items():
        if name not in before or before[name] is not value:
            raise Untraceable(f"its forward sets {name!r}")


def _noting(channels: dict[str, int], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if len(inputs) == 1 and isinstance(inputs[0], Tensor) and inputs[0].dim() == 4:
            channels[name] = int(inputs[0].shape[1])

    return hook


class _Recorder(TorchFunctionMode):
    def __init__(self, shapes: ShapeEnv) -> None:
        super().__init__()
        self.graph = Graph()
        self.recording: Recording | None = None
        self._shapes = shapes
        self._guards = 0  # that torch itself has set
        self._attributes: dict[int, str] = {}
        self._nodes: dict[int, Node | tuple[Node, int]] = {}
        self._alive: list[Any] = []  # an id is a tensor's for as long as that lives

    def own(self, module: nn.Module) -> None:
        named = (*module.named_parameters(), *module.named_buffers())
        self._attributes = {id(t): name for name, t in named}
        self._alive.append(named)

    def input(self, x: Tensor) -> Node:
        node = self.graph.placeholder("x")
        self._set(x, node)
        return node

    def check_sizes(self) -> None:
        if len(self._shapes.guards) > self._guards:
            raise Untraceable("its control flow depends on the size of its input")

    def _set(self, value: Any, node: Node) -> None:
        node.meta["example_value"] = value
        self._alive.append(value)
        parts = enumerate(value) if isinstance(value, tuple | list) else ()
        for i, part in parts:
            if isinstance(part, Tensor):
                self._nodes[id(part)] = node, i
        if isinstance(value, Tensor):
            self._nodes[id(value)] = node

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
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        pools = name == "avg_pool2d" and self._pools_window(*args, **kwargs)
        if pools or (name == "avg_pool2d" and _is_whole(*args, **kwargs)):
            # Its own signature takes numbers, and would fix the size of the map.
            func, args, kwargs = Tensor.mean, (args[0], (2, 3), True), {}
        guards = len(self._shapes.guards)
        out = func(*args, **kwargs)
        self._guards += len(self._shapes.guards) - guards
        if "dropout" in name and not _drops(*args, **kwargs):
            return args[0]  # in inference mode the result is another tensor
        if name != "__setitem__" and not _has_tensors(out):
            return out

        def traced(value: Any) -> Any:
            if isinstance(value, torch.SymInt):
                return str(value)  # sizes are read from the examples
            node = self.node_of(value)
            return value if node is None else node

        inputs = map_aggregate(tuple(args), traced), map_aggregate(dict(kwargs), traced)
        # x[0] is Tensor.__getitem__ here and operator.getitem in other graphs.
        target = getattr(operator, name, func) if name.startswith("__") else func
        self._set(out, self.graph.call_function(target, *inputs))
        if pools and self.recording is not None:
            self.recording.pools.append(self.node_of(out))
        return out

    def _pools_window(
        self, x: Any, window: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
        count_include_pad: bool = True, divisor_override: Any = None,
    ) -> bool:  # fmt: skip
        """Whether an average over a window of a number of pixels is one over this map."""
        sizes: Any = (window, window) if isinstance(window, int) else tuple(window)
        if self.recording is None or not all(type(size) is int for size in sizes):
            return False
        map_size: Any = tuple(_hint(extent) for extent in x.shape[2:])
        self.recording.windows.append((sizes, map_size))
        # At the first size it is a part of most maps.
        fits = self.recording.size != _SIZE and sizes == map_size
        return fits and padding in (0, (0, 0)) and divisor_override is None


def _drops(x: Any, p: Any = 0.5, training: bool = True, *args: Any, **kwargs: Any) -> bool:
    return bool(kwargs.get("train", training))


def _hint(extent: Any) -> int:
    return extent if isinstance(extent, int) else int(extent.node.hint)


def _is_whole(x: Any, window: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a window is a map's own size."""
    sizes = tuple(window) if isinstance(window, tuple | list) else (window,)
    is_open = any(isinstance(size, torch.SymInt) for size in sizes)
    return is_open and sizes == tuple(x.shape[2:]) and not args and not kwargs


def _has_tensors(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(isinstance(part, Tensor) for part in value)
    return isinstance(value, Tensor)
