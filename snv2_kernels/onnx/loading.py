"""``load_onnx``: the file read, its graph imported, the module built."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from snv2_kernels.onnx import moves, operators, quantized  # noqa: F401  # register operators
from snv2_kernels.onnx.importer import Importer
from snv2_kernels.onnx.model import OnnxModel, OnnxNetwork
from snv2_kernels.onnx.reader import read_file
from snv2_kernels.onnx.steps import Draft, live, merged, placed
from snv2_kernels.onnx.values import Map, Quantization
from snv2_kernels.quantization.spans import Span, within_spans

__all__ = ["load_onnx"]


def load_onnx(path: str | os.PathLike[str], dtype: str | None = None) -> nn.Module:
    """The network of an ONNX file as a module, in ``eval()`` mode.

    Its layers are submodules, ``nn.Conv2d``, ``nn.BatchNorm2d``, ``nn.Linear`` and so on, named as
    the file names them, so that it can be fused, trained and saved as any other. It runs at any
    batch, height and width, also where the file says one: what the file computes before its first
    convolution and after its last linear layer are modules of their own, and the result then is an
    ``nn.Sequential`` of ``normalization``, ``network`` and ``tail``.

    A quantized file becomes the floating-point network that it stands for: weights dequantized,
    ReLUs kept, and maps not rounded. With ``dtype="int8"`` it is that network as
    :func:`snv2_kernels.quantize` makes it, within the ranges that the file has its maps in.

    Args:
        path: a file of opset 1 to 25. Weights may lie in another file in the same folder.
        dtype: ``"int8"`` for a quantized file that is to run in integers; None for floats.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no ONNX file, damaged, or has a node that is not supported; nothing is
            guessed. The message names the node, its operator, domain and opset. For another
            ``dtype``; with ``"int8"`` if the file is not quantized or does not run in integers.
        ImportError: if the package ``onnx`` is missing.
    """
    if dtype not in (None, "int8"):
        raise ValueError(f"dtype: expected None or 'int8', got {dtype!r}")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a path, got {type(path).__name__}")
    try:
        with torch.inference_mode(False), torch.no_grad():
            importer = Importer(read_file(path))
            source, results = importer.run()
            return _built(importer, source, results, dtype == "int8").eval()
    except ValueError as error:
        raise ValueError(f"{Path(path)}: {error}") from None


def _built(importer: Importer, source: Map, results: Sequence[Map], integers: bool) -> nn.Module:
    returned = [m.id for m in results]
    drafts = merged(live(importer.drafts, returned), returned)
    if not any(isinstance(draft.module, nn.Conv2d) for draft in drafts):
        raise ValueError("the graph has no convolution")
    front, back = _front(drafts, source.id, returned), _back(drafts, returned)
    inner = drafts[len(front) : len(drafts) - len(back)]
    start = front[-1].outputs[0] if front else source.id
    ends = back[0].inputs[:1] if back else returned
    network = _network(importer, inner, start, list(ends))
    if integers:
        image = importer.ranges.get(start)
        span = None if image is None else _span(image)
        try:
            network = within_spans(network.eval(), span, _spans_by_weight(importer))
        except ValueError as error:
            raise ValueError(f"dtype: {error}") from None
    if not front and not back:
        return network
    before = _network(importer, front, source.id, [start]) if front else None
    after = _network(importer, back, ends[0], returned) if back else None
    return OnnxModel(before, network, after)


def _spans_by_weight(importer: Importer) -> dict[int, Span]:
    """Spans of convolutions' results by the addresses of their weights, behind an activation if
    there is one."""
    return {
        importer.makers[value].weight.data_ptr(): _span(told)
        for value, told in importer.ranges.items()
        if value in importer.makers
    }


def _span(told: Quantization) -> Span:
    limits = np.iinfo(told.dtype)
    low, high = (told.scale * (int(end) - told.zero) for end in (limits.min, limits.max))
    return Span(low, high)


def _front(drafts: Sequence[Draft], source: int, results: Sequence[int]) -> list[Draft]:
    """The steps before the first convolution, if they make its input alone."""
    first = next(i for i, draft in enumerate(drafts) if isinstance(draft.module, nn.Conv2d))
    front = list(drafts[:first])
    made = {value for draft in front for value in draft.outputs} | {source}
    read = {value for draft in drafts[first:] for value in draft.inputs} | set(results)
    whole = front and read & made == {front[-1].outputs[0]} == set(drafts[first].inputs)
    return front if whole else []


def _back(drafts: Sequence[Draft], results: Sequence[int]) -> list[Draft]:
    """The steps behind the last linear layer, if they read nothing else of the network's."""
    linear = [i for i, draft in enumerate(drafts) if isinstance(draft.module, nn.Linear)]
    if not linear or len(results) != 1:
        return []
    back = list(drafts[linear[-1] + 1 :])
    made = {value for draft in drafts[: linear[-1] + 1] for value in draft.outputs}
    read = {value for draft in back for value in draft.inputs} | set(results)
    whole = back and read & made == set(drafts[linear[-1]].outputs)
    return back if whole and back[0].inputs[0] in made else []


def _network(
    importer: Importer, drafts: Sequence[Draft], source: int, results: Sequence[int]
) -> nn.Module:
    tensors = dict(importer.buffers.values())
    names = {value: name for value, (name, _) in importer.buffers.items()}
    steps, operands, returned, places = placed(drafts, source, results, names)
    network = OnnxNetwork(steps, operands, returned, places)
    for draft in drafts:
        if draft.module is not None:
            _place(network, draft.name, draft.module)
    for _, name in operands:
        network.register_buffer(name, tensors[name])
    return network


def _place(root: nn.Module, path: Sequence[str], module: nn.Module) -> None:
    """Put a module where its name says."""
    for key in path[:-1]:
        if key not in root._modules:
            root.add_module(key, nn.Module())
        inner = root._modules[key]
        assert inner is not None
        root = inner
    root.add_module(path[-1], module)
