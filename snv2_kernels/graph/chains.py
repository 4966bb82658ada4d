"""Depthwise and pointwise layers in a row that belong to no unit, such as a branch whose result
goes through attention before it is joined, or the separable convolutions of a detector's neck."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from snv2_kernels.graph.layers import Layer
from snv2_kernels.graph.nodes import example
from snv2_kernels.graph.recognize import (
    Part,
    Run,
    Unit,
    Units,
    between,
    is_branch,
    is_covered,
    is_written,
    told_parts,
)
from snv2_kernels.packing import units

__all__ = ["chains"]


def chains(found: Units, runs: Sequence[Run]) -> list[Run]:
    """Runs of such layers, none of which is in one of the runs of units. A network of another
    family has none: one without units, in which no branch reads a part of a map's channels."""
    taken = {node for run in runs for node in run.nodes}
    made = [_chain(found, layer, taken) for layer in found.layers.by_last.values()]
    chained = [unit for unit in made if unit is not None]
    if not runs and not any(_reads_a_part(found, unit) for unit in chained):
        return []
    return [run for unit in chained if is_covered(run := Run([unit]))]


def _chain(found: Units, last: Layer, taken: set[Node]) -> Unit | None:
    """The longest chain of which a layer is the last, or the last but for a gate, as a unit through
    which nothing passes."""
    gate = found.gates_after.get(last.out)
    out = last.out if gate is None else gate.out
    following = found.layers.after(out, "pw", "dw")
    if following is not None and taken.isdisjoint(following.nodes):
        return None
    parts = list(found.parts(out))
    while parts and not (is_branch(parts) and _are_free(parts, taken)):
        del parts[0]
    if not parts:
        return None
    source = parts[0].source
    nodes = between(source, out)
    if is_written(source, out, nodes):
        return None
    strides = [part.stride for part in parts if isinstance(part, Layer) and part.kind == "dw"]
    channels, result = (int(example(node).shape[1]) for node in (source, out))
    unit = units.Unit(
        max(strides), told_parts(parts), range(channels), (), range(result),
        strided=strides.index(max(strides)),
    )  # fmt: skip
    return Unit(source, channels, out, unit, nodes)


def _are_free(parts: Sequence[Part], taken: set[Node]) -> bool:
    layers = (part for part in parts if isinstance(part, Layer))
    return all(taken.isdisjoint(layer.nodes) for layer in layers)


def _reads_a_part(found: Units, unit: Unit) -> bool:
    """Whether a chain reads some channels of a map that has others too."""
    read = found.map_of(unit.source)
    makers = found.follower.makers(read)
    return len(makers) == 1 and len(read) < len(found.map_of(*makers))
