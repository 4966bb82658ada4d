"""Modules that compute a run of units, whatever their class, and the drop-in in their place."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from snv2_kernels.graph.constant import constant_to_dynamo
from snv2_kernels.graph.guards import erase_unread_after, last_node
from snv2_kernels.graph.nodes import example, writes
from snv2_kernels.graph.reasons import why_no_unit
from snv2_kernels.graph.recipe import Recipe, RecipeBuilder
from snv2_kernels.graph.recognize import Run, recognize
from snv2_kernels.graph.record import Recording, record
from snv2_kernels.graph.returned import ONE_MAP, Returned
from snv2_kernels.nn.network import PlannedModule
from snv2_kernels.packing import Builder
from snv2_kernels.packing.common import map_shape
from snv2_kernels.packing.units import Unsupported
from snv2_kernels.verification import why_wrong

__all__ = [
    "Recognition",
    "Recognized",
    "find",
    "holds_unit",
    "is_depthwise",
    "recognized_class",
    "structure",
]

_MOST_GUESSES = 10
_CONTAINERS = (nn.Module, nn.ModuleList, nn.ModuleDict)  # without a forward


@dataclass(frozen=True)
class Recognition:
    """What a module computes, and where its numbers are."""

    kind: str  # unit, stage, backbone (of several results) or network
    recipe: str
    names: tuple[str, ...]  # of the recipe's state among parameters and buffers
    weights: tuple[int, ...]  # places in it of the weights of convolutions and linear layers
    in_channels: int
    splits_input: bool
    plain_in_autocast: bool  # it leaves some results in float32
    returned: Returned
    checked_size: tuple[int, int, int]  # batch, height and width of the input that it is checked on
    last_map: tuple[int, int] | None  # the only size of the last map that it is true of
    structure: dict[str, Any]  # of the module that this is true of

    def state(self, module: nn.Module) -> list[Tensor]:
        return [attrgetter(name)(module) for name in self.names]


# Finding --------------------------------------------------------------------------------------


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def holds_unit(module: nn.Module, pointwise: int = 1) -> bool:
    """Whether a module has the convolutions of a unit, of which so many are pointwise."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    enough = sum(c.kernel_size == (1, 1) for c in convs) >= pointwise
    return enough and any(map(is_depthwise, convs))


def find(
    model: nn.Module,
    is_known: Callable[[nn.Module], bool],
    is_unit: Callable[[nn.Module], bool],
    verify: bool,
    reasons_of_all: bool,
) -> tuple[dict[int, Recognition], dict[int, str]]:
    """Modules of ``model`` that compute runs of units, outermost first, by id.

    Args:
        model: left as it is.
        is_known: whether a module needs no recognition.
        is_unit: whether a module that needs none is a unit, which holds no others.
        verify: see :func:`snv2_kernels.fuse`.
        reasons_of_all: also of modules inside one that computes no unit anywhere.

    Returns:
        What was recognised, and why others that hold the convolutions of a unit were not.
    """
    found: dict[int, Recognition] = {}
    reasons: dict[int, str] = {}

    def visit(module: nn.Module, channels: dict[str, int], name: str) -> None:
        if id(module) in found or id(module) in reasons:
            return
        if is_unit(module) or not holds_unit(module):
            return
        if not is_known(module) and type(module) not in _CONTAINERS:
            try:
                recognition, channels = _recognize(module, channels.get(name), verify)
                name = ""
            except _NotRecognized as error:
                reasons[id(module)] = str(error)
                if error.channels is not None:
                    name, channels = "", error.channels
                    if error.no_unit and not reasons_of_all:
                        for inner in channels:
                            reasons.setdefault(id(module.get_submodule(inner)), str(error))
            else:
                found[id(module)] = recognition
                if recognition.kind == "unit":
                    return
        for child_name, child in module.named_children():
            visit(child, channels, f"{name}.{child_name}" if name else child_name)

    visit(model, {}, "")
    return found, reasons


class _NotRecognized(Exception):
    """The message is the reason in a few words."""

    def __init__(
        self, reason: str, channels: dict[str, int] | None = None, no_unit: bool = False
    ) -> None:
        super().__init__(reason)
        self.channels = channels  # what is known of the inputs of submodules
        self.no_unit = no_unit  # nor in any of these submodules


def _recognize(
    module: nn.Module, in_channels: int | None = None, verify: bool = False
) -> tuple[Recognition, dict[str, int]]:
    """What a module computes, and the channels of the inputs of its submodules.

    Raises:
        _NotRecognized: if that is no run of units.
    """
    if isinstance(module, torch.fx.GraphModule | torch.jit.ScriptModule):
        raise _NotRecognized(f"a {type(module).__mro__[1].__name__}")
    for name, child in module.named_modules():
        if "forward" in vars(child):
            raise _NotRecognized(f"{name or 'the module'} has a forward of its own")
    recognized_class(type(module), tuple(vars(module)) + tuple(module._modules))
    farthest: Recording | None = None
    for channels in [in_channels] if in_channels else _guesses(module):
        recording = record(module, channels)
        if recording.error is None:
            run = _whole_run(recording)
            if run is not None and _reads_all(run, channels):
                recognition = _describe(module, run, channels, recording)
                wrong = why_wrong(module, recognition) if verify else None
                if wrong is not None:
                    raise _NotRecognized(wrong)
                return recognition, recording.channels
        if farthest is None or len(farthest.graph.nodes) < len(recording.graph.nodes):
            farthest = recording
        if recording.error is None and run is None and not _is_hollow(recording):
            break
    if farthest is None:
        raise _NotRecognized("its input channels cannot be told")
    runs = [] if farthest.error else recognize(farthest.graph, farthest.outs)
    made = {out for run in runs for out in (run.out, *(unit.out for unit in run.units))}
    if runs and farthest.returned.container and not made.issuperset(farthest.outs):
        reason = "returns maps that no unit makes"
    else:
        reason = farthest.error or why_no_unit(farthest.graph)
    raise _NotRecognized(reason, farthest.channels, no_unit=not farthest.error and not runs)


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
        if parts and all(type(part) is int and part > 0 for part in parts):
            numbers.append(sum(parts))
    numbers += of_convs
    return [c for c in dict.fromkeys(numbers) if c > 1][:_MOST_GUESSES]


def _is_hollow(recording: Recording) -> bool:
    """Whether there are maps without channels, as halves are of too small an input."""
    values = map(example, recording.graph.nodes)
    return any(isinstance(t, Tensor) and t.dim() == 4 and t.shape[1] == 0 for t in values)


def _whole_run(recording: Recording) -> Run | None:
    """The run that is all that was recorded, with the maps on the way that are returned."""
    outs = recording.outs
    for run in recognize(recording.graph, frozenset(outs)):
        made = {run.out, *(unit.out for unit in run.units)}
        if run.source is recording.source and run.out in outs and made.issuperset(outs):
            run.taps = frozenset(outs) - {run.out}
            nodes = run.nodes
            pools = recording.pools
            means = [] if run.head is None else run.head.nodes
            if len(pools) > 1 or not all(pool in means for pool in pools):
                continue
            if not any(writes(node) and node not in nodes for node in recording.graph.nodes):
                return run
    return None


def _reads_all(run: Run, channels: int) -> bool:
    """Whether each input channel has its place: only then was the right number guessed."""
    unit = run.units[0].told
    read = {*unit.main, *unit.passthrough}
    return run.stem is not None or unit.projection is not None or len(read) == channels


def _describe(module: nn.Module, run: Run, channels: int, recording: Recording) -> Recognition:
    builder: Any = RecipeBuilder()  # of nodes in the place of tensors
    run.tell(builder)
    names = tuple(node.target for node in builder.state if node.op == "get_attr")
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if len(names) != len(builder.state) or not own.issuperset(names):
        raise _NotRecognized("weights that are not its parameters")
    returned, outs = recording.returned, recording.outs
    order = sorted(outs)  # nodes compare by their places in the graph
    projects = [unit.told.projection is not None for unit in run.units]
    splits = run.stem is None and not projects[0]
    adds = run.stem is None and run.units[0].told.has_shortcut
    return Recognition(
        kind=_kind(run, returned),
        recipe=builder.text,
        names=names,
        weights=tuple(builder.state.index(weight) for weight in builder.weights),
        in_channels=channels,
        splits_input=splits,
        # A split or a sum passes on the input's dtype, up to a unit that projects.
        plain_in_autocast=((splits or adds) and any(projects))
        or any(layer.norm.is_spelled for layer in run.layers),
        returned=replace(
            returned, places=tuple(order.index(outs[place]) for place in returned.places)
        ),
        checked_size=recording.size,
        last_map=recording.windows[-1][0] if recording.pools else None,
        structure=structure(module),
    )


def _kind(run: Run, returned: Returned) -> str:
    if run.head is not None:
        return "network"
    if returned.container is not None:
        return "backbone"
    joins = sum(unit.told.joins for unit in run.units)
    return "unit" if joins == 1 and run.stem is None else "stage"


# The drop-in ----------------------------------------------------------------------------------

_OWN = ("_packed_state", "_backend", "_shares_parameters", "_recognition", "training")


def structure(module: nn.Module) -> dict[str, Any]:
    """All that a forward may depend on but the numbers. Equal ones compute the same."""
    return {
        name: (
            child._original if isinstance(child, Recognized) else type(child),
            dict(_attributes(child)),
        )
        for name, child in module.named_modules(remove_duplicate=False)
    }


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name not in _OWN and name not in _base_attributes():
            simple = value is None or callable(value) or isinstance(value, str | int | float)
            yield name, value if simple else _frozen(value)
    for registry in (module._parameters, module._buffers):
        for name, t in registry.items():
            yield name, None if t is None else tuple(t.shape)


def _frozen(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_frozen(part) for part in value]
    return value if isinstance(value, str | int | float | None) else type(value)


@functools.cache
def _base_attributes() -> frozenset[str]:
    return frozenset(vars(nn.Module()))


_later: Any = weakref.WeakKeyDictionary()  # recognitions of modules that have changed


class Recognized(PlannedModule):
    """A drop-in for a module that was recognised by what it computes.

    Its class derives from the module's own too, and is made by :func:`recognized_class`.
    """

    _original: ClassVar[type[nn.Module]]
    _recognition: Recognition | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            return super().forward(args[0])
        return self._original.forward(self, *args, **kwargs)

    def _plain(self, x: Tensor) -> Any:
        return self._original.forward(self, x)

    @property
    def _returned(self) -> Returned:
        known = self._known()
        return ONE_MAP if known is None else known.returned

    def _eager(self, x: Tensor) -> Any:
        return self._plain(x) if self._differs(x) else super()._eager(x)

    def _exported(self, x: Tensor) -> Any:
        if self._differs(x):
            raise Unsupported("plain")
        return super()._exported(x)

    def _differs(self, x: Tensor) -> bool:
        """Whether the forward does something else with this input than was recognised: it may take
        several numbers of channels, average over a window of one size, and autocast leave some
        results in float32."""
        known = self._known()
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if known is None or tracing or not isinstance(x, Tensor) or x.dim() != 4:
            return False
        autocast = known.plain_in_autocast and torch.is_autocast_enabled(x.device.type)
        return autocast or x.shape[1] != known.in_channels or not self._fits(*x.shape[2:])

    def _fits(self, height: int, width: int) -> bool:
        last_map = _fact(self, "last_map").split()
        if not last_map:
            return True
        sizes = isinstance(height, int) and isinstance(width, int)  # in an export they may be open
        last_height, last_width, halvings = map(int, last_map)
        made = map_shape(1, 1, halvings, height, width)[2:]
        return sizes and made == (last_height, last_width)

    def _known(self) -> Recognition | None:
        """Of the module as it was when it was last looked at."""
        return _later.get(self) or self._recognition

    def _current(self) -> Recognition:
        """Of the module as it is now."""
        now = structure(self)
        for known in (self._recognition, _later.get(self)):
            if known is not None and known.structure == now:
                if known is self._recognition:
                    _later.pop(self, None)
                return known
        try:
            hint = None if self._recognition is None else self._recognition.in_channels
            recognition, _ = _recognize(self, hint, verify=True)
        except _NotRecognized as error:
            raise Unsupported(str(error)) from None
        _later[self] = recognition
        return recognition

    def _in_channels(self) -> int:
        return self._current().in_channels

    def _splits_input(self) -> bool:
        return _fact(self, "splits_input") == "True"

    def _is_run(self) -> bool:
        return self._recognition is not None and Recipe.read(self._recognition.recipe).is_run

    def _add_to(self, builder: Builder) -> None:
        now = self._current()
        recipe = Recipe.read(now.recipe)
        if not recipe.is_run:
            raise Unsupported("a network cannot follow units")
        recipe.tell(builder, now.state(self), goes_on=True)

    def _tell(self, builder: Builder, taps: Collection[str] = ()) -> None:
        assert not taps
        now = self._current()
        Recipe.read(now.recipe).tell(builder, now.state(self))

    def _in_graph(self, x: Tensor) -> Any:
        recipe = _fact(self, "recipe")
        if not recipe:
            raise Unsupported("it was changed, and computes something else")
        state = []
        for name in _fact(self, "names").split():
            tensor: Any = self
            for part in name.split("."):
                tensor = getattr(tensor, part)
            state.append(tensor)
        weights = [state[int(place)] for place in _fact(self, "weights").split()]
        dtypes = self._graph_dtypes(x, weights, int(_fact(self, "in_channels")))
        plain_in_autocast = _fact(self, "plain_in_autocast") == "True"
        if (plain_in_autocast and dtypes[1] is not None) or not self._fits(*x.shape[2:]):
            raise Unsupported("plain")
        # The forward may read whatever it likes.
        before = last_node()
        plain = self._plain(x)
        erase_unread_after(before)
        arguments = x, state, recipe, self._backend, *dtypes
        if int(_fact(self, "results")) > 1:
            results = torch.ops.snv2.fused_results(*arguments)
        else:
            results = [torch.ops.snv2.fused(*arguments)]
        return _like(plain, [results[int(place)] for place in _fact(self, "places").split()])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _without_state, (self._original,), self.__getstate__()


@constant_to_dynamo  # which guards the module's identity, and by its forward what it consists of
def _fact(module: Recognized, name: str) -> str:
    """Something of its recognition, as a text: Dynamo takes no other for a constant."""
    try:
        known = module._current() if name == "recipe" else module._known()
    except Unsupported:
        known = None
    if known is None:
        return ""
    if name == "last_map" and known.last_map is None:
        return ""
    recipe = Recipe.read(known.recipe)
    values = {
        "names": known.names,
        "weights": known.weights,
        "results": [len(recipe.results)],
        "places": known.returned.places,
        "last_map": [*(known.last_map or ()), recipe.halvings],
    }
    return " ".join(map(str, values.get(name) or [getattr(known, name)]))


def _like(plain: Any, maps: list[Tensor]) -> Any:
    """Other maps in a container as the forward makes it."""
    if isinstance(plain, Tensor):
        return maps[0]
    if isinstance(plain, tuple):
        return tuple(maps)
    if isinstance(plain, list):
        return maps
    for key, value in zip(list(plain), maps, strict=True):
        plain[key] = value
    return plain


def _without_state(original: type[nn.Module]) -> nn.Module:
    return object.__new__(recognized_class(original))


def recognized_class(
    original: type[nn.Module], attributes: tuple[str, ...] = ()
) -> type[Recognized]:
    """The class of the drop-in for modules of a class.

    Raises:
        _NotRecognized: if the class, or an instance's attribute, has a name that the drop-in needs.
    """
    if issubclass(original, Recognized):
        return original
    for name in _reserved():
        if name in attributes or hasattr(original, name):
            raise _NotRecognized(f"its attribute {name!r} has another meaning in a drop-in")
    hashable: Any = original
    made: type[Recognized] = _derived(hashable)
    return made


@functools.cache
def _reserved() -> frozenset[str]:
    return frozenset(dir(Recognized)) - frozenset(dir(nn.Module))


@functools.cache
def _derived(original: Any) -> Any:
    names = {"_original": original, "__module__": original.__module__}
    try:
        made = type(original.__name__, (Recognized, original), names)
    except TypeError as error:  # a metaclass of its own, or a layout that does not fit
        raise _NotRecognized(f"its class cannot be derived from: {error}") from None
    made.__qualname__ = original.__qualname__
    return made
