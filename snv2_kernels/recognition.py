"""Modules that compute a run of units, whatever their class, and the drop-in in their place."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from snv2_kernels.description import describe, partitioned, reads_all, run_and_tail, whole_run
from snv2_kernels.graph.conditions import USUAL, Conditions
from snv2_kernels.graph.names import Names
from snv2_kernels.graph.nodes import example, function_name
from snv2_kernels.graph.reasons import described, why_no_unit
from snv2_kernels.graph.recognize import JOINS, Run, Units, runs_of
from snv2_kernels.graph.record import Recording, record, without_modes
from snv2_kernels.nn.clone import CACHES, original_class
from snv2_kernels.nn.derived import recognized_class
from snv2_kernels.nn.fused import FusedModule
from snv2_kernels.nn.known import KnownModule
from snv2_kernels.nn.methods import why_class_replaced
from snv2_kernels.nn.recognition import NotRecognized, Recognition
from snv2_kernels.nn.recognized import Recognized
from snv2_kernels.nn.series import Mixed
from snv2_kernels.nn.structure import Incomparable, structure
from snv2_kernels.threads import one_thread
from snv2_kernels.verification import why_wrong

__all__ = ["CONTAINERS", "holds_unit", "is_depthwise", "recognize_module", "replace_recognized"]

_MOST_GUESSES = 10
_CALLS = ("__call__", "_call_impl", "_wrapped_call_impl")
CONTAINERS = (nn.Module, nn.ModuleList, nn.ModuleDict)  # without a forward


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def holds_unit(module: nn.Module, pointwise: int = 1) -> bool:
    """Whether a module has the convolutions of a unit, of which so many are pointwise."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    enough = sum(c.kernel_size == (1, 1) for c in convs) >= pointwise
    return enough and any(map(is_depthwise, convs))


def replace_recognized(
    model: nn.Module, verify: bool, explained: bool
) -> tuple[list[Recognized], dict[nn.Module, str]]:
    """Makes drop-ins of the modules that compute runs of units, outermost first.

    Args:
        model: a copy, in which drop-ins stand for modules of known classes. They need no
            recognition where they consist of what their class is made of, nor, before they are
            first asked, inside a module that was recognised.
        verify: see :func:`snv2_kernels.fuse`.
        explained: whether all modules are looked at, also inside one that computes no unit anywhere
            and inside one that was recognised; else these become drop-ins unseen.

    Returns:
        What was recognised, and why others that hold the convolutions of a unit were not.
    """
    search = _Search(verify, explained)
    search.visit(model, _Outer({}), "")
    return search.found, search.reasons


@dataclass(frozen=True)
class _Outer:
    """What the recording of a module says of those in it."""

    channels: dict[str, int]  # of their inputs, as far as they are known
    recognized: bool = False
    # Of a module that was recognised, by names of those in it: whether there are units inside,
    # where that can be told from a call.
    units: dict[str, bool] = field(default_factory=dict)


class _Search:
    """One pass over a model; no closure, which would be a cycle that keeps modules alive."""

    def __init__(self, verify: bool, explained: bool) -> None:
        self.found: list[Recognized] = []
        self.reasons: dict[nn.Module, str] = {}
        self._seen: set[nn.Module] = set()
        self._verify, self._explained = verify, explained

    def visit(self, module: nn.Module, outer: _Outer, name: str) -> None:
        """Look at a module of the model, with its name in an outer one that was recorded, and at
        those in it."""
        if module in self._seen or module in self.reasons or not holds_unit(module):
            return
        self._seen.add(module)
        if isinstance(module, KnownModule) and (outer.recognized or module.fits_class()):
            return
        if isinstance(module, KnownModule) or not (
            isinstance(module, FusedModule | Mixed) or type(module) in CONTAINERS
        ):
            if not self._explained and name in outer.units:
                if not outer.units[name]:
                    return
                with contextlib.suppress(NotRecognized):
                    _drop_in(module)._given_channels = outer.channels[name]
            elif (found := self._recognized(module, outer, name)) is not None:
                outer, name = found, ""
                if isinstance(module, Recognized) and module.kind() == "unit":
                    return
        for child_name, child in module.named_children():
            self.visit(child, outer, f"{name}.{child_name}" if name else child_name)

    def _recognized(self, module: nn.Module, outer: _Outer, name: str) -> _Outer | None:
        """Make a module a drop-in; None where nothing is known of those in it."""
        try:
            recognition, inner = recognize_module(module, outer.channels.get(name), self._verify)
            drop_in = _drop_in(module)
        except NotRecognized as error:
            self.reasons[module] = str(error)
            if error.channels is None:
                return None
            if error.no_unit and not self._explained:
                within = dict(module.named_modules())
                for inner_name in error.channels:
                    self.reasons.setdefault(within[inner_name], str(error))
            return _Outer(error.channels, outer.recognized)
        drop_in._recognition = recognition
        self.found.append(drop_in)
        return inner


def _drop_in(module: nn.Module) -> Recognized:
    """The module, of the class of its drop-in."""
    try:
        module.__class__ = recognized_class(type(module))
    except TypeError as error:  # its memory is laid out in another way
        raise NotRecognized(f"its class cannot be derived from: {error}") from None
    assert isinstance(module, Recognized)
    return module


def recognize_module(
    module: nn.Module,
    in_channels: int | None = None,
    verify: bool = False,
    conditions: Conditions = USUAL,
) -> tuple[Recognition, _Outer]:
    """Recognise what a module computes; also returns what is known of those in it.

    Args:
        module: left as it is.
        in_channels: of its input, if they are known.
        verify: see :func:`snv2_kernels.fuse`.
        conditions: under which its forward is looked at.

    Raises:
        NotRecognized: if it computes no run of units.
    """
    key = _key(module, in_channels, verify, conditions)
    found = _recent.get(key)
    if found is None:
        try:
            with one_thread(), without_modes():  # it may be asked for while a program is exported
                recognition, known = _look_at(module, in_channels, verify, conditions)
        except NotRecognized as error:
            # Not the error itself: it would keep the frames that it went through alive.
            found = (str(error), error.channels, error.no_unit, error.outside), error.outside
            _recent.put(key, found)
            raise
        found = (recognition, known), recognition.outside
        _recent.put(key, found)
    result, _ = found
    if not isinstance(result[0], Recognition):
        raise NotRecognized(*result)
    recognition, known = result
    return replace(recognition, alike=dict(recognition.alike)), known


class _Recent:
    """What the last looks at modules found, for other modules that are alike."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: OrderedDict[Any, tuple[tuple[Any, ...], Names | None]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any) -> tuple[tuple[Any, ...], Names | None] | None:
        with self._lock:
            found = self._found.get(key)
            if found is None:
                return None
            self._found.move_to_end(key)
        _, names = found
        return found if names is None or names.changed() is None else None

    def put(self, key: Any, found: tuple[tuple[Any, ...], Names | None]) -> None:
        _, names = found
        if key is None or (names is not None and names.hold_numbers()):
            return
        with self._lock:
            self._found[key] = found
            self._found.move_to_end(key)
            if len(self._found) > self._most:
                self._found.popitem(last=False)


_recent = _Recent(most=256)


def _key(
    module: nn.Module, in_channels: int | None, verify: bool, conditions: Conditions
) -> tuple[Any, ...] | None:
    """All that a look at a module depends on; None if that cannot be told, as of a forward that may
    read whatever it likes, or would keep classes alive that nothing else does."""
    classes = tuple(map(original_class, module.modules()))
    if not all(_is_of_library(cls) and not why_class_replaced(cls) for cls in set(classes)):
        return None
    tensors = [*module.parameters(), *module.buffers()]
    kinds = tuple((t.dtype, t.device.type, t.requires_grad) for t in tensors)
    is_drop_in = isinstance(module, Recognized)
    try:
        told = structure(module), classes, kinds, is_drop_in, torch.get_default_dtype()
        return *told, in_channels, verify, conditions
    except Incomparable:
        return None


def _is_of_library(cls: type) -> bool:
    """Whether a class belongs to a library whose modules read nothing that changes."""
    if cls.__module__.partition(".")[0] not in ("torch", "torchvision", "snv2_kernels"):
        return False
    value: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        value = getattr(value, name, None)
    return value is cls


def _check_recordable(module: nn.Module) -> None:
    """Raise for a module whose forward is not all that a call of it does, or no Python."""
    if isinstance(module, torch.fx.GraphModule):
        how = 'torch.compile(model, backend="snv2") fuses its units'
        raise NotRecognized(f"a graph module of torch.fx: {how}")
    if isinstance(module, torch.jit.ScriptModule):
        raise NotRecognized("TorchScript: fuse() takes the module that it was made from")
    own: Any = original_class(module)
    if any(getattr(own, name) is not getattr(nn.Module, name) for name in _CALLS):
        raise NotRecognized("its class has a __call__ of its own")
    for name, child in module.named_modules():
        if "forward" in vars(child):
            raise NotRecognized(f"{name or 'the module'} has a forward of its own")
    if not isinstance(module, Recognized):
        attributes = {*vars(module), *module._modules}.difference(CACHES)
        recognized_class(original_class(module), attributes)


def _look_at(
    module: nn.Module, in_channels: int | None, verify: bool, conditions: Conditions
) -> tuple[Recognition, _Outer]:
    _check_recordable(module)
    farthest: Recording | None = None
    runs: list[Run] = []
    all_units: Units | None = None  # of the farthest
    for channels in [in_channels] if in_channels else _guesses(module):
        recording = record(module, channels, conditions)
        units = None if recording.error else Units(recording.graph, frozenset(recording.outs))
        found = [] if units is None else runs_of(units, units.returned)
        run, tail = run_and_tail(recording, found, units)
        if run is not None and reads_all(run, channels):
            recognition = _verified(
                module, describe(module, run, channels, recording, tail), verify
            )
            return recognition, _Outer(recording.channels, True, _units_in_calls(recording, [run]))
        if units is not None and run is None:
            mixed = partitioned(module, recording, channels, units)
            if mixed is not None:
                return _verified(module, mixed, verify), _Outer(
                    recording.channels, True, _units_in_calls(recording, found)
                )
        if farthest is None or len(farthest.graph.nodes) < len(recording.graph.nodes):
            farthest, runs, all_units = recording, found, units
        if recording.error is None and run is None and not _is_hollow(recording):
            break
    if farthest is None:
        raise NotRecognized("its input channels cannot be told")
    no_unit = not farthest.error and not runs
    raise NotRecognized(
        _why_no_run(farthest, runs, all_units), farthest.channels, no_unit, farthest.names
    )


def _verified(module: nn.Module, recognition: Recognition, verify: bool) -> Recognition:
    wrong = why_wrong(module, recognition) if verify else None
    if wrong is not None:
        raise NotRecognized(wrong, outside=recognition.outside)
    return recognition


def _units_in_calls(recording: Recording, runs: Sequence[Run]) -> dict[str, bool]:
    """Whether the halves of a unit are joined in the calls of submodules that are called once, and
    where they are, with one map that gives one."""
    nodes = (node for run in runs for unit in run.units for node in unit.nodes)
    joins = {node for node in nodes if function_name(node) in JOINS}
    found = {}
    for call in recording.calls:
        has_units = not joins.isdisjoint(call.nodes)
        if not has_units or (call.given is not None and call.result is not None):
            found[call.name] = has_units
    return found


def _why_no_run(recording: Recording, runs: list[Run], units: Units | None) -> str:
    """Why a recording as a whole is no run of units."""
    if recording.error is not None:
        return recording.error
    if whole_run(recording, runs) is not None:
        return "reads a part of its input's channels"
    made = {out for run in runs for out in (run.out, *(unit.out for unit in run.units))}
    strange = [out for out in recording.outs if out not in made]
    if runs and recording.returned.container and strange:
        return f"returns maps that no unit makes: {described(strange[0])}"
    return why_no_unit(recording.graph, units)


def _guesses(module: nn.Module) -> list[int]:
    """Numbers of channels that the input may have. With the wrong one the first convolution
    raises."""
    of_convs = [
        c
        for m in module.modules() if isinstance(m, nn.Conv2d)
        for c in (m.in_channels, 2 * m.in_channels)
    ]  # fmt: skip
    numbers = of_convs[:2]
    for value in vars(module).values():
        parts = value if isinstance(value, tuple | list) else [value]
        if parts and all(type(part) is int and part > 0 for part in parts) and sum(parts) > 1:
            numbers.append(sum(parts))
    numbers += of_convs
    return list(dict.fromkeys(numbers))[:_MOST_GUESSES]


def _is_hollow(recording: Recording) -> bool:
    """Whether there are maps without channels, as halves are of too small an input."""
    values = map(example, recording.graph.nodes)
    return any(isinstance(t, Tensor) and t.dim() == 4 and t.shape[1] == 0 for t in values)
