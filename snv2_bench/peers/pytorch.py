"""Ways to run a network in PyTorch, this package's among them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from snv2_bench.peers.engines import Unavailable
from snv2_kernels.engine import Engine
from snv2_kernels.fuse import fuse

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "channels_last",
    "compiled",
    "cuda_graph",
    "cuda_graph_channels_last",
    "eager",
    "engine",
    "fused",
    "jit",
    "max_autotune",
]


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


def max_autotune(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """torch.compile in the mode max-autotune with frozen weights: on a GPU it measures tiles and
    replays a CUDA graph."""
    torch.compiler.reset()
    options = {**torch._inductor.list_mode_options("max-autotune"), "freezing": True}
    module = torch.compile(model, dynamic=False, options=options)
    return lambda: module(x)


def cuda_graph(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The model as one CUDA graph; a call copies the input to where the graph reads it."""
    if x.device.type != "cuda":
        raise Unavailable(f"CUDA graphs need a GPU, not {x.device}")
    buffer = x.clone()  # keeps the memory format
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose their kernels now, which a capture does not allow
            model(buffer)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        out: Tensor = model(buffer)

    def call() -> Tensor:
        buffer.copy_(x)
        graph.replay()
        return out

    return call


def cuda_graph_channels_last(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The same with weights and input channels-last."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return cuda_graph(model, x.contiguous(memory_format=torch.channels_last))


def fused(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """:func:`snv2_kernels.fuse`."""
    module = fuse(model)
    return lambda: module(x)


def engine(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """:class:`snv2_kernels.Engine`."""
    n, c, h, w = x.shape
    frozen = Engine(model, input_shape=(n, c, h, w))
    return lambda: frozen(x)
