"""Engines on a network that they quantize to int8, after the same batches of images.

All take the float32 model, the float32 input and the batches, and give float32 scores, so that a
call has the rounding of its input too.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from typing import TYPE_CHECKING, Any

import torch

import snv2_kernels
from snv2_bench.peers.engines import (
    export_onnx,
    installed,
    openvino_request,
    session_of,
    silenced,
)
from snv2_kernels.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

__all__ = ["onnxruntime", "openvino", "quantized_engine", "quantized_fused"]


class _Batches:
    """Calibration data as ONNX Runtime reads it: one batch a call, None at the end."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._left: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._left, None)
        return None if batch is None else {"x": batch.numpy()}


def onnxruntime(model: nn.Module, x: Tensor, batches: Sequence[Tensor]) -> Callable[[], Tensor]:
    """ONNX Runtime, quantized by its quantize_static: QDQ, unsigned activations, weights per
    channel."""
    installed("onnxruntime")
    installed("onnx")
    quantization = installed("onnxruntime.quantization")
    shape_inference = installed("onnxruntime.quantization.shape_inference")
    with tempfile.TemporaryDirectory() as folder, silenced():
        net, prepared, final = (f"{folder}/{name}.onnx" for name in ("net", "prepared", "final"))
        export_onnx(model, x, net)
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # it advises to do what was just done
        try:
            shape_inference.quant_pre_process(net, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared, final, _reader(quantization, batches),
                quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                # Without VNNI sums of two products of 8 bits overflow.
                reduce_range=not torch.cpu._is_vnni_supported(),
            )  # fmt: skip
        finally:
            root.setLevel(level)
        return session_of(final, x)


def _reader(quantization: Any, batches: Sequence[Tensor]) -> Any:
    """Returns the batches in a class of ONNX Runtime's, which it asks for."""
    return type("Reader", (_Batches, quantization.CalibrationDataReader), {})(batches)


def openvino(model: nn.Module, x: Tensor, batches: Sequence[Tensor]) -> Callable[[], Tensor]:
    """OpenVINO, quantized by NNCF with its defaults: one infer request, hint LATENCY."""
    ov, nncf = installed("openvino"), installed("nncf")
    with silenced():
        converted = ov.convert_model(copy.deepcopy(model), example_input=x, input=[list(x.shape)])
        data = nncf.Dataset([batch.numpy() for batch in batches])
        quantized = nncf.quantize(converted, data, subset_size=len(batches))
        return openvino_request(quantized, x, "f32")


def quantized_fused(model: nn.Module, x: Tensor, batches: Sequence[Tensor]) -> Callable[[], Tensor]:
    """:func:`snv2_kernels.quantize`."""
    module = _quantized(model, batches)
    return lambda: module(x)


def quantized_engine(
    model: nn.Module, x: Tensor, batches: Sequence[Tensor]
) -> Callable[[], Tensor]:
    """:class:`snv2_kernels.Engine` of what :func:`snv2_kernels.quantize` makes."""
    n, c, h, w = x.shape
    frozen = Engine(_quantized(model, batches), input_shape=(n, c, h, w))
    return lambda: frozen(x)


def _quantized(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    return snv2_kernels.quantize(model, batches)
