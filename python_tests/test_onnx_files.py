"""ONNX files of every spelling become one module, and one fused network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _cases import runs_fused
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.testing import max_error

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from _onnx_files import MEAN, STD, V2, images, lively, network, quantized, save, v1  # noqa: E402

BOUND = 1e-6  # of the largest score


def onnxruntime_scores(path: Path, x: Tensor) -> Tensor:
    """Of images one by one, since most files take one."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    rows = [session.run(None, {name: row[None].numpy()})[0] for row in x]
    return torch.cat([torch.from_numpy(row) for row in rows])


def scores(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def fused_as_one(model: nn.Module, x: Tensor) -> nn.Module:
    """The fused model, which is one op call at two sizes and computes the same."""
    fused = snv2.fuse(model)
    for size in (x.shape[2:], (96, 80)):
        y = nn.functional.interpolate(x, size=size)
        assert runs_fused(fused, y)
        assert max_error(scores(fused, y), scores(model, y)) < BOUND
    return fused


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11, 12, 13, 15, 18, 20, 21, 23])
def test_every_opset(tmp_path: Path, opset: int) -> None:
    path = save(V2(opset).write(network()), tmp_path / "net.onnx")
    x = images(2)
    model = snv2.load_onnx(path)
    assert max_error(scores(model, x), onnxruntime_scores(path, x)) < BOUND
    y = images(3, 96)[:, :, :, :80]  # a file of one batch and size runs at any
    assert max_error(scores(model, y), scores(network(), y)) < BOUND
    assert not model.training
    kinds = [type(module) for module in network().modules()]
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.MaxPool2d):
        assert sum(type(module) is kind for module in model.modules()) == kinds.count(kind)


@pytest.mark.parametrize(
    ("opset", "options"),
    [
        (12, {}),
        (16, {"folded": True, "halves": "slice"}),
        (12, {"computed": True, "halves": "slice"}),
        (20, {"folded": True, "computed": True}),
    ],
    ids=["zoo", "torch-hub", "dynamic", "default-exporter"],
)
def test_every_spelling_is_one_fused_network(
    tmp_path: Path, opset: int, options: dict[str, Any]
) -> None:
    path = save(V2(opset, **options).write(network()), tmp_path / "net.onnx")
    model, x = snv2.load_onnx(path), images(2)
    assert max_error(scores(model, x), onnxruntime_scores(path, x)) < BOUND
    fused = fused_as_one(model, x)
    assert [part.reason for part in snv2.explain(fused).parts] == [None]
    engine = snv2.Engine(model, tuple(x.shape))
    assert max_error(engine(x), scores(model, x)) < BOUND


def test_names_are_those_of_the_exported_module(tmp_path: Path) -> None:
    twin = network()
    model = snv2.load_onnx(save(V2(12).write(twin), tmp_path / "net.onnx"))
    found = model.state_dict()
    twin.load_state_dict(found)
    assert found.keys() == twin.state_dict().keys()
    folded = snv2.load_onnx(save(V2(12, folded=True).write(twin), tmp_path / "net.onnx"))
    names = [name.rpartition(".")[0] for name, _ in folded.named_parameters()]
    assert "stage2.0.branch2.3" in names
    assert set(names) <= {name.rpartition(".")[0] for name, _ in twin.named_parameters()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "dynamo",
    [False, pytest.param(True, marks=pytest.mark.slow)],  # it takes ten seconds
    ids=["torchscript", "default"],
)
def test_what_the_exporters_write(tmp_path: Path, dynamo: bool) -> None:
    pytest.importorskip("onnxscript")
    x, path = images(1), tmp_path / "net.onnx"
    kinds: dict[str, Any] = {"opset_version": 16, "dynamo": False}
    if dynamo:
        kinds = {"opset_version": 20, "dynamo": True, "external_data": True, "verbose": False}
    torch.onnx.export(network(), (x,), str(path), **kinds)
    assert max_error(scores(snv2.load_onnx(path), x), onnxruntime_scores(path, x)) < BOUND


def test_it_trains_and_is_saved_as_any_other(tmp_path: Path) -> None:
    model, twin = snv2.load_onnx(save(V2(12).write(network()), tmp_path / "net.onnx")), network()
    x, grads = images(3), []
    for m in (model, twin):
        m.train()
        m(x).square().sum().backward()
        grads.append([p.grad for p in m.parameters()])
    names = dict(zip((n for n, _ in twin.named_parameters()), grads[1], strict=True))
    for (name, _), grad in zip(model.named_parameters(), grads[0], strict=True):
        torch.testing.assert_close(grad, names[name], rtol=1e-3, atol=1e-5)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)
    torch.save(model, tmp_path / "whole.pth")
    loaded = torch.load(tmp_path / "whole.pth", weights_only=False)
    assert torch.equal(scores(loaded.eval(), x), scores(model.eval(), x))
    model.get_submodule("fc").weight.data.zero_()
    assert not torch.equal(scores(loaded, x), scores(model, x))


# Ends -----------------------------------------------------------------------------------------


def test_normalization_and_softmax_are_modules_of_their_own(tmp_path: Path) -> None:
    file = V2(17, folded=True).write(network(), normalized=True, softmax=True)
    path = save(file, tmp_path / "net.onnx")
    model, x = snv2.load_onnx(path), images(2)
    assert [name for name, _ in model.named_children()] == ["normalization", "network", "tail"]
    assert max_error(scores(model, x), onnxruntime_scores(path, x)) < BOUND
    fused = fused_as_one(model, x)
    assert snv2.explain(fused).parts[0].name == "network"
    engine = snv2.Engine(model, tuple(x.shape))
    for _ in range(2):  # its buffer is not what the network reads
        engine.input.copy_(x)
        assert max_error(engine(engine.input), scores(model, x)) < BOUND
    again = snv2.Engine(fused, tuple(x.shape))
    assert torch.equal(again(x), engine(x))
    with torch.no_grad():
        model.normalization.get_buffer(next(iter(model.normalization._buffers))).zero_()
    assert torch.equal(again(x), engine(x))  # it is frozen, all of it
    with pytest.raises(ValueError, match="eval"):
        snv2.Engine(model.train())


def test_bytes_are_normalized_by_engine_and_model(tmp_path: Path) -> None:
    """``normalize`` makes the file's input of bytes, its own normalization follows."""
    file = V2(17, folded=True).write(network(), normalized=True)
    model = snv2.load_onnx(save(file, tmp_path / "net.onnx"))
    x = (images(2) * 255).to(torch.uint8)
    engine = snv2.Engine(model, tuple(x.shape), normalize=([0.0] * 3, [1.0] * 3))
    assert max_error(engine(x.permute(0, 2, 3, 1)), scores(model, x / 255)) < BOUND
    twin = snv2.Engine(network(), tuple(x.shape), normalize=(MEAN, STD))
    assert max_error(twin(x.permute(0, 2, 3, 1)), scores(model, x / 255)) < BOUND
    model.normalization = nn.Sequential(model.normalization, nn.ReLU())
    with pytest.raises(ValueError, match="normalize: the model's normalization does more"):
        snv2.Engine(model, tuple(x.shape), normalize=([0.0] * 3, [1.0] * 3))


# Quantized and v1 -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "options"),
    [("QOperator", {"per_channel": True}), ("QDQ", {"per_channel": False})],
    ids=["int8", "qdq"],
)
def test_quantized_files_are_the_float_networks_they_stand_for(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    path = save(V2(12).write(network()), tmp_path / "net.onnx")
    file = quantized(path, kind, **options)
    model, x = snv2.load_onnx(file), images(16, seed=1)
    exact = onnxruntime_scores(path, x)
    ours = (scores(model, x) - exact).square().mean().sqrt()
    theirs = (onnxruntime_scores(file, x) - exact).square().mean().sqrt()
    assert ours < theirs
    assert ours < 0.1 * exact.square().mean().sqrt()
    relus = [step for step in model._steps if getattr(step.function, "__name__", "") == "relu"]
    assert len(relus) == sum(isinstance(m, nn.ReLU) for m in network().modules())
    fused_as_one(model, x[:2])
    # In integers within the file's ranges it is no further off, and within its own nearer.
    integers = snv2.load_onnx(file, dtype="int8")
    assert "network in int8: fused" in str(snv2.explain(integers))
    assert (scores(integers, x) - exact).square().mean().sqrt() < 1.1 * theirs
    calibrated = snv2.quantize(model, images(16, seed=2))
    assert (scores(calibrated, x) - exact).square().mean().sqrt() < theirs


@pytest.mark.filterwarnings("ignore")
def test_files_that_do_not_run_in_integers(tmp_path: Path) -> None:
    path = save(V2(12).write(network()), tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"does not say in which range the result of stem is"):
        snv2.load_onnx(path, dtype="int8")
    with pytest.raises(ValueError, match=r"dtype: expected None or 'int8', got 'int4'"):
        snv2.load_onnx(path, dtype="int4")
    # Without the numbers that the image is rounded to.
    file = quantized(path, "QDQ")
    model = onnx.load(str(file))
    nodes, image = model.graph.node, model.graph.input[0].name
    rounds = next(node for node in nodes if list(node.input[:1]) == [image])
    floats = next(node for node in nodes if node.input[0] == rounds.output[0])
    for node in nodes:
        if floats.output[0] in node.input:
            node.input[list(node.input).index(floats.output[0])] = image
    nodes.remove(rounds)
    nodes.remove(floats)
    with pytest.raises(ValueError, match="it does not quantize its image"):
        snv2.load_onnx(save(model, file), dtype="int8")


@pytest.mark.filterwarnings("ignore")
def test_integers_that_two_layers_read_with_scales_of_their_own(tmp_path: Path) -> None:
    file = quantized(save(V2(12).write(network()), tmp_path / "net.onnx"), "QOperator")
    model = onnx.load(str(file))
    nodes = {node.name: node for node in model.graph.node}
    paths = [f"/stage2/stage2.1/branch2/branch2.{i}/Conv_quant" for i in (0, 5)]
    first, second = (nodes[path] for path in paths)
    second.input[3] = first.input[3]
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    loaded = snv2.load_onnx(save(model, file))
    layers: list[Any] = [loaded.get_submodule(f"stage2.1.branch2.{i}") for i in (0, 5)]
    scales = [float(tensors[node.input[4]]) for node in (first, second)]
    assert scales[0] != scales[1]
    integers = torch.from_numpy(tensors[first.input[3]].copy())
    for layer, scale in zip(layers, scales, strict=True):
        torch.testing.assert_close(layer.weight, integers * scale)


@pytest.mark.slow
def test_whole_network(tmp_path: Path) -> None:
    model = lively(snv2.models.shufflenet_v2_x1_0())
    path = save(V2(10).write(model, size=224), tmp_path / "net.onnx")
    loaded, x = snv2.load_onnx(path), images(1, 224)
    assert max_error(scores(loaded, x), onnxruntime_scores(path, x)) < BOUND
    fused_as_one(loaded, x)


@pytest.mark.parametrize("opset", [3, 6, 7, 8, 9])
def test_v1(tmp_path: Path, opset: int) -> None:
    path = save(v1(opset), tmp_path / "net.onnx")
    model, x = snv2.load_onnx(path), images(2)
    twin = save(v1(9), tmp_path / "twin.onnx")
    assert max_error(scores(model, x), onnxruntime_scores(twin, x)) < BOUND
    assert torch.equal(scores(model, x), scores(snv2.load_onnx(twin), x))
    larger = images(2, 96)
    expected = onnxruntime_scores(save(v1(9, 96), tmp_path / "larger.onnx"), larger)
    assert max_error(scores(model, larger), expected) < BOUND
    if opset == 9:
        fused_as_one(model, x)
        assert max_error(snv2.Engine(model, tuple(x.shape))(x), scores(model, x)) < BOUND


# The package ----------------------------------------------------------------------------------


def test_the_package_is_imported_only_to_load(tmp_path: Path) -> None:
    code = "import sys, snv2_kernels; assert 'onnx' not in sys.modules; sys.modules['onnx'] = None"
    code += "; snv2_kernels.load_onnx('x.onnx')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'ImportError: load_onnx needs the package onnx: pip install "snv2_kernels[onnx]"' in (
        done.stderr
    )


def test_what_changes_nothing_or_the_rank(tmp_path: Path) -> None:
    """A Clip without bounds clips nothing; what adds a dimension is no bias."""
    numbers = np.random.default_rng(0).standard_normal
    arrays = {
        "w": numbers((8, 3, 3, 3)), "fw": numbers((8, 5)), "b": numbers((1, 1, 5))
    }  # fmt: skip
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["z"], pads=[1, 1, 1, 1]),
        onnx.helper.make_node("Clip", ["z"], ["c"]),
        onnx.helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        onnx.helper.make_node("Flatten", ["g"], ["f"]),
        onnx.helper.make_node("MatMul", ["f", "fw"], ["m"]),
        onnx.helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "graph", [value("x", 1, ["n", 3, 8, 8])], [value("y", 1, None)],
        [onnx.numpy_helper.from_array(a.astype(np.float32), k) for k, a in arrays.items()],
    )  # fmt: skip
    path = tmp_path / "net.onnx"
    opsets = [onnx.helper.make_opsetid("", 17)]
    path.write_bytes(
        onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    )
    x = torch.randn(2, 3, 8, 8)
    (expected,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    with torch.no_grad():
        out = snv2.load_onnx(path)(x)
    assert out.shape == expected.shape
    torch.testing.assert_close(out, torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
