"""Layers, pools and what is computed element by element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from snv2_kernels.onnx import functions
from snv2_kernels.onnx.node import Node, operator
from snv2_kernels.onnx.reader import Array
from snv2_kernels.onnx.values import Constant, Map

__all__ = ["add_average_pool", "add_convolution", "add_linear", "add_maps", "relu_of"]

_MOST_SIZES = 4096  # numbers of a computed constant: shapes, not weights
_SIXTH = float(np.float32(1 / 6))


# Convolutions and linear layers ---------------------------------------------------------------


@operator("Conv", inputs=(2, 3))
def _conv(node: Node) -> None:
    weight = node.weight(1, 4)
    bias = None if node.value(2) is None else node.weight(2, 1)
    node.alias(add_convolution(node, node.map(0), weight, bias, node.inputs[1]))


def add_convolution(
    node: Node, x: Map, weight: nn.Parameter, bias: nn.Parameter | None, name: str
) -> Map:
    """The result of a convolution with a node's attributes."""
    out_channels, depth, *window = weight.shape
    kernel = _pair(window)
    groups = node.integer("group", 1)
    if min(weight.shape) < 1 or groups < 1 or out_channels % groups:
        raise ValueError(f"its weight has shape {tuple(weight.shape)} with {groups} groups")
    if node.integers("kernel_shape", 2) not in (None, kernel):
        raise ValueError(f"kernel_shape is not that of its weight, {kernel}")
    stride, padding, dilation = _window(node, kernel)
    if len(x.shape) != 4 or x.fixed(1) != depth * groups:
        raise ValueError(f"its input has shape {x.shape}, expected {depth * groups} channels")
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"its bias has shape {tuple(bias.shape)}, expected ({out_channels},)")
    conv = nn.Conv2d(
        depth * groups, out_channels, kernel, stride, padding, dilation, groups,
        bias=bias is not None, device="meta", dtype=weight.dtype,
    )  # fmt: skip
    made = node.layer(conv, x, name)
    conv.weight, conv.bias = weight, bias
    return made


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    height, width = sizes
    return height, width


def _window(
    node: Node, kernel: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Stride, padding and dilation."""
    sy, sx = node.integers("strides", 2) or (1, 1)
    dy, dx = node.integers("dilations", 2) or (1, 1)
    if min(sy, sx, dy, dx, *kernel) < 1:
        raise ValueError("its kernel, strides or dilations are not positive")
    automatic = node.text("auto_pad", "NOTSET")
    top, left, bottom, right = node.integers("pads", 4) or (0, 0, 0, 0)
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        totals = dy * (kernel[0] - 1), dx * (kernel[1] - 1)
        if (sy, sx) != (1, 1) or any(total % 2 for total in totals):
            raise ValueError(f"auto_pad {automatic} pads asymmetrically, which is not supported")
        top, left = bottom, right = totals[0] // 2, totals[1] // 2
    elif automatic == "VALID":
        top = left = bottom = right = 0
    elif automatic != "NOTSET":
        raise ValueError(f"auto_pad is {automatic[:20]!r}")
    if (top, left) != (bottom, right) or min(top, left) < 0:
        pads = [top, left, bottom, right]
        raise ValueError(f"pads {pads} are asymmetric, which is not supported")
    return (sy, sx), (top, left), (dy, dx)


@operator("Gemm", inputs=(2, 3))
def _gemm(node: Node) -> None:
    node.expect("alpha", 1.0)
    node.expect("beta", 1.0)
    node.expect("transA", 0)
    broadcasts = node.integer("broadcast", 0) if node.version < 7 else 1
    weight = node.weight(1, 2, *transposed(node.integer("transB", 0)))
    node.alias(add_linear(node, node.map(0), weight, _bias(node, 2, bool(broadcasts)), 1))


def _bias(node: Node, i: int, broadcasts: bool = True) -> nn.Parameter | None:
    found = node.constant(i)
    if found is None:
        return None
    shape = found.arrays[0].shape
    if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != 1) or not broadcasts:
        raise ValueError(f"its input {i} has shape {shape}, expected one number for each output")
    return node.weight(i, len(shape), "bias", lambda array: array.reshape(-1))


def transposed(is_already: int) -> tuple[str, Callable[[Array], Array]]:
    """How a matrix is made into a linear layer's weight: a name for it, and a function."""
    return ("", lambda array: array) if is_already else ("transposed", lambda array: array.T)


def add_linear(
    node: Node, x: Map, weight: nn.Parameter, bias: nn.Parameter | None, name: int
) -> Map:
    """The result of a linear layer whose weight is the node's input ``name``."""
    outputs, features = weight.shape
    if len(x.shape) != 2:
        raise ValueError(f"its input has shape {x.shape}, expected a row for each image")
    if x.shape[1] != features or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(f"its weight and bias do not fit {x.shape[1]} features")
    dtype = weight.dtype
    linear = nn.Linear(features, outputs, bias is not None, device="meta", dtype=dtype)
    made = node.layer(linear, x, node.inputs[name])
    linear.weight = weight
    linear.bias = bias  # type: ignore[assignment]
    return made


@operator("MatMul", inputs=(2, 2))
def _matmul(node: Node) -> None:
    node.alias(add_linear(node, node.map(0), node.weight(1, 2, *transposed(0)), None, 1))


@operator("BatchNormalization", inputs=(5, 5))
def _batch_norm(node: Node) -> None:
    if node.version < 7:
        node.expect("is_test", 1, default=0)
    if node.version < 9:
        node.expect("spatial", 1)
    if node.version >= 14:
        node.expect("training_mode", 0)
    node.ignore("consumed_inputs")
    x = node.map(0)
    scale, shift, mean, var = (node.weight(i, 1) for i in range(1, 5))
    channels = len(scale)
    if {len(t) for t in (shift, mean, var)} != {channels} or x.fixed(1) != channels:
        raise ValueError(f"its input has shape {x.shape}, its scale {channels} numbers")
    cls = {4: nn.BatchNorm2d, 2: nn.BatchNorm1d}.get(len(x.shape))
    if cls is None:
        raise ValueError(f"its input has shape {x.shape}, expected 4 dimensions")
    eps, momentum = node.real("epsilon", 1e-5), 1 - node.real("momentum", 0.9)
    if eps < 0 or not 0 <= momentum <= 1:
        raise ValueError(f"epsilon is {eps}, momentum {1 - momentum}")
    norm = cls(channels, eps, momentum, device="meta", dtype=scale.dtype)
    made = node.layer(norm, x, node.inputs[1], by_element=True)
    norm.weight, norm.bias = scale, shift
    norm.running_mean, norm.running_var = mean.detach().clone(), var.detach().clone()
    norm.num_batches_tracked = torch.tensor(0)
    node.alias(made)


# Pools ----------------------------------------------------------------------------------------


@operator("MaxPool", inputs=(1, 1))
def _max_pool(node: Node) -> None:
    node.ignore("storage_order")  # of indices, which are not supported
    x = node.any_map(0)
    kernel = _kernel(node)
    stride, padding, dilation = _window(node, kernel)
    ceil = bool(node.integer("ceil_mode", 0))
    if ceil and (padding != (0, 0) or any(s > k for s, k in zip(stride, kernel, strict=True))):
        raise ValueError("ceil_mode with padding is not supported")
    size, step, margin, spread = map(_one, (kernel, stride, padding, dilation))
    pool = nn.MaxPool2d(size, step, margin, spread, ceil_mode=ceil)
    made = node.layer(pool, x, is_positive=x.is_positive, quantization=x.quantization)
    node.alias(made)


def _kernel(node: Node) -> tuple[int, int]:
    kernel = node.integers("kernel_shape", 2)
    if kernel is None:
        raise ValueError("kernel_shape is missing")
    return _pair(kernel)


def _one(pair: tuple[int, int]) -> Any:
    return pair[0] if pair[0] == pair[1] else pair


@operator("AveragePool", inputs=(1, 1))
def _average_pool(node: Node) -> None:
    node.alias(add_average_pool(node, node.map(0)))


def add_average_pool(node: Node, x: Map) -> Map:
    """The result of an average over windows with a node's attributes.

    A window that is all of the map, in a file for images of one size, is a mean over maps of any
    size.
    """
    kernel = _kernel(node)
    stride, padding, dilation = _window(node, kernel)
    if node.integer("ceil_mode", 0) or dilation != (1, 1):
        raise ValueError("ceil_mode and dilations are not supported")
    includes = bool(node.integer("count_include_pad", 0))
    is_whole = kernel == x.shape[2:] and padding == (0, 0)
    if is_whole and node.importer.is_of_one_size:
        return node.call(functions.mean, [x], (2, 3), True, is_positive=x.is_positive)
    size, step, margin = map(_one, (kernel, stride, padding))
    pool = nn.AvgPool2d(size, step, margin, count_include_pad=includes)
    return node.layer(pool, x, is_positive=x.is_positive)


@operator("GlobalAveragePool", inputs=(1, 1))
def _global_average_pool(node: Node) -> None:
    x = node.map(0)
    if len(x.shape) != 4:
        raise ValueError(f"its input has shape {x.shape}, expected 4 dimensions")
    node.alias(node.call(functions.global_average_pool, [x], is_positive=x.is_positive))


@operator("ReduceMean", inputs=(1, 2))
def _reduce_mean(node: Node) -> None:
    x = node.map(0)
    axes = node.numbers(1, "axes", since=18)
    node.expect("noop_with_empty_axes", 0)
    keeps = bool(node.integer("keepdims", 1))
    rank = len(x.shape)
    if not axes or not all(-rank <= axis < rank for axis in axes):
        raise ValueError(f"axes are {axes}, expected some of {rank} dimensions")
    found = tuple(sorted(axis % rank for axis in axes))
    node.alias(node.call(functions.mean, [x], found, keeps, is_positive=x.is_positive))


# Element by element ---------------------------------------------------------------------------


def relu_of(node: Node, x: Map) -> Map:
    """The result of ReLU on a map, the map itself where it is never negative."""
    return x if x.is_positive else node.call(
        functions.relu, [x], is_positive=True, by_element=True
    )  # fmt: skip


@operator("Relu", inputs=(1, 1))
def _relu(node: Node) -> None:
    node.ignore("consumed_inputs")
    x = node.map(0)
    node.alias(node.call(functions.relu, [x], is_positive=True, by_element=True))


@operator("LeakyRelu", inputs=(1, 1))
def _leaky_relu(node: Node) -> None:
    node.ignore("consumed_inputs")
    slope = node.real("alpha", 0.01)
    node.alias(node.call(functions.leaky_relu, [node.map(0)], slope, by_element=True))


@operator("PRelu", inputs=(2, 2))
def _prelu(node: Node) -> None:
    node.ignore("consumed_inputs")
    x, slope = node.map(0), node.constant(1)
    shape = () if slope is None else slope.arrays[0].shape
    count = int(np.prod(shape))
    is_vector = len(shape) == 1 and (node.version < 7 or len(x.shape) == 2)
    is_column = len(x.shape) == len(shape) + 1 and set(shape[1:]) <= {1}
    if slope is None or not (count == 1 or ((is_vector or is_column) and count == x.fixed(1))):
        raise ValueError(f"its slope has shape {shape}, expected one number for each channel")
    weight = node.weight(1, len(shape), "flat", lambda array: array.reshape(-1))
    prelu = nn.PReLU(count, device="meta", dtype=weight.dtype)
    made = node.layer(prelu, x, node.inputs[1], by_element=True)
    prelu.weight = weight
    node.alias(made)


@operator("Sigmoid", inputs=(1, 1))
def _sigmoid(node: Node) -> None:
    node.ignore("consumed_inputs")
    x = node.map(0)
    node.alias(node.call(functions.sigmoid, [x], is_positive=True, by_element=True))


@operator("HardSigmoid", inputs=(1, 1))
def _hard_sigmoid(node: Node) -> None:
    node.ignore("consumed_inputs")
    x, alpha, beta = node.map(0), node.real("alpha", 0.2), node.real("beta", 0.5)
    if abs(alpha - _SIXTH) < 1e-7 and beta == 0.5:
        node.alias(node.call(functions.hard_sigmoid, [x], is_positive=True, by_element=True))
        return
    scaled = node.call(functions.multiply, [x], alpha, by_element=True)
    shifted = node.call(functions.add, [scaled], beta, by_element=True)
    node.alias(node.call(functions.clamp, [shifted], 0.0, 1.0, is_positive=True, by_element=True))


@operator("HardSwish", inputs=(1, 1))
def _hard_swish(node: Node) -> None:
    node.alias(node.call(functions.hard_swish, [node.map(0)], by_element=True))


@operator("Clip", inputs=(1, 3))
def _clip(node: Node) -> None:
    node.ignore("consumed_inputs")
    least, most = (_bound(node, i, name) for i, name in ((1, "min"), (2, "max")))
    x = node.map(0)
    if least == 0 and most is None:
        node.alias(node.call(functions.relu, [x], is_positive=True, by_element=True))
        return
    if least is None and most is None:
        node.alias(x)
        return
    is_positive = least is not None and least >= 0
    node.alias(
        node.call(functions.clamp, [x], least, most, is_positive=is_positive, by_element=True)
    )


def _bound(node: Node, i: int, name: str) -> float | None:
    if node.version < 11:
        return node.real(name, 0.0) if node.has(name) else None
    found = node.array(i)
    if found is None:
        return None
    if found.size != 1 or np.isnan(found).any():
        raise ValueError(f"{name} has shape {found.shape}, expected one number")
    value = float(found.reshape(()))
    return value if np.isfinite(value) else None


_BINARY: dict[str, tuple[Any, Any]] = {  # with a number second, and first
    "Add": (functions.add, functions.add),
    "Sub": (functions.subtract, functions.subtract_from),
    "Mul": (functions.multiply, functions.multiply),
    "Div": (functions.divide, functions.divide_from),
}


@operator(*_BINARY, inputs=(2, 2))
def _binary(node: Node) -> None:
    node.ignore("consumed_inputs")
    broadcasts = node.integer("broadcast", 0) if node.version < 7 else 1
    axis = node.integer("axis", -1) if node.version < 7 else -1
    a, b = node.value(0), node.value(1)
    if isinstance(a, Constant) and isinstance(b, Constant):
        _fold(node, a, b)
        return
    if not broadcasts:
        shapes = [v.shape if isinstance(v, Map) else v.arrays[0].shape for v in (a, b) if v]
        if shapes[0] != shapes[1]:
            raise ValueError(f"it does not broadcast, and has inputs of shapes {shapes}")
    if isinstance(a, Map) and isinstance(b, Map):
        node.alias(add_maps(node, node.kind, node.map(0), node.map(1)))
        return
    first = isinstance(a, Map)
    x, constant = node.map(0 if first else 1), node.array(1 if first else 0)
    assert constant is not None
    if axis >= 0 and constant.ndim == 1:
        constant = constant.reshape(-1, *[1] * (len(x.shape) - axis - 1))
    if node.kind == "Add" and (bias := add_bias(node, x, constant)) is not None:
        node.alias(bias)
        return
    function = _BINARY[node.kind][not first]
    if _dtype_of(constant) != x.example.dtype:
        raise ValueError(f"its constant has type {constant.dtype}, its map {x.example.dtype}")
    if constant.size == 1 and constant.ndim <= len(x.shape):
        number = float(constant.reshape(()))
        if not np.isfinite(number):
            raise ValueError(f"its constant is {number}")
        is_positive = x.is_positive and number > 0 and node.kind != "Sub"
        node.alias(node.call(function, [x], number, is_positive=is_positive, by_element=True))
        return
    operand = node.importer.operand(node.inputs[1 if first else 0], constant)
    maps = [x, operand] if first else [operand, x]
    node.alias(node.call(_BINARY[node.kind][0], maps))


def add_maps(node: Node, kind: str, a: Map, b: Map) -> Map:
    """The sum, difference, product or quotient of two maps."""
    is_positive = a.is_positive and b.is_positive and kind != "Sub"
    same = _shapes(a) == _shapes(b)
    call = _BINARY[kind][0]
    return node.call(call, [a, b], is_positive=is_positive, by_element=same)


def _shapes(x: Map) -> list[Any]:
    return [t if t is None else (t.shape, t.dtype) for t in x.examples]


def add_bias(node: Node, x: Map, constant: Array) -> Map | None:
    """The result of the linear layer just before, which has no bias, with this one; None where
    there is none."""
    last = node.importer.drafts[-1] if node.importer.drafts else None
    linear = last.module if last is not None and last.outputs == (x.id,) else None
    if not isinstance(linear, nn.Linear) or node.importer.uses(x) != 1:
        return None
    fits = constant.shape in ((linear.out_features,), (1, linear.out_features))
    has_bias = linear._parameters["bias"] is not None
    if has_bias or not fits or _dtype_of(constant) != linear.weight.dtype:
        return None
    linear.bias = nn.Parameter(torch.from_numpy(constant.reshape(-1).copy()))
    return x


def _dtype_of(array: Array) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


def _fold(node: Node, a: Constant, b: Constant) -> None:
    functions: dict[str, Callable[[Array, Array], Array]] = {
        "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _divide,
    }  # fmt: skip
    worlds = range(max(len(a.arrays), len(b.arrays)))
    pairs = [(a.in_world(world), b.in_world(world)) for world in worlds]
    if any(max(x.size, y.size, np.broadcast(x, y).size) > _MOST_SIZES for x, y in pairs):
        raise ValueError("computes with constants that are no shapes")
    with np.errstate(all="raise"):
        node.fold([np.asarray(functions[node.kind](x, y), x.dtype) for x, y in pairs])


def _divide(x: Array, y: Array) -> Array:
    """Integers are rounded towards zero."""
    if x.dtype.kind != "i":
        return np.divide(x, y)
    if (y == 0).any():
        raise ValueError("divides by zero")
    return np.asarray(np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y)))


@operator("Sum", inputs=(1, 16))
def _sum(node: Node) -> None:
    node.ignore("consumed_inputs")
    total = node.map(0)
    for i in range(1, len(node.inputs)):
        total = add_maps(node, "Add", total, node.map(i))
    node.alias(total)


# Ends -----------------------------------------------------------------------------------------


@operator("Softmax", "LogSoftmax", inputs=(1, 1))
def _softmax(node: Node) -> None:
    x = node.map(0)
    rank = len(x.shape)
    axis = node.integer("axis", -1 if node.version >= 13 else 1)
    if not -rank <= axis < rank or (node.version < 13 and axis % rank != rank - 1):
        raise ValueError(f"axis is {axis} of {rank} dimensions")
    cls = nn.Softmax if node.kind == "Softmax" else nn.LogSoftmax
    is_positive = node.kind == "Softmax"
    node.alias(node.layer(cls(axis % rank), x, is_positive=is_positive, by_element=True))


@operator("Dropout", inputs=(1, 3))
def _dropout(node: Node) -> None:
    node.ignore("consumed_inputs", "seed")
    if node.version < 7:
        node.expect("is_test", 1, default=0)
    ratio = node.real("ratio", 0.5)
    if node.version >= 12:
        given, training = node.array(1), node.array(2)
        ratio = ratio if given is None else float(given.reshape(()))
        if training is not None and training.any():
            raise ValueError("it is in training mode")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}, expected 0 to 1")
    x = node.map(0)
    node.alias(node.layer(nn.Dropout(ratio), x, is_positive=x.is_positive, by_element=True))


@operator("Identity", inputs=(1, 1))
def _identity(node: Node) -> None:
    value = node.value(0)
    assert value is not None
    node.alias(value)
