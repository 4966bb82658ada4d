"""A classifier of several layers behind a network: the kernels end before it, and it runs as it
is."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases import FP32_BOUND, SMALL, assert_close, draw, run_fused, runs_fused, small_network
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.testing import max_error, randomize_

SIZE = (2, 3, 33, 35)


def _model(*layers: nn.Module) -> Any:
    model: Any = small_network()
    model.fc = nn.Sequential(*(layers or (nn.Linear(40, 8), nn.ReLU(True), nn.Linear(8, 3))))
    return randomize_(model).eval()


def _same_gradients(fused: nn.Module, model: Any, x: Tensor) -> None:
    grads = []
    for m in (fused, model):
        y = x.clone().requires_grad_()
        inputs = [y, *m.parameters()]
        first = torch.autograd.grad(m(y).square().mean(), inputs, create_graph=True)
        twice = torch.autograd.grad(first[0].square().sum(), m.conv1[0].weight)
        grads.append((*first, *twice))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layers",
    [
        # which writes to the network's result, and to nothing that the backward pass needs
        (nn.SiLU(True), nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 3)),
        (nn.Dropout(0.5), nn.Linear(40, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3)),
        (nn.LayerNorm(40), nn.Linear(40, 3)),
    ],
    ids=["in-place", "norm", "layer-norm"],
)
def test_gradients(layers: tuple[nn.Module, ...]) -> None:
    model, x = _model(*layers), draw(*SIZE)
    fused = snv2.fuse(model)
    assert runs_fused(fused, x)
    _same_gradients(fused, model, x)


def test_edits_after_fuse() -> None:
    model, x = small_network(), draw(*SIZE)
    fused = snv2.fuse(model)
    for m in (fused, model):
        m.fc = _model().fc
    assert runs_fused(fused, x)
    _same_gradients(fused, model, x)
    with torch.no_grad():
        fused(x)
        for m in (fused, model):
            m.fc[2].weight.mul_(2)
        assert_close(fused, model, x)
    for layer in (nn.Sequential(nn.Linear(40, 4), nn.Sigmoid()), nn.Linear(40, 5), _model().fc):
        for m in (fused, model):
            m.fc = copy.deepcopy(layer)
        assert runs_fused(fused, x)
        assert_close(fused, model, x)


def test_frozen_network() -> None:
    """Its classifier is trained in eval mode, and sees a tensor without gradients."""
    model, x = _model(), draw(*SIZE)
    model.requires_grad_(False)
    model.fc = randomize_(nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 3))).eval()
    fused, seen = snv2.fuse(model), []
    assert runs_fused(fused, x)
    grads = [torch.autograd.grad(m(x).square().mean(), m.fc.parameters()) for m in (fused, model)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    fused.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    fused(x)
    assert seen == [False]


def test_backward_passes_of_several_threads() -> None:
    fused = snv2.fuse(_model())
    inputs = [draw(*SIZE, seed=seed).requires_grad_() for seed in range(4)]

    def backward(x: Tensor) -> Tensor:
        return torch.autograd.grad(fused(x).square().sum(), x)[0]

    expected = list(map(backward, inputs))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            assert all(map(torch.equal, pool.map(backward, inputs), expected))


class _Centred(nn.Module):
    """Moves statistics in eval mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(40), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.norm.running_mean, self.norm.running_var
        x = F.batch_norm(x, mean, var, training=True)
        return self.fc(x)  # type: ignore[no-any-return]


def test_backward_pass_does_not_run_the_tail() -> None:
    model: Any = small_network()
    model.fc, x = _Centred(), draw(*SIZE)
    models = [randomize_(model).eval(), snv2.fuse(copy.deepcopy(model))]
    for m in models:
        m(x).square().mean().backward()
    for a, b in zip(*(m.fc.norm.buffers() for m in models), strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_and_modes_of_the_tail() -> None:
    model, x = _model(nn.Dropout(0.5), nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 3)), draw(*SIZE)
    fused, seen = snv2.fuse(model), []
    fused.fc[1].register_forward_hook(lambda *_: seen.append(1))
    assert_close(fused, model, x)
    assert seen == [1]
    fused = snv2.fuse(model)
    fused.fc[0].train()
    assert "train" in str(fused.reason())
    with torch.no_grad():
        assert len({float(fused(x).sum()) for _ in range(8)}) > 1


def test_copies_and_autocast() -> None:
    model, x = _model(), draw(*SIZE)
    fused = snv2.fuse(model)
    expected = run_fused(fused, x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(run_fused(other, x), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out, plain = fused(x), model(x)
    assert out.dtype == plain.dtype == torch.bfloat16
    assert max_error(out.float(), plain.float()) < 0.05


def test_graphs() -> None:
    """One graph with one operator of the network, in which the tail is plain."""
    model, x = _model(), draw(*SIZE)
    fused = snv2.fuse(model)
    counted: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        counted.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(fused, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert max_error(compiled(x), model(x)) < FP32_BOUND
    assert sum("snv2.fused" in name for name in counted) == 1
    assert not any("conv2d" in name for name in counted)
    exported = torch.export.export(fused, (x,)).module()
    with torch.no_grad():
        assert max_error(exported(x), model(x)) < FP32_BOUND


def test_what_is_told() -> None:
    model = _model()
    parts = {part.name: str(part.reason) for part in snv2.explain(model).parts}
    assert parts[""] == "None"
    assert "follows a network" in parts["fc"]
    with pytest.raises(ValueError, match="cannot run fused: fc follows the network"):
        snv2.Engine(model, SIZE)


class _Counting(nn.Module):
    """Writes to what it was not given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(40, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.fc(x)  # type: ignore[no-any-return]


class _Means(snv2.models.ShuffleNetV2):
    def means(self, x: Tensor) -> Tensor:
        y = self.stage4(self.stage3(self.stage2(self.maxpool(self.conv1(x)))))
        return self.conv5(y).mean([2, 3])  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.means(x))  # type: ignore[no-any-return]


class _Twice(_Means):
    def forward(self, x: Tensor) -> Tensor:
        y = self.means(x)
        self.fc(3 * y)  # whose result nobody takes
        return self.fc(y)  # type: ignore[no-any-return]


class _Added(_Means):
    def forward(self, x: Tensor) -> Tensor:
        y = self.means(x)
        return self.fc(y) + y.mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("cls", [_Means, _Twice, _Added])
def test_what_is_no_tail(cls: type[Any]) -> None:
    """It runs as it is, beside the network that is fused; where it writes to its own state, beside
    the stages."""
    model = cls(*SMALL, 3)
    model.fc = (
        _Counting()
        if cls is _Means
        else nn.Sequential(nn.Linear(40, 4), nn.Tanh(), nn.Linear(4, 3))
    )
    randomize_(model).eval()
    x, fused = draw(*SIZE), snv2.fuse(model)
    part = snv2.explain(fused).parts[0]
    told = ("stage2", "stage") if cls is _Means else ("", "partition of a network")
    assert (part.name, part.kind) == told
    _same_gradients(fused, model, x)
    if cls is _Means:
        assert torch.equal(model.fc.calls, fused.fc.calls)
