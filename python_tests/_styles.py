"""Units as they are written in the wild, of classes that the package does not know."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from _cases import assert_accurate, draw, run_fused
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.testing import float64_reference, randomize_


class MegviiUnit(nn.Module):
    """The authors': shuffled at the input, branches of unequal widths at stride 2."""

    def __init__(self, inp: int, oup: int, mid: int, *, stride: int) -> None:
        super().__init__()
        self.stride, self.mid_channels, self.inp = stride, mid, inp
        outputs = oup - inp
        self.branch_main = nn.Sequential(
            nn.Conv2d(inp, mid, 1, 1, 0, bias=False), nn.BatchNorm2d(mid), nn.ReLU(inplace=True),
            nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False), nn.BatchNorm2d(mid),
            nn.Conv2d(mid, outputs, 1, 1, 0, bias=False), nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )  # fmt: skip
        self.branch_proj = None
        if stride == 2:
            self.branch_proj = nn.Sequential(
                nn.Conv2d(inp, inp, 3, stride, 1, groups=inp, bias=False), nn.BatchNorm2d(inp),
                nn.Conv2d(inp, inp, 1, 1, 0, bias=False), nn.BatchNorm2d(inp),
                nn.ReLU(inplace=True),
            )  # fmt: skip

    def forward(self, old_x: Tensor) -> Tensor:
        if self.stride == 1:
            x_proj, x = self.channel_shuffle(old_x)
            return torch.cat((x_proj, self.branch_main(x)), 1)
        assert self.branch_proj is not None
        return torch.cat((self.branch_proj(old_x), self.branch_main(old_x)), 1)

    def channel_shuffle(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batchsize, num_channels, height, width = x.data.size()
        assert num_channels % 4 == 0
        x = x.reshape(batchsize * num_channels // 2, 2, height * width)
        x = x.permute(1, 0, 2)
        x = x.reshape(2, -1, num_channels // 2, height, width)
        return x[0], x[1]


class MegviiStage(nn.Module):
    """As in the authors' network, where the units of all stages are one list."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            MegviiUnit(10, 28, 14, stride=2), *(MegviiUnit(14, 28, 14, stride=1) for _ in range(2))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


def shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, -1, height, width)


def conv_bn(i: int, o: int, k: int = 1, s: int = 1, g: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o)]


class Renamed(nn.Module):
    """torchvision's, under other names, with functional activations."""

    def __init__(self, inp: int, oup: int, stride: int) -> None:
        super().__init__()
        half = oup // 2
        self.s = stride
        self.squash = nn.Sequential(*conv_bn(inp if stride > 1 else half, half))
        self.spread = nn.Sequential(*conv_bn(half, half, 3, stride, half))
        self.mix = nn.Sequential(*conv_bn(half, half))
        self.drop = nn.Dropout2d(0.1)
        if stride > 1:
            self.short = nn.Sequential(
                *conv_bn(inp, inp, 3, stride, inp), *conv_bn(inp, half), nn.ReLU()
            )
        else:
            self.short = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1) if self.s == 1 else (x, x)
        right = F.relu(self.squash(right), inplace=True)
        right = torch.relu(self.drop(self.mix(self.spread(right))))
        return shuffle(torch.cat([self.short(left), right], dim=1), 2)


class ConvBNReLU(nn.Module):
    def __init__(
        self, i: int, o: int, k: int = 1, s: int = 1, g: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, k, s, (k - 1) // 2, groups=g, bias=False)
        self.norm = nn.BatchNorm2d(o, eps=1e-3)
        self.activate = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.norm(self.conv(x)))


class Wrapped(nn.Module):
    """As detectors write it: layers in modules of their own, nn.ChannelShuffle."""

    def __init__(self, inp: int, oup: int, stride: int) -> None:
        super().__init__()
        half = oup // 2
        self.main = nn.Sequential(
            ConvBNReLU(inp if stride > 1 else half, half),
            ConvBNReLU(half, half, 3, stride, half, act=False),
            ConvBNReLU(half, half),
        )
        self.proj = None
        if stride > 1:
            self.proj = nn.Sequential(
                ConvBNReLU(inp, inp, 3, stride, inp, act=False), ConvBNReLU(inp, half)
            )
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.proj is None:
            x1, x2 = torch.split(x, x.shape[1] // 2, dim=1)
            return self.shuffle(torch.cat((x1, self.main(x2)), 1))
        return self.shuffle(torch.cat((self.proj(x), self.main(x)), 1))


class WithInnerForward(nn.Module):
    """As OpenMMLab's: a function inside the forward, checkpoints."""

    def __init__(self, inp: int, oup: int, stride: int) -> None:
        super().__init__()
        self.stride, self.with_cp = stride, False
        features = oup // 2
        if stride > 1:
            self.branch1 = nn.Sequential(
                ConvBNReLU(inp, inp, 3, stride, inp, act=False), ConvBNReLU(inp, features)
            )
        self.branch2 = nn.Sequential(
            ConvBNReLU(inp if stride > 1 else features, features),
            ConvBNReLU(features, features, 3, stride, features, act=False),
            ConvBNReLU(features, features),
        )

    def forward(self, x: Tensor) -> Tensor:
        def _inner_forward(x: Tensor) -> Tensor:
            if self.stride > 1:
                out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
            else:
                channels = x.shape[1] // 2
                x1, x2 = x[:, :channels, :, :], x[:, channels:, :, :]
                out = torch.cat((x1, self.branch2(x2)), dim=1)
            return shuffle(out, 2)

        if self.with_cp and x.requires_grad:
            return torch.utils.checkpoint.checkpoint(_inner_forward, x)
        return _inner_forward(x)


class Listed(nn.Module):
    """Units in a ModuleList and layers in another, slices of fixed sizes, folded batch norms."""

    def __init__(self, inp: int, oup: int, stride: int) -> None:
        super().__init__()
        self.stride, self.half = stride, oup // 2
        entry = inp if stride > 1 else self.half
        self.layers = nn.ModuleList([
            nn.Conv2d(entry, self.half, 1), nn.ReLU(),
            nn.Conv2d(self.half, self.half, 3, stride, 1, groups=self.half),
            nn.Conv2d(self.half, self.half, 1), nn.ReLU(),
        ])  # fmt: skip
        self.side = nn.ModuleList()
        if stride > 1:
            self.side.extend(
                [nn.Conv2d(inp, inp, 3, 2, 1, groups=inp), nn.Conv2d(inp, self.half, 1)]
            )

    def forward(self, x: Tensor) -> Tensor:
        y, rest = (x, x) if self.stride > 1 else (x[:, self.half :], x[:, : self.half])
        for layer in self.layers:
            y = layer(y)
        for layer in self.side:
            rest = layer(rest)
        return shuffle(torch.cat([y, rest.relu() if self.stride > 1 else rest], 1), 2)


class Loop(nn.Module):
    def __init__(self, units: list[nn.Module]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return x


def three(unit: Callable[..., nn.Module]) -> list[nn.Module]:
    return [unit(10, 28, 2), unit(28, 28, 1), unit(28, 28, 1)]


STYLES: dict[str, Callable[[], nn.Module]] = {
    "megvii": MegviiStage,
    "renamed": lambda: nn.Sequential(*three(Renamed)),
    "wrapped": lambda: nn.Sequential(*three(Wrapped)),
    "nested": lambda: nn.Sequential(*three(Wrapped)[:1], nn.Sequential(*three(Wrapped)[1:])),
    "inner-forward": lambda: Loop(three(WithInnerForward)),
    "listed": lambda: Loop(three(Listed)),
}
each_style = pytest.mark.parametrize("style", STYLES)


def styled(style: str) -> tuple[nn.Module, Tensor]:
    return randomize_(STYLES[style]()).eval(), draw(2, 10, 9, 11)


def check(model: nn.Module, x: Tensor, kind: str) -> nn.Module:
    """The whole model runs as one op, within the rule for its kind."""
    fused = snv2.fuse(model)
    assert str(snv2.explain(fused)).splitlines()[0] == f"(model): {kind}: fused"
    with torch.no_grad():
        exact = float64_reference(model)(x)
        assert_accurate(kind, run_fused(fused, x), model(x), exact)
    return fused
