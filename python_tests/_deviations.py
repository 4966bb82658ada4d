"""Units that deviate from the paper's: activations, windows, gates, other branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from _cases import draw, largest_error
from torch import Tensor, nn

from snv2_kernels.ops import run_plan
from snv2_kernels.packing import Builder, GpuPlanBuilder, PlanBuilder, TritonPlanBuilder
from snv2_kernels.packing.units import IDENTITY, RELU, Activation, Gate, Layer, Unit
from snv2_kernels.testing import float64_reference, max_error, randomize_

# What makes a plan whose maps have a dtype, by backend.
BUILDERS: dict[str, Callable[[], Any]] = {
    "cpu": PlanBuilder, "cuda": GpuPlanBuilder, "cuda-emulated": GpuPlanBuilder,
    "cuda-ptx": GpuPlanBuilder, "triton": TritonPlanBuilder,
}  # fmt: skip


def activation(name: str, channels: int) -> Activation:
    """``"prelu"`` has a slope for each channel, ``"prelu-one"`` one for all."""
    kind = name.removesuffix("-one")
    if kind == "leaky_relu":
        return Activation(kind, 0.1)
    if kind == "prelu":
        slopes = torch.rand(1 if kind != name else channels, generator=_generator(channels)) - 0.3
        return Activation(kind, slopes)
    return Activation(kind)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ACTIVATIONS = [
    "relu", "identity", "relu6", "leaky_relu", "prelu", "prelu-one", "silu", "hardswish",
]  # fmt: skip


class After(nn.Module):
    def __init__(self, channels: int, act: str) -> None:
        super().__init__()
        self.kind, self.slope = act.removesuffix("-one"), activation(act, channels).slope
        if isinstance(self.slope, Tensor):
            self.slope = nn.Parameter(self.slope)

    @property
    def activation(self) -> Activation:
        plain = {"relu": RELU, "identity": IDENTITY}
        return plain.get(self.kind) or Activation(self.kind, self.slope)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x)


class ConvBn(nn.Module):
    """A layer: pointwise to some width, or depthwise where ``kernel`` is above one."""

    def __init__(
        self, inp: int, oup: int, kernel: int = 1, stride: int = 1, dilation: int = 1,
        act: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        padding, groups = dilation * (kernel // 2), inp if kernel > 1 else 1
        self.conv = nn.Conv2d(
            inp, oup, kernel, stride, padding, dilation, groups=groups, bias=kernel > 3
        )
        self.bn = nn.BatchNorm2d(oup)
        act = act or ("identity" if kernel > 1 else "relu")
        self.kernel, self.dilation = kernel, dilation
        self.after = After(oup, act)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.bn(self.conv(x)))

    def layer(self) -> Layer:
        return Layer(self.conv, self.bn, self.after.activation, self.kernel, self.dilation)


class SqueezeExcite(nn.Module):
    """And what may follow it: the branch's input, an activation."""

    def __init__(
        self, channels: int, act: str = "relu", gate: str = "sigmoid", after: str = "identity",
        adds_source: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        reduced = max(1, channels // 4)
        self.reduce = ConvBn(channels, reduced, act=act)
        self.expand = ConvBn(reduced, channels, act=gate)
        self.after, self.adds_source = After(channels, after), adds_source

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        y = x * self.expand(self.reduce(x.mean([2, 3], keepdim=True)))
        return self.after(y + source if self.adds_source else y)

    def layer(self) -> Gate[Layer]:
        layers = self.reduce.layer(), self.expand.layer()
        return Gate(*layers, self.after.activation, self.adds_source)


class Shortcut(nn.Module):
    """The branch's input, and an activation."""

    adds_source = True

    def __init__(self, channels: int, after: str = "relu") -> None:
        super().__init__()
        self.after = After(channels, after)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        return self.after(x + source)

    def layer(self) -> Gate[Layer]:
        return Gate(activation=self.after.activation, adds_source=True)


class DeviantUnit(nn.Module):
    """A unit with the given branch; its lists are permuted, unless it is strided."""

    def __init__(
        self,
        channels: int,
        branch: Sequence[ConvBn | SqueezeExcite | Shortcut],
        stride: int = 1,
        projection: Sequence[ConvBn] = (),
        passthrough: bool = True,
    ) -> None:
        super().__init__()
        self.branch, self.projection = nn.Sequential(*branch), nn.Sequential(*projection)
        self.stride = stride
        inp = next(part.conv.in_channels for part in branch if isinstance(part, ConvBn))
        oup = [part.conv.out_channels for part in branch if isinstance(part, ConvBn)][-1]
        shuffled = torch.randperm(channels, generator=_generator(channels)).tolist()
        self.main, self.passthrough = shuffled[:inp], shuffled[inp:] if passthrough else []
        first = projection[1].conv.out_channels if projection else len(self.passthrough)
        self.order = torch.randperm(first + oup, generator=_generator(oup)).tolist()

    def forward(self, x: Tensor) -> Tensor:
        y = source = x[:, self.main]
        for part in self.branch:
            y = part(y) if isinstance(part, ConvBn) else part(y, source)
        parts = [y]
        if self.projection or self.passthrough:
            parts.insert(0, self.projection(x) if self.projection else x[:, self.passthrough])
        return torch.cat(parts, 1)[:, self.order]

    def add_to(self, builder: Builder) -> None:
        branch: Any = tuple(part.layer() for part in self.branch)
        projection: Any = tuple(part.layer() for part in self.projection) or None
        lists = self.main, self.passthrough, self.order
        windows = [part for part in self.branch if isinstance(part, ConvBn) and part.kernel > 1]
        strides = [part.conv.stride[0] for part in windows]
        strided = strides.index(self.stride) if self.stride in strides else 0
        builder.add_unit(Unit(self.stride, branch, *lists, projection, strided))


def paper_unit(
    channels: int, stride: int, acts: Sequence[str | None], window: int = 3, dilation: int = 1
) -> DeviantUnit:
    """pw, dw, pw and, at stride 2, dw and pw of the projection; activations in that order."""
    half, width = (channels, channels + 3) if stride == 2 else (channels // 2, channels // 2)
    pw1, dw, pw2, proj_dw, proj_pw = acts
    branch = [
        ConvBn(half, width, act=pw1),
        ConvBn(width, width, window, stride, dilation, dw),
        ConvBn(width, half, act=pw2),
    ]
    projection = [
        ConvBn(channels, channels, window, 2, dilation, proj_dw),
        ConvBn(channels, half, act=proj_pw),
    ]
    return DeviantUnit(channels, branch, stride, projection if stride == 2 else ())


Place = tuple[str, torch.dtype]  # a backend, and what its maps are of


def plan_of(place: Place, units: nn.Module, channels: int) -> Any:
    backend, dtype = place
    builder = BUILDERS[backend]()
    builder.add_import(channels)
    for unit in units.children():
        unit.add_to(builder)  # type: ignore[operator]
    return builder.build(dtype, *([] if backend == "cpu" else [torch.get_default_device()]))


def check(
    place: Place, units: Sequence[DeviantUnit], shape: Sequence[int], kind: str = "unit"
) -> None:
    """The rule for some units and an input of that shape."""
    backend, dtype = place
    module = randomize_(nn.Sequential(*units)).eval()
    x = draw(*shape, dtype=dtype)
    out = run_plan(x, plan_of(place, module, x.shape[1]), backend)
    exact = float64_reference(module)(x)
    eps = torch.finfo(dtype).eps
    error = max_error(out, exact)
    assert out.dtype == dtype
    assert error <= largest_error(kind, dtype, backend) * eps, f"{error / eps:.2f} eps"
    # Eager's error in a few elements is one throw of the dice.
    if out.numel() >= 512:
        with torch.no_grad():
            eager = max_error(module.to(dtype)(x), exact)
        module.float()
        assert error <= 1.5 * eager + eps, f"{error / eps:.2f} eps, eager {eager / eps:.2f} eps"
