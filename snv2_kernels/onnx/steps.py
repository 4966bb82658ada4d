"""Steps before they have places: dead ones dropped, shuffles merged, places shared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from snv2_kernels.onnx import functions
from snv2_kernels.onnx.model import Step

__all__ = ["Draft", "live", "merged", "placed"]


@dataclass
class Draft:
    """A step whose inputs and outputs are numbered values."""

    inputs: tuple[int, ...]
    function: Callable[..., Any] | None = None
    constants: tuple[Any, ...] = ()
    module: nn.Module | None = None
    name: tuple[str, ...] = ()  # of the module
    outputs: tuple[int, ...] = ()


def live(drafts: Sequence[Draft], results: Sequence[int]) -> list[Draft]:
    """The steps that results depend on."""
    wanted = set(results)
    kept = []
    for draft in reversed(drafts):
        if not wanted.isdisjoint(draft.outputs):
            wanted.update(draft.inputs)
            kept.append(draft)
    return kept[::-1]


def merged(drafts: Sequence[Draft], results: Sequence[int]) -> list[Draft]:
    """The same with each unflatten, permute and flatten that shuffle channels as one step."""
    makers = {value: draft for draft in drafts for value in draft.outputs}
    uses = Counter(value for draft in drafts for value in draft.inputs)
    uses.update(results)
    gone: set[int] = set()  # by id
    out = []
    for draft in drafts:
        swap = _single(makers, uses, draft) if draft.function is functions.flatten else None
        part = _single(makers, uses, swap) if swap is not None else None
        if (
            swap is not None
            and part is not None
            and draft.constants == (1, 2)
            and swap.function is functions.permute
            and swap.constants == ((0, 2, 1, 3, 4),)
            and part.function is functions.unflatten
            and part.constants[0] == 1
            and len(part.constants[1]) == 2
        ):
            gone |= {id(swap), id(part)}
            groups = part.constants[1][0]
            out.append(Draft(part.inputs, functions.shuffle, (groups,), outputs=draft.outputs))
        else:
            out.append(draft)
    return [draft for draft in out if id(draft) not in gone]


def _single(makers: dict[int, Draft], uses: Counter[int], draft: Draft) -> Draft | None:
    """The step before, if nothing else reads its result."""
    (value,) = draft.inputs
    return makers.get(value) if uses[value] == 1 else None


def placed(
    drafts: Sequence[Draft], source: int, results: Sequence[int], buffers: Mapping[int, str]
) -> tuple[list[Step], list[tuple[int, str]], list[int], int]:
    """Steps whose values take the places of those that nobody reads any more.

    Args:
        drafts: in order.
        source: the value that the forward is given.
        results: the values that it returns.
        buffers: values that are buffers, by name.

    Returns:
        The steps, buffers with their places, the places of the results, how many places there are.
    """
    last = {value: i for i, draft in enumerate(drafts) for value in draft.inputs}
    operands = [value for value in last if value in buffers]
    last.update(dict.fromkeys((*results, *operands), len(drafts)))
    places = {value: place for place, value in enumerate((source, *operands))}
    count = len(places)
    free: list[int] = []
    steps = []
    for i, draft in enumerate(drafts):
        inputs = tuple(places[value] for value in draft.inputs)
        free += [places[value] for value in dict.fromkeys(draft.inputs) if last[value] == i]
        for value in draft.outputs:
            places[value] = free.pop() if free else count
            count = max(count, places[value] + 1)
        free += [places[value] for value in draft.outputs if value not in last]
        outputs = tuple(places[value] for value in draft.outputs)
        steps.append(Step(draft.name, draft.function, inputs, draft.constants, outputs))
    named = [(places[value], buffers[value]) for value in operands]
    return steps, named, [places[value] for value in results], count
