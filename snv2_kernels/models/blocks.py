"""What the networks share: layers, the shuffle, published widths and checks of lists."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from torch import Tensor, nn

__all__ = [
    "WIDTHS",
    "by_size",
    "channel_shuffle",
    "check_constructors",
    "check_list",
    "check_lists",
    "check_sizes",
    "check_stride",
    "depthwise",
    "pointwise",
]

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


def check_sizes(least: int = 1, /, **sizes: Any) -> None:
    """Raise TypeError or ValueError, naming the argument, unless all are integers that large."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral):
            raise TypeError(f"{name}: expected an integer, got {size!r}")
        if size < least:
            raise ValueError(f"{name}: expected at least {least}, got {size}")


def check_stride(stride: Any, most: int = 2) -> None:
    """Raise ValueError unless it is an integer from 1 to ``most``."""
    if not isinstance(stride, Integral) or stride not in range(1, most + 1):
        expected = "1 or 2" if most == 2 else f"1 to {most}"
        raise ValueError(f"stride: expected {expected}, got {stride!r}")


def check_list(name: str, numbers: Any, length: int | None = None, least: int = 1) -> None:
    """Raise TypeError or ValueError, naming the argument, unless it holds so many integers."""
    if not isinstance(numbers, Sequence) or isinstance(numbers, str):
        raise TypeError(f"{name}: expected a list of integers, got {numbers!r}")
    if length is not None and len(numbers) != length:
        raise ValueError(f"{name}: expected {length} integers, got {len(numbers)}")
    for i, number in enumerate(numbers):
        check_sizes(least, **{f"{name}[{i}]": number})


def check_lists(repeats: list[int], channels: list[int], stages: int, others: int) -> None:
    """Check that there are as many repeats as stages, and ``others`` more channels."""
    check_list("stages_repeats", repeats, stages)
    check_list("stages_out_channels", channels, stages + others)


def check_constructors(**constructors: object) -> None:
    """Raise TypeError, naming the argument, unless all can be called."""
    for name, constructor in constructors.items():
        if not callable(constructor):
            raise TypeError(f"{name}: expected a constructor of modules, got {constructor!r}")


def by_size(sizes: dict[str, list[int]], model_size: str) -> list[int]:
    """What a table of sizes says, ValueError if it has no such size."""
    if not isinstance(model_size, str) or model_size not in sizes:
        raise ValueError(f"model_size: expected one of {', '.join(sizes)}, got {model_size!r}")
    return sizes[model_size]
