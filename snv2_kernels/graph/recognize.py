"""Finds units, stages and networks in a graph, by what flows where.

The graph is one that Dynamo or torch.export captured, or :mod:`~snv2_kernels.graph.record`, with an
example beside each node (:func:`snv2_kernels.graph.nodes.example`). Names of modules and spellings
do not matter: a unit is a branch of layers and gates whose result is joined with the channels that
pass by, or with a projection, wherever they come from and in whatever order they leave. Each unit
says so in the terms of :meth:`snv2_kernels.packing.Builder.add_unit`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard

from torch.fx import Graph, Node

from snv2_kernels.graph.channels import MOST_CHANNELS, MOVES, Follower, Origin, Value, channels_of
from snv2_kernels.graph.elementwise import activation_after
from snv2_kernels.graph.ends import Head, Stem, head_after, stem_before
from snv2_kernels.graph.gates import Gate, gates, sums
from snv2_kernels.graph.layers import CONCATENATIONS, Layer, Layers
from snv2_kernels.graph.nodes import example, function_name, readers, writes
from snv2_kernels.graph.pools import pools
from snv2_kernels.ops import KERNEL_DTYPES
from snv2_kernels.packing import units
from snv2_kernels.packing.units import Activation

if TYPE_CHECKING:
    from snv2_kernels.packing import Builder

__all__ = ["JOINS", "Run", "Unit", "Units", "are_of_others", "recognize", "runs_of"]

Part = Layer | Gate  # of a branch
JOINS = (*CONCATENATIONS, "stack")  # functions by which halves of a unit may come together


@dataclass(frozen=True)
class Unit:
    """A unit between two maps."""

    source: Node
    in_channels: int
    out: Node
    told: units.Unit[Layer]
    nodes: frozenset[Node]  # between the two, and out

    def tell(self, builder: Builder) -> None:
        builder.add_unit(self.told.map(Layer.told))


@dataclass
class Run:
    """Units one after the other, with the stem before and the head behind where they are there."""

    units: list[Unit]
    stem: Stem | None = None
    head: Head | None = None
    taps: frozenset[Node] = frozenset()  # maps of units on the way that are results too

    @property
    def source(self) -> Node:
        return self.units[0].source if self.stem is None else self.stem.layer.source

    @property
    def out(self) -> Node:
        return self.units[-1].out if self.head is None else self.head.nodes[-1]

    @property
    def layers(self) -> Iterator[Layer]:
        if self.stem is not None:
            yield self.stem.layer
        for unit in self.units:
            yield from unit.told.layers()
        if self.head is not None and self.head.layer is not None:
            yield self.head.layer

    @property
    def nodes(self) -> set[Node]:
        """All that compute it."""
        found = {node for unit in self.units for node in unit.nodes}
        for layer in self.layers:
            found.update(layer.nodes)
        for end in (self.stem, self.head):
            found.update(() if end is None else end.nodes)
        return found

    def tell(self, builder: Builder) -> None:
        """Tell a builder that takes nodes for tensors: :class:`RecipeBuilder`."""
        if self.stem is None:
            builder.add_import(self.units[0].in_channels)
        else:
            builder.add_stem(self.stem.layer.told())
        for unit in self.units:
            unit.tell(builder)
            if unit.out in self.taps:
                builder.add_result()
        if self.head is not None:
            layer = None if self.head.layer is None else self.head.layer.told()
            builder.add_head(layer, self.head.linear)  # type: ignore[arg-type]


def recognize(graph: Graph, returned: Collection[Node] = ()) -> list[Run]:
    """All runs of units in a graph that the kernels cover, in its order. A unit whose map is
    returned ends there, whatever shuffles it next."""
    return runs_of(Units(graph, returned), returned)


def runs_of(found: Units, returned: Collection[Node], taps: bool = False) -> list[Run]:
    """See :func:`recognize`. With ``taps`` a run goes on behind a map that others read too, which
    is then one of its results; without, it ends there."""
    runs: list[Run] = []
    for unit in found.units:
        run = runs[-1] if runs else None
        source = run.units[-1].out if run is not None else None
        if run is not None and source is unit.source and _reads_alone(unit):
            run.units.append(unit)
        elif run is not None and source is unit.source and taps and _read_alone(unit):
            run.taps |= {source}
            run.units.append(unit)
        else:
            runs.append(Run([unit]))
        chain = found.behind(unit)
        while chain is not None:
            runs[-1].units.append(chain)
            chain = found.behind(chain)
    for run in runs:
        if _reads_alone(run.units[0]):
            run.stem = stem_before(run.source, found.layers)
        run.head = head_after(run.out, found.layers, returned)
        if taps:
            run.taps |= frozenset(returned) & {unit.out for unit in run.units} - {run.out}
    return [run for run in runs if is_covered(run) and not are_of_others(run.units)]


def are_of_others(found: Sequence[Unit]) -> bool:
    """Whether nothing but sums joins branches, and no layer has groups: residual units of other
    families, which PyTorch runs as they are."""
    layers = (layer for unit in found for layer in unit.told.layers())
    grouped = any(layer.kind == "pw" and layer.conv.groups > 1 for layer in layers)
    return not grouped and not any(unit.told.joins for unit in found)


def _reads_alone(unit: Unit) -> bool:
    """Whether nothing but the unit reads its input."""
    return _read_alone(unit) and all(user in unit.nodes for user in readers(unit.source))


def _read_alone(unit: Unit) -> bool:
    """Whether nothing but the unit reads what it makes on the way to its result."""
    inside = (node for node in unit.nodes if node is not unit.out)
    return all(user in unit.nodes for node in inside for user in readers(node))


class Units:
    """Those of a graph, which it goes through once."""

    def __init__(self, graph: Graph, returned: Collection[Node] = ()) -> None:
        self.units: list[Unit] = []
        self.returned = returned
        self._graph = graph
        self._asked: set[Node] = set()  # whether they are returned
        self.layers = Layers(graph)
        self.gates = {gate.out: gate for gate in gates(graph, self.layers)}
        self.gates_after = {gate.source: gate for gate in reversed(self.gates.values())}
        self.pools = {pool.out: pool for pool in pools(graph)}
        self._sums = {ways[0].out: ways for ways in sums(graph)}
        self.follower = Follower()
        for node in graph.nodes:
            self.follower.follow(node)
            if function_name(node) in JOINS:
                unit = self._joined_at(node)
                if unit is None:
                    self.follower.cut(node)
                else:
                    self.units.append(unit)
                    self.follower.cut(unit.out)
            elif node in self._sums and (unit := self._residual(node)) is not None:
                self.units.append(unit)

    def returning(self, returned: Collection[Node]) -> Units:
        """Those of the graph where others are returned: these, if no answer was another one."""
        changed = any((node in returned) != (node in self.returned) for node in self._asked)
        return Units(self._graph, returned) if changed else self

    def _is_returned(self, node: Node) -> bool:
        self._asked.add(node)
        return node in self.returned

    def branch(self, out: Node) -> tuple[Part, ...]:
        """Layers and gates, each for the next alone, that end at a node; the last one may add what
        the first one reads."""
        for shortcut in self._sums.get(out, ()):
            parts = self.parts(shortcut.source)
            if not parts or len(readers(shortcut.source)) != 1:
                continue
            added = shortcut.added
            if added is None or not self.map_of(added) == self.map_of(parts[0].source) != ():
                continue
            last = parts[-1]
            if isinstance(last, Gate) and last.activation.kind == "identity":
                return (*parts[:-1], replace(shortcut, reduce=last.reduce, expand=last.expand))
            return (*parts, shortcut)
        return self.parts(out)

    def parts(self, out: Node) -> tuple[Part, ...]:
        """Layers and gates, each for the next alone, that end at a node."""
        parts: list[Part] = []
        shuffle: tuple[int, ...] | None = None
        while (part := self.layers.by_last.get(out) or self.gates.get(out)) is not None:
            if isinstance(part, Layer) and part.kind not in ("pw", "dw"):
                break
            if shuffle is not None:
                if not isinstance(part, Layer):
                    break
                part = replace(part, shuffle=shuffle)
            parts.insert(0, part)
            out, shuffle = part.source, None
            if isinstance(part, Layer) and not part.reads_alone:
                break
            if out not in self.layers.by_last and (found := self._shuffled(out)) is not None:
                out, shuffle = found
        return tuple(parts)

    def _shuffled(self, node: Node) -> tuple[Node, tuple[int, ...]] | None:
        """The layer's result of which a node has all channels in another order and that nothing
        else reads, and the order."""
        channels = self.map_of(node)
        makers = self.follower.makers(channels)
        if len(makers) != 1 or node in makers:
            return None
        (maker,) = makers
        order = channels_of(channels)
        moves = between(maker, node)
        alone = all(user in moves for each in (maker, *moves - {node}) for user in readers(each))
        is_all = sorted(order) == list(range(len(self.map_of(maker))))
        return (maker, order) if maker in self.layers.by_last and alone and is_all else None

    def behind(self, unit: Unit) -> Unit | None:
        """A depthwise and a pointwise layer that alone read a unit's result, as a unit through
        which nothing passes."""
        parts: list[Part] = []
        out = unit.out
        for kind in ("dw", "pw"):
            layer = self.layers.after(out, kind)
            if layer is None or layer.stride != 1 or layer.keeps_input:
                return None
            parts.append(layer)
            out = layer.out
            gate = self.gates_after.get(out)
            if gate is not None:
                parts.append(gate)
                out = gate.out
        nodes = between(unit.out, out)
        if not is_branch(parts) or is_written(unit.out, out, nodes):
            return None
        channels = len(unit.told.order)
        assert isinstance(layer, Layer)
        told = units.Unit(1, told_parts(parts), range(channels), (), range(layer.channels))
        return Unit(unit.out, channels, out, told, nodes)

    def _residual(self, out: Node) -> Unit | None:
        """The unit of a whole map that ends as the sum of its branch and its input."""
        branch = self.branch(out)
        last = branch[-1] if branch else None
        if not isinstance(last, Gate) or last.added is None or not is_branch(branch):
            return None
        read = self.map_of(branch[0].source)
        source = self.follower.makers(read[:1])[0] if read else out
        order = range(len(read))
        whole = tuple(self.follower.origins(source, len(read)))
        if not read == whole == self.map_of(source):
            return None
        nodes = between(source, out)
        if is_written(source, out, nodes):
            return None
        told = units.Unit(1, told_parts(branch), order, (), order)
        return Unit(source, len(read), out, told, nodes)

    def map_of(self, node: Node) -> tuple[Origin, ...]:
        """The channels of a map, empty for what is none."""
        value = self.follower.value(node)
        channels = value.channels() if isinstance(value, Value) else None
        return channels or ()

    def _joined_at(self, join: Node) -> Unit | None:
        """The unit whose two halves come together at a node."""
        value = self.follower.value(join)
        if not isinstance(value, Value):
            return None
        makers = self.follower.makers(value.origins)
        if len(makers) != 2:
            return None
        for maker, other in (makers, makers[::-1]):
            unit = self._unit(join, value, maker, other)
            if unit is not None:
                return unit
        return None

    def _unit(self, join: Node, value: Value, maker: Node, other: Node) -> Unit | None:
        branch = self.branch(maker)
        if len(readers(maker)) != 1 or not is_branch(branch):
            return None
        read = self.map_of(branch[0].source)
        makers = self.follower.makers(read)
        if len(makers) != 1:
            return None
        (source,) = makers
        whole = self.map_of(source)
        strides = [part.stride for part in branch if _is_depthwise(part)]
        stride = max(strides)
        projection: tuple[Layer, Layer] | units.Pool | None = None
        if other is source:
            passing = self.follower.origins(other, MOST_CHANNELS)
            first = tuple([origin for origin in value.origins if origin in passing])
            fits = stride == 1
        else:
            first = self.map_of(other)
            projection = self._projection(other, whole, stride)
            fits = projection is not None
        last = next(part for part in reversed(branch) if isinstance(part, Layer))
        joined = (*first, *self.follower.origins(maker, last.channels))
        place = {origin: i for i, origin in enumerate(joined)}
        if not fits or len(place) != len(joined) or place.keys() != set(value.origins):
            return None
        out = self._last_shuffle(join, set(place))
        order = self.map_of(out)
        if not self._is_returned(out) and projection is not None:
            activation, activated = activation_after(out)
            if activated and (both := _activated(branch, projection, activation)) is not None:
                branch, projection, out = *both, activated[-1]
        nodes = between(source, out)
        if len(order) != len(joined) or is_written(source, out, nodes):
            return None
        told = units.Unit(
            stride,
            told_parts(branch),
            channels_of(read),
            () if projection else channels_of(first),
            tuple([place[origin] for origin in order]),
            projection,
            strides.index(stride),
        )
        return Unit(source, len(whole), out, told, nodes)

    def _projection(
        self, out: Node, whole: tuple[Origin, ...], stride: int
    ) -> tuple[Layer, Layer] | units.Pool | None:
        """What alone makes a node's map of a whole one, with a stride."""
        pool, layers = self.pools.get(out), as_projection(self.branch(out))
        begin = pool or (layers[0] if layers is not None else None)
        if begin is None or begin.stride != stride or self.map_of(begin.source) != whole:
            return None
        if len(readers(out)) != 1:
            return None
        if pool is not None:
            return units.Pool(len(whole), pool.counts_padding, pool.activation)
        return layers

    def _last_shuffle(self, join: Node, joined: set[Origin]) -> Node:
        """The farthest map with the same channels that is all that the join is used for."""
        out, waiting = join, [join]
        while waiting:
            node = waiting.pop(0)
            if self._is_returned(node):
                continue
            for user in readers(node):
                if function_name(user) not in MOVES:
                    continue
                value = self.follower.value(user)
                parts = value if isinstance(value, tuple) else (value,)
                moves = all(isinstance(p, Value) and joined.issuperset(p.origins) for p in parts)
                if user in waiting or not moves:
                    continue
                waiting.append(user)
                channels = value.channels() if isinstance(value, Value) else None
                whole = channels is not None and len(channels) == len(joined)
                if whole and set(channels or ()) == joined and self._leads_to(join, user):
                    out = user
        return out

    def _leads_to(self, join: Node, out: Node) -> bool:
        """Whether a map is used for nothing but another one, and none on the way is returned."""
        moves = between(join, out)
        inside = (join, *moves - {out})
        used = all(user in moves for node in inside for user in readers(node))
        return used and not any(map(self._is_returned, inside))


def _activated(
    branch: Sequence[Part], projection: tuple[Layer, Layer] | units.Pool, activation: Activation
) -> tuple[tuple[Part, ...], tuple[Layer, Layer] | units.Pool] | None:
    """Both sides of a join with the activation that follows it, if they have none."""
    last = branch[-1]
    side = projection if isinstance(projection, units.Pool) else projection[1]
    known = activation.kind not in ("prelu", "sigmoid", "hardsigmoid")
    if not known or not isinstance(last, Layer):
        return None
    if not last.activation.kind == side.activation.kind == "identity":
        return None
    changed: Any = replace(side, activation=activation)
    joined = changed if isinstance(projection, units.Pool) else (projection[0], changed)
    return (*branch[:-1], replace(last, activation=activation)), joined


def told_parts(parts: Sequence[Part]) -> tuple[Layer | units.Gate[Layer], ...]:
    return tuple(part.told() if isinstance(part, Gate) else part for part in parts)


def between(source: Node, out: Node) -> frozenset[Node]:
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


def is_written(source: Node, out: Node, nodes: frozenset[Node]) -> bool:
    """Whether others change what a unit reads, so that it matters when it reads."""
    read = {source, *nodes} - {out}
    return any(writes(user) and user not in nodes for node in read for user in node.users)


def _is_depthwise(part: Part) -> TypeGuard[Layer]:
    return isinstance(part, Layer) and part.kind == "dw"


def is_branch(parts: Sequence[Part]) -> bool:
    """Whether kernels may compute them as the branch of a unit."""
    depthwise = [part for part in parts if _is_depthwise(part)]
    layers = [part for part in parts if isinstance(part, Layer)]
    return (
        len(depthwise) > 0
        and len(layers) > len(depthwise)
        and isinstance(parts[0], Layer)
        and sum(part.stride > 1 for part in depthwise) <= 1
        and not any(layer.activation.kind in ("sigmoid", "hardsigmoid") for layer in layers)
    )


def as_projection(parts: Sequence[Part]) -> tuple[Layer, Layer] | None:
    """The same as the dw and the pw of a projection, None if they are anything else."""
    if len(parts) != 2 or not is_branch(parts):
        return None
    dw, pw = parts
    if not isinstance(dw, Layer) or not isinstance(pw, Layer):
        return None
    return (dw, pw) if (dw.kind, pw.kind) == ("dw", "pw") else None


# What the kernels cover -----------------------------------------------------------------------


def is_covered(run: Run) -> bool:
    weights = [example(layer.conv.weight) for layer in run.layers]
    if run.head is not None and run.head.linear is not None:
        weights.append(example(run.head.linear.weight))
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
