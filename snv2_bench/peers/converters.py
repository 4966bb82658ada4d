"""Converters of LiteRT, ExecuTorch and MNN, each run in a process of its own.

They bring JAX and torchao along, change parts of PyTorch, and print; none of that may touch what is
timed. Run by its path, as ``python -P converters.py litert FOLDER``: it reads ``net.pt2``, an
exported program of one image batch, and ``batches.pt``, what to calibrate with (no batches: do not
quantize), and writes ``net.tflite`` or ``net.pte``. MNN's reads ``net.onnx``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FILES"]

FILES = {"litert": "net.tflite", "executorch": "net.pte", "mnn": "net.mnn"}


def _inputs(folder: Path) -> tuple[Any, list[Tensor]]:
    """Returns the exported program and the batches to calibrate with."""
    import torch

    return torch.export.load(folder / "net.pt2"), torch.load(folder / "batches.pt")


def _litert(folder: Path) -> None:
    """Convert by litert-torch, the images channels-last as LiteRT computes."""
    import litert_torch

    program, batches = _inputs(folder)
    (x,), _ = program.example_inputs
    module = litert_torch.to_channel_last_io(program.module(), args=[0])
    path = folder / FILES["litert"]
    litert_torch.convert(module, (x.permute(0, 2, 3, 1).contiguous(),)).export(str(path))
    if batches:
        path.write_bytes(_quantized_tflite(path, batches))


def _quantized_tflite(path: Path, batches: list[Tensor]) -> bytes:
    """Quantize by ai-edge-quantizer: int8 with weights per channel, input and output float32."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer, recipe_manager

    operations = qtyping.TFLOperationName
    recipe = recipe_manager.RecipeManager()
    recipe.add_static_config(
        ".*", operations.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8
    )
    for operation in (operations.INPUT, operations.OUTPUT):
        recipe.add_quantization_config(
            ".*", operation, algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE
        )
    ((signature, names),) = Interpreter(str(path)).get_signature_list().items()
    (name,) = names["inputs"]
    data = [{name: batch.permute(0, 2, 3, 1).contiguous().numpy()} for batch in batches]
    maker = quantizer.Quantizer(str(path), recipe.get_quantization_recipe())
    return bytes(maker.quantize(maker.calibrate({signature: data})).quantized_model)


def _executorch(folder: Path) -> None:
    """Lower to XNNPACK what its partitioner takes."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program, batches = _inputs(folder)
    if batches:
        inputs, _ = program.example_inputs
        program = torch.export.export(_quantized_module(program.module(), batches), inputs)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    (folder / FILES["executorch"]).write_bytes(lowered.to_executorch().buffer)


def _quantized_module(module: Any, batches: list[Tensor]) -> Any:
    """Quantize by PT2E and XNNPACK's quantizer: symmetric int8, weights per channel."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True)
    prepared = prepare_pt2e(module, XNNPACKQuantizer().set_global(config))
    for batch in batches:
        prepared(batch)
    return convert_pt2e(prepared)


def _mnn(folder: Path) -> None:
    """Convert by the extension module itself.

    The module around it, ``MNN.tools.mnnconvert``, installs packages when it is imported and sends
    a report.
    """
    import _tools

    # fmt: off
    _tools.mnnconvert([
        "mnnconvert", "-f", "ONNX", "--modelFile", str(folder / "net.onnx"),
        "--MNNModel", str(folder / FILES["mnn"]), "--bizCode", "snv2",
    ])
    # fmt: on


if __name__ == "__main__":
    {"litert": _litert, "executorch": _executorch, "mnn": _mnn}[sys.argv[1]](Path(sys.argv[2]))
