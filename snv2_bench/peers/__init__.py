"""The ways to run a network that ``snv2 bench`` compares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snv2_bench.peers import engines, pytorch, quantized, xnnpack
from snv2_bench.peers.engines import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor, nn

    Peer = Callable[[nn.Module, Tensor], Callable[[], Tensor]]
    QuantizedPeer = Callable[[nn.Module, Tensor, Sequence[Tensor]], Callable[[], Tensor]]

__all__ = ["GPU_PEERS", "INT8_PEERS", "OURS", "PEERS", "Unavailable", "peers_of"]

OURS = ("fused", "engine")

# Each makes ready to run a model in eval() mode on one input, in as many threads as PyTorch is set
# to; a call runs it once. The model and the input stay as they are.
PEERS: dict[str, Peer] = {
    "eager": pytorch.eager,
    "channels_last": pytorch.channels_last,
    "jit": pytorch.jit,
    "compile": pytorch.compiled,
    "onnxruntime": engines.onnxruntime,
    "openvino": engines.openvino,
    "ncnn": engines.ncnn,
    "mnn": engines.mnn,
    "litert": xnnpack.litert,
    "executorch": xnnpack.executorch,
    "fused": pytorch.fused,
    "engine": pytorch.engine,
}

# Each quantizes a float32 model after batches of the input's shape as well.
INT8_PEERS: dict[str, QuantizedPeer] = {
    "onnxruntime": quantized.onnxruntime,
    "openvino": quantized.openvino,
    "litert": xnnpack.quantized_litert,
    "executorch": xnnpack.quantized_executorch,
    "fused": quantized.quantized_fused,
    "engine": quantized.quantized_engine,
}

GPU_PEERS: dict[str, Peer] = {
    "eager": pytorch.eager,
    "channels_last": pytorch.channels_last,
    "cuda_graph": pytorch.cuda_graph,
    "cuda_graph_channels_last": pytorch.cuda_graph_channels_last,
    "max_autotune": pytorch.max_autotune,
    "fused": pytorch.fused,
    "engine": pytorch.engine,
}


def peers_of(
    device: torch.device,
) -> dict[str, Peer]:
    """The ways to run a network on a device."""
    return GPU_PEERS if device.type == "cuda" else PEERS
