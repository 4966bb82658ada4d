"""Quantized operators as the floating-point layers that they stand for.

Weights are dequantized. That maps are rounded to integers is left out, but not that these begin at
zero: a QuantizeLinear whose zero point is the least integer is a ReLU, and often the only trace of
one that a quantizer merged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from snv2_kernels.onnx import functions
from snv2_kernels.onnx.moves import concatenated
from snv2_kernels.onnx.node import Node, operator
from snv2_kernels.onnx.operators import (
    add_average_pool,
    add_bias,
    add_convolution,
    add_linear,
    add_maps,
    relu_of,
    transposed,
)
from snv2_kernels.onnx.reader import Array
from snv2_kernels.onnx.values import Constant, Map, Quantization

__all__: list[str] = []  # it registers operators

_MICROSOFT = "com.microsoft"
_INTEGERS = ("uint8", "int8")
_IMAGE = 0  # the id of the graph's input


def _scale(node: Node, i: int) -> Array:
    found = node.array(i)
    if found is None or found.dtype.kind != "f" or found.ndim > 1:
        raise ValueError(f"its input {i} is no scale")
    if not np.isfinite(found).all() or (found <= 0).any():
        raise ValueError(f"its scale, input {i}, is not positive and finite")
    return found.astype(np.float64)


def _quantization(node: Node, i: int) -> Quantization:
    """Of a map, by the node's inputs ``i`` and ``i + 1``."""
    scale, zero = _scale(node, i), node.array(i + 1)
    zero = np.array(0, np.uint8) if zero is None else zero
    if scale.size != 1 or zero.size != 1:
        raise ValueError("a map has several scales, which is not supported")
    if zero.dtype.name not in _INTEGERS:
        raise ValueError(f"its zero point has type {zero.dtype}, expected int8 or uint8")
    return Quantization(float(scale.reshape(())), int(zero.reshape(())), zero.dtype.name)


def _quantized(node: Node, x: Map, to: Quantization) -> Map:
    """A map as integers stand for it: not below the least."""
    limits = np.iinfo(to.dtype)
    if to.zero == limits.max:
        raise ValueError(f"zero point {to.zero} leaves no positive numbers")
    if to.zero == limits.min and x.id != _IMAGE:
        x = relu_of(node, x)
    node.importer.ranges[x.id] = to
    return replace(x, quantization=to)


def _dequantized(node: Node, i: int, scale: int) -> Map:
    """An input that is a map of integers, as the floats that it stands for."""
    x, told = node.any_map(i), _quantization(node, scale)
    if x.quantization != told:
        raise ValueError(f"its input {i} was quantized with another scale or zero point")
    return replace(x, quantization=None)


def _numbers(node: Node, i: int, axis: int | None) -> Constant:
    """A constant of integers with its scale and zero point, the inputs behind it, as floats."""
    found, scale, zero = node.array(i), _scale(node, i + 1), node.array(i + 2)
    if found is None or found.dtype.kind not in "iu":
        raise ValueError(f"its input {i} is no constant of integers")
    zero = np.zeros(1, found.dtype) if zero is None else zero
    if zero.dtype != found.dtype or (zero.size != 1 and zero.shape != scale.shape):
        raise ValueError(f"its zero point, input {i + 2}, does not fit")
    shape = [1] * found.ndim
    if scale.size != 1:
        if axis is None or not -found.ndim <= axis < found.ndim:
            raise ValueError(f"axis is {axis} of {found.ndim} dimensions")
        if found.shape[axis] != scale.size:
            raise ValueError(f"{scale.size} scales for {found.shape[axis]} channels")
        shape[axis] = scale.size
    offset = zero.astype(np.float64)
    offset = offset.reshape(shape) if offset.size != 1 else offset.reshape(())
    spread = scale.reshape(shape) if scale.size != 1 else scale.reshape(())
    values = (found.astype(np.float64) - offset) * spread
    return Constant((values.astype(np.float32),))


def _bias(node: Node, i: int, x: int, weight: int) -> Any:
    """A bias of int32, whose scale is the product of those of input and weight."""
    if node.value(i) is None:
        return None
    found = node.array(i)
    assert found is not None
    if found.dtype != np.int32 or found.ndim != 1:
        raise ValueError(f"its bias has type {found.dtype} and shape {found.shape}")
    scale = _scale(node, x) * _scale(node, weight)
    if scale.size not in (1, len(found)):
        raise ValueError(f"{scale.size} scales for a bias of {len(found)}")
    values = (found.astype(np.float64) * scale.reshape(-1)).astype(np.float32)
    return node.importer.parameter(Constant((values,)), "", lambda array: array)


# ONNX's own -----------------------------------------------------------------------------------


def _quantize(node: Node) -> None:
    x, to = node.map(0), _quantization(node, 1)
    _only_by_tensor(node)
    node.alias(_quantized(node, x, to))


def _only_by_tensor(node: Node) -> None:
    node.ignore("axis", "saturate", "precision")
    for name in ("block_size", "output_dtype"):
        if node.integer(name, 0):
            raise ValueError(f"{name} is not supported")


def _dequantize(node: Node) -> None:
    if isinstance(node.value(0), Map):
        _only_by_tensor(node)
        node.alias(_dequantized(node, 0, 1))
        return
    axis = node.integer("axis", 1)
    if node.integer("block_size", 0) or node.integer("output_dtype", 0):
        raise ValueError("blocks and other output types are not supported")
    made = _numbers(node, 0, axis)
    node.alias(replace(made, name=node.outputs[0]))


for _domain in ("", _MICROSOFT):
    operator("QuantizeLinear", inputs=(2, 3), domain=_domain)(_quantize)
    operator("DequantizeLinear", inputs=(2, 3), domain=_domain)(_dequantize)


@operator("QLinearConv", inputs=(8, 9))
def _conv(node: Node) -> None:
    x, to = _dequantized(node, 0, 1), _quantization(node, 6)
    weight = node.importer.parameter(_numbers(node, 3, 0), "dequantized", lambda array: array)
    if weight.dim() != 4:
        raise ValueError(f"its weight has {weight.dim()} dimensions")
    made = add_convolution(node, x, weight, _bias(node, 8, 1, 4), node.inputs[3])
    node.alias(_quantized(node, made, to))


@operator("QLinearMatMul", inputs=(8, 8))
def _matmul(node: Node) -> None:
    x, to = _dequantized(node, 0, 1), _quantization(node, 6)
    weight = _linear_weight(node, 3, is_transposed=0)
    node.alias(_quantized(node, add_linear(node, x, weight, None, 3), to))


def _linear_weight(node: Node, i: int, is_transposed: int) -> Any:
    kind, make = transposed(is_transposed)
    constant = _numbers(node, i, 0 if is_transposed else 1)
    if constant.arrays[0].ndim != 2:
        raise ValueError(f"its weight has {constant.arrays[0].ndim} dimensions")
    return node.importer.parameter(constant, f"dequantized {kind}", make)


# ONNX Runtime's -------------------------------------------------------------------------------


@operator("QGemm", inputs=(6, 9), domain=_MICROSOFT)
def _gemm(node: Node) -> None:
    node.expect("alpha", 1.0)
    node.expect("transA", 0)
    x = _dequantized(node, 0, 1)
    weight = _linear_weight(node, 3, node.integer("transB", 0))
    made = add_linear(node, x, weight, _bias(node, 6, 1, 4), 3)
    node.alias(made if node.value(7) is None else _quantized(node, made, _quantization(node, 7)))


@operator("QLinearAdd", "QLinearMul", inputs=(8, 8), domain=_MICROSOFT)
def _binary(node: Node) -> None:
    kind, to = node.kind.removeprefix("QLinear"), _quantization(node, 6)
    places = [i for i in (0, 3) if isinstance(node.value(i), Map)]
    if len(places) == 2:
        made = add_maps(node, kind, _dequantized(node, 0, 1), _dequantized(node, 3, 4))
    else:
        (i,) = places
        constant = _numbers(node, 3 - i, None).arrays[0]
        x = _dequantized(node, i, i + 1)
        biased = add_bias(node, x, constant) if kind == "Add" else None
        if biased is None:
            operand = node.importer.operand(node.inputs[3 - i], constant)
            function = functions.add if kind == "Add" else functions.multiply
            biased = node.call(function, [x, operand])
        made = biased
    node.alias(_quantized(node, made, to))


@operator("QLinearConcat", inputs=(5, 64), domain=_MICROSOFT)
def _concat(node: Node) -> None:
    to, count = _quantization(node, 0), len(node.inputs)
    if count % 3 != 2:
        raise ValueError(f"{count} inputs, expected two and three for each map")
    maps = [_dequantized(node, i, i + 1) for i in range(2, count, 3)]
    node.alias(_quantized(node, concatenated(node, maps, node.integer("axis", -100)), to))


@operator("QLinearGlobalAveragePool", "QLinearAveragePool", inputs=(4, 5), domain=_MICROSOFT)
def _average(node: Node) -> None:
    if len(node.inputs) != 5:
        raise ValueError("its output has no zero point")
    node.expect("channels_last", 0)
    x, to = _dequantized(node, 0, 1), _quantization(node, 3)
    if node.kind == "QLinearAveragePool":
        made = add_average_pool(node, x)
    elif len(x.shape) == 4:
        made = node.call(functions.global_average_pool, [x], is_positive=x.is_positive)
    else:
        raise ValueError(f"its input has shape {x.shape}, expected 4 dimensions")
    node.alias(_quantized(node, made, to))
