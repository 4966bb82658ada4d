"""Finds units, stages and networks in a graph, by what flows where.

The graph is one that Dynamo or torch.export captured, with an example beside each node
(:func:`snv2_kernels.graph.channels.example`). Names of modules and the spelling of split, concat
and shuffle do not matter: a unit is a main branch (pw, dw, pw) whose result is joined with the
channels that pass by, or with a projection, wherever they come from and in whatever order they
leave. Each unit says so in the terms of :meth:`snv2_kernels.packing.Builder.add_unit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from snv2_kernels.graph.channels import Follower, Origin, Value, example, function_name
from snv2_kernels.ops import KERNEL_DTYPES
from snv2_kernels.packing import units
from snv2_kernels.packing.units import IDENTITY, RELU

if TYPE_CHECKING:
    from snv2_kernels.packing import Builder

__all__ = ["Conv", "Norm", "Run", "Unit", "recognize", "writes"]


@dataclass(frozen=True)
class Conv:
    """A convolution or linear layer whose numbers are nodes; what a builder asks of a module."""

    weight: Node
    bias: Node | None
    in_channels: int
    out_channels: int

    @property
    def out_features(self) -> int:
        return self.out_channels


@dataclass(frozen=True)
class Norm:
    """A batch norm in eval mode; none at all has no tensors."""

    weight: Any = None
    bias: Any = None
    running_mean: Any = None
    running_var: Any = None
    eps: float = 0.0


@dataclass(frozen=True)
class Layer:
    """A convolution, its batch norm and, if it has one, its ReLU."""

    source: Node
    out: Node
    conv: Conv
    norm: Norm
    kind: str  # pw, dw or stem
    stride: int
    relu: bool
    nodes: tuple[Node, ...]

    def told(self) -> units.Layer:
        """For a builder that takes nodes for tensors."""
        conv: Any = self.conv
        norm: Any = self.norm
        kernel = 3 if self.kind == "dw" else 1
        return units.Layer(conv, norm, RELU if self.relu else IDENTITY, kernel)


@dataclass(frozen=True)
class Unit:
    """A unit between two maps, in general index lists."""

    source: Node
    in_channels: int
    out: Node
    stride: int
    pw1: Layer
    dw: Layer
    pw2: Layer
    main: tuple[int, ...]
    passthrough: tuple[int, ...]
    order: tuple[int, ...]
    projection: tuple[Layer, Layer] | None
    nodes: frozenset[Node]  # between the two, and out

    def tell(self, builder: Builder) -> None:
        branch = self.pw1.told(), self.dw.told(), self.pw2.told()
        side = None
        if self.projection is not None:
            side = self.projection[0].told(), self.projection[1].told()
        lists = self.main, self.passthrough, self.order
        builder.add_unit(units.Unit(self.stride, branch, *lists, side))


@dataclass
class Run:
    """Units one after the other, with the stem before and the head behind where they are there."""

    units: list[Unit]
    stem: Layer | None = None
    head: tuple[Layer, Conv] | None = None
    ends: tuple[Node, ...] = field(default_factory=tuple)  # max-pool; mean to linear

    @property
    def source(self) -> Node:
        return self.units[0].source if self.stem is None else self.stem.source

    @property
    def out(self) -> Node:
        return self.units[-1].out if self.head is None else self.ends[-1]

    @property
    def layers(self) -> Iterator[Layer]:
        if self.stem is not None:
            yield self.stem
        for unit in self.units:
            yield from (unit.pw1, unit.dw, unit.pw2, *(unit.projection or ()))
        if self.head is not None:
            yield self.head[0]

    def tell(self, builder: Builder) -> None:
        """Tell a builder that takes nodes for tensors: :class:`RecipeBuilder`."""
        if self.stem is None:
            builder.add_import(self.units[0].in_channels)
        else:
            builder.add_stem(self.stem.told())
        for unit in self.units:
            unit.tell(builder)
        if self.head is not None:
            layer, linear = self.head
            builder.add_head(layer.told(), linear)  # type: ignore[arg-type]


def recognize(graph: Graph) -> list[Run]:
    """All runs of units in a graph that the kernels cover, in its order."""
    found = _Units(graph)
    runs: list[Run] = []
    for unit in found.units:
        last = runs[-1].units[-1] if runs else None
        if last is not None and last.out is unit.source and _only_users(unit):
            runs[-1].units.append(unit)
        else:
            runs.append(Run([unit]))
    for run in runs:
        _add_stem(run, found.layers)
        _add_head(run, found.layers)
    return [run for run in runs if _is_covered(run)]


def _only_users(unit: Unit) -> bool:
    """Whether nothing but the unit reads its input."""
    inside = (unit.source, *(node for node in unit.nodes if node is not unit.out))
    return all(user in unit.nodes for node in inside for user in node.users)


# Layers ---------------------------------------------------------------------------------------


def _arguments(node: Node, names: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """By name, whether or not they were passed so."""
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def _all(value: Any) -> Any:
    """The number that all numbers of a tuple are, None if there is none."""
    values = set(value) if isinstance(value, tuple | list) else {value}
    return values.pop() if len(values) == 1 else None


def _only_user(node: Node, *names: str) -> Node | None:
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if function_name(user) in names and user.args and user.args[0] is node else None


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_AFFINE, _STATISTICS = ("weight", "bias"), ("running_mean", "running_var")
_F_NORM = ("input", *_STATISTICS, *_AFFINE, "training", "momentum", "eps")
_ATEN_NORM = ("input", *_AFFINE, *_STATISTICS, "training", "momentum", "eps")
_NORM_DEFAULTS = {"weight": None, "bias": None, "training": False, "eps": 1e-5}


def _layer(node: Node) -> Layer | None:
    """The layer that begins with a convolution."""
    if function_name(node) != "conv2d":
        return None
    given = _arguments(node, _CONV, _CONV_DEFAULTS)
    weight, y = example(given["weight"]), example(node)
    if not all(isinstance(t, Tensor) and t.dim() == 4 for t in (weight, y)):
        return None
    kind = _kind(given, weight)
    if kind is None:
        return None
    nodes, norm = [node], Norm()
    if (user := _only_user(node, "batch_norm")) is not None:
        folded = _norm(user)
        if folded is None:
            return None
        nodes, norm = [node, user], folded
    if (user := _only_user(nodes[-1], "relu", "relu_")) is not None:
        nodes.append(user)
    conv = Conv(given["weight"], given["bias"], weight.shape[1] * given["groups"], weight.shape[0])
    relu = function_name(nodes[-1]).startswith("relu")
    stride = _all(given["stride"])
    return Layer(given["input"], nodes[-1], conv, norm, kind, stride, relu, tuple(nodes))


def _kind(given: dict[str, Any], weight: Tensor) -> str | None:
    """pw, dw or stem, for those that the kernels compute."""
    outputs, depth, *window = weight.shape
    kernel, stride = _all(window), _all(given["stride"])
    groups, padding = given["groups"], given["padding"]
    if padding == "same" and stride == 1 and kernel in (1, 3):
        padding = kernel // 2
    if _all(given["dilation"]) != 1 or (kernel, _all(padding)) not in ((1, 0), (3, 1)):
        return None
    if kernel == 1:
        return "pw" if groups == stride == 1 else None
    if depth == 1 and groups == outputs > 1:
        return "dw" if stride in (1, 2) else None
    return "stem" if groups == 1 and stride == 2 else None


def _norm(node: Node) -> Norm | None:
    """A batch norm that has an inference form."""
    names = _ATEN_NORM if isinstance(node.target, torch._ops.OpOverload) else _F_NORM
    told = _arguments(node, names, _NORM_DEFAULTS)
    told["eps"] = example(told["eps"])
    if told["training"] or told["running_mean"] is None:
        return None
    if not isinstance(told["eps"], float | torch.SymFloat):
        return None
    return Norm(**{name: told[name] for name in Norm.__dataclass_fields__})


# Units ----------------------------------------------------------------------------------------


class _Units:
    """Goes through a graph once."""

    def __init__(self, graph: Graph) -> None:
        self.units: list[Unit] = []
        self.layers: dict[Node, Layer] = {}  # by their last node
        self._follower = Follower()
        for node in graph.nodes:
            if (layer := _layer(node)) is not None:
                self.layers[layer.out] = layer
        for node in graph.nodes:
            self._follower.value(node)
            if function_name(node) in ("cat", "concat", "concatenate", "stack"):
                unit = self._joined_at(node)
                if unit is None:
                    self._follower.cut(node)
                else:
                    self.units.append(unit)
                    self._follower.cut(unit.out)

    def _before(self, layer: Layer, kind: str, relu: bool) -> Layer | None:
        """The layer that alone makes a layer's input, for it alone."""
        before = self.layers.get(layer.source)
        if before is None or before.kind != kind or before.relu != relu:
            return None
        return before if list(before.out.users) == [layer.nodes[0]] else None

    def _branch(self, out: Node) -> tuple[Layer, ...] | None:
        """dw and pw, or pw, dw and pw, that end at a node which nothing else reads twice."""
        last = self.layers.get(out)
        if last is None or last.kind != "pw" or not last.relu or len(out.users) != 1:
            return None
        middle = self._before(last, "dw", relu=False)
        if middle is None:
            return None
        first = self._before(middle, "pw", relu=True)
        return (middle, last) if first is None else (first, middle, last)

    def _map(self, node: Node) -> tuple[Origin, ...]:
        value = self._follower.value(node)
        channels = value.channels() if isinstance(value, Value) else None
        return channels or ()

    def _joined_at(self, join: Node) -> Unit | None:
        """The unit whose two halves come together at a node."""
        value = self._follower.value(join)
        if not isinstance(value, Value):
            return None
        makers = list(dict.fromkeys(origin for origin, _ in value.origins))
        if len(makers) != 2:
            return None
        for maker, other in (makers, makers[::-1]):
            branch = self._branch(maker)
            if branch is not None and len(branch) == 3:
                unit = self._unit(join, value, branch, other)
                if unit is not None:
                    return unit
        return None

    def _unit(
        self, join: Node, value: Value, branch: tuple[Layer, ...], other: Node
    ) -> Unit | None:
        pw1, dw, pw2 = branch
        read = self._map(pw1.source)
        if not read or len({origin for origin, _ in read}) != 1:
            return None
        source = read[0][0]
        whole = self._map(source)
        projection: tuple[Layer, Layer] | None = None
        if dw.stride == 1:
            first = tuple(origin for origin in value.origins if origin[0] is other)
            fits = other is source
        else:
            # Before the projection there may be a pw, which makes the unit's input.
            side = self._branch(other)
            if side is None:
                return None
            projection = side[-2], side[-1]
            first = tuple((other, i) for i in range(projection[1].conv.out_channels))
            fits = projection[0].stride == 2 and self._map(projection[0].source) == whole
        joined = (*first, *((pw2.out, i) for i in range(pw2.conv.out_channels)))
        place = {origin: i for i, origin in enumerate(joined)}
        if not fits or len(place) != len(joined) or place.keys() != set(value.origins):
            return None
        out = self._last_shuffle(join, set(place))
        order = self._map(out)
        nodes = _between(source, out)
        if len(order) != len(joined) or _is_written(source, out, nodes):
            return None
        return Unit(
            source=source,
            in_channels=len(whole),
            out=out,
            stride=dw.stride,
            pw1=pw1,
            dw=dw,
            pw2=pw2,
            main=tuple(channel for _, channel in read),
            passthrough=() if projection else tuple(channel for _, channel in first),
            order=tuple(place[origin] for origin in order),
            projection=projection,
            nodes=nodes,
        )

    def _last_shuffle(self, join: Node, joined: set[Origin]) -> Node:
        """The farthest map with the same channels that is all that the join is used for."""
        out = node = join
        while len(node.users) == 1:
            (node,) = node.users
            moved = self._follower.value(node)
            if not isinstance(moved, Value):
                break
            channels = moved.channels()
            if channels is not None:
                if len(channels) != len(joined) or set(channels) != joined:
                    break
                out = node
        return out


def _between(source: Node, out: Node) -> frozenset[Node]:
    """The nodes by which ``out`` depends on ``source``, and ``out``."""
    after: set[Node] = set()
    waiting = [source]
    while waiting:
        for user in waiting.pop().users:
            if user not in after and user <= out:
                after.add(user)
                waiting.append(user)
    needed: set[Node] = set()
    waiting = [out]
    while waiting:
        node = waiting.pop()
        if node in after and node not in needed:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    return frozenset(needed)


def _is_written(source: Node, out: Node, nodes: frozenset[Node]) -> bool:
    """Whether others change what a unit reads, so that it matters when it reads."""
    read = {source, *nodes} - {out}
    return any(writes(user) and user not in nodes for node in read for user in node.users)


def writes(node: Node) -> bool:
    """Whether a node changes its input, so that it matters when the others read it."""
    name = function_name(node)
    return (
        (name.endswith("_") and not name.endswith("__"))
        or name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod")
        or bool(node.kwargs.get("inplace"))
        or node.kwargs.get("out") is not None
    )


# Ends -----------------------------------------------------------------------------------------


def _add_stem(run: Run, layers: dict[Node, Layer]) -> None:
    pool = run.source
    if function_name(pool) != "max_pool2d" or not _only_users(run.units[0]):
        return
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = _arguments(pool, names, {"stride": None, "padding": 0, "dilation": 1})
    window = [_all(given[name]) for name in ("kernel_size", "stride", "padding", "dilation")]
    layer = layers.get(given["input"])
    if window != [3, 2, 1, 1] or given.get("ceil_mode") or given.get("return_indices"):
        return
    if layer is not None and layer.kind == "stem" and layer.relu and len(layer.out.users) == 1:
        run.stem, run.ends = layer, (pool,)


def _add_head(run: Run, layers: dict[Node, Layer]) -> None:
    out = run.out
    (first,) = out.users if len(out.users) == 1 else (None,)
    layer = next((layer for layer in layers.values() if layer.nodes[0] is first), None)
    if layer is None or layer.kind != "pw" or not layer.relu or layer.source is not out:
        return
    ends = _mean(layer.out)
    if ends is None:
        return
    linear = _only_user(ends[-1], "linear")
    if linear is None:
        return
    given = _arguments(linear, ("input", "weight", "bias"), {"bias": None})
    weight = example(given["weight"])
    if not isinstance(weight, Tensor) or weight.shape[1] != layer.conv.out_channels:
        return
    classes, features = weight.shape
    run.head = layer, Conv(given["weight"], given["bias"], features, classes)
    run.ends = (*run.ends, *ends, linear)


def _mean(node: Node) -> tuple[Node, ...] | None:
    """The nodes from a map to the means of its channels, [N, C]."""
    mean = _only_user(node, "mean", "adaptive_avg_pool2d")
    if mean is None:
        return None
    if function_name(mean) == "mean":
        given = _arguments(mean, ("input", "dim", "keepdim"), {"dim": None, "keepdim": False})
        dims = given["dim"] if isinstance(given["dim"], tuple | list) else ()
        pooled = {dim % 4 for dim in dims} == {2, 3} and given.get("dtype") is None
    else:
        size = _arguments(mean, ("input", "output_size"), {})["output_size"]
        pooled = _all(size) == 1
    if not pooled:
        return None
    nodes = [mean]
    names = ("flatten", "view", "reshape", "squeeze", "dropout")
    while (user := _only_user(nodes[-1], *names)) is not None and not _drops(user):
        nodes.append(user)
    shape = example(nodes[-1]).shape
    return tuple(nodes) if len(shape) == 2 and shape[1] == example(node).shape[1] else None


def _drops(node: Node) -> bool:
    """Whether a dropout does anything."""
    if function_name(node) != "dropout":
        return False
    return bool(_arguments(node, ("input", "p", "training"), {"training": True})["training"])


# What the kernels cover -----------------------------------------------------------------------


def _is_covered(run: Run) -> bool:
    weights = [example(layer.conv.weight) for layer in run.layers]
    if run.head is not None:
        weights.append(example(run.head[1].weight))
    tensors = [example(run.source), *weights]
    dtypes = {weight.dtype for weight in weights}
    products = {example(layer.nodes[0]).dtype for layer in run.layers}
    return (
        len(dtypes) == 1
        and dtypes <= set(KERNEL_DTYPES)
        and len(products) == 1  # another one than the weights' under autocast
        and products <= set(KERNEL_DTYPES)
        and len({t.device for t in tensors}) == 1
    )
