"""ONNX files and scripts of fused modules: the plain graph, since others lack the kernels."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from _cases import FP32_BOUND, draw, plain_stage, unit_pair
from _styles import WithInnerForward
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.testing import max_error, randomize_

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# torch.jit and the exporters warn of themselves, and of Python numbers that become constants.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Shuffled(nn.Module):
    """Calls an op of this package by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return snv2.ops.cat_shuffle(*x.chunk(2, 1))


def every_kind() -> tuple[nn.Module, Tensor]:
    """A known unit in a row with a recognised one, a stage, a split, an op, and another layer."""
    row = plain_stage([1], 8, 8)[0], randomize_(WithInnerForward(8, 8, 1))
    rest = plain_stage([2], 8, 8), randomize_(snv2.nn.SplitDepthwiseShuffle(8)), Shuffled()
    return nn.Sequential(*row, nn.Hardswish(), *rest).eval(), draw(1, 8, 5, 6)


class Both(nn.Module):
    """Two models side by side, so that one export has both graphs, the first one's first."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(y)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx_of_a_fused_model_is_that_of_the_plain_one(tmp_path: Path, dynamo: bool) -> None:
    """Operator by operator."""
    plain, x = every_kind()
    fused = snv2.fuse(plain)
    assert [part.reason for part in snv2.explain(fused).parts] == [None] * 6
    path = tmp_path / "both.onnx"
    both = Both(plain, fused).eval()
    torch.onnx.export(both, (x, x + 1), path, dynamo=dynamo, external_data=False, verbose=False)
    data = "Constant", "Identity"  # which the two graphs share
    graph = onnx.load(path).graph
    nodes = [(n.op_type, *map(str, n.attribute)) for n in graph.node if n.op_type not in data]
    assert nodes[: len(nodes) // 2] == nodes[len(nodes) // 2 :]
    session = onnxruntime.InferenceSession(path)
    inputs = {i.name: v.numpy() for i, v in zip(session.get_inputs(), (x, x + 1), strict=True)}
    for out, expected in zip(session.run(None, inputs), both(x, x + 1), strict=True):
        assert max_error(torch.from_numpy(out), expected.detach()) < FP32_BOUND


def test_scripting_says_to_script_the_plain_model() -> None:
    """And leaves the fused one as it was, also inside a model of another class."""
    fused = nn.Sequential(nn.ReLU(), snv2.fuse(unit_pair(1, 8, 8)[0]))
    classes = [type(module) for module in fused.modules()]
    for module in (fused, fused[1], copy.deepcopy(fused)):
        with pytest.raises(TypeError, match=r"got a fused InvertedResidual; .* torch\.jit\.trace"):
            torch.jit.script(module)
    assert [type(module) for module in fused.modules()] == classes
