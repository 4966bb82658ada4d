"""Drawn networks of a few channels, as any builder is told them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from _triton_units import depthwise, gate, layer
from torch import Tensor, nn

from snv2_kernels.graph.recipe import Recipe, RecipeBuilder
from snv2_kernels.nn.planned import plan_element
from snv2_kernels.packing import Builder, GpuPlanBuilder, PlanBuilder, TritonPlanBuilder
from snv2_kernels.packing.units import Activation, Gate, Layer, Pool, Unit
from snv2_kernels.quantization import integer_layers
from snv2_kernels.quantization.calibrate import calibrate_builder
from snv2_kernels.testing import randomize_

MOST_CHANNELS = 12

# pw, dw, gate, shortcut; "D" is a depthwise convolution of a larger window, "G" a pw of groups.
BRANCHES = [
    "pdp", "pdp", "pDp", "dp", "pd", "dpdp", "pdpgs", "pdgp", "dpdpg", "pdps", "pp", "dpp",
    "GdG", "GdGs", "dG", "pdGdG",
]  # fmt: skip
_ACTIVATIONS = ["relu", "relu", "identity", "relu6", "leaky_relu", "prelu", "silu", "hardswish"]
Step = Callable[[Builder], None]


@dataclass
class SmallNetwork:
    """Steps that begin with what reads the caller's map, and what to call their errors."""

    channels: int
    steps: list[Step]
    kind: str

    def tell(self, builder: Builder) -> None:
        for step in self.steps:
            step(builder)

    def plan(self, backend: str, dtype: torch.dtype) -> Any:
        """Raises ``Unsupported`` where the backend has no kernel for it."""
        if backend == "cpu":
            builder: Any = PlanBuilder()
            self.tell(builder)
            return builder.build(plan_element(dtype))
        builder = TritonPlanBuilder() if backend == "triton" else GpuPlanBuilder()
        self.tell(builder)
        return builder.build(dtype, torch.get_default_device())

    def integer_plan(self) -> Any:
        """Of the CPU in integers; raises ``Unsupported`` where it has no kernel for it."""
        builder = PlanBuilder()
        self.tell(builder)
        ranges = calibrate_builder(builder, torch.rand(1, self.channels, 9, 7), method="minmax")
        return builder.build_integers(integer_layers(builder, ranges))

    def formula(self, x: Tensor) -> tuple[Tensor, ...]:
        """All results in plain PyTorch, in the dtype of ``x``."""
        recipe = RecipeBuilder()
        self.tell(recipe)
        state = [t.to(x.device, x.dtype) for t in recipe.state]
        with torch.no_grad():
            made = Recipe.read(recipe.text).plain(x, state)
        return made if isinstance(made, tuple) else (made,)


def _width(random: Random) -> int:
    return random.randint(1, MOST_CHANNELS)


def _activation(random: Random, channels: int) -> Activation:
    kind = random.choice(_ACTIVATIONS)
    if kind == "prelu":
        return Activation(kind, torch.linspace(-0.4, 1.3, channels).bfloat16().float())
    return Activation(kind, 0.125 if kind == "leaky_relu" else None)


def _groups(random: Random, channels: int) -> int:
    return random.choice([g for g in range(1, channels + 1) if channels % g == 0])


def _shuffled(random: Random, part: Layer) -> Layer:
    """With its channels in another order, half of the time."""
    if random.random() < 0.5:
        return part
    return replace(part, shuffle=random.sample(range(part.channels), part.channels))


def _branch(
    random: Random, inp: int, pattern: str, stride: int
) -> tuple[tuple[Layer | Gate[Layer], ...], int]:
    """Layers and gates, and the width of their result. Only the paper's activations half of the
    time: they have kernels of their own."""
    papers, channels = random.random() < 0.5, inp
    shortcut = "s" in pattern
    branch: list[Layer | Gate[Layer]] = []
    for i, part in enumerate(pattern):
        if part in "pG":
            last = not {*"pG"} & {*pattern[i + 1 :]}
            groups = _groups(random, channels) if part == "G" else 1
            width = inp if shortcut and last else groups * _width(random)
            groups = groups if width % groups == 0 else 1
            act = Activation("relu") if papers else _activation(random, width)
            made = layer(channels, width, act, groups=groups)
            branch.append(_shuffled(random, made) if part == "G" else made)
            channels = width
        elif part in "dD":
            act = Activation("identity") if papers else _activation(random, channels)
            window = random.choice([5, 7]) if part == "D" else 3
            dilation = random.choice([1, 2]) if part == "D" else 1
            made = depthwise(channels, window, stride, dilation, act)
            branch.append(_shuffled(random, made) if "G" in pattern[:i] else made)
            stride = 1
        elif part == "g":
            branch.append(gate(channels))
        elif isinstance(branch[-1], Gate):
            branch[-1] = replace(branch[-1], adds_source=True)
        else:
            branch.append(Gate(activation=_activation(random, channels), adds_source=True))
    return tuple(branch), channels


def _unit(random: Random, channels: int, pattern: str) -> Unit[Layer]:
    has_depthwise = "d" in pattern.lower()
    stride = random.choice([1, 2]) if has_depthwise and "s" not in pattern else 1
    shuffled = random.sample(range(channels), channels)
    projection = None
    if stride == 2 or (has_depthwise and random.random() < 0.2):
        width = _width(random)
        side: Any = depthwise(channels, 3, stride), layer(channels, width)
        if random.random() < 0.4:
            width = channels
            side = Pool(channels, random.random() < 0.5, _activation(random, channels))
        main, passthrough, first, projection = shuffled, [], width, side
    else:
        cut = random.randint(1, channels)
        main, passthrough = shuffled[:cut], shuffled[cut:]
        first = len(passthrough)
    branch, width = _branch(random, len(main), pattern, stride)
    order = random.sample(range(first + width), first + width)
    return Unit(stride, branch, main, passthrough, order, projection)


def drawn_unit(random: Random, pattern: str | None = None) -> SmallNetwork:
    """One unit of 1 to 12 channels in all its layers."""
    channels = _width(random)
    unit = _unit(random, channels, pattern or random.choice(BRANCHES))
    steps: list[Step] = [lambda b: b.add_import(channels), lambda b: b.add_unit(unit)]
    return SmallNetwork(channels, steps, "unit" if len(unit.branch) <= 3 else "stage")


def drawn_network(random: Random) -> SmallNetwork:
    """A stem or none, one to three units, one of which may be tapped, and a head or none."""
    stem, head = random.random() < 0.6, random.random() < 0.6
    inp = random.randint(1, 4) if stem else _width(random)
    steps: list[Step] = []
    channels = inp
    if stem:
        channels = _width(random)
        conv = layer(inp, channels, _activation(random, channels), 3, 2)
        steps.append(lambda b: b.add_stem(conv))
    else:
        steps.append(lambda b: b.add_import(inp))
    units = random.randint(1, 3)
    for i in range(units):
        unit = _unit(random, channels, random.choice(BRANCHES))
        steps.append(lambda b, unit=unit: b.add_unit(unit))
        channels = len(unit.order)
        if i == 0 and (head or units > 1) and random.random() < 0.3:
            steps.append(lambda b: b.add_result())
    if head:
        features = layer(channels, _width(random), _activation(random, 1))
        if random.random() < 0.3:
            features = None
        fc = randomize_(nn.Linear(features.channels if features else channels, _width(random)))
        fc.weight.data = fc.weight.data.bfloat16().float()
        steps.append(lambda b: b.add_head(features, fc))
    return SmallNetwork(inp, steps, "network")
