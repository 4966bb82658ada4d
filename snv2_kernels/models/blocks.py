"""What the networks share: layers, the shuffle, published widths and checks of lists."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["WIDTHS", "by_size", "channel_shuffle", "check_lists", "depthwise", "pointwise"]

# Channels after conv1, stages 2, 3, 4 and conv5: Table 5 of the paper.
WIDTHS = {
    "0.5x": [24, 48, 96, 192, 1024],
    "1.0x": [24, 116, 232, 464, 1024],
    "1.5x": [24, 176, 352, 704, 1024],
    "2.0x": [24, 244, 488, 976, 2048],
}


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave ``groups`` equal runs of channels.

    ``y[:, i * groups + g] = x[:, g * (C // groups) + i]`` for ``x`` of shape [N, C, H, W].

    Raises:
        RuntimeError: from torch, if C is not a multiple of ``groups``.
    """
    n, c, h, w = x.shape
    return x.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def depthwise(channels: int, stride: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)


def pointwise(inp: int, oup: int) -> nn.Conv2d:
    return nn.Conv2d(inp, oup, 1, bias=False)


def check_lists(repeats: list[int], channels: list[int], stages: int, others: int) -> None:
    """Raise ValueError unless there are as many repeats as stages, and ``others`` more channels."""
    if len(repeats) != stages:
        raise ValueError(f"stages_repeats: expected {stages} integers, got {len(repeats)}")
    if len(channels) != stages + others:
        raise ValueError(
            f"stages_out_channels: expected {stages + others} integers, got {len(channels)}"
        )


def by_size(sizes: dict[str, list[int]], model_size: str) -> list[int]:
    """What a table of sizes says, ValueError if it has no such size."""
    if model_size not in sizes:
        raise ValueError(f"model_size: expected one of {', '.join(sizes)}, got {model_size!r}")
    return sizes[model_size]
