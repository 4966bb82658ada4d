"""Describes what a recorded forward computes: one run of units, or a partition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import Node

from snv2_kernels.graph.chains import chains
from snv2_kernels.graph.nodes import example, writes
from snv2_kernels.graph.partition import Uncut, constant_sizes, cut, functions
from snv2_kernels.graph.reasons import described
from snv2_kernels.graph.recipe import RecipeBuilder
from snv2_kernels.graph.recognize import Run, Units, runs_of
from snv2_kernels.graph.record import DEFAULT_SIZE, Call, Recording
from snv2_kernels.graph.returned import ONE_MAP, Returned
from snv2_kernels.nn.clone import original_class
from snv2_kernels.nn.recognition import NotRecognized, Recognition
from snv2_kernels.nn.structure import Incomparable, structure
from snv2_kernels.packing.units import Pool

__all__ = ["describe", "partitioned", "reads_all", "run_and_tail", "whole_run"]


def run_and_tail(
    recording: Recording, runs: list[Run], found: Units | None
) -> tuple[Run | None, Call | None]:
    """The run that is all that was recorded, or the network that is all but one submodule, which
    makes what is returned of its result: a classifier of several layers. ``found`` is None where
    the recording has an error."""
    run = whole_run(recording, runs)
    if run is None and found is not None and recording.returned == ONE_MAP:
        for call in recording.calls[::-1]:  # the outermost first
            of_means = call.given is not None and example(call.given).dim() == 2
            if of_means and call.result in recording.outs and _is_on_its_own(call):
                outs = frozenset(_outs(recording, call))
                before = runs_of(found.returning(outs), outs)
                network = whole_run(recording, before, call)
                if network is not None and network.head is not None:
                    return network, call
    return run, None


def _outs(recording: Recording, tail: Call | None) -> list[Node]:
    """What is returned, or given to a tail."""
    return recording.outs if tail is None or tail.given is None else [tail.given]


def _is_on_its_own(call: Call) -> bool:
    """Whether a call reads only its input and the submodule's state, and writes no state."""
    own = {call.given, *(node for node in call.nodes if node.op != "get_attr")}
    for node in call.nodes:
        inputs = node.all_input_nodes
        read = inputs if writes(node) else [part for part in inputs if part.op != "get_attr"]
        if not own.issuperset(read):
            return False
    return True


def whole_run(recording: Recording, runs: list[Run], tail: Call | None = None) -> Run | None:
    """The run that is all that was recorded, but for a tail, with the maps on the way that are
    returned."""
    outs = _outs(recording, tail)
    behind = () if tail is None else tail.nodes
    for run in runs:
        made = {run.out, *(unit.out for unit in run.units)}
        if run.source is recording.source and run.out in outs and made.issuperset(outs):
            run.taps = frozenset(outs) - {run.out}
            nodes = run.nodes
            pools = recording.pools
            means = [] if run.head is None else run.head.nodes
            if len(pools) > 1 or not all(pool in means for pool in pools):
                continue
            others = (node for node in recording.graph.nodes if node not in behind)
            beside = recording.measured.difference(nodes, behind)
            if any(any(constant_sizes(node)) for node in beside):
                continue  # a partition checks them
            if not any(writes(node) and node not in nodes for node in others):
                return run
    return None


def reads_all(run: Run, channels: int) -> bool:
    """Whether each input channel has its place: only then was the right number guessed."""
    unit = run.units[0].told
    read = {*unit.main, *unit.passthrough}
    return run.stem is not None or unit.projection is not None or len(read) == channels


def describe(
    module: nn.Module, run: Run, channels: int, recording: Recording, tail: Call | None
) -> Recognition:
    builder: Any = RecipeBuilder()  # of nodes in the place of tensors
    run.tell(builder)
    own = _own_names(module)
    for node in builder.state:
        if node.op != "get_attr" or node.target not in own:
            raise NotRecognized(f"a weight that is no parameter: {described(node)}")
    common, outs = _common(module, recording, channels), _outs(recording, tail)
    order = sorted(outs)  # nodes compare by their places in the graph
    projects = [unit.told.projection is not None for unit in run.units]
    splits = run.stem is None and not projects[0]
    adds = run.stem is None and run.units[0].told.has_shortcut
    return replace(
        common,
        kind=_kind(run, recording.returned),
        recipe=builder.text,
        names=tuple(node.target for node in builder.state),
        weights=tuple(builder.state.index(weight) for weight in builder.weights),
        splits_input=splits,
        # A split, a sum or a pool passes on the input's dtype, up to a unit that projects.
        plain_in_autocast=((splits or adds) and any(projects))
        or (run.stem is None and isinstance(run.units[0].told.projection, Pool))
        or any(layer.leaves_float32 for layer in run.layers)
        or common.plain_in_autocast,
        returned=recording.returned.moved([order.index(out) for out in outs]),
        last_map=recording.windows[-1][0] if recording.pools else None,
        tail=tail.name if tail else "",
    )


def partitioned(
    module: nn.Module, recording: Recording, channels: int, found: Units
) -> Recognition | None:
    """A forward that is runs of units and other functions; None where it has no runs but those that
    submodules compute by themselves, which the drop-ins in their places run."""
    if not recording.asked.isdisjoint(("sets autocast", "enables gradients", "default dtype")):
        return None
    runs = runs_of(found, found.returned, taps=True)
    runs += chains(found, runs)
    runs = [run for run in runs if run.source is not recording.source or reads_all(run, channels)]
    calls = {functions(call.nodes) for call in recording.calls if call.name}
    if original_class(module) is nn.Sequential or all(_is_call(run, calls) for run in runs):
        return None
    try:
        partition = cut(recording, runs, _own_names(module))
    except Uncut:
        return None
    return replace(
        _common(module, recording, channels),
        kind=f"partition of {_counted(runs)}",
        plain_in_autocast=True,
        # Another size than it was recorded at.
        checked_size=(1, 18, 14) if recording.size == DEFAULT_SIZE else recording.size,
        partition=partition,
    )


def _is_call(run: Run, calls: set[frozenset[Node]]) -> bool:
    """Whether a submodule computes a run and nothing else, so that a drop-in takes its place."""
    return not all(unit.told.is_chain for unit in run.units) and functions(run.nodes) in calls


def _counted(runs: Sequence[Run]) -> str:
    """``"a network and 2 units"``."""
    kinds = Counter(_kind(run, ONE_MAP) for run in runs)
    parts = [f"{n} {kind}s" if n > 1 else f"a {kind}" for kind, n in kinds.items()]
    return " and ".join(parts)


def _own_names(module: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in (*module.named_parameters(), *module.named_buffers()))


def _common(module: nn.Module, recording: Recording, channels: int) -> Recognition:
    """What is told of a forward whether or not it is one run."""
    try:
        known = structure(module)
    except Incomparable as error:
        raise NotRecognized(str(error)) from None
    return Recognition(
        kind="",
        recipe="",
        names=(),
        weights=(),
        in_channels=channels,
        splits_input=False,
        plain_in_autocast="autocast" in recording.asked,
        returned=recording.returned,
        checked_size=recording.size,
        last_map=None,
        asked=recording.asked | _numbers_read(recording),
        alike={recording.told: True},
        outside=recording.names,
        structure=known,
    )


def _numbers_read(recording: Recording) -> frozenset[str]:
    """``{"numbers"}`` where the module has lists of channels in buffers that its forward reads."""
    nodes = recording.graph.nodes
    read = any(n.op == "get_attr" and n.meta.get("numbers") is not None for n in nodes)
    return frozenset(("numbers",)) if read else frozenset()


def _kind(run: Run, returned: Returned) -> str:
    if run.head is not None:
        return "network"
    if returned.container is not None:
        return "backbone"
    behind = sum(unit.told.is_chain for unit in run.units)
    if behind == len(run.units):
        return "chain"
    return "unit" if len(run.units) - behind == 1 and run.stem is None else "stage"
