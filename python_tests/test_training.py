"""Training: fused modules and ops follow plain PyTorch, step by step, and learn."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from _cases import PlainSplit, assert_agrees, ops_called, run_fused, same_state
from conftest import running_on
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.testing import max_error

CHANCE = 0.1

Digits = tuple[Tensor, Tensor, Tensor, Tensor]  # images and labels, to learn and to test


@pytest.fixture(scope="module")
def digits() -> Digits:
    """Handwritten digits, 8 x 8."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 8 - 1
    y = torch.tensor(labels)[order]
    return x[:-400], y[:-400], x[-400:], y[-400:]


def train(
    model: nn.Module, digits: Digits, steps: int, rate: float, batch: int = 32
) -> list[float]:
    """The loss of each step."""
    images, labels, _, _ = digits
    parameter = next(model.parameters())
    images, labels = images.to(parameter), labels.to(parameter.device)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    losses = []
    for step in range(steps):
        at = torch.arange(step * batch, (step + 1) * batch) % len(labels)
        loss = F.cross_entropy(model(images[at]), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    _, _, images, labels = digits
    return float((model(images).argmax(1) == labels).float().mean())


def enlarged(network: nn.Module) -> nn.Sequential:
    """A network behind what makes a picture of a digit."""
    return nn.Sequential(nn.Upsample(scale_factor=4.0, mode="bilinear"), _Grey(), network)


class _Grey(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)


def test_network(digits: Digits) -> None:
    torch.manual_seed(0)
    plain = enlarged(snv2.models.ShuffleNetV2([1, 2, 1], [16, 32, 64, 96, 128], 10))
    fused = snv2.fuse(copy.deepcopy(plain))
    x, _, _, _ = digits
    untrained = run_fused(fused.eval(), x[:8])  # packs its weights
    assert train(fused.train(), digits, 120, 0.05) == train(plain.train(), digits, 120, 0.05)
    assert same_state(fused, plain)
    assert_agrees("network", fused.eval(), plain.eval(), x[:8])
    assert max_error(run_fused(fused, x[:8]), untrained) > 0.1
    assert accuracy(fused, digits) == accuracy(plain, digits) > 8 * CHANCE


class Split(nn.Module):
    """split_dw_cat_shuffle with weights that learn, on a backend."""

    def __init__(self, channels: int, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.weight = nn.Parameter(torch.randn(channels // 2, 1, 3, 3) / 3)
        self.scale = nn.Parameter(torch.ones(channels // 2))
        self.shift = nn.Parameter(torch.zeros(channels // 2))

    def forward(self, x: Tensor) -> Tensor:
        return snv2.ops.split_dw_cat_shuffle(
            x, self.weight, self.scale, self.shift, backend=self.backend
        )


class Pair(nn.Module):
    """cat_shuffle of a map and a depthwise convolution of it, with weights that learn."""

    def __init__(self, channels: int, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.weight = nn.Parameter(torch.randn(channels, 1, 3, 3) / 3)
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        main = snv2.ops.dw_conv3x3(
            x, self.weight, self.scale, self.shift, 1, True, backend=self.backend
        )
        return snv2.ops.cat_shuffle(x, main, backend=self.backend)


def around(first: nn.Module, second: nn.Module) -> nn.Sequential:
    """A small classifier of digits around a module of 24 channels and one of 24 or more."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        first,
        nn.Conv2d(24, 24, 1), nn.BatchNorm2d(24), nn.ReLU(),
        second,
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(10),
    )  # fmt: skip


def of_ops(backend: str, digits: Digits) -> nn.Sequential:
    torch.manual_seed(0)
    with torch.device("cpu"):  # the same numbers on every device
        model = around(Split(24, backend), Pair(24, backend))
    model = model.to(torch.get_default_device())
    model(digits[0][:8].to(torch.get_default_device()))  # the last layer learns its size
    return model


def deviations(losses: list[float], exact: list[float]) -> list[float]:
    """The largest so far, at a few steps."""
    found = [abs(a - b) / b for a, b in zip(losses, exact, strict=True)]
    return [max(found[:step]) for step in (20, 100, 200)]


def test_ops_learn_as_their_formulas_do(digits: Digits) -> None:
    """Roundings grow as they do in plain PyTorch, measured on the way that float64 takes."""
    exact = train(of_ops("reference", digits).double(), digits, 200, 0.05)
    fused, plain = (of_ops(name, digits) for name in ("cpu", "reference"))
    ours = deviations(train(fused, digits, 200, 0.05), exact)
    eager = deviations(train(plain, digits, 200, 0.05), exact)
    assert all(a <= 2 * e + 1e-6 for a, e in zip(ours, eager, strict=True)), (ours, eager)
    assert eager[0] < 1e-5
    for model in (fused, plain):
        assert accuracy(model.eval(), digits) > 8 * CHANCE


@pytest.mark.parametrize("backend", ["cuda-emulated", "triton"])
@pytest.mark.on_triton(0)
def test_first_steps_of_ops(backend: str, digits: Digits) -> None:
    with running_on(backend):
        losses = train(of_ops(backend, digits), digits, 3, 0.05, batch=4)
    expected = train(of_ops("reference", digits), digits, 3, 0.05, batch=4)
    assert losses == pytest.approx(expected, rel=1e-5)


def test_split_module_in_train_and_eval_mode(digits: Digits) -> None:
    """Then with statistics that stay as they are, where the forward is fused."""
    fused = around(snv2.nn.SplitDepthwiseShuffle(24), snv2.nn.SplitDepthwiseShuffle(24))
    plain = around(PlainSplit(24), PlainSplit(24))
    for model in (fused, plain):
        model(digits[0][:8])
    plain.load_state_dict(fused.state_dict())
    assert train(fused, digits, 100, 0.05) == train(plain, digits, 100, 0.05)
    losses, expected = (train(m.eval(), digits, 20, 0.01) for m in (fused, plain))
    assert losses == pytest.approx(expected, rel=1e-4)
    called = ops_called(fused, digits[0][:8])
    assert called.count("snv2::split_dw_cat_shuffle") == 2
    assert accuracy(fused, digits) == pytest.approx(accuracy(plain, digits), abs=0.01)
    assert accuracy(fused, digits) > 8 * CHANCE
