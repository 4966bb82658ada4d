"""Ways to run a network in PyTorch, this package's among them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from snv2_kernels.engine import Engine
from snv2_kernels.fuse import fuse

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["channels_last", "compiled", "eager", "engine", "fused", "jit"]


def eager(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The model as it is."""
    return lambda: model(x)


def channels_last(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Weights and input channels-last."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.contiguous(memory_format=torch.channels_last)
    return lambda: model(x)


def jit(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """TorchScript, frozen and optimised for inference."""
    traced: Any = torch.jit.trace(model, x, check_trace=False)
    frozen: Any = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
    return lambda: frozen(x)


def compiled(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """torch.compile with frozen weights."""
    torch.compiler.reset()  # else a second shape would be compiled with dynamic sizes
    module = torch.compile(model, dynamic=False, options={"freezing": True})
    return lambda: module(x)


def fused(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """:func:`snv2_kernels.fuse`."""
    module = fuse(model)
    return lambda: module(x)


def engine(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """:class:`snv2_kernels.Engine`."""
    n, c, h, w = x.shape
    frozen = Engine(model, input_shape=(n, c, h, w))
    return lambda: frozen(x)
