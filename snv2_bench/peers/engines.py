"""Inference engines, set as their documentation says for the lowest latency.

They read the input where PyTorch has it. OpenVINO and ncnn take and give float32; in which type
they compute is an option.
"""

from __future__ import annotations

import copy
import importlib
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Unavailable", "ncnn", "onnxruntime", "openvino"]

_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class Unavailable(RuntimeError):
    """A peer that cannot run here; the message is the whole reason."""


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            reason = f"not installed ({name})"
        else:
            reason = f"cannot be imported: {error}"
        raise Unavailable(f'{reason}: pip install "snv2_kernels[peers]"') from None


@dataclass(frozen=True)
class _SharedMemory:
    """A call of an engine that was handed the memory of two tensors, and keeps neither alive."""

    infer: Callable[[], object]
    x: Tensor
    y: Tensor

    def __call__(self) -> Tensor:
        self.infer()
        return self.y


def onnxruntime(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """ONNX Runtime on the exported model: all optimisations, one thread pool, spinning."""
    ort = _installed("onnxruntime")
    _installed("onnx")  # the exporter's
    if x.dtype == torch.bfloat16:
        raise Unavailable("ONNX Runtime has no bfloat16 convolutions on CPUs")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/net.onnx"
        torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"])
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """OpenVINO on the traced model: one infer request, hint LATENCY, and the input's precision."""
    ov = _installed("openvino")
    x = x.float()
    dtype = _NAMES[_dtype_of(model)]
    converted = ov.convert_model(
        copy.deepcopy(model).float(), example_input=x, input=[list(x.shape)]
    )
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": dtype,
    }
    network = ov.Core().compile_model(converted, "CPU", settings)
    used = network.get_property("INFERENCE_PRECISION_HINT").to_string()
    if used != dtype:
        raise Unavailable(f"OpenVINO computes in {used} on this CPU, not in {dtype}")
    request = network.create_infer_request()
    y = torch.empty(tuple(network.output(0).shape))
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(ov.Tensor(y.numpy(), shared_memory=True))
    return _SharedMemory(request.infer, x, y)


def ncnn(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """ncnn on the model that pnnx makes of the trace.

    A batch is a loop over its images, which is faster than ncnn's own batches.
    """
    runtime, converter = _installed("ncnn"), _installed("pnnx")
    dtype, x = _dtype_of(model), x.float()
    net = runtime.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.opt.use_bf16_storage = net.opt.use_bf16_packed = dtype == torch.bfloat16
    net.opt.use_fp16_storage = net.opt.use_fp16_packed = dtype == torch.float16
    net.opt.use_fp16_arithmetic = dtype == torch.float16
    with tempfile.TemporaryDirectory() as folder:
        shape = [1, *x.shape[1:]]
        traced: Any = torch.jit.trace(copy.deepcopy(model).float(), x[:1], check_trace=False)
        traced.save(f"{folder}/net.pt")
        # pnnx.convert() would import the Python code that it writes as well.
        command = [converter.EXEC_PATH, "net.pt", f"inputshape={shape}".replace(" ", ""), "fp16=0"]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        for load, ending in ((net.load_param, "param"), (net.load_model, "bin")):
            path = Path(folder) / f"net.ncnn.{ending}"
            if load(str(path)) != 0:
                raise RuntimeError(f"ncnn cannot load the .{ending} file that pnnx wrote")
    (first,), (last,) = net.input_names(), net.output_names()

    def scores(image: Any) -> Tensor:
        extractor = net.create_extractor()
        extractor.input(first, runtime.Mat(image))
        status, out = extractor.extract(last)
        if status != 0:
            raise RuntimeError(f"ncnn's extract() returned {status}")
        return torch.tensor(out.numpy())  # a copy, since out's memory goes with it

    return lambda: torch.stack([scores(image) for image in x.numpy()])


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
