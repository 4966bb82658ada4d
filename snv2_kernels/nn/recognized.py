"""The drop-in for a module that was recognised by what it computes."""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from snv2_kernels.graph.conditions import USUAL, Conditions, conditions_at
from snv2_kernels.graph.constant import constant_to_dynamo
from snv2_kernels.graph.guards import calls_so_far, erase_unread_after
from snv2_kernels.graph.names import Names
from snv2_kernels.graph.partition import OtherInput, Partition
from snv2_kernels.graph.recipe import Recipe
from snv2_kernels.graph.returned import ONE_MAP, Returned
from snv2_kernels.nn.clone import drop_in_of
from snv2_kernels.nn.fused import FusedModule
from snv2_kernels.nn.methods import why_replaced
from snv2_kernels.nn.partitioned import BoundPartition, check_regions
from snv2_kernels.nn.planned import PlannedModule
from snv2_kernels.nn.recognition import NotRecognized, Recognition, path_of
from snv2_kernels.nn.structure import Incomparable, structure
from snv2_kernels.packing import Builder
from snv2_kernels.packing.common import map_shape
from snv2_kernels.packing.units import Unsupported

__all__ = ["Recognized"]


@dataclass(frozen=True)
class _Refusal:
    """Why a module was not recognised."""

    reason: str
    outside: Names | None
    structure: str


class _Reached(BaseException):
    """A plain forward has made what a tail is called with; no module's code may catch it."""

    def __init__(self, result: Tensor) -> None:
        self.result = result


def _stop(tail: nn.Module, inputs: tuple[Tensor]) -> None:
    raise _Reached(inputs[0])


# What was found of modules that have changed: a Recognition, a _Refusal, or None where the class
# tells.
_later: Any = weakref.WeakKeyDictionary()


class Recognized(PlannedModule):
    """A drop-in for a module that was recognised by what it computes.

    Its class derives from the module's own too, and is made by :func:`recognized_class`. Inside a
    module that was recognised it has no recognition before it is first asked.
    """

    _original: ClassVar[type[nn.Module]]
    _recognition: Recognition | None = None
    _given_channels: int | None = None  # by the outer module that alone was recognised so far
    _may_partition: bool = True  # else what is only a partition runs plain, through those inside

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "_original" in vars(cls):
            cls.forward = _forward_of(cls._original)  # type: ignore[method-assign]

    def kind(self) -> str:
        """What it is, as :func:`snv2_kernels.explain` says it."""
        known = self._known()
        return type(self).__name__ if known is None else known.kind

    def _plain(self, x: Tensor) -> Any:
        return self._original.forward(self, x)

    @property
    def _returned(self) -> Returned:
        known = self._known()
        return ONE_MAP if known is None else known.returned

    def _tail(self) -> tuple[str, nn.Module | None]:
        """The name of the submodule that follows the kernels, and that module; empty and None where
        there is none."""
        known = self._known()
        return ("", None) if known is None else (known.tail, known.tail_of(self))

    def _finish(self, results: Any) -> Any:
        known = self._known()
        if known is None:
            return ONE_MAP.filled(results)
        out, tail = known.returned.filled(results), known.tail_of(self)
        return out if tail is None else tail(out)

    def _plain_results(self, x: Tensor) -> Any:
        try:
            return super()._plain_results(x)
        except _Reached as reached:
            return reached.result

    def _read_by_run(self, parameters: Sequence[nn.Parameter]) -> Sequence[nn.Parameter]:
        known = self._known()
        if known is None or not known.tail:
            return parameters
        read = {id(t) for t in known.state(self)}
        return [p for p in parameters if id(p) in read]

    def _twin(self) -> FusedModule:
        twin = super()._twin()
        assert isinstance(twin, Recognized)
        twin._remember(self._known())
        _, tail = twin._tail()
        if tail is not None:  # nor may it see twice what it is given
            tail.register_forward_pre_hook(_stop)
        return twin

    def _exported(self, x: Tensor) -> Any:
        partitioned = self._partition() is not None
        if partitioned or self._differs(x) or "compiler" in _fact(self, "asked"):
            raise Unsupported("plain")
        return super()._exported(x)

    def _eager(self, x: Any) -> Any:
        if not isinstance(x, Tensor | torch.fx.Proxy) and self._partition() is not None:
            return self._plain(x)  # which may take anything
        try:
            return super()._eager(x)
        except OtherInput:
            return self._plain(x)

    def _differs(self, x: Tensor) -> bool:
        """Whether the forward does something else with this input than was recognised: it may take
        several numbers of channels, average over a window of one size, ask about what holds during
        a call, and autocast leave some results in float32. Where there is a gradient to compute,
        the plain forward goes through the drop-ins inside, each with its own."""
        known = self._known()
        partition = None if known is None else known.partition
        if partition is not None and self._is_strange(x, partition):
            return True
        if known is None or x.dim() != 4:
            return False
        autocast = known.plain_in_autocast and torch._C._is_any_autocast_enabled()
        shape = x.shape[1] != known.in_channels or not self._fits(*x.shape[2:])
        inference = "inference" in known.asked and x.is_inference()
        asks = known.asked - {"inference", "numbers"}
        conditions = asks and not _is_alike(self, *conditions_at(x))
        return bool(autocast or shape or inference or conditions)

    def _is_settled(self) -> bool:
        known = self._known()
        if known is None:
            return True
        return not (known.partition or known.plain_in_autocast or known.asked - {"numbers"})

    def _returns_result(self) -> bool:
        return super()._returns_result() and self._tail()[1] is None

    def _is_strange(self, x: Tensor, partition: Partition) -> bool:
        """Whether a partition is not right for an input, or a gradient is wanted."""
        packed = self._packed_state or self.packed()  # a forward has just looked at it
        if x.dim() != 4 or x.dtype != packed.dtype:
            return True
        if any(map(operator.lt, x.shape[2:], partition.least)):
            return True
        if partition.in_order and not x.is_contiguous():
            return True
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or (packed.watch is not None and packed.watch.requires_grad())

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
        if known.tail:
            return f"{known.tail} follows the network, and is no part of its plan"
        if known.partition is not None and (dtype, device.type) != self._place():
            return f"{known.partition.why_not_whole()}, so convert the model first"
        if known.partition is not None and any(map(operator.lt, shape[2:], known.partition.least)):
            return f"of maps of at least {known.partition.least} its forward is known"
        if not known.asked:
            return None
        with torch.no_grad():
            _, _, *given = conditions_at(torch.empty(shape, dtype=dtype, device="meta"))
        converted = dtype != self._place()[0]
        if "dtype" in known.asked and converted:
            return f"its forward asks for the dtype, so convert the model to {dtype} first"
        alike = _is_alike(self, dtype, device.type, *given)
        return None if alike else "its forward does something else with such an input"

    def _place(self) -> tuple[torch.dtype | None, str]:
        packed = self.packed()
        return packed.dtype, "" if packed.device is None else packed.device.type

    def _known(self) -> Recognition | None:
        """The recognition of the module as it was when it was last looked at."""
        later = _later.get(self, self._recognition)
        if later is None and self.is_unseen():
            with contextlib.suppress(Unsupported):
                self._current()
            later = _later.get(self)
        return self._recognition if isinstance(later, _Refusal) else later

    def is_unseen(self) -> bool:
        """Whether nobody has asked yet what it computes."""
        return self._given_channels is not None and self not in _later

    def _outside(self) -> list[Names]:
        later = _later.get(self, self._recognition)
        return [] if later is None or later.outside is None else [later.outside]

    def _remember(self, found: Recognition | _Refusal | None) -> None:
        """Keep the result of a look at the module as it is now."""
        if found is self._recognition:
            _later.pop(self, None)
        else:
            _later[self] = found

    def _current(self) -> Recognition:
        """The recognition of the module as it is now."""
        self._check_methods()
        try:
            now = structure(self)
        except Incomparable as error:
            raise Unsupported(str(error)) from None
        for known in (self._recognition, _later.get(self)):
            if known is None or known.structure != now:
                continue
            if known.outside is None or known.outside.changed() is None:
                self._remember(known)
                if isinstance(known, _Refusal):
                    raise Unsupported(known.reason)
                return known
        try:
            recognition = _recognized(self)
        except NotRecognized as error:
            self._refuse(error)
            raise Unsupported(str(error)) from None
        self._remember(recognition)
        return recognition

    def _refuse(self, error: NotRecognized) -> None:
        """Remember why this module, and with it those inside, is not recognised."""
        within = dict(self.named_modules())
        inside = [within[name] for name in error.channels or ()] if error.no_unit else []
        for module in (self, *inside):
            if isinstance(module, Recognized):
                module._remember(_Refusal(str(error), error.outside, structure(module)))

    def _in_channels(self) -> int:
        return self._current().in_channels

    def _splits_input(self) -> bool:
        return _fact(self, "splits_input") == "True"

    def _partition(self) -> Partition | None:
        """Returns the partition of the module as it was when it was last looked at."""
        known = self._known()
        return None if known is None else known.partition

    def _check_supported(self) -> None:
        partition = self._partition()
        if partition is None:
            super()._check_supported()
        elif not self._may_partition:
            raise Unsupported("it was quantized in parts")
        else:
            check_regions(self, partition)

    def _pack(self, backend: str, dtype: torch.dtype, device: torch.device) -> Any:
        partition = self._partition()
        if partition is None:
            return super()._pack(backend, dtype, device)
        return BoundPartition(self, partition, backend, dtype, device)

    def _covers(self, weights: Any, x: Tensor) -> bool:
        return isinstance(weights, BoundPartition) or super()._covers(weights, x)

    def _run(self, weights: Any, x: Tensor, backend: str) -> Any:
        if isinstance(weights, BoundPartition):
            return weights(x)
        return super()._run(weights, x, backend)

    def _why_not_whole(self) -> str | None:
        partition = self._partition()
        return None if partition is None else partition.why_not_whole()

    def _beside(self) -> str:
        """Returns what PyTorch runs of it, in a few words; empty where it is one plan."""
        partition = self._partition()
        return "" if partition is None else partition.told()

    def _is_run(self) -> bool:
        known = self._known()
        return known is not None and _why_no_run(known) is None

    def _takes_images(self) -> bool:
        known = self._known()
        return known is not None and known.kind == "network" and Recipe.read(known.recipe).has_stem

    def _check_methods(self) -> None:
        """Raise for replaced methods that its structure, with what was recorded, does not show."""
        if type(self).forward is not drop_in_of(type(self)).forward:
            raise Unsupported("its class derives from a drop-in, and has a forward of its own")
        for name, child in self.named_modules():
            if "forward" in vars(child):
                raise Unsupported(f"{name or 'the module'} has a forward of its own")
            is_torchs = type(child).__module__.startswith("torch.")
            if is_torchs and (reason := why_replaced(child, inside=False)) is not None:
                raise Unsupported(reason)

    def _add_to(self, builder: Builder) -> None:
        now = self._current()
        if (reason := _why_no_run(now)) is not None:
            raise Unsupported(reason)
        Recipe.read(now.recipe).tell(builder, now.state(self), goes_on=True)

    def _tell(self, builder: Builder, taps: Collection[str] = ()) -> None:
        assert not taps
        now = self._current()
        if now.partition is not None:
            raise Unsupported(now.partition.why_not_whole())
        Recipe.read(now.recipe).tell(builder, now.state(self))

    def _in_graph(self, x: Tensor) -> Any:
        recipe = _fact(self, "recipe")
        if not recipe:
            raise Unsupported("it was changed, and computes something else")
        state: list[Tensor] = []
        owner: Any = None
        within = ""
        for path in _fact(self, "names").splitlines():  # those of a module follow each other
            modules, _, name = path.rpartition("\t")
            if owner is None or modules != within:
                owner, within = self, modules
                for part in modules.split("\t") if modules else ():
                    owner = owner._modules[part]
            state.append(getattr(owner, name))
        weights = [state[int(place)] for place in _fact(self, "weights").split()]
        dtypes = self._graph_dtypes(x, weights, state, int(_fact(self, "in_channels")))
        plain_in_autocast = _fact(self, "plain_in_autocast") == "True"
        nested = _fact(self, "is_nested") == "True"
        differs = (plain_in_autocast and dtypes[1] is not None) or not self._fits(*x.shape[2:])
        if differs or nested:
            raise Unsupported("plain")
        asked = _fact(self, "asked")
        # Dynamo has no guard on what is in a buffer.
        if asked and ("compiler" in asked or "inference" in asked or "numbers" in asked):
            raise Unsupported("plain")
        if asked and not _is_alike(self, *conditions_at(x)):
            raise Unsupported("plain")
        # The forward may read whatever it likes.
        before = calls_so_far()
        plain = self._plain(x)
        erase_unread_after(before)
        arguments = x, state, recipe, self._backend, *dtypes
        if int(_fact(self, "results")) > 1:
            results = torch.ops.snv2.fused_results(*arguments)
        else:
            results = [torch.ops.snv2.fused(*arguments)]
        out = _like(plain, [results[int(place)] for place in _fact(self, "places").split()])
        tail: Any = self
        for part in _fact(self, "tail").split("\t"):
            tail = tail._modules[part] if part else None
        return out if tail is None else tail(out)

    def __getstate__(self) -> Any:
        state = super().__getstate__()
        known = self._recognition
        if known is not None and known.partition is not None and isinstance(state, dict):
            # Functions of many kinds are in it; it is found again when it is asked for.
            del state["_recognition"]
            state["_given_channels"] = known.in_channels
        return state

    def __reduce_ex__(self, protocol: Any) -> Any:
        from snv2_kernels.nn.derived import reduces_itself, without_state

        if reduces_itself(self._original):
            return self._original.__reduce_ex__(self, protocol)
        base = vars(type(self)).get("_base")
        if base is None:  # its class can be imported
            return super().__reduce_ex__(protocol)
        return without_state, (self._original, base), self.__getstate__()


def _forward_of(original: type[nn.Module]) -> Any:
    """The forward of a drop-in, with the signature of the forward in whose place it stands."""

    def forward(self: Recognized, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            return FusedModule.forward(self, args[0])
        return self._original.forward(self, *args, **kwargs)

    forward.__wrapped__ = original.forward  # type: ignore[attr-defined]
    return forward


def _why_no_run(known: Recognition) -> str | None:
    """Why units may not follow what was recognised, in one plan."""
    if known.partition is not None:
        return "other layers are between its units"
    if not Recipe.read(known.recipe).is_run:
        return "a network cannot follow units"
    if known.plain_in_autocast or known.asked - {"numbers"}:
        return "it computes something else under other conditions"
    return None


def _recognized(module: Recognized, conditions: Conditions = USUAL) -> Recognition:
    from snv2_kernels.recognition import recognize_module

    known = module._recognition
    hint = module._given_channels if known is None else known.in_channels
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
            facts = attrgetter("recipe", "names", "returned", "last_map", "tail", "partition")
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
    if known is None or known.partition is not None:
        return ""
    if name == "last_map" and known.last_map is None:
        return ""
    if name == "names":
        return "\n".join("\t".join(path_of(module, name)) for name in known.names)
    if name == "tail":
        return "\t".join(path_of(module, known.tail))
    recipe = Recipe.read(known.recipe)
    values = {
        "weights": known.weights,
        "asked": sorted(known.asked) or [""],
        "results": [len(recipe.results)],
        "places": known.returned.places,
        "is_nested": [known.returned.is_nested],
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
