"""The two runtimes around XNNPACK: LiteRT and ExecuTorch, in float32 and int8."""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from snv2_bench.peers.converters import FILES
from snv2_bench.peers.engines import (
    Unavailable,
    convert,
    installed,
    refuse_other_dtypes,
    silenced,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

__all__ = ["executorch", "litert", "quantized_executorch", "quantized_litert"]

_EXTRA = "peers-xnnpack"
# The file made last of each kind, and a digest of what it was made of: a conversion takes up to a
# minute, and cases that differ in threads alone follow each other.
_latest: dict[str, tuple[bytes, bytes]] = {}


def litert(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """LiteRT with XNNPACK on the model that litert-torch converts; the input is a channels-last
    copy in the interpreter's memory."""
    refuse_other_dtypes(model, "LiteRT")
    return _interpreter(model, x, ())


def quantized_litert(
    model: nn.Module, x: Tensor, batches: Sequence[Tensor]
) -> Callable[[], Tensor]:
    """LiteRT with XNNPACK, quantized by ai-edge-quantizer: static int8, weights per channel."""
    return _interpreter(model, x, batches)


def executorch(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """ExecuTorch on the exported model, lowered to XNNPACK."""
    refuse_other_dtypes(model, "ExecuTorch")
    return _method(model, x, ())


def quantized_executorch(
    model: nn.Module, x: Tensor, batches: Sequence[Tensor]
) -> Callable[[], Tensor]:
    """ExecuTorch lowered to XNNPACK, quantized by its XNNPACKQuantizer: int8, weights per
    channel."""
    return _method(model, x, batches)


def _interpreter(model: nn.Module, x: Tensor, batches: Sequence[Tensor]) -> Callable[[], Tensor]:
    runtime = installed("ai_edge_litert.interpreter", _EXTRA)
    _check_installed("litert_torch")
    content = _converted("litert", model, x, batches)
    with silenced():
        net = runtime.Interpreter(model_content=content, num_threads=torch.get_num_threads())
        net.allocate_tensors()
    (first,), (last,) = net.get_input_details(), net.get_output_details()

    def call() -> Tensor:
        net.invoke()
        return torch.from_numpy(net.get_tensor(last["index"]))  # a copy

    def feed() -> None:
        """Hand over what x holds now, which is no part of a call."""
        net.set_tensor(first["index"], x.permute(0, 2, 3, 1).contiguous().numpy())

    feed()
    call.feed = feed  # type: ignore[attr-defined]
    return call


def _method(model: nn.Module, x: Tensor, batches: Sequence[Tensor]) -> Callable[[], Tensor]:
    with silenced():
        runtime = installed("executorch.runtime", _EXTRA)
        pool = installed("executorch.extension.pybindings.portable_lib", _EXTRA)
        content = _converted("executorch", model, x, batches)
        pool._unsafe_reset_threadpool(torch.get_num_threads())
        program: Any = runtime.Runtime.get().load_program(content)
        method: Any = program.load_method("forward")

    def call() -> Tensor:
        (y,) = method.execute([x])
        out: Tensor = y
        return out

    call.program = program  # type: ignore[attr-defined]  # owns the memory of the method
    return call


def _check_installed(package: str) -> None:
    """Raise :class:`Unavailable` for a package that is not there, and leave its import to the
    process that converts."""
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f'not installed ({package}): pip install "snv2_kernels[{_EXTRA}]"')


def _converted(kind: str, model: nn.Module, x: Tensor, batches: Sequence[Tensor]) -> bytes:
    """Returns the file that a converter makes of a model."""
    with torch.inference_mode(False), torch.no_grad():
        program = torch.export.export(model, (x.clone(),))
    made_of = hashlib.sha256(f"{x.shape} {program.graph_module.code}".encode())
    for tensor in (*program.state_dict.values(), *program.constants.values(), *batches):
        if isinstance(tensor, torch.Tensor):
            made_of.update(tensor.detach().contiguous().numpy().tobytes())
    digest = made_of.digest()
    known, content = _latest.get(kind, (b"", b""))
    if known != digest:
        with tempfile.TemporaryDirectory() as folder:
            torch.export.save(program, f"{folder}/net.pt2")
            torch.save([batch.clone() for batch in batches], f"{folder}/batches.pt")
            convert(kind, folder)
            content = (Path(folder) / FILES[kind]).read_bytes()
        _latest[kind] = digest, content
    return content
