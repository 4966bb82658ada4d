"""What a unit, a stage or a network computes, apart from its numbers.

A recipe is a text, so that a graph can carry it as a constant; the numbers are a list of tensors,
the *state*, in the order in which the recipe's layers take them. It is JSON, a list of steps::

    ["import", channels]
    ["stem", layer]
    ["unit", stride, branch, main, passthrough, order, projection, strided]
    ["result"]
    ["head", layer, linear, classes]  # linear "" and its features without a linear layer,
                                      # layer [] where there is none

as :class:`snv2_kernels.packing.Builder` is told them. A branch or projection is a list of layers
and gates. A layer is ``[letters, eps, activation, slope, dilation, keeps_input, groups, shuffle]``,
a letter for each tensor of the convolution, its batch norm and its activation that is there
(``_LETTERS``), and the slope of a leaky ReLU; behind that is ``[letters, eps]`` of each term. A
projection may be an average pool instead, ``[channels, counts_padding, letters, activation,
slope]``. A gate is ``[layers, letters, activation, slope, adds_source]``, its layers one, two or
none. A list of channels is a text such as ``"0:58|58:116"`` (:func:`write_channels`).
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snv2_kernels.graph.constant import constant_to_dynamo
from snv2_kernels.packing.common import Builder
from snv2_kernels.packing.units import Activation, Gate, Layer, Pool, Term, Unit

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
    "a": "weight of a PReLU",
}
Written = tuple[Any, ...]  # a layer

# Channels -------------------------------------------------------------------------------------

_MOST_RUNS = 4  # that are interleaved
_MOST_CHANNELS = 1 << 24  # as in a plan; a few letters may name as many as fill memory


def write_channels(channels: Sequence[int]) -> str:
    """``[0, 58, 1, 59]`` as ``"0:2|58:60"``: ranges that take turns. Others as ``"3,1,2"``."""
    for count in range(1, _MOST_RUNS + 1):
        runs = [channels[i::count] for i in range(count)]
        if len(channels) % count == 0 and all(map(_is_range, runs)):
            return "|".join(_write_range(run) for run in runs)
    return ",".join(map(str, channels))


def _is_range(run: Sequence[int]) -> bool:
    step = run[1] - run[0] if len(run) > 1 else 1
    return not run or (step > 0 and list(run) == list(range(run[0], run[-1] + 1, step)))


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
    if any(len(run) > _MOST_CHANNELS for run in runs):
        raise ValueError(f"recipe: expected at most {_MOST_CHANNELS} channels, got {text}")
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


def _learned(activation: Activation) -> Any:
    return activation.slope if activation.kind == "prelu" else None


def _slope(activation: Activation) -> float:
    """That of a leaky ReLU."""
    slope: float = activation.slope if activation.kind == "leaky_relu" else 0.0
    return slope


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

    def _layer(self, layer: Layer) -> Written:
        conv, bn, act = layer.conv, layer.bn, layer.activation
        self.weights.append(conv.weight)
        norm = bn.weight, bn.bias, bn.running_mean, bn.running_var
        letters = self._tensors(conv.weight, conv.bias, *norm, _learned(act))
        shuffle = "" if layer.shuffle is None else _written(layer.shuffle)
        groups = conv.groups if layer.kernel == 1 else 1
        shape = layer.dilation, layer.keeps_input, groups, shuffle
        terms = [self._term(term) for term in layer.terms]
        return letters, _constant(bn.eps), act.kind, _slope(act), *shape, *terms

    def _term(self, term: Term) -> tuple[str, float]:
        conv, bn = term.conv, term.bn
        of_conv = (None, None) if conv is None else (conv.weight, conv.bias)
        if conv is not None:
            self.weights.append(conv.weight)
        norm = bn.weight, bn.bias, bn.running_mean, bn.running_var
        return self._tensors(*of_conv, *norm, None), _constant(bn.eps)

    def _gate(self, gate: Gate[Layer]) -> tuple[Any, ...]:
        layers = [self._layer(layer) for layer in gate.layers]
        return layers, *self._activation(gate.activation), gate.adds_source

    def _projection(self, projection: tuple[Layer, Layer] | Pool | None) -> list[Any]:
        if isinstance(projection, Pool):
            activation = self._activation(projection.activation)
            return [projection.channels, projection.counts_padding, *activation]
        return [self._layer(layer) for layer in projection or ()]

    def _activation(self, act: Activation) -> tuple[str, str, float]:
        """One that belongs to no convolution."""
        letters = self._tensors(*[None] * (len(_LETTERS) - 1), _learned(act))
        return letters, act.kind, _slope(act)

    def _tensors(self, *tensors: Any) -> str:
        """The letters of those that are there."""
        letters = ""
        for letter, tensor in zip(_LETTERS, tensors, strict=True):
            if tensor is not None:
                letters += letter
                self.state.append(tensor)
        return letters

    def add_import(self, channels: int) -> None:
        super().add_import(channels)
        self._steps.append(("import", channels))

    def add_stem(self, layer: Layer) -> None:
        super().add_stem(layer)
        self._steps.append(("stem", self._layer(layer)))

    def add_unit(self, unit: Unit[Layer]) -> None:
        super().add_unit(unit)
        branch = [
            self._gate(part) if isinstance(part, Gate) else self._layer(part)
            for part in unit.branch
        ]
        lists = _written(unit.main), _written(unit.passthrough), _written(unit.order)
        side = self._projection(unit.projection)
        self._steps.append(("unit", unit.stride, branch, *lists, side, unit.strided))

    def add_result(self) -> None:
        super().add_result()
        self._steps.append(("result",))

    def add_head(self, layer: Layer | None, fc: nn.Linear | None) -> None:
        super().add_head(layer, fc)
        written: Any = () if layer is None else self._layer(layer)
        linear = ""
        if fc is not None:
            self.weights.append(fc.weight)
            self.state.append(fc.weight)
            if fc.bias is not None:
                self.state.append(fc.bias)
            linear = "W" if fc.bias is None else "WB"
        self._steps.append(("head", written, linear, self.channels))


# Reading --------------------------------------------------------------------------------------


class _State:
    """Hands out the tensors of a state in order."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._next: Iterator[Tensor] = iter(tensors)

    def take(self, letters: str) -> dict[str, Tensor]:
        return {letter: next(self._next) for letter in letters}

    def layer(self, written: Written, stride: int = 1, depthwise: bool = True) -> Layer:
        """As modules, on these tensors; a window larger than 1x1 is a depthwise one or a stem's."""
        letters, eps, kind, slope, dilation, keeps_input, groups, shuffle, *terms = written
        tensors = self.take(letters)
        weight = tensors["W"]
        if weight.dim() == 2:  # of a linear layer, in a gate
            weight = weight[:, :, None, None]
        out_channels, _, kernel, _ = weight.shape
        if kernel > 1:
            groups = out_channels if depthwise else 1
        shape = stride if kernel > 1 else 1, dilation, groups
        conv = _conv(weight, tensors.get("B"), *shape)
        bn = _norm(tensors, out_channels, eps, weight)
        activation = _activation(kind, slope, tensors)
        order = read_channels(shuffle) if shuffle else None
        added = tuple(self._term(term, weight, shape) for term in terms)
        return Layer(conv, bn, activation, kernel, dilation, keeps_input, order, added)

    def _term(self, written: Sequence[Any], like: Tensor, shape: tuple[int, int, int]) -> Term:
        """A term of a layer with such a weight, stride, dilation and groups."""
        letters, eps = written
        tensors = self.take(letters)
        conv = _conv(tensors["W"], tensors.get("B"), *shape) if "W" in tensors else None
        return Term(conv, _norm(tensors, len(like), eps, like))

    def gate(self, written: Sequence[Any]) -> Gate[Layer]:
        layers, letters, kind, slope, adds_source = written
        read = list(map(self.layer, layers))
        expand = read.pop() if read else None
        reduce = read.pop() if read else None
        return Gate(reduce, expand, _activation(kind, slope, self.take(letters)), adds_source)

    def branch(
        self, written: Sequence[Any], stride: int, strided: int = 0
    ) -> tuple[Layer | Gate[Layer], ...]:
        parts: list[Layer | Gate[Layer]] = []
        for part in written:
            if isinstance(part[0], list):
                parts.append(self.gate(part))
                continue
            layer = self.layer(part, stride if strided == 0 else 1)
            parts.append(layer)
            strided -= layer.kernel > 1
        return tuple(parts)

    def projection(self, written: Sequence[Any], stride: int) -> tuple[Layer, Layer] | Pool | None:
        if not written:
            return None
        if isinstance(written[0], int):
            channels, counts_padding, letters, kind, slope = written
            return Pool(channels, counts_padding, _activation(kind, slope, self.take(letters)))
        dw, pw = written
        return self.layer(dw, stride), self.layer(pw)

    def linear(self, letters: str) -> nn.Linear | None:
        if not letters:
            return None
        tensors = self.take(letters)
        classes, features = tensors["W"].shape
        fc = nn.Linear(features, classes, "B" in tensors, device="meta")
        _set(fc, weight=tensors["W"], bias=tensors.get("B"))
        return fc


def _conv(
    weight: Tensor, bias: Tensor | None, stride: int, dilation: int, groups: int
) -> nn.Conv2d:
    """A convolution that pads so that only its stride makes a map smaller."""
    out_channels, depth, kernel, _ = weight.shape
    made = nn.Conv2d(
        depth * groups, out_channels, kernel, stride, kernel // 2 * dilation, dilation,
        groups=groups, bias=bias is not None, device="meta",
    )  # fmt: skip
    _set(made, weight=weight, bias=bias)
    return made


def _norm(tensors: dict[str, Tensor], channels: int, eps: float, like: Tensor) -> nn.BatchNorm2d:
    """A batch norm; without tensors one that changes nothing."""
    made = nn.BatchNorm2d(channels, eps, affine="w" in tensors, device="meta")
    # That of a frozen batch norm may be [1, C, 1, 1].
    vectors = {letter: tensors[letter].flatten() for letter in "wbmv" if letter in tensors}
    _set(made, weight=vectors.get("w"), bias=vectors.get("b"))
    made.running_mean = vectors.get("m", like.new_zeros(channels))
    made.running_var = vectors.get("v", like.new_ones(channels))
    return made


def _activation(kind: str, slope: float, tensors: dict[str, Tensor]) -> Activation:
    return Activation(kind, {"prelu": tensors.get("a"), "leaky_relu": slope}.get(kind))


def _set(module: nn.Module, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        # Not a Parameter of its own: gradients are to reach the tensor itself.
        module._parameters[name] = tensor  # type: ignore[assignment]


class Recipe:
    """A recipe that was read."""

    def __init__(self, text: str) -> None:
        self._steps: list[list[Any]] = json.loads(text)
        self.classify: bool = self._steps[-1][0] == "head"
        self._lists = {
            text: read_channels(text)
            for step in self._steps if step[0] == "unit"
            for text in step[3:6]
        }  # fmt: skip
        self.results: list[tuple[int, int]] = []  # channels and halvings of each
        channels = halvings = 0
        for kind, *rest in self._steps:
            if kind == "stem":
                halvings = 2
            elif kind == "unit":
                channels, halvings = len(self._lists[rest[4]]), halvings + (rest[0] == 2)
            elif kind == "head":
                channels = rest[2]
            elif kind == "result":
                self.results.append((channels, halvings))
        self.results.append((channels, halvings))
        self.out_channels, self.halvings = self.results[-1]

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def read(text: str) -> Recipe:
        return Recipe(text)

    @property
    def is_run(self) -> bool:
        """Whether it is units alone."""
        kinds = {step[0] for step in self._steps}
        return kinds == {"import", "unit"}

    @property
    def has_stem(self) -> bool:
        return any(step[0] == "stem" for step in self._steps)

    def tell(self, builder: Builder, tensors: Sequence[Tensor], goes_on: bool = False) -> None:
        """Tell a builder this network with a state's tensors; ``goes_on`` if units came before."""
        state = _State(tensors)
        for kind, *rest in self._steps:
            if kind == "import":
                if not goes_on:
                    builder.add_import(*rest)
            elif kind == "stem":
                builder.add_stem(state.layer(rest[0], 2, depthwise=False))
            elif kind == "unit":
                stride, branch, *texts, side, strided = rest
                main, passthrough, order = (self._lists[text] for text in texts)
                parts = state.branch(branch, stride, strided)
                projection = state.projection(side, stride)
                lists = main, passthrough, order
                builder.add_unit(Unit(stride, parts, *lists, projection, strided))
            elif kind == "result":
                builder.add_result()
            else:
                layer = state.layer(rest[0]) if rest[0] else None
                builder.add_head(layer, state.linear(rest[1]))

    def plain(self, x: Tensor, tensors: Sequence[Tensor]) -> Any:
        """The formula in plain PyTorch: the result, or a tuple of several."""
        formula = _Formula(x)
        self.tell(formula, tensors)
        return (*formula.results, formula.value) if formula.results else formula.value


class _Formula(Builder):
    """Computes what it is told."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.value = x
        self.results: list[Tensor] = []

    def add_import(self, channels: int) -> None:
        pass

    def add_stem(self, layer: Layer) -> None:
        self.value = F.max_pool2d(_apply(layer, self.value), 3, 2, 1)

    def add_unit(self, unit: Unit[Layer]) -> None:
        x = self.value
        y = source = _channels(x, unit.main)
        for part in unit.branch:
            y = _gated(part, y, source) if isinstance(part, Gate) else _apply(part, y)
        joined = [y]
        if isinstance(unit.projection, Pool):
            joined.insert(0, _pooled(unit.projection, x, unit.stride))
        elif unit.projection is not None:
            dw, pw = unit.projection
            joined.insert(0, _apply(pw, _apply(dw, x)))
        elif unit.passthrough:
            joined.insert(0, _channels(x, unit.passthrough))
        self.value = _channels(torch.cat(joined, 1), unit.order)

    def add_result(self) -> None:
        self.results.append(self.value)

    def add_head(self, layer: Layer | None, fc: nn.Linear | None) -> None:
        features = (self.value if layer is None else _apply(layer, self.value)).mean([2, 3])
        self.value = features if fc is None else F.linear(features, fc.weight, fc.bias)


def _apply(layer: Layer, x: Tensor) -> Tensor:
    y = _normed(layer.bn, _convolved(layer.conv, x))
    for term in layer.terms:
        y = y + _normed(term.bn, x if term.conv is None else _convolved(term.conv, x))
    y = layer.activation(y)
    if layer.shuffle is not None:
        y = _channels(y, layer.shuffle)
    return torch.cat([x, y], 1) if layer.keeps_input else y


def _convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(
        x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )  # fmt: skip


def _normed(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    norm = bn.running_mean, bn.running_var, bn.weight, bn.bias
    return F.batch_norm(x, *norm, False, 0.0, bn.eps)


def _pooled(pool: Pool, x: Tensor, stride: int) -> Tensor:
    y = F.avg_pool2d(x, 3, stride, 1, count_include_pad=pool.counts_padding)
    return pool.activation(y)


def _gated(gate: Gate[Layer], x: Tensor, source: Tensor) -> Tensor:
    if gate.layers:
        scale = x.mean([2, 3], keepdim=True)
        for layer in gate.layers:
            scale = _apply(layer, scale)
        x = x * scale
    return gate.activation(x + source if gate.adds_source else x)


def _channels(x: Tensor, channels: Sequence[int]) -> Tensor:
    if channels == list(range(channels[0], channels[-1] + 1)):
        return x.narrow(1, channels[0], len(channels))
    return x.index_select(1, torch.tensor(channels, device=x.device))
