"""Units that deviate from the paper's, as plans of the Triton kernels are told them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from _cases import assert_accurate
from torch import Tensor, nn

from snv2_kernels.graph.recipe import Recipe, RecipeBuilder
from snv2_kernels.ops import operators
from snv2_kernels.packing import Builder, TritonPlan, TritonPlanBuilder
from snv2_kernels.packing.units import (
    IDENTITY,
    RELU,
    Activation,
    Gate,
    Layer,
    Unit,
)
from snv2_kernels.testing import randomize_

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
Told = Callable[[Builder], None]

# Networks -------------------------------------------------------------------------------------


def layer(
    inp: int, oup: int, activation: Activation = RELU, kernel: int = 1, stride: int = 1,
    dilation: int = 1, groups: int = 1,
) -> Layer:  # fmt: skip
    padding = kernel // 2 * dilation
    conv = nn.Conv2d(inp, oup, kernel, stride, padding, dilation, groups, bias=False)
    seed = 1000 * inp + 10 * oup + kernel
    pair = randomize_(nn.Sequential(conv, nn.BatchNorm2d(oup)), seed).eval()
    conv, bn = pair.bfloat16().float()  # exact in every dtype
    return Layer(conv, bn, activation, kernel, dilation)  # type: ignore[arg-type]


def depthwise(
    channels: int, kernel: int = 3, stride: int = 1, dilation: int = 1,
    activation: Activation = IDENTITY,
) -> Layer:  # fmt: skip
    return layer(channels, channels, activation, kernel, stride, dilation, channels)


def prelu(channels: int) -> Activation:
    """Slopes of both signs, and one above 1."""
    return Activation("prelu", torch.linspace(-0.4, 1.3, channels).bfloat16().float())


def gate(channels: int, reduce: str = "relu", expand: str = "sigmoid") -> Gate[Layer]:
    hidden = channels // 4 + 1
    first = layer(channels, hidden, Activation(reduce))
    return Gate(first, layer(hidden, channels, Activation(expand)))


def alone(
    *branch: Layer | Gate[Layer], stride: int = 1, channels: int = 20,
    projection: tuple[Layer, Layer] | None = None, passes: bool = True,
) -> tuple[int, Told]:  # fmt: skip
    """A unit that reads half its input, or all of it where the other half does not pass through."""
    width = next(p.channels for p in reversed(branch) if isinstance(p, Layer))
    if passes and projection is None:
        main, passing = range(channels // 2, channels), range(channels // 2)
    else:
        main, passing = range(channels), range(0)
    firsts = projection[1].channels if projection else len(passing)
    # Those of the two take turns, as far as there are.
    order = sorted(range(firsts + width), key=lambda e: e % firsts if e < firsts else e - firsts)
    unit = Unit(stride, branch, main, passing, order, projection)

    def tell(builder: Builder) -> None:
        builder.add_import(channels)
        builder.add_unit(unit)

    return channels, tell


def planned(told: Told, dtype: torch.dtype = FP32) -> TritonPlan:
    builder = TritonPlanBuilder()
    told(builder)
    return builder.build(dtype, torch.get_default_device())


def plain(told: Told, x: Tensor) -> Tensor:
    """In x's dtype."""
    recipe = RecipeBuilder()
    told(recipe)
    state = [t.to(x.device, x.dtype) for t in recipe.state]
    with torch.no_grad():
        return Recipe.read(recipe.text).plain(x, state)


def check(told: Told, x: Tensor, kind: str = "unit") -> TritonPlan:
    """The plan gives the formula, within the rule for ``kind``."""
    plan = planned(told, x.dtype)
    out = operators("triton").network(x, *plan.arguments)
    assert_accurate(kind, out, plain(told, x), plain(told, x.double()), "triton")
    return plan


# Units ----------------------------------------------------------------------------------------


def paper(
    pw1: Activation = RELU, dw: Activation = IDENTITY, pw2: Activation = RELU, kernel: int = 3,
    stride: int = 1, dilation: int = 1, channels: int = 20,
) -> tuple[int, Told]:  # fmt: skip
    """The paper's unit with these, in the projection too."""
    inp, mid, side = channels // (2 if stride == 1 else 1), 18, None
    window = {"kernel": kernel, "stride": stride, "dilation": dilation, "activation": dw}
    if stride == 2:
        side = depthwise(inp, **window), layer(inp, 13, pw2)  # type: ignore[arg-type]
    main = layer(inp, mid, pw1), depthwise(mid, **window), layer(mid, 10, pw2)  # type: ignore[arg-type]
    return alone(*main, stride=stride, channels=channels, projection=side)


SILU, HARDSWISH, RELU6 = Activation("silu"), Activation("hardswish"), Activation("relu6")
LEAKY = Activation("leaky_relu", 0.1)
ONE_SLOPE = Activation("prelu", torch.tensor([-0.25]))

ACTIVATED = {
    "silu": paper(SILU, SILU, SILU, stride=2),
    "hardswish": paper(HARDSWISH, IDENTITY, HARDSWISH),
    "leaky": paper(LEAKY, IDENTITY, LEAKY, stride=2),
    "prelu": paper(prelu(18), prelu(18), prelu(10)),
    "one-slope": paper(ONE_SLOPE, RELU6, ONE_SLOPE),
    "leaky-s1": paper(LEAKY, IDENTITY, LEAKY),
    "none": paper(IDENTITY, RELU, IDENTITY, stride=2),
}
WINDOWS = {
    "5x5": paper(kernel=5),
    "5x5-s2": paper(kernel=5, stride=2),
    "7x7-s2": paper(kernel=7, stride=2),
    "dilated": paper(dilation=2),
    "5x5-dilated-s2": paper(kernel=5, dilation=3, stride=2),
    "differing": alone(
        layer(20, 18), depthwise(18, 5, 2), layer(18, 10), stride=2,
        projection=(depthwise(20, 3, 2, dilation=2), layer(20, 13)),
    ),
}  # fmt: skip
GATED = {
    "gate-before-pw2": alone(layer(10, 18), depthwise(18), gate(18), layer(18, 10)),
    "gate-before-pw2-s2": alone(
        layer(20, 18), depthwise(18, 5, 2), gate(18, "silu"), layer(18, 10, SILU), stride=2,
        projection=(depthwise(20, 3, 2), layer(20, 13, prelu(13))),
    ),
    "gate-after-pw2": alone(
        layer(10, 18), depthwise(18), layer(18, 10), gate(10, "hardswish", "hardsigmoid")
    ),
    "gate-after-pw2-s2": alone(
        layer(20, 18), depthwise(18, 3, 2), layer(18, 10), gate(10), stride=2,
        projection=(depthwise(20, 3, 2), layer(20, 10)),
    ),
    "gate-before-dw": alone(layer(10, 18), gate(18), depthwise(18), layer(18, 10)),
}  # fmt: skip
CHAINS = {
    "dw-first": alone(depthwise(10), layer(10, 18), depthwise(18), layer(18, 10)),
    "pairs": alone(
        depthwise(10), layer(10, 18), depthwise(18, 5), layer(18, 14), depthwise(14), layer(14, 10)
    ),
    "pairs-s2": alone(
        depthwise(20, 3, 2), layer(20, 18), depthwise(18), layer(18, 10), stride=2,
        projection=(depthwise(20, 3, 2), layer(20, 13)),
    ),
    "pairs-gate": alone(depthwise(10), layer(10, 18), depthwise(18), layer(18, 10), gate(10)),
    "pw-dw": alone(layer(10, 18, SILU), depthwise(18, activation=SILU)),
    "dw-pw": alone(depthwise(10), layer(10, 12)),
    "dw": alone(depthwise(10, activation=prelu(10))),
    "pw-pw": alone(layer(10, 18), layer(18, 10)),
    "dw-pw-pw": alone(depthwise(10), layer(10, 18), layer(18, 10)),
    "four-pw": alone(layer(10, 18), layer(18, 14), layer(14, 12), layer(12, 10)),
    "gate-before-two-dw": alone(
        layer(10, 18), gate(18), depthwise(18), depthwise(18, 5), layer(18, 10)
    ),
    "no-passthrough": alone(
        layer(20, 18), depthwise(18), layer(18, 10),
        projection=(depthwise(20), layer(20, 13)),
    ),
}  # fmt: skip
PAIR = layer(10, 18), depthwise(18), layer(18, 10, IDENTITY)
FOLLOWED = {
    "shortcut": alone(*PAIR, Gate(activation=prelu(10), adds_source=True)),
    "gated-shortcut": alone(
        *PAIR, replace(gate(10, "silu", "hardsigmoid"), activation=RELU, adds_source=True)
    ),
    "gated-shortcut-projection": alone(
        layer(20, 18), depthwise(18), layer(18, 20), replace(gate(20), adds_source=True),
        projection=(depthwise(20), layer(20, 13)),
    ),
    "shortcut-alone": alone(
        layer(20, 18), depthwise(18), layer(18, 20), Gate(activation=RELU, adds_source=True),
        passes=False,
    ),
    "gate-activation-s2": alone(
        layer(20, 18), depthwise(18, 3, 2), layer(18, 10), replace(gate(10), activation=SILU),
        stride=2, projection=(depthwise(20, 3, 2), layer(20, 10)),
    ),
    "gate-activation-before-pw": alone(
        layer(10, 18), replace(gate(18), activation=prelu(18)), layer(18, 14), depthwise(14),
        layer(14, 10),
    ),
    "activation": alone(layer(10, 18), depthwise(18), Gate(activation=HARDSWISH), layer(18, 10)),
}  # fmt: skip
UNITS = {**ACTIVATED, **WINDOWS, **GATED, **CHAINS, **FOLLOWED}
