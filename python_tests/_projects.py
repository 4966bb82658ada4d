"""Units that differ from the paper's, written as the projects that use them write theirs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _styles import conv_bn, shuffle
from torch import Tensor, nn

# Activations ----------------------------------------------------------------------------------


class SwishByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class HardSwishByHand(nn.Module):
    """As for exporters without the operator."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.relu6 = nn.ReLU6(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.relu6(x + 3) / 6


class ClippedSwish(nn.Module):
    """As the authors' ShuffleNetV2+."""

    def forward(self, inputs: Tensor) -> Tensor:
        clip = torch.clamp(inputs + 3, 0, 6) / 6
        return inputs * clip


ACTIVATIONS: dict[str, tuple[str, Callable[[int], Callable[[Tensor], Tensor]]]] = {
    "relu": ("relu", lambda c: nn.ReLU(inplace=True)),
    "relu-clamp": ("relu", lambda c: lambda x: x.clamp(min=0)),
    "relu-maximum": ("relu", lambda c: lambda x: torch.clamp_min_(x, 0.0)),
    "relu6": ("relu6", lambda c: nn.ReLU6(inplace=True)),
    "relu6-clamp": ("relu6", lambda c: lambda x: torch.clamp(x, 0, 6)),
    "relu6-hardtanh": ("relu6", lambda c: nn.Hardtanh(0.0, 6.0, inplace=True)),
    "relu6-min": ("relu6", lambda c: lambda x: F.relu(x).clamp_max(6)),
    "leaky": ("leaky_relu", lambda c: nn.LeakyReLU(0.1, inplace=True)),
    "leaky-positional": ("leaky_relu", lambda c: lambda x: F.leaky_relu(x, 0.2, True)),
    "leaky-max": ("leaky_relu", lambda c: lambda x: torch.max(x, 0.3 * x)),
    "leaky-where": ("leaky_relu", lambda c: lambda x: torch.where(x > 0, x, x * 0.25)),
    "prelu": ("prelu", nn.PReLU),
    "prelu-one": ("prelu", lambda c: nn.PReLU()),
    "silu": ("silu", lambda c: nn.SiLU(inplace=True)),
    "silu-by-hand": ("silu", lambda c: SwishByHand()),
    "silu-method": ("silu", lambda c: lambda x: x.sigmoid().mul(x)),
    "silu-in-place": ("silu", lambda c: lambda x: x.mul_(x.sigmoid())),
    "hardswish": ("hardswish", lambda c: nn.Hardswish(inplace=True)),
    "hardswish-by-hand": ("hardswish", lambda c: HardSwishByHand()),
    "hardswish-clipped": ("hardswish", lambda c: ClippedSwish()),
    "hardswish-function": ("hardswish", lambda c: lambda x: x * F.hardsigmoid(x)),
    "hardswish-scaled": ("hardswish", lambda c: lambda x: F.hardtanh(x + 3, 0, 6) * (1 / 6) * x),
    "identity": ("identity", lambda c: nn.Identity()),
}


# Gates ----------------------------------------------------------------------------------------


class LinearGate(nn.Module):
    """Linear layers, views, expand_as."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(c, c // 2, bias=False), nn.ReLU(inplace=True),
            nn.Linear(c // 2, c, bias=False), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.size()
        return x * self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1).expand_as(x)


class ConvGate(nn.Module):
    """Convolutions with biases, hard sigmoid."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d((1, 1))
        self.conv1, self.conv2 = nn.Conv2d(c, c // 4, 1), nn.Conv2d(c // 4, c, 1)
        self.act1, self.act2 = nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act2(self.conv2(self.act1(self.conv1(self.avg_pool(x)))))
        return torch.multiply(y, x)


class NormedGate(nn.Module):
    """As the authors' ShuffleNetV2+: a batch norm inside, the hard sigmoid spelled out."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c // 4, 1, bias=False), nn.BatchNorm2d(c // 4),
            nn.ReLU(inplace=True), nn.Conv2d(c // 4, c, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.clamp(self.squeeze(x) + 3, 0, 6).div(6)


class MeanGate(nn.Module):
    """A dimension at a time, indices for views, in place."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(c, 3), nn.Linear(3, c)

    def forward(self, x: Tensor) -> Tensor:
        y = x.mean(-1).mean(-1)
        y = torch.sigmoid(self.up(F.silu(self.down(y))))
        x *= y[:, :, None, None]
        return x


class WindowGate(nn.Module):
    """An average over a window of the map's size."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(c, 5, 1), nn.Conv2d(5, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(x, x.size()[2:])
        y = self.up(F.hardswish(self.down(y)))
        return (F.relu6(y + 3.0, inplace=True) / 6.0).mul(x)


class FlatGate(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(c, 4), nn.Linear(4, c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.down(x.flatten(2).mean(dim=2)).relu()).sigmoid()
        return y.unsqueeze(-1).unsqueeze(-1) * x


class EffectiveGate(nn.Module):
    """Effective squeeze-and-excite, as VoVNet's and PicoDet's neck: one layer, with its norm."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(*conv_bn(c, c))

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.fc(F.adaptive_avg_pool2d(x, 1)))


class EffectiveLinearGate(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.fc = nn.Linear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(x.mean((2, 3)))).view(*x.shape[:2], 1, 1) * x


# Of two layers, and of one.
GATES: dict[str, Callable[[int], nn.Module]] = {
    "linear": LinearGate, "conv": ConvGate, "normed": NormedGate, "mean": MeanGate,
    "window": WindowGate, "flat": FlatGate,
    "effective": EffectiveGate, "effective-linear": EffectiveLinearGate,
}  # fmt: skip


# Norms ----------------------------------------------------------------------------------------


class FrozenNorm(nn.Module):
    """As detection libraries freeze theirs: a product and a sum."""

    def __init__(self, c: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", 0.5 + torch.rand(c))
        self.register_buffer("bias", torch.randn(c))
        self.register_buffer("running_mean", torch.randn(c))
        self.register_buffer("running_var", 0.5 + torch.rand(c))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        scale, bias = scale.reshape(1, -1, 1, 1), bias.reshape(1, -1, 1, 1)
        return x * scale.to(x.dtype) + bias.to(x.dtype)


class FrozenNorm4d(FrozenNorm):
    """Views first."""

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.view(1, -1, 1, 1), self.bias.view(1, -1, 1, 1)
        rv, rm = self.running_var.view(1, -1, 1, 1), self.running_mean.view(1, -1, 1, 1)
        return (x - rm) / torch.sqrt(rv + self.eps) * w + b


class Affine(nn.Module):
    """What is left of a batch norm: a scale and a shift, [1, C, 1, 1]."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1, c, 1, 1) + 0.5)
        self.shift = nn.Parameter(torch.randn(1, c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(torch.mul(self.scale, x), self.shift)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d, "eps": lambda c: nn.BatchNorm2d(c, eps=1e-3),
    "no-affine": lambda c: nn.BatchNorm2d(c, affine=False), "frozen": FrozenNorm,
    "frozen-4d": FrozenNorm4d, "affine": Affine, "none": lambda c: nn.Identity(),
}  # fmt: skip


# Shortcuts ------------------------------------------------------------------------------------

# Of the branch's result and of what it read, which is the second half of the unit's input.
SHORTCUTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plus": lambda y, source, x: y + source,
    "behind": lambda y, source, x: source + y,
    "method": lambda y, source, x: y.add(source),
    "in-place": lambda y, source, x: y.add_(source),
    "augmented": lambda y, source, x: operator.iadd(y, source),
    "function": lambda y, source, x: torch.add(source, y, alpha=1),
    "sliced": lambda y, source, x: y + x[:, -source.shape[1] :],
}


# Units ----------------------------------------------------------------------------------------


class General(nn.Module):
    """A unit of layers as told, ``"pw dw pw"`` in the paper, with a projection where it is told to
    or strides, torchvision's split and shuffle. ``shortcut`` and ``after`` follow the branch."""

    def __init__(
        self, inp: int, oup: int, stride: int = 1, *, layers: str = "pw dw pw", kernel: int = 3,
        dilation: int = 1, act: str = "relu", dw_act: str = "identity", last: str | None = None,
        gate: str | None = None, gate_after: int = -1, norm: str = "batch",
        project: bool = False, shuffled: bool = True, shortcut: str | None = None,
        after: str = "identity",
    ) -> None:  # fmt: skip
        super().__init__()
        self.shortcut, self.after = shortcut, ACTIVATIONS[after][1](oup // 2)
        self.inp, self.half, self.shuffled = inp, oup // 2, shuffled
        half, names = self.half, layers.split()

        def layer(kind: str, i: int, o: int, s: int, function: str) -> nn.Module:
            k, d, g = (kernel, dilation, i) if kind == "dw" else (1, 1, 1)
            conv = nn.Conv2d(i, o, k, s, k // 2 * d, d, g, bias=norm == "none")
            return Layered(conv, NORMS[norm](o), ACTIVATIONS[function][1](o))

        self.side = None
        if project or stride == 2:
            self.side = nn.Sequential(
                layer("dw", inp, inp, stride, dw_act), layer("pw", inp, half, 1, act)
            )
        self.main = nn.Sequential()
        channels = inp if self.side is not None else half
        gate_after %= len(names)
        for i, kind in enumerate(names):
            function = dw_act if kind == "dw" else act
            if i == len(names) - 1 and last is not None:
                function = last
            out = channels if kind == "dw" else half
            self.main.append(layer(kind, channels, out, stride if kind == "dw" else 1, function))
            channels, stride = out, 1 if kind == "dw" else stride
            if gate is not None and i == gate_after:
                self.main.append(GATES[gate](channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.side is None:
            first, y = x.split((self.inp - self.half, self.half), 1)
        else:
            first, y = self.side(x), x
        source, y = y, self.main(y)
        if self.shortcut is not None:
            y = SHORTCUTS[self.shortcut](y, source, x)
        y = torch.cat((first, self.after(y)), 1)
        return shuffle(y, 2) if self.shuffled else y


class Layered(nn.Module):
    def __init__(self, conv: nn.Module, norm: nn.Module, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class PlusUnit(nn.Module):
    """The authors' ShuffleNetV2+: shuffled at the input, wide windows, h-swish and a gate at the
    end; with ``pairs`` of three, their Xception unit."""

    def __init__(
        self, inp: int, oup: int, stride: int, ksize: int, act: str, gated: bool, pairs: int = 0
    ) -> None:
        super().__init__()
        self.stride = stride
        base, outputs, mid = oup // 2, oup - inp, oup // 2
        entry = inp
        if stride == 1:
            entry, outputs = inp // 2, oup - inp // 2

        def function() -> nn.Module:
            return nn.ReLU(inplace=True) if act == "ReLU" else ClippedSwish()

        main: list[nn.Module] = []
        for i in range(pairs):
            i_, s = (entry, stride) if i == 0 else (mid, 1)
            o = outputs if i == pairs - 1 else mid
            main += [*conv_bn(i_, i_, ksize, s, i_), *conv_bn(i_, o), function()]
        if not pairs:
            main = [
                *conv_bn(entry, base), function(), *conv_bn(base, base, ksize, stride, base),
                *conv_bn(base, outputs), function(),
            ]  # fmt: skip
        if gated:
            main.append(NormedGate(outputs))
        self.branch_main = nn.Sequential(*main)
        self.branch_proj = None
        if stride == 2:
            self.branch_proj = nn.Sequential(
                *conv_bn(inp, inp, ksize, stride, inp), *conv_bn(inp, inp), function()
            )

    def forward(self, old_x: Tensor) -> Tensor:
        if self.branch_proj is None:
            x_proj, x = self.channel_shuffle(old_x)
            return torch.cat((x_proj, self.branch_main(x)), 1)
        return torch.cat((self.branch_proj(old_x), self.branch_main(old_x)), 1)

    def channel_shuffle(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, c, h, w = x.data.size()
        x = x.reshape(b * c // 2, 2, h * w).permute(1, 0, 2).reshape(2, -1, c // 2, h, w)
        return x[0], x[1]


PROJECTS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "nanodet": (lambda: nn.Sequential(*stage(act="leaky")), 10),
    "yolov5-face": (lambda: nn.Sequential(*stage(act="silu")), 10),
    "shufflefacenet": (lambda: nn.Sequential(*stage(act="prelu")), 10),
    "yolov5-lite": (lambda: nn.Sequential(*stage(act="hardswish-by-hand", norm="eps")), 10),
    "openpifpaf": (lambda: nn.Sequential(*stage(kernel=5)), 10),
    "openpifpaf-dilated": (
        lambda: nn.Sequential(
            General(10, 28, 1, kernel=5, dilation=2, project=True),
            General(28, 28, kernel=5, dilation=2),
        ),
        10,
    ),
    "plus-relu": (
        lambda: nn.Sequential(
            PlusUnit(8, 24, 2, 3, "ReLU", False), PlusUnit(24, 24, 1, 5, "ReLU", False)
        ),
        8,
    ),
    "plus-swish": (
        lambda: nn.Sequential(
            PlusUnit(8, 24, 2, 7, "HS", True), PlusUnit(24, 24, 1, 5, "HS", True)
        ),
        8,
    ),
    "plus-xception": (
        lambda: nn.Sequential(
            PlusUnit(8, 24, 2, 3, "HS", True, pairs=3), PlusUnit(24, 24, 1, 3, "HS", True, pairs=3)
        ),
        8,
    ),
    "star": (lambda: nn.Sequential(*stage(layers="dw pw dw pw")), 10),
}  # fmt: skip


def stage(**kwargs: Any) -> list[nn.Module]:
    return [General(10, 28, 2, **kwargs), General(28, 28, **kwargs)]
