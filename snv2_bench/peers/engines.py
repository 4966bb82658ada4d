"""Inference engines, set as their documentation says for the lowest latency.

They read the input where PyTorch has it, but for MNN, which has a copy. OpenVINO and ncnn take and
give float32; in which type they compute is an option.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from snv2_bench.peers import converters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "Unavailable",
    "convert",
    "export_onnx",
    "installed",
    "mnn",
    "ncnn",
    "onnxruntime",
    "openvino",
    "openvino_request",
    "refuse_other_dtypes",
    "session_of",
    "silenced",
]

_NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class Unavailable(RuntimeError):
    """A peer that cannot run here; the message is the whole reason."""


def installed(name: str, extra: str = "peers") -> Any:
    """Import a package of an extra.

    Raises:
        Unavailable: if it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            reason = f"not installed ({name.partition('.')[0]})"
        else:
            reason = f"cannot be imported: {error}"
        raise Unavailable(f'{reason}: pip install "snv2_kernels[{extra}]"') from None


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drop what libraries print, by Python or to the descriptors themselves."""
    numbers = (1, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(number) for number in numbers]
    with open(os.devnull, "w") as nowhere:
        try:
            for number in numbers:
                os.dup2(nowhere.fileno(), number)
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
        finally:
            for number, copied in zip(numbers, kept, strict=True):
                os.dup2(copied, number)
                os.close(copied)


def convert(kind: str, folder: str) -> None:
    """Run a converter of :mod:`snv2_bench.peers.converters` in a process of its own.

    Raises:
        RuntimeError: with the last line of what it printed, if it fails.
    """
    assert converters.__file__ is not None
    command = [sys.executable, "-P", converters.__file__, kind, folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        raise RuntimeError(f"conversion for {kind}: {lines[-1]}")


def refuse_other_dtypes(model: nn.Module, name: str) -> None:
    """Raise :class:`Unavailable` for a model that is not in float32."""
    dtype = _dtype_of(model)
    if dtype != torch.float32:
        raise Unavailable(f"{name} is measured in float32 and int8 alone, not in {_NAMES[dtype]}")


@dataclass(frozen=True)
class _SharedMemory:
    """A call of an engine that was handed the memory of two tensors, and keeps neither alive."""

    infer: Callable[[], object]
    x: Tensor
    y: Tensor

    def __call__(self) -> Tensor:
        self.infer()
        return self.y


def export_onnx(model: nn.Module, x: Tensor, path: str) -> None:
    """Write a model as an ONNX file with the input ``x`` and the output ``y``."""
    installed("onnx")  # the exporter's
    torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"], output_names=["y"])


def session_of(path: str, x: Tensor) -> Callable[[], Tensor]:
    """Returns a call of ONNX Runtime on a file: one thread pool, spinning."""
    ort = installed("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def onnxruntime(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """ONNX Runtime on the exported model: all optimisations, one thread pool, spinning."""
    installed("onnxruntime")
    if x.dtype == torch.bfloat16:
        raise Unavailable("ONNX Runtime has no bfloat16 convolutions on CPUs")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/net.onnx"
        export_onnx(model, x, path)
        return session_of(path, x)


def openvino_request(network: Any, x: Tensor, dtype: str) -> Callable[[], Tensor]:
    """Returns a call of OpenVINO on its own model: one infer request, hint LATENCY.

    Args:
        network: OpenVINO's model.
        x: input in float32.
        dtype: in which it computes what is not quantized, by OpenVINO's name.
    """
    ov = installed("openvino")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": dtype,
    }
    compiled = ov.Core().compile_model(network, "CPU", settings)
    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if used != dtype:
        raise Unavailable(f"OpenVINO computes in {used} on this CPU, not in {dtype}")
    request = compiled.create_infer_request()
    y = torch.empty(tuple(compiled.output(0).shape))
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(ov.Tensor(y.numpy(), shared_memory=True))
    return _SharedMemory(request.infer, x, y)


def openvino(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """OpenVINO on the traced model: one infer request, hint LATENCY, and the input's precision."""
    ov = installed("openvino")
    x = x.float()
    converted = ov.convert_model(
        copy.deepcopy(model).float(), example_input=x, input=[list(x.shape)]
    )
    return openvino_request(converted, x, _NAMES[_dtype_of(model)])


def mnn(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """MNN on its conversion of the exported model, by its module API; the input is a copy."""
    with silenced():
        runtime = installed("MNN")
        refuse_other_dtypes(model, "MNN")
        settings = {"backend": 0, "numThread": torch.get_num_threads(), "precision": "high"}
        manager = runtime.nn.create_runtime_manager((settings,))
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(model, x, f"{folder}/net.onnx")
            convert("mnn", folder)
            module = runtime.nn.load_module_from_file(
                f"{folder}/net.mnn", ["x"], ["y"], runtime_manager=manager
            )
        image = runtime.expr.const(x.numpy(), list(x.shape), runtime.expr.NCHW)

    def call() -> Tensor:
        return torch.tensor(module.forward(image).read())  # a copy, since its memory goes

    return call


def ncnn(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """ncnn on the model that pnnx makes of the trace.

    A batch is a loop over its images, which is faster than ncnn's own batches.
    """
    runtime, converter = installed("ncnn"), installed("pnnx")
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
