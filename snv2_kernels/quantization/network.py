"""Walks through a folded network, one layer after the other, for whatever stands for its maps.

The float network, the integer network and the scales of its maps are all evaluated by
:func:`evaluate`: they differ in what a layer does, never in the order of layers or channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVar

from snv2_kernels.packing.common import Folded, FoldingBuilder
from snv2_kernels.packing.units import Gate, Pool, Unit, Unsupported

__all__ = ["Evaluator", "Key", "Step", "evaluate", "steps"]

# "stem", "features" (the head's pointwise layer), "fc", or the unit and the layer in it, in the
# order of ``tuple(unit.layers())``.
Key: TypeAlias = str | tuple[int, int]
Kind: TypeAlias = Literal["stem", "pointwise", "depthwise", "features", "fc"]

M = TypeVar("M")


@dataclass(frozen=True)
class Step:
    """One layer and its place in the network.

    ``"stem"`` is a convolution 3x3 of stride 2, ``"features"`` is a pointwise layer and the mean
    over pixels, ``"fc"`` is a linear layer.
    """

    key: Key
    kind: Kind
    folded: Folded
    stride: int = 1

    @property
    def name(self) -> str:
        """Name of the layer in messages."""
        if isinstance(self.key, str):
            return self.key
        return f"unit {self.key[0]}, layer {self.key[1]}"

    @property
    def clamps(self) -> bool:
        """Whether an activation keeps the result from being negative."""
        return self.folded.activation.kind != "identity"


class Evaluator(Protocol[M]):
    """Arithmetic on ``M``, which stands for a feature map."""

    def layer(self, step: Step, x: M) -> M:
        """Returns the result of one layer, its activation included."""

    def max_pool(self, x: M) -> M:
        """Returns ``F.max_pool2d(x, 3, 2, 1)``."""

    def take(self, x: M, channels: Sequence[int]) -> M:
        """Returns ``x[:, channels]``."""

    def concat(self, parts: Sequence[M]) -> M:
        """Returns ``torch.cat(parts, 1)``."""


def evaluate(builder: FoldingBuilder, x: M, evaluator: Evaluator[M]) -> list[M]:
    """Returns all results of the network for the input ``x``: tapped maps, then the last one, once.

    Raises:
        Unsupported: naming the first layer that has no integer form.
    """
    results: list[M] = []
    if builder._stem is not None:
        step = _checked(Step("stem", "stem", builder._stem.conv, 2))
        x = evaluator.max_pool(evaluator.layer(step, x))
    for index, unit in enumerate(builder._units):
        x = _evaluate_unit(index, unit, x, evaluator)
        if index in builder._tapped and (builder._head or index + 1 < len(builder._units)):
            results.append(x)
    if builder._head is not None:
        if builder._head.conv is None:
            raise Unsupported("the head averages without a pointwise layer, which has no int8 form")
        x = evaluator.layer(_checked(Step("features", "features", builder._head.conv)), x)
        x = evaluator.layer(Step("fc", "fc", builder._head.fc), x)
    return [*results, x]


def _evaluate_unit(index: int, unit: Unit[Folded], x: M, evaluator: Evaluator[M]) -> M:
    if isinstance(unit.projection, Pool):
        raise Unsupported(f"unit {index}: an average-pool projection has no int8 form")
    if any(isinstance(part, Gate) for part in unit.branch):
        raise Unsupported(f"unit {index}: squeeze-and-excite or a shortcut has no int8 form")
    branch = [part for part in unit.branch if not isinstance(part, Gate)]
    parts: list[M] = []
    if unit.projection is not None:
        first = len(branch)
        parts.append(_chain(index, first, unit.projection, [unit.stride, 1], x, evaluator))
    elif unit.passthrough:
        parts.append(evaluator.take(x, unit.passthrough))
    main = evaluator.take(x, unit.main)
    parts.append(_chain(index, 0, branch, _strides(branch, unit), main, evaluator))
    return evaluator.take(evaluator.concat(parts), unit.order)


def _chain(
    index: int, first: int, layers: Sequence[Folded], strides: Sequence[int], x: M,
    evaluator: Evaluator[M],
) -> M:  # fmt: skip
    """Returns the result of layers in a row; ``first`` is the number of the first in its unit."""
    for at, (layer, stride) in enumerate(zip(layers, strides, strict=True)):
        kind: Kind = "depthwise" if layer.kernel > 1 else "pointwise"
        step = _checked(Step((index, first + at), kind, layer, stride))
        if not step.clamps and (at + 1 == len(layers) or layers[at + 1].kernel > 1):
            raise Unsupported(f"{step.name}: no activation, and no pointwise layer behind it")
        x = evaluator.layer(step, x)
    return x


def _strides(branch: Sequence[Folded], unit: Unit[Folded]) -> list[int]:
    strides, depthwise = [], 0
    for layer in branch:
        is_strided = layer.kernel > 1 and depthwise == unit.strided
        strides.append(unit.stride if is_strided else 1)
        depthwise += layer.kernel > 1
    return strides


def _checked(step: Step) -> Step:
    """Returns the step; raises :class:`Unsupported` if the layer has no integer form."""
    layer, kind = step.folded, step.folded.activation.kind
    allowed = {"stem": ("relu", "relu6"), "features": ("relu",)}  # its mean has no scale of 6 / 255
    if kind not in allowed.get(step.kind, ("relu", "relu6", "identity")):
        raise Unsupported(f"{step.name}: activation {kind} has no int8 form")
    if layer.kernel not in (1, 3) or layer.dilation != 1:
        window = f"{layer.kernel}x{layer.kernel} with dilation {layer.dilation}"
        raise Unsupported(f"{step.name}: a window of {window} has no int8 form")
    if layer.groups:
        raise Unsupported(f"{step.name}: a pointwise layer of groups has no int8 form")
    if layer.keeps_input or layer.shuffle:
        raise Unsupported(f"{step.name}: a layer that keeps or shuffles its input")
    return step


class _Listing:
    """Evaluator without maps, which lists the steps that it is shown."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def layer(self, step: Step, x: None) -> None:
        self.steps.append(step)

    def max_pool(self, x: None) -> None: ...

    def take(self, x: None, channels: Sequence[int]) -> None: ...

    def concat(self, parts: Sequence[None]) -> None: ...


def steps(builder: FoldingBuilder) -> list[Step]:
    """Returns all layers of the network in the order in which they run.

    Raises:
        Unsupported: naming the first layer that has no integer form.
    """
    noted = _Listing()
    evaluate(builder, None, noted)
    return noted.steps
