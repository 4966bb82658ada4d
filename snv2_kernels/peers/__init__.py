"""The ways to run a network that ``snv2 bench`` compares."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snv2_kernels.peers import engines, pytorch
from snv2_kernels.peers.engines import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

__all__ = ["OURS", "PEERS", "Unavailable"]

OURS = ("fused", "engine")

# Each makes ready to run a model in eval() mode on one input, in as many threads as PyTorch is set
# to; a call runs it once. The model and the input stay as they are.
PEERS: dict[str, Callable[[nn.Module, Tensor], Callable[[], Tensor]]] = {
    "eager": pytorch.eager,
    "channels_last": pytorch.channels_last,
    "jit": pytorch.jit,
    "compile": pytorch.compiled,
    "onnxruntime": engines.onnxruntime,
    "openvino": engines.openvino,
    "ncnn": engines.ncnn,
    "fused": pytorch.fused,
    "engine": pytorch.engine,
}
