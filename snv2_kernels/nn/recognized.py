"""The drop-in for a module that was recognised by what it computes."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from snv2_kernels.graph.conditions import USUAL, Conditions, conditions_at
from snv2_kernels.graph.constant import constant_to_dynamo
from snv2_kernels.graph.guards import erase_unread_after, last_node
from snv2_kernels.graph.names import Names
from snv2_kernels.graph.recipe import Recipe
from snv2_kernels.graph.returned import ONE_MAP, Returned
from snv2_kernels.nn.methods import why_replaced
from snv2_kernels.nn.network import PlannedModule
from snv2_kernels.nn.structure import Incomparable, structure
from snv2_kernels.packing import Builder
from snv2_kernels.packing.common import map_shape
from snv2_kernels.packing.units import Unsupported

__all__ = ["NotRecognized", "Recognition", "Recognized", "recognized_class"]


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
    asked: frozenset[str]  # words of snv2_kernels.graph.conditions
    alike: dict[tuple[Any, ...], bool]  # by conditions: whether the forward is the same in them
    outside: Names  # that the forward looks up
    structure: str  # of the module that this is true of

    def state(self, module: nn.Module) -> list[Tensor]:
        return [attrgetter(name)(module) for name in self.names]


class NotRecognized(Exception):
    """The message is the reason in a few words."""

    def __init__(
        self,
        reason: str,
        channels: dict[str, int] | None = None,
        no_unit: bool = False,
        outside: Names | None = None,
    ) -> None:
        super().__init__(reason)
        self.channels = channels  # what is known of the inputs of submodules
        self.no_unit = no_unit  # nor in any of these submodules
        self.outside = outside  # names that the forward looks up, where it was recorded


# Recognitions of modules that have changed, or the NotRecognized.
_later: Any = weakref.WeakKeyDictionary()


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

    def _exported(self, x: Tensor) -> Any:
        if self._differs(x) or "compiler" in _fact(self, "asked"):
            raise Unsupported("plain")
        return super()._exported(x)

    def _differs(self, x: Tensor) -> bool:
        """Whether the forward does something else with this input than was recognised: it may take
        several numbers of channels, average over a window of one size, ask about what holds during
        a call, and autocast leave some results in float32."""
        known = self._known()
        if known is None or x.dim() != 4:
            return False
        autocast = known.plain_in_autocast and torch._C._is_any_autocast_enabled()
        shape = x.shape[1] != known.in_channels or not self._fits(*x.shape[2:])
        inference = "inference" in known.asked and x.is_inference()
        conditions = known.asked and not _is_alike(self, *conditions_at(x))
        return bool(autocast or shape or inference or conditions)

    def _fits(self, height: int, width: int) -> bool:
        last_map = _fact(self, "last_map").split()
        if not last_map:
            return True
        sizes = isinstance(height, int) and isinstance(width, int)  # in an export they may be open
        last_height, last_width, halvings = map(int, last_map)
        made = map_shape(1, 1, halvings, height, width)[2:]
        return sizes and made == (last_height, last_width)

    def _why_not_at(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> str | None:
        known = self._current()
        if not known.asked:
            return None
        with torch.no_grad():
            _, _, *given = conditions_at(torch.empty(shape, dtype=dtype, device="meta"))
        converted = dtype != known.state(self)[known.weights[0]].dtype
        if "dtype" in known.asked and converted:
            return f"its forward asks for the dtype, so convert the model to {dtype} first"
        alike = _is_alike(self, dtype, device.type, *given)
        return None if alike else "its forward does something else with such an input"

    def _known(self) -> Recognition | None:
        """The recognition of the module as it was when it was last looked at."""
        later = _later.get(self)
        return later if isinstance(later, Recognition) else self._recognition

    def _outside(self) -> list[Names]:
        later = _later.get(self) or self._recognition
        return [] if later is None or later.outside is None else [later.outside]

    def _current(self) -> Recognition:
        """The recognition of the module as it is now."""
        try:
            now = structure(self)
        except Incomparable as error:
            raise Unsupported(str(error)) from None
        for known in (self._recognition, _later.get(self)):
            if not isinstance(known, Recognition) or known.structure != now:
                continue
            if known.outside.changed() is None:
                if known is self._recognition:
                    _later.pop(self, None)
                return known
        try:
            _later[self] = recognition = _recognized(self)
        except NotRecognized as error:
            _later[self] = error.with_traceback(None)
            raise Unsupported(str(error)) from None
        return recognition

    def _in_channels(self) -> int:
        return self._current().in_channels

    def _splits_input(self) -> bool:
        return _fact(self, "splits_input") == "True"

    def _is_run(self) -> bool:
        known = self._recognition
        if known is None or known.plain_in_autocast or known.asked:
            return False
        return Recipe.read(known.recipe).is_run

    def _check_methods(self) -> None:
        """Raise for replaced methods that its structure, with what was recorded, does not show."""
        for name, child in self.named_modules():
            if "forward" in vars(child):
                raise Unsupported(f"{name or 'the module'} has a forward of its own")
            is_torchs = type(child).__module__.startswith("torch.")
            if is_torchs and (reason := why_replaced(child, inside=False)) is not None:
                raise Unsupported(reason)

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
        dtypes = self._graph_dtypes(x, weights, state, int(_fact(self, "in_channels")))
        plain_in_autocast = _fact(self, "plain_in_autocast") == "True"
        if (plain_in_autocast and dtypes[1] is not None) or not self._fits(*x.shape[2:]):
            raise Unsupported("plain")
        asked = _fact(self, "asked")
        if asked and ("compiler" in asked or "inference" in asked):
            raise Unsupported("plain")
        if asked and not _is_alike(self, *conditions_at(x)):
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
        if _reduces_itself(self._original):
            return self._original.__reduce_ex__(self, protocol)
        return _without_state, (self._original,), self.__getstate__()


def _recognized(module: Recognized, conditions: Conditions = USUAL) -> Recognition:
    from snv2_kernels.recognition import recognize_module

    hint = None if module._recognition is None else module._recognition.in_channels
    return recognize_module(module, hint, conditions == USUAL, conditions)[0]


@constant_to_dynamo  # the arguments are guarded, and by the forward what it asks of the module
def _is_alike(module: Recognized, *given: Any) -> bool:
    """Whether a forward does the same under other conditions than it was recorded in."""
    known, conditions = module._known(), Conditions(*given)
    assert known is not None
    told = conditions.about(known.asked, module)
    if told not in known.alike:
        try:
            found = _recognized(module, conditions)
        except NotRecognized:
            known.alike[told] = False
        else:
            facts = attrgetter("recipe", "names", "returned", "last_map")
            # Another question there may have another answer in the next call.
            known.alike[told] = facts(found) == facts(known) and found.asked <= known.asked
    return known.alike[told]


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
        "asked": sorted(known.asked) or [""],
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


def _reduces_itself(original: type[nn.Module]) -> bool:
    """Whether a class has its own way to be copied and pickled."""
    plain = original.__reduce_ex__ is object.__reduce_ex__
    return not plain or original.__reduce__ is not object.__reduce__


def _without_state(original: type[nn.Module]) -> nn.Module:
    return object.__new__(recognized_class(original))


def recognized_class(
    original: type[nn.Module], attributes: tuple[str, ...] = ()
) -> type[Recognized]:
    """The class of the drop-in for modules of a class.

    Raises:
        NotRecognized: if the class, or an instance's attribute, has a name that the drop-in needs.
    """
    if issubclass(original, Recognized):
        return original
    for name in _reserved():
        if name in attributes or hasattr(original, name):
            raise NotRecognized(f"its attribute {name!r} has another meaning in a drop-in")
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
        raise NotRecognized(f"its class cannot be derived from: {error}") from None
    made.__qualname__ = original.__qualname__
    return made
