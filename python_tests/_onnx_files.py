"""ONNX files with the structure of those that people have, small and with random weights: the ONNX
model zoo's ShuffleNets (v2 and v1), what PyTorch's exporters write, ONNX Runtime's quantizer's, and
networks that normalize their image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from snv2_kernels import models
from snv2_kernels.testing import randomize_

SIZE = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network() -> Any:
    """The network whose files these are."""
    return lively(models.ShuffleNetV2([2, 1, 1], [8, 16, 24, 32, 40], 10))


def lively(network: nn.Module, seed: int = 0) -> Any:
    """A network in eval mode with random numbers, whose scores depend on the image so much that a
    wrong shuffle shows."""
    model = randomize_(network, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            spread = (2 / conv.weight[0].numel()) ** 0.5
            conv.weight.data = spread * torch.randn(conv.weight.shape, generator=generator)
    return model


class Writer:
    """Nodes and tensors of a file, spelled as its opset asks for."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}

    def add(
        self, kind: str, *inputs: str, name: str = "", outputs: int = 1, **attributes: Any
    ) -> Any:
        node = name or f"node{len(self.nodes)}"
        made = [f"{node}_out{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, made, name=node, **attributes))
        return made[0] if outputs == 1 else made

    def tensor(self, value: Any, name: str = "") -> str:
        name = name or f"value{len(self.tensors)}"
        array = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
        self.tensors[name] = numpy_helper.from_array(np.array(array, order="C"), name)
        return name

    def integers(self, *values: int) -> str:
        made = self.add("Constant", value=numpy_helper.from_array(np.array(values, np.int64)))
        return str(made)

    def with_axes(self, kind: str, x: str, since: int, axes: list[int], **attributes: Any) -> str:
        """An operator whose axes became an input in a later opset."""
        if self.opset < since:
            return str(self.add(kind, x, axes=axes, **attributes))
        return str(self.add(kind, x, self.integers(*axes), **attributes))

    def model(self, source: str, result: str, shape: list[Any], classes: int) -> Any:
        self.nodes[-1].output[0] = result
        graph = helper.make_graph(
            self.nodes, "network",
            [helper.make_tensor_value_info(source, TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(result, TensorProto.FLOAT, [shape[0], classes])],
            list(self.tensors.values()),
        )  # fmt: skip
        opset = helper.make_opsetid("", self.opset)
        return helper.make_model(graph, opset_imports=[opset], ir_version=8)


def scoped(path: str, kind: str) -> str:
    """A node's name as TorchScript's exporter writes it, such as /stage2/stage2.0/Conv."""
    scopes: list[str] = []
    for part in path.split("."):
        scopes.append(f"{scopes[-1]}.{part}" if part.isdecimal() else part)
    return "/".join(("", *scopes, kind))


class V2(Writer):
    """A file of :func:`network`.

    Args:
        opset: of the file.
        folded: whether batch norms are part of the convolutions.
        halves: how a map is parted: "split", or "slice" as TorchScript's exporter writes ``chunk``.
        computed: whether shapes are computed from the map's, for any batch and size, or constants.
    """

    def __init__(
        self, opset: int, *, folded: bool = False, halves: str = "split", computed: bool = False
    ) -> None:
        super().__init__(opset)
        self.folded, self.halves, self.computed = folded, halves, computed

    def layers(self, layers: nn.Sequential, x: str, path: str) -> str:
        modules = list(layers)
        for i, module in enumerate(modules):
            if isinstance(module, nn.Conv2d):
                x = self.conv(module, modules[i + 1], x, f"{path}.{i}")
            elif isinstance(module, nn.BatchNorm2d) and not self.folded:
                keys = "weight", "bias", "running_mean", "running_var"
                given = [self.tensor(getattr(module, k), f"{path}.{i}.{k}") for k in keys]
                kept = {} if self.opset >= 9 else {"spatial": 1}
                x = self.add("BatchNormalization", x, *given, epsilon=module.eps, **kept)
            elif isinstance(module, nn.ReLU):
                x = self.add("Relu", x)
        return x

    def conv(self, conv: nn.Conv2d, norm: Any, x: str, path: str) -> str:
        weight, given = conv.weight, []
        if self.folded:
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            weight = weight * scale.reshape(-1, 1, 1, 1)
            shift = norm.bias - norm.running_mean * scale
            given = [self.tensor(shift, f"onnx::Conv_{len(self.tensors)}")]
        label = f"onnx::Conv_{len(self.tensors)}" if self.folded else f"{path}.weight"
        pad, stride = conv.padding[0], conv.stride[0]
        made = self.add(
            "Conv", x, self.tensor(weight, label), *given, name=scoped(path, "Conv"),
            group=conv.groups,
            kernel_shape=list(conv.kernel_size), pads=[pad] * 4, strides=[stride] * 2,
            dilations=[1, 1],
        )  # fmt: skip
        return str(made)

    def shuffled(self, x: str, channels: int, size: int) -> str:
        half = channels // 2
        if self.computed:
            n, h, w = (self.sizes(x, axis) for axis in (0, 2, 3))
            two, c = self.integers(2), self.integers(channels)
            first = self.add("Concat", n, two, self.add("Div", c, two), h, w, axis=0)
            last = self.add("Concat", n, c, h, w, axis=0)
        else:
            first = self.integers(1, 2, half, size, size)
            last = self.integers(1, -1, size, size)
        y = self.add("Reshape", x, first)
        y = self.add("Transpose", y, perm=[0, 2, 1, 3, 4])
        return str(self.add("Reshape", y, last))

    def sizes(self, x: str, axis: int) -> str:
        shape = self.add("Shape", x)
        picked = self.add("Gather", shape, self.tensor(np.int64(axis)), axis=0)
        return self.with_axes("Unsqueeze", picked, 13, [0])

    def parts(self, x: str, channels: int) -> tuple[str, str]:
        half = channels // 2
        if self.halves == "slice":
            whole = self.add("Gather", self.add("Shape", x), self.integers(1), axis=0)
            middle = self.add("Div", self.add("Add", whole, self.integers(1)), self.integers(2))
            end = self.add("Mul", middle, self.integers(2))
            axis = self.integers(1)
            first = self.add("Slice", x, self.integers(0), middle, axis)
            return str(first), str(self.add("Slice", x, middle, end, axis))
        if self.opset < 13:
            a, b = self.add("Split", x, outputs=2, axis=1, split=[half, half])
        elif self.opset < 18:
            a, b = self.add("Split", x, self.integers(half, half), outputs=2, axis=1)
        else:
            a, b = self.add("Split", x, outputs=2, axis=1, num_outputs=2)
        return a, b

    def write(
        self, network: Any, *, normalized: bool = False, softmax: bool = False, size: int = SIZE
    ) -> Any:
        x = "image"
        if normalized:
            for kind, values in (("Sub", MEAN), ("Div", STD)):
                x = self.add(kind, x, self.tensor(np.float32(values).reshape(1, 3, 1, 1)))
        x = self.layers(network.conv1, x, "conv1")
        window = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [2, 2]}
        x = self.add("MaxPool", x, **window)
        at = size // 4
        for stage in ("stage2", "stage3", "stage4"):
            at //= 2
            for i, unit in enumerate(getattr(network, stage)):
                channels = 2 * unit.branch2[-3].out_channels
                path = f"{stage}.{i}"
                first, second = (x, x) if unit.stride == 2 else self.parts(x, channels)
                if unit.stride == 2:
                    first = self.layers(unit.branch1, x, f"{path}.branch1")
                second = self.layers(unit.branch2, second, f"{path}.branch2")
                x = self.shuffled(self.add("Concat", first, second, axis=1), channels, at)
        x = self.layers(network.conv5, x, "conv5")
        x = self.with_axes("ReduceMean", x, 18, [2, 3], keepdims=0)
        fc = self.tensor(network.fc.weight, "fc.weight"), self.tensor(network.fc.bias, "fc.bias")
        x = self.add("Gemm", x, *fc, alpha=1.0, beta=1.0, transB=1, name="/fc/Gemm")
        if softmax:
            self.add("Softmax", x, axis=1)
        shape = ["n", 3, "h", "w"] if self.computed else [1, 3, size, size]
        return self.model("image", "scores", shape, network.fc.out_features)


# ShuffleNet v1 --------------------------------------------------------------------------------


def v1(opset: int, size: int = SIZE, groups: int = 4) -> Any:
    """The zoo's ShuffleNet v1: grouped pointwise layers, shuffles inside branches, sums, and
    average pools beside them. Initializers are inputs, too."""
    rng = np.random.default_rng(0)
    writer = Writer(opset)

    def conv(x: str, inp: int, out: int, kernel: int, stride: int, group: int, relu: bool) -> str:
        shape = (out, inp // group, kernel, kernel)
        spread = (2 / (inp // group * kernel**2)) ** 0.5
        name = f"gpu_0/conv{len(writer.nodes)}"
        weight = writer.tensor(np.float32(rng.normal(0, spread, shape)), f"{name}_w_0")
        x = writer.add(
            "Conv", x, weight, group=group, kernel_shape=[kernel] * 2, strides=[stride] * 2,
            pads=[kernel // 2] * 4,
        )  # fmt: skip
        drawn = [
            rng.uniform(0.5, 1, out),
            *rng.normal(0, 0.1, (2, out)),
            rng.uniform(0.5, 1.5, out),
        ]
        norm = [
            writer.tensor(np.float32(v), f"{name}_bn_{k}_0")
            for k, v in zip(("s", "b", "rm", "riv"), drawn, strict=True)
        ]
        old: dict[str, Any] = {"spatial": 1} if opset < 9 else {}
        old |= {"is_test": 1} if opset < 7 else {}
        old |= {"consumed_inputs": [0, 0, 0, 1, 1]} if opset < 6 else {}
        x = writer.add("BatchNormalization", x, *norm, **old)
        return elementwise("Relu", x) if relu else x

    def elementwise(kind: str, *inputs: str) -> str:
        old = {"consumed_inputs": [0] * len(inputs)} if opset < 6 else {}
        return str(writer.add(kind, *inputs, **old))

    def reshaped(x: str, *shape: int) -> str:
        if opset < 5:
            return str(writer.add("Reshape", x, shape=list(shape)))
        return str(writer.add("Reshape", x, writer.tensor(np.array(shape, np.int64))))

    pool = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [2, 2]}
    x, channels, at = (
        writer.add("MaxPool", conv("image", 3, 8, 3, 2, 1, True), **pool),
        8,
        size // 4,
    )
    for stage, (out, count) in enumerate(((24, 2), (48, 2))):
        for unit in range(count):
            made, stride = (out - channels, 2) if unit == 0 else (out, 1)
            group, inner = (groups, 16)
            y = conv(x, channels, inner, 1, 1, group if stage or unit else 1, True)
            y = reshaped(y, 1, group, inner // group, at, at)
            y = reshaped(writer.add("Transpose", y, perm=[0, 2, 1, 3, 4]), 1, inner, at, at)
            y = conv(y, inner, inner, 3, stride, inner, False)
            y = conv(y, inner, made, 1, 1, group, False)
            if stride == 2:
                y = writer.add("Concat", y, writer.add("AveragePool", x, **pool), axis=1)
                at //= 2
            else:
                y = elementwise("Sum", y, x)
            x, channels = elementwise("Relu", y), out
    x = writer.add("AveragePool", x, kernel_shape=[at, at], strides=[1, 1])
    x = reshaped(x, 1, channels)
    weight = writer.tensor(np.float32(rng.normal(0, 0.3, (10, channels))), "gpu_0/pred_w_0")
    bias = writer.tensor(np.float32(rng.normal(0, 0.3, 10)), "gpu_0/pred_b_0")
    x = writer.add("Gemm", x, weight, bias, transB=1, **({"broadcast": 1} if opset < 7 else {}))
    writer.add("Softmax", x)
    model = writer.model("image", "gpu_0/softmax_1", [1, 3, size, size], 10)
    model.ir_version = 3
    for tensor in writer.tensors.values():
        info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(info)
    return model


# Quantized ------------------------------------------------------------------------------------


def images(count: int, size: int = SIZE, seed: int = 0) -> Tensor:
    """Smooth pictures from 0 to 1, as a quantizer is calibrated with."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


class _Images:
    def __init__(self, pictures: Tensor) -> None:
        self._left: Iterator[Any] = iter([{"image": x[None].numpy()} for x in pictures])

    def get_next(self) -> Any:
        return next(self._left, None)


def quantized(path: Path, kind: str, **options: Any) -> Path:
    """A file quantized by ONNX Runtime, beside it.

    Args:
        path: of the file.
        kind: "QOperator" for QLinearConv and its kin, "QDQ" for pairs around float operators.
        options: for ONNX Runtime's ``quantize_static``.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, out = path.with_suffix(".pre.onnx"), path.with_suffix(f".{kind}.onnx")
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(out), _Images(images(8)), quant_format=QuantFormat[kind],
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, **options,
    )  # fmt: skip
    return out


def save(model: Any, path: Path) -> Path:
    onnx.save(model, str(path))
    return path
