"""Bad ONNX files are a ValueError that names the node; nothing is guessed, and nothing crashes."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import snv2_kernels as snv2

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from _onnx_files import V2, network, quantized, save, v1  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402


def node_of(model: Any, kind: str, index: int = 0) -> Any:
    return [node for node in model.graph.node if node.op_type == kind][index]


def with_attribute(kind: str, name: str, value: Any, index: int = 0) -> Callable[[Any], None]:
    """An edit that sets an attribute of a node."""

    def edit(model: Any) -> None:
        node = node_of(model, kind, index)
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return edit


def with_operator(kind: str, to: str, domain: str = "") -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        node = node_of(model, kind)
        node.op_type, node.domain = to, domain

    return edit


def with_nodes(*nodes: Any) -> Callable[[Any], None]:
    """An edit that adds nodes in front."""

    def edit(model: Any) -> None:
        kept = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*nodes, *kept])

    return edit


def with_tensor(name: str, change: Callable[[Any], None]) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        change(next(t for t in model.graph.initializer if t.name == name))

    return edit


def cyclic(model: Any) -> None:
    node_of(model, "MaxPool").input[0] = node_of(model, "Relu", 3).output[0]


def with_opset(version: int) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        model.opset_import[0].version = version

    return edit


def without_output(model: Any) -> None:
    model.graph.output[0].name = "nothing"


def without_last_node(model: Any) -> None:
    del model.graph.node[-1]


def twice(model: Any) -> None:
    node_of(model, "Relu", 2).output[0] = node_of(model, "Relu", 1).output[0]


def doubled(count: int) -> list[Any]:
    """Constants, each twice as large as the one before."""
    first = helper.make_node(
        "Constant", [], ["c0"], value=numpy_helper.from_array(np.ones(1024, np.int64))
    )
    joins = [helper.make_node("Concat", [f"c{i}"] * 2, [f"c{i + 1}"], axis=0) for i in range(count)]
    return [first, *joins]


def set_dims(*dims: int) -> Callable[[Any], None]:
    def change(tensor: Any) -> None:
        del tensor.dims[:]
        tensor.dims.extend(dims)

    return change


def shorten(tensor: Any) -> None:
    tensor.raw_data = tensor.raw_data[:-1]


def two_inputs(model: Any) -> None:
    model.graph.input.append(helper.make_tensor_value_info("other", 1, [1]))


SUBGRAPH = helper.make_graph([], "then", [], [])
CONV = r"node '/conv1/conv1.0/Conv' \(Conv, domain ai.onnx, opset 12\): "
EDITS: dict[str, tuple[Callable[[Any], None], str]] = {
    "pads": (with_attribute("Conv", "pads", [0, 0, 1, 1]), CONV + r"pads \[0, 0, 1, 1\] are asym"),
    "same": (with_attribute("Conv", "auto_pad", "SAME_UPPER"), CONV + "auto_pad SAME_UPPER pads"),
    "strides": (with_attribute("Conv", "strides", [0, 2]), CONV + "its kernel, strides or"),
    "group": (with_attribute("Conv", "group", 5), CONV + "its weight has shape"),
    "far stride": (with_attribute("Conv", "strides", [1 << 62, 2]), r"\(Reshape.*\(1, 16, 1, 8\)"),
    "kernel": (with_attribute("Conv", "kernel_shape", [5, 5]), CONV + "kernel_shape is not"),
    "type": (with_attribute("Conv", "group", 1.0), CONV + "attribute group has type"),
    "unknown attribute": (with_attribute("Conv", "fuse", 1), CONV + "attribute 'fuse' is not"),
    "count": (with_attribute("Conv", "pads", [1, 1]), CONV + "attribute pads has 2 numbers"),
    "alpha": (with_attribute("Gemm", "alpha", 2.0), r"'/fc/Gemm' \(Gemm.*alpha is 2.0, only 1.0"),
    "beta": (with_attribute("Gemm", "beta", float("nan")), "beta is nan"),
    "transA": (with_attribute("Gemm", "transA", 1), "transA is 1, only 0"),
    "transB": (with_attribute("Gemm", "transB", 0), "do not fit 40 features"),
    "eps": (with_attribute("BatchNormalization", "epsilon", float("inf")), "epsilon is inf"),
    "axis": (with_attribute("Concat", "axis", 2), r"\(Concat.*size depends on the image"),
    "far axis": (with_attribute("Split", "axis", 1 << 40), "axis is 1099511627776 of 4"),
    "sizes": (with_attribute("Split", "split", [7, 8]), r"splits 16 into \[7, 8\]"),
    "perm": (with_attribute("Transpose", "perm", [0, 2, 1, 3, 3]), r"perm is \[0, 2, 1, 3, 3\]"),
    "batch": (with_attribute("Transpose", "perm", [1, 0, 2, 3, 4]), r"\(Split.*depends on the"),
    "height": (
        with_attribute("Constant", "value", numpy_helper.from_array(np.array([1, 16, 4, 2, 8]))),
        r"\(Reshape.*splits height, width or batch",
    ),
    "operator": (with_operator("Relu", "Rely"), r"\(Rely, domain ai.onnx.*unknown operator"),
    "domain": (
        with_operator("Relu", "Relu", "org.evil"),
        r"\(Relu, domain org.evil, opset unknown\): an unknown operator",
    ),
    "if": (
        with_nodes(helper.make_node("If", ["image"], ["y"], name="branch", then_branch=SUBGRAPH)),
        r"node 'branch' \(If, .*unknown operator",
    ),
    "cycle": (cyclic, r"\(MaxPool, .*which nothing makes before it"),
    "opset 0": (with_opset(0), "opset 0, expected 1 to 25"),
    "opset 99": (with_opset(99), "opset 99, expected"),
    "opset -1": (with_opset(-1), "opset -1, expected"),
    "output": (without_output, "no node makes the output 'nothing'"),
    "last node": (without_last_node, "no node makes the output 'scores'"),
    "two of a name": (twice, r"\(Relu, .*two values named"),
    "constants": (with_nodes(*doubled(60)), r"\(Concat, .*joins constants that are no shapes"),
    "dims": (with_tensor("fc.bias", set_dims(1 << 40)), "tensor 'fc.bias' has shape"),
    "negative": (with_tensor("fc.bias", set_dims(-10)), "tensor 'fc.bias' has shape"),
    "no size": (with_tensor("fc.bias", set_dims(0, 1 << 62)), "tensor 'fc.bias' has shape"),
    "bytes": (with_tensor("fc.bias", shorten), "tensor 'fc.bias' has 39 bytes, expected 40"),
    "inputs": (two_inputs, "2 inputs, expected one, an image"),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_refused(tmp_path: Path, edit: str) -> None:
    model, (change, match) = V2(12).write(network()), EDITS[edit]
    change(model)
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=match) as caught:
        snv2.load_onnx(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_norms_in_training_mode(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    model = V2(15).write(network())
    with_attribute("BatchNormalization", "training_mode", 1)(model)
    with pytest.raises(ValueError, match=r"\(BatchNormalization.*training_mode is 1, only 0"):
        snv2.load_onnx(save(model, path))
    old = v1(6)
    del node_of(old, "BatchNormalization").attribute[:]
    with pytest.raises(ValueError, match=r"\(BatchNormalization.*is_test is 0, only 1"):
        snv2.load_onnx(save(old, path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("value", "match"),
    [(float("nan"), "is not positive and finite"), (0.0, "is not positive"),
     (0.5, "quantized with another scale")],
)  # fmt: skip
def test_scales(tmp_path: Path, value: float, match: str) -> None:
    file = quantized(save(V2(12).write(network()), tmp_path / "net.onnx"), "QOperator")
    model = onnx.load(str(file))
    name = node_of(model, "QLinearConv", 3).input[1]
    node = node_of(model, "QLinearConv", 3)
    changed = numpy_helper.from_array(np.array(value, np.float32), f"{name}_changed")
    node.input[1] = changed.name
    model.graph.initializer.append(changed)
    with pytest.raises(ValueError, match=rf"\(QLinearConv, domain ai.onnx, opset 12\).*{match}"):
        snv2.load_onnx(save(model, file))


# Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "no graph"),
        (b"no ONNX file at all", "not an ONNX file"),
        (b"\x3a\xff\xff\xff\xff\x7f", "ends too early"),
        (b"\x08" + b"\xff" * 20, "a number without an end"),
        (b"\x3a" + b"\x80\x89\x7a" + b"\x0a\x00" * 1_000_000, "more entries than a network has"),
    ],
    ids=["empty", "text", "cut", "endless", "bomb"],
)
def test_no_onnx_file(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match):
        snv2.load_onnx(path)


@pytest.mark.parametrize(
    "text", [b"dilations", b"/conv1/conv1.0/Conv", b"conv1.0.weight", b"image"]
)
def test_text_that_is_not_utf_8(tmp_path: Path, text: bytes) -> None:
    """Protobuf would make bytes of it."""
    data, path = V2(12).write(network()).SerializeToString(), tmp_path / "net.onnx"
    path.write_bytes(data.replace(text, b"\xff" + text[1:], 1))
    with pytest.raises(ValueError, match="a text that is not UTF-8"):
        snv2.load_onnx(path)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        snv2.load_onnx(tmp_path / "missing.onnx")
    with pytest.raises(IsADirectoryError):
        snv2.load_onnx(tmp_path)
    with pytest.raises(TypeError, match="path: expected a path, got int"):
        snv2.load_onnx(3)  # type: ignore[arg-type]


def _external(path: Path, location: str, **keys: str) -> Path:
    """A file whose ``fc.weight`` lies elsewhere."""
    model = V2(12).write(network())
    tensor = next(t for t in model.graph.initializer if t.name == "fc.weight")
    if not keys:
        (path.parent / "weights").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **keys}.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path, secret = folder / "net.onnx", tmp_path / "secret"
    model: Any = snv2.load_onnx(_external(path, "weights"))
    assert torch.equal(model.fc.weight, network().fc.weight)
    secret.write_bytes((folder / "weights").read_bytes())
    (folder / "link").symlink_to(secret)
    os.mkfifo(folder / "pipe")  # opening it would wait for ever
    for location in ("../secret", str(secret), "link", "pipe", "missing", ".", "", "a\0b"):
        with pytest.raises(ValueError, match=r"tensor 'fc\.weight'"):
            snv2.load_onnx(_external(path, location))
    for keys in ({"offset": "8"}, {"offset": "-8"}, {"length": "4"}, {"offset": "x"}):
        with pytest.raises(ValueError, match=r"tensor 'fc\.weight': .*external data"):
            snv2.load_onnx(_external(path, "weights", **keys))


# Damaged at random ----------------------------------------------------------------------------


def _bases(folder: Path) -> list[Any]:
    plain = save(V2(12).write(network()), folder / "net.onnx")
    others = [
        V2(16, folded=True, halves="slice").write(network(), normalized=True, softmax=True),
        V2(12, computed=True).write(network()),
        v1(3),
        v1(9),
    ]
    formats = [onnx.load(str(quantized(plain, kind))) for kind in ("QOperator", "QDQ")]
    return [onnx.load(str(plain)), *others, *formats]


def _any_of(items: Any, rng: np.random.Generator) -> int:
    return int(rng.integers(len(items)))


def _damage_node(node: Any, other: Any, rng: np.random.Generator) -> None:
    kind = rng.integers(4)
    if kind == 0:
        node.op_type = other.op_type
    elif kind == 1 and node.input and other.input:
        node.input[_any_of(node.input, rng)] = other.input[_any_of(other.input, rng)]
    elif kind == 2 and node.input:
        del node.input[_any_of(node.input, rng)]
    elif node.attribute:
        attribute = node.attribute[_any_of(node.attribute, rng)]
        drawn = int(rng.choice([-1, 0, 1, 2, 3, 7, 1 << 31, (1 << 63) - 1]))
        if rng.integers(3) == 0:
            node.attribute.remove(attribute)
        elif attribute.ints:
            attribute.ints[_any_of(attribute.ints, rng)] = drawn
        else:
            attribute.i = drawn


def _damage_tensor(tensor: Any, rng: np.random.Generator) -> None:
    numbers = bytearray(tensor.raw_data)
    if tensor.dims and rng.integers(2):
        tensor.dims[_any_of(tensor.dims, rng)] = int(rng.choice([-1, 0, 1, 1 << 40]))
    elif numbers:
        numbers[_any_of(numbers, rng)] = int(rng.integers(256))
        tensor.raw_data = bytes(numbers)


def _damaged(model: Any, rng: np.random.Generator) -> bytes:
    """The file with some of its structure or bytes changed."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    nodes, tensors = copied.graph.node, copied.graph.initializer
    for _ in range(rng.integers(0, 3)):
        kind = rng.integers(8)
        if kind == 0:
            copied.opset_import[0].version = int(rng.integers(-2, 30))
        elif kind < 3:
            _damage_tensor(tensors[_any_of(tensors, rng)], rng)
        else:
            _damage_node(nodes[_any_of(nodes, rng)], nodes[_any_of(nodes, rng)], rng)
    data = bytearray(copied.SerializeToString())
    for _ in range(rng.integers(0, 4)):
        at = _any_of(data, rng)
        if rng.integers(4) == 0:
            del data[at : at + int(rng.integers(1, 9))]
        else:
            data[at] = int(rng.integers(256))
    return bytes(data)


def _loaded(path: Path) -> nn.Module | str:
    """A module, or the message of a ValueError."""
    try:
        return snv2.load_onnx(path)  # type: ignore[no-any-return]
    except ValueError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(20))
def test_ten_thousand_damaged_files(tmp_path: Path, seed: int) -> None:
    bases, rng = _bases(tmp_path), np.random.default_rng(seed)
    path = tmp_path / "damaged.onnx"
    refused, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(500):
        path.write_bytes(_damaged(bases[rng.integers(len(bases))], rng))
        start, result = time.process_time(), _loaded(path)
        assert time.process_time() - start < 5
        refused += isinstance(result, str)
        assert isinstance(result, nn.Module) or result.startswith(f"{path}: ")
    assert 100 < refused < 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10
