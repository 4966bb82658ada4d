"""What a unit, a stage or a network computes, apart from its numbers.

A recipe is a text, so that a graph can carry it as a constant; the numbers are a list of tensors,
the *state*, in the order in which the recipe's layers take them. It is JSON, a list of steps::

    ["import", channels]
    ["stem", layer]
    ["unit", stride, pw1, dw, pw2, main, passthrough, order, projection]
    ["head", layer, linear, classes]

as :class:`snv2_kernels.packing.Builder` is told them. A layer is ``[letters, eps]``, a letter for
each tensor of the convolution and its batch norm that is there (``_LETTERS``); a list of channels
is a text such as ``"0:58|58:116"`` (:func:`write_channels`).
"""

from __future__ import annotations

import functools
import itertools
import json
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snv2_kernels.graph.constant import constant_to_dynamo
from snv2_kernels.packing.common import Builder, ConvBn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Recipe", "RecipeBuilder", "read_channels", "write_channels"]

_LETTERS = {
    "W": "convolution's weight",
    "B": "convolution's bias",
    "w": "batch norm's weight",
    "b": "batch norm's bias",
    "m": "running_mean",
    "v": "running_var",
}
Layer = tuple[str, float]

# Channels -------------------------------------------------------------------------------------

_MOST_RUNS = 4  # that are interleaved


def write_channels(channels: Sequence[int]) -> str:
    """``[0, 58, 1, 59]`` as ``"0:2|58:60"``: ranges that take turns. Others as ``"3,1,2"``."""
    for count in range(1, _MOST_RUNS + 1):
        runs = [channels[i::count] for i in range(count)]
        if len(channels) % count == 0 and all(map(_is_range, runs)):
            return "|".join(_write_range(run) for run in runs)
    return ",".join(map(str, channels))


def _is_range(run: Sequence[int]) -> bool:
    step = run[1] - run[0] if len(run) > 1 else 1
    return step > 0 and all(b - a == step for a, b in itertools.pairwise(run))


def _write_range(run: Sequence[int]) -> str:
    if not run:
        return "0:0"
    step = run[1] - run[0] if len(run) > 1 else 1
    text = f"{run[0]}:{run[-1] + 1}"
    return text if step == 1 else f"{text}:{step}"


def read_channels(text: str) -> list[int]:
    """What :func:`write_channels` wrote."""
    if ":" not in text:
        return [int(number) for number in text.split(",")]
    runs = [range(*map(int, run.split(":"))) for run in text.split("|")]
    return [channel for turn in zip(*runs, strict=True) for channel in turn]


# Writing --------------------------------------------------------------------------------------


@constant_to_dynamo
def _write(*steps: tuple[Any, ...]) -> str:
    return json.dumps(steps, separators=(",", ":"))


@constant_to_dynamo
def _written(channels: Sequence[int]) -> str:
    return write_channels(list(channels))


def _constant(number: float | torch.SymFloat) -> float:
    """Dynamo may make a float an input of the graph, but not the key of a dict. The comparison
    makes it decide before. In a graph that has one, float() sets a guard."""
    if isinstance(number, torch.SymFloat):
        return float(number)
    return next(iter({number: None})) if number > 0 else 0.0


class RecipeBuilder(Builder):
    """Writes down what it is told. Dynamo can trace it: whatever the recipe depends on then gets a
    guard, and the state's tensors become inputs of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[Any, ...]] = []
        self.state: list[Tensor] = []
        self.weights: list[Tensor] = []  # of convolutions and the linear layer

    @property
    def text(self) -> str:
        text: str = _write(*self._steps)
        return text

    def _layer(self, pair: ConvBn) -> Layer:
        conv, bn = pair
        self.weights.append(conv.weight)
        tensors = (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)
        letters = ""
        for letter, tensor in zip(_LETTERS, tensors, strict=True):
            if tensor is not None:
                letters += letter
                self.state.append(tensor)
        return letters, _constant(bn.eps)

    def add_import(self, channels: int) -> None:
        super().add_import(channels)
        self._steps.append(("import", channels))

    def add_stem(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        super().add_stem(conv, bn)
        self._steps.append(("stem", self._layer((conv, bn))))

    def add_unit(
        self,
        stride: int,
        pw1: ConvBn,
        dw: ConvBn,
        pw2: ConvBn,
        main: Sequence[int],
        passthrough: Sequence[int],
        order: Sequence[int],
        projection: tuple[ConvBn, ConvBn] | None = None,
    ) -> None:
        super().add_unit(stride, pw1, dw, pw2, main, passthrough, order, projection)
        layers = self._layer(pw1), self._layer(dw), self._layer(pw2)
        lists = _written(main), _written(passthrough), _written(order)
        side = None
        if projection is not None:
            side = self._layer(projection[0]), self._layer(projection[1])
        self._steps.append(("unit", stride, *layers, *lists, side))

    def add_head(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, fc: nn.Linear) -> None:
        super().add_head(conv, bn, fc)
        layer = self._layer((conv, bn))
        self.weights.append(fc.weight)
        self.state.append(fc.weight)
        if fc.bias is not None:
            self.state.append(fc.bias)
        linear = "W" if fc.bias is None else "WB"
        self._steps.append(("head", layer, linear, fc.out_features))


# Reading --------------------------------------------------------------------------------------


class _State:
    """Hands out the tensors of a state in order."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._next: Iterator[Tensor] = iter(tensors)

    def take(self, letters: str) -> dict[str, Tensor]:
        return {letter: next(self._next) for letter in letters}

    def conv_bn(self, layer: Layer, depthwise: bool = False, stride: int = 1) -> ConvBn:
        """As modules, on these tensors."""
        letters, eps = layer
        tensors = self.take(letters)
        weight = tensors["W"]
        out_channels, depth, kernel, _ = weight.shape
        groups = out_channels if depthwise else 1
        conv = nn.Conv2d(
            depth * groups, out_channels, kernel, stride, kernel // 2,
            groups=groups, bias="B" in tensors, device="meta",
        )  # fmt: skip
        bn = nn.BatchNorm2d(out_channels, eps, affine="w" in tensors, device="meta")
        _set(conv, weight=weight, bias=tensors.get("B"))
        _set(bn, weight=tensors.get("w"), bias=tensors.get("b"))
        # Without a batch norm, one that changes nothing.
        bn.running_mean = tensors.get("m", weight.new_zeros(out_channels))
        bn.running_var = tensors.get("v", weight.new_ones(out_channels))
        return conv, bn

    def linear(self, letters: str) -> nn.Linear:
        tensors = self.take(letters)
        classes, features = tensors["W"].shape
        fc = nn.Linear(features, classes, "B" in tensors, device="meta")
        _set(fc, weight=tensors["W"], bias=tensors.get("B"))
        return fc


def _set(module: nn.Module, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        # Not a Parameter of its own: gradients are to reach the tensor itself.
        module._parameters[name] = tensor  # type: ignore[assignment]


class Recipe:
    """A recipe that was read."""

    def __init__(self, text: str) -> None:
        self._steps: list[list[Any]] = json.loads(text)
        first, last = self._steps[0], self._steps[-1]
        self.classify: bool = last[0] == "head"
        units = [step for step in self._steps if step[0] == "unit"]
        strides: list[int] = [step[1] for step in units]
        self.halvings = strides.count(2) + (2 if first[0] == "stem" else 0)
        self._lists = {text: read_channels(text) for step in units for text in step[5:8]}
        self.out_channels: int = last[3] if self.classify else len(self._lists[last[7]])

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def read(text: str) -> Recipe:
        return Recipe(text)

    def tell(self, builder: Builder, tensors: Sequence[Tensor]) -> None:
        """Tell a builder this network with a state's tensors."""
        state = _State(tensors)
        for kind, *rest in self._steps:
            if kind == "import":
                builder.add_import(*rest)
            elif kind == "stem":
                builder.add_stem(*state.conv_bn(rest[0], stride=2))
            elif kind == "unit":
                stride, pw1, dw, pw2, main, passthrough, order, side = rest
                branch = (
                    state.conv_bn(pw1), state.conv_bn(dw, True, stride), state.conv_bn(pw2)
                )  # fmt: skip
                projection = None
                if side is not None:
                    projection = state.conv_bn(side[0], True, stride), state.conv_bn(side[1])
                read = self._lists
                builder.add_unit(
                    stride, *branch, read[main], read[passthrough], read[order], projection
                )
            else:
                builder.add_head(*state.conv_bn(rest[0]), state.linear(rest[1]))

    def plain(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The formula in plain PyTorch."""
        formula = _Formula(x)
        self.tell(formula, tensors)
        return formula.value


class _Formula(Builder):
    """Computes what it is told."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.value = x

    def add_import(self, channels: int) -> None:
        pass

    def add_stem(self, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> None:
        self.value = F.max_pool2d(_conv_bn(self.value, (conv, bn)).relu(), 3, 2, 1)

    def add_unit(
        self,
        stride: int,
        pw1: ConvBn,
        dw: ConvBn,
        pw2: ConvBn,
        main: Sequence[int],
        passthrough: Sequence[int],
        order: Sequence[int],
        projection: tuple[ConvBn, ConvBn] | None = None,
    ) -> None:
        x = self.value
        y = _conv_bn(_channels(x, main), pw1).relu()
        y = _conv_bn(_conv_bn(y, dw), pw2).relu()
        if projection is None:
            first = _channels(x, passthrough)
        else:
            first = _conv_bn(_conv_bn(x, projection[0]), projection[1]).relu()
        self.value = _channels(torch.cat([first, y], 1), order)

    def add_head(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, fc: nn.Linear) -> None:
        features = _conv_bn(self.value, (conv, bn)).relu().mean([2, 3])
        self.value = F.linear(features, fc.weight, fc.bias)


def _conv_bn(x: Tensor, pair: ConvBn) -> Tensor:
    conv, bn = pair
    y = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, 1, conv.groups)
    return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)


def _channels(x: Tensor, channels: Sequence[int]) -> Tensor:
    if channels == list(range(channels[0], channels[-1] + 1)):
        return x.narrow(1, channels[0], len(channels))
    return x.index_select(1, torch.tensor(channels, device=x.device))
