"""PicoDet's backbone in small, as its project writes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Act = Callable[[], nn.Module]


def split_and_shuffle(x: Tensor, groups: int) -> Tensor:
    """ESNet's."""
    n, c, h, w = x.shape
    x = torch.reshape(x, [n, groups, c // groups, h, w])
    return torch.reshape(torch.transpose(x, 1, 2), [n, c, h, w])


class ConvNormAct(nn.Module):
    def __init__(
        self, i: int, o: int, k: int = 1, s: int = 1, g: int = 1, act: Act | None = None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False)
        self.bn, self.act = nn.BatchNorm2d(o), act() if act is not None else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y if self.act is None else self.act(y)


class HardGate(nn.Module):
    """ESNet's squeeze-and-excite."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = nn.Conv2d(channels, channels // 4, 1)
        self.conv2 = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        out = F.relu(self.conv1(self.avg_pool(inputs)))
        return torch.multiply(inputs, F.hardsigmoid(self.conv2(out)))


class EsUnit(nn.Module):
    """ESNet's at stride 1: the first layer's result stays beside the depthwise one's."""

    def __init__(
        self, channels: int, mid: int, act: Act = nn.Hardswish, dw_act: Act | None = None,
        kernel: int = 3, gated: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        half = channels // 2
        self.conv_pw = ConvNormAct(half, mid // 2, act=act)
        self.conv_dw = ConvNormAct(mid // 2, mid // 2, kernel, 1, mid // 2, act=dw_act)
        self.se = HardGate(mid) if gated else nn.Identity()
        self.conv_linear = ConvNormAct(mid, half, act=act)

    def beside(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv_dw(x)], dim=1)

    def forward(self, inputs: Tensor) -> Tensor:
        x1, x2 = torch.split(inputs, [inputs.shape[1] // 2, inputs.shape[1] // 2], dim=1)
        x3 = self.conv_linear(self.se(self.beside(self.conv_pw(x2))))
        return split_and_shuffle(torch.cat([x1, x3], dim=1), 2)


class EsUnitDS(nn.Module):
    """ESNet's at stride 2: a gate in the branch, and no shuffle but two layers behind the join."""

    def __init__(self, inp: int, mid: int, oup: int, act: Act = nn.Hardswish) -> None:
        super().__init__()
        half, mid = oup // 2, mid // 2
        self.conv_dw_1 = ConvNormAct(inp, inp, 3, 2, inp)
        self.conv_linear_1 = ConvNormAct(inp, half, act=act)
        self.conv_pw_2 = ConvNormAct(inp, mid, act=act)
        self.conv_dw_2 = ConvNormAct(mid, mid, 3, 2, mid)
        self.se = HardGate(mid)
        self.conv_linear_2 = ConvNormAct(mid, half, act=act)
        self.conv_dw_mv1 = ConvNormAct(oup, oup, 3, 1, oup, act=nn.Hardswish)
        self.conv_pw_mv1 = ConvNormAct(oup, oup, act=nn.Hardswish)

    def forward(self, inputs: Tensor) -> Tensor:
        x1 = self.conv_linear_1(self.conv_dw_1(inputs))
        x2 = self.conv_linear_2(self.se(self.conv_dw_2(self.conv_pw_2(inputs))))
        out = torch.cat([x1, x2], dim=1)
        return self.conv_pw_mv1(self.conv_dw_mv1(out))


class EsNet(nn.Module):
    """All blocks in one list, of which the maps of some are returned."""

    def __init__(self, feature_maps: Sequence[int] = (3, 5, 7)) -> None:
        super().__init__()
        self.feature_maps = list(feature_maps)
        self.conv1 = ConvNormAct(3, 8, 3, 2, act=nn.Hardswish)
        self.max_pool = nn.MaxPool2d(3, 2, 1)
        self._block_list = []
        channels = 8
        for stage, (repeats, width) in enumerate(((2, 16), (2, 24), (2, 32))):
            for i in range(repeats):
                block: nn.Module = EsUnitDS(channels, 16, width) if i == 0 else EsUnit(width, 16)
                self.add_module(f"{stage + 2}_{i + 1}", block)
                self._block_list.append(block)
                channels = width

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.max_pool(self.conv1(x))
        outs = []
        for i, block in enumerate(self._block_list):
            y = block(y)
            if i + 2 in self.feature_maps:
                outs.append(y)
        return outs
