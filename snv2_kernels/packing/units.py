"""What a unit is, for all who build, write down, recognise or pack one.

A unit splits its input by channels, sends the main half through a *branch* of layers and joins the
result with what passes through, or with a projection of the whole input::

    first = x[:, passthrough] if projection is None else projection(x)
    y = torch.cat([first, branch(x[:, main])], 1)[:, order]

where ``projection`` is dw and pw, or an average pool (ShuffleNet v1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "ACTIVATIONS",
    "IDENTITY",
    "RELU",
    "Activation",
    "Gate",
    "Layer",
    "Pool",
    "Term",
    "Unit",
    "Unsupported",
]

# In the order of snv2::Activation.
ACTIVATIONS = (
    "relu", "identity", "relu6", "leaky_relu", "prelu", "silu", "hardswish", "sigmoid",
    "hardsigmoid",
)  # fmt: skip


class Unsupported(Exception):
    """What the kernels do not cover; the message is the reason in a few words."""


@dataclass(frozen=True)
class Activation:
    """``torch.nn.functional``'s function of that name, or ``"identity"``."""

    kind: str
    # leaky_relu: a float; prelu: its weight, [1] or [C]
    slope: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "identity":
            return x
        function: Callable[..., Tensor] = getattr(F, self.kind)
        return function(x) if self.slope is None else function(x, self.slope)


IDENTITY = Activation("identity")
RELU = Activation("relu")


@dataclass(frozen=True)
class Term:
    """``bn(conv(x))``, or ``bn(x)`` without a convolution. The convolution has a window of at most
    its layer's size, and the layer's groups, stride and, but for 1x1, dilation."""

    conv: nn.Conv2d | None
    bn: nn.BatchNorm2d


@dataclass(frozen=True)
class Layer:
    """``activation(bn(conv(x)) + terms)[:, shuffle]``, where the terms are linear in x too.

    With a window of 1x1 the convolution is pointwise and may have groups, with a larger one
    depthwise, and both keep height and width but for the stride of their unit. (The stem's is
    neither; it is no part of a unit.) One that ``keeps_input``, depthwise and without a stride, is
    ``torch.cat([x, activation(bn(conv(x)))], 1)``.
    """

    conv: nn.Conv2d
    bn: nn.BatchNorm2d
    activation: Activation = IDENTITY
    kernel: int = 1
    dilation: int = 1
    keeps_input: bool = False
    shuffle: Sequence[int] | None = None  # as it is where None
    terms: tuple[Term, ...] = ()

    @property
    def channels(self) -> int:
        return self.conv.out_channels * (1 + self.keeps_input)


class _HasChannels(Protocol):
    @property
    def channels(self) -> int: ...  # of the result


L = TypeVar("L", bound=_HasChannels)
M = TypeVar("M", bound=_HasChannels)


@dataclass(frozen=True)
class Gate(Generic[L]):
    """Squeeze-and-excite, and the shortcut that may follow it, of a ``source`` that the branch
    reads::

        y = x * expand(reduce(x.mean([2, 3], keepdim=True)))
        y = activation(y + source if adds_source else y)

    Both layers are pointwise. ``reduce`` may be missing, or both: then nothing is scaled.
    """

    reduce: L | None = None
    expand: L | None = None
    activation: Activation = IDENTITY
    adds_source: bool = False

    @property
    def layers(self) -> tuple[L, ...]:
        """Those that are there."""
        return tuple(layer for layer in (self.reduce, self.expand) if layer is not None)

    def map(self, f: Callable[[L], M]) -> Gate[M]:
        """The same gate with ``f`` of each layer."""
        reduce = None if self.reduce is None else f(self.reduce)
        expand = None if self.expand is None else f(self.expand)
        return Gate(reduce, expand, self.activation, self.adds_source)


@dataclass(frozen=True)
class Pool:
    """``activation(F.avg_pool2d(x, 3, stride, 1, count_include_pad=counts_padding))``, with the
    stride of its unit."""

    channels: int
    counts_padding: bool = True
    activation: Activation = IDENTITY


@dataclass(frozen=True)
class Unit(Generic[L]):
    """A unit whose layers are ``L``: modules or nodes (:class:`Layer`), or folded numbers.

    Attributes:
        stride: of a depthwise convolution of the branch, and of the projection's: 1 or 2.
        branch: layers and gates, one after the other; pw, dw, pw in the paper.
        main: logical channels that the branch reads.
        passthrough: logical channels that go through untouched; empty with a projection. With
            neither a unit is a chain of layers, such as those behind another unit's join.
        order: output channel ``j`` is entry ``order[j]`` of ``cat([first, branch result])``.
        projection: dw and pw, or an average pool, over all logical channels.
        strided: which of the branch's depthwise convolutions has the stride.
    """

    stride: int
    branch: tuple[L | Gate[L], ...]
    main: Sequence[int]
    passthrough: Sequence[int]
    order: Sequence[int]
    projection: tuple[L, L] | Pool | None = None
    strided: int = 0

    @property
    def branch_channels(self) -> int:
        """Of the branch's result."""
        return next(p.channels for p in reversed(self.branch) if not isinstance(p, Gate))

    @property
    def projection_channels(self) -> int:
        if isinstance(self.projection, Pool):
            return self.projection.channels
        return 0 if self.projection is None else self.projection[1].channels

    @property
    def projection_layers(self) -> tuple[L, ...]:
        """Layers of the projection; none of a pool."""
        return self.projection if isinstance(self.projection, tuple) else ()

    @property
    def joins(self) -> bool:
        """Whether the branch's result is joined with anything."""
        return self.projection is not None or len(self.passthrough) > 0

    @property
    def has_shortcut(self) -> bool:
        """Whether what the branch reads is added to its result."""
        last = self.branch[-1]
        return isinstance(last, Gate) and last.adds_source

    @property
    def is_chain(self) -> bool:
        """Whether nothing but the branch goes through."""
        return not self.joins and not self.has_shortcut

    def map(self, f: Callable[[L], M]) -> Unit[M]:
        """The same unit with ``f`` of each layer."""
        branch = tuple(part.map(f) if isinstance(part, Gate) else f(part) for part in self.branch)
        side: tuple[M, M] | Pool | None
        side = self.projection if not isinstance(self.projection, tuple) else None
        if isinstance(self.projection, tuple):
            side = f(self.projection[0]), f(self.projection[1])
        lists = self.main, self.passthrough, self.order
        return Unit(self.stride, branch, *lists, side, self.strided)

    def layers(self) -> Iterator[L]:
        """Of the branch, gates included, then of the projection."""
        for part in self.branch:
            if isinstance(part, Gate):
                yield from part.layers
            else:
                yield part
        yield from self.projection_layers
