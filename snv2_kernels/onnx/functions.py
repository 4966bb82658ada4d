"""What steps of an imported forward call, in plain PyTorch: tensors first, then what is fixed."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "add", "concatenate", "divide", "flatten", "global_average_pool", "hard_sigmoid", "hard_swish",
    "leaky_relu", "matmul", "mean", "multiply", "permute", "relu", "reshape", "select", "shuffle",
    "sigmoid", "split", "subtract", "take", "unflatten",
]  # fmt: skip


def relu(x: Tensor) -> Tensor:
    return torch.relu(x)


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    return F.leaky_relu(x, slope)


def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def hard_sigmoid(x: Tensor) -> Tensor:
    return F.hardsigmoid(x)


def hard_swish(x: Tensor) -> Tensor:
    return F.hardswish(x)


def clamp(x: Tensor, least: float | None, most: float | None) -> Tensor:
    return torch.clamp(x, least, most)


def add(x: Any, y: Any) -> Any:
    return x + y


def subtract(x: Any, y: Any) -> Any:
    return x - y


def multiply(x: Any, y: Any) -> Any:
    return x * y


def divide(x: Any, y: Any) -> Any:
    return x / y


def subtract_from(x: Tensor, number: float) -> Tensor:
    return number - x


def divide_from(x: Tensor, number: float) -> Tensor:
    return number / x


def matmul(x: Tensor, y: Tensor) -> Tensor:
    return torch.matmul(x, y)


def concatenate(*given: Any) -> Tensor:
    return torch.cat(given[:-1], given[-1])


def split(x: Tensor, sizes: tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
    return torch.split(x, list(sizes), dim)


def take(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    return x.narrow(dim, start, length)


def select(x: Tensor, dim: int, index: int) -> Tensor:
    return x.select(dim, index)


def permute(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.permute(dims)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Not ``F.channel_shuffle``, which ``torch.onnx.export`` does not know."""
    n, c, h, w = x.shape
    return x.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def flatten(x: Tensor, first: int, last: int) -> Tensor:
    return x.flatten(first, last)


def unflatten(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    return x.unflatten(dim, sizes)  # type: ignore[no-any-return]


def reshape(x: Tensor, *given: Any) -> Tensor:
    """To sizes that are read from other maps.

    Args:
        x: a tensor.
        given: the other maps, then for each dimension a number or a tuple of what is multiplied:
            numbers, and pairs of a map's place among the others and an axis.
    """
    *others, sizes = given
    return x.reshape([_extent(size, others) for size in sizes])


def _extent(size: Any, others: list[Tensor]) -> Any:
    if not isinstance(size, tuple):
        return size
    return math.prod(f if isinstance(f, int) else others[f[0]].shape[f[1]] for f in size)


def mean(x: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    return x.mean(dims, keepdim)


def global_average_pool(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1)
