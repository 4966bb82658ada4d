"""What tests, ``snv2 verify`` and benchmarks share: random models, errors and bounds."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["float64_reference", "max_error", "randomize_"]

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def randomize_(model: M, seed: int = 0) -> M:
    """Draw all parameters and batch norm statistics at random, in place.

    A fresh batch norm (scale 1, shift 0, mean 0, variance 1) is the same for all channels, and
    hides a channel that went to the wrong place. Activations keep a scale near 1 through any
    depth.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform_(t: Tensor, low: float, high: float) -> None:
        t.copy_(torch.empty(t.shape, device="cpu").uniform_(low, high, generator=generator))

    def normal_(t: Tensor, std: float) -> None:
        t.copy_(torch.empty(t.shape, device="cpu").normal_(0.0, std, generator=generator))

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            normal_(module.weight, (2.0 / fan_in) ** 0.5)
            if module.bias is not None:
                normal_(module.bias, 0.1)
        elif isinstance(module, nn.PReLU):
            uniform_(module.weight, 0.05, 0.5)
        elif isinstance(module, nn.BatchNorm2d):
            if module.affine:
                uniform_(module.weight, 0.5, 1.5)
                normal_(module.bias, 0.3)
            assert module.running_mean is not None
            assert module.running_var is not None
            normal_(module.running_mean, 0.3)
            uniform_(module.running_var, 0.5, 2.0)
    return model


def float64_reference(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A float64 copy of the plain PyTorch ``model``: the truth that errors are measured against."""
    copied = copy.deepcopy(model).double()

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = copied(x.double())
        return out

    return forward


def max_error(actual: Tensor, expected: Tensor) -> float:
    """``max |actual - expected| / max |expected|`` in float64; 0 for empty tensors.

    Raises:
        ValueError: if the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(
            f"actual: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
        )
    if expected.numel() == 0:
        return 0.0
    expected = expected.double()
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((actual.double() - expected).abs().max() / scale)
