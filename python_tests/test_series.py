"""Units that follow each other in a container of other modules too."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from _cases import assert_accurate, assert_close, draw, ops_called, plain_stage
from _styles import ConvBNReLU, Wrapped, three
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.nn.series import Mixed
from snv2_kernels.testing import float64_reference, randomize_


def mixed() -> tuple[nn.Sequential, Tensor]:
    """Three units and a stage of two between other modules, and an input."""
    stage = nn.Sequential(Wrapped(28, 28, 1), Wrapped(28, 28, 1))
    model = nn.Sequential(ConvBNReLU(3, 10, 3, 2), *three(Wrapped), stage, nn.Conv2d(28, 5, 1))
    return randomize_(model).eval(), draw(2, 3, 19, 23)


def count(model: nn.Module, x: Tensor) -> int:
    """Fused ops that a forward calls."""
    with torch.no_grad():
        return sum(name.startswith("snv2::") for name in ops_called(model, x))


def test_one_op() -> None:
    model, x = mixed()
    fused = snv2.fuse(model)
    with torch.no_grad():
        assert_accurate("network", fused(x), model(x), float64_reference(model)(x))
    assert count(fused, x) == 1
    assert list(fused.state_dict()) == list(model.state_dict())
    assert list(map(str, snv2.explain(model).parts)) == [
        "1-4: stage: fused",
        "1: unit: fused",
        "2: unit: fused",
        "3: unit: fused",
        "4: stage: fused",
        "4.0: unit: fused",
        "4.1: unit: fused",
        "(model): Sequential: not fused: computes more than units: conv2d (0.conv); plain: 0, 5",
    ]
    assert str(snv2.explain(fused)) == str(snv2.explain(model))
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), snv2.fuse(fused)):
        assert type(other) is Mixed
        assert count(other, x) == 1
        assert_close(other, model, x)


def test_known_units() -> None:
    units = list(plain_stage([2, 1], 34, 21))
    model = nn.Sequential(nn.ReLU(), *units, nn.Hardswish(), *plain_stage([1], 34, 34)).eval()
    x = draw(2, 21, 9, 11)
    fused = snv2.fuse(model)
    assert count(fused, x) == 2
    assert_close(fused, model, x)


def test_units_that_do_not_fit_complain_as_they_do() -> None:
    model = nn.Sequential(*three(Wrapped)[:2], *three(Wrapped)[:1], nn.ReLU()).eval()
    with pytest.raises(RuntimeError, match="channels"):
        snv2.fuse(model)(draw(1, 10, 9, 9))


def test_changes_show() -> None:
    model, x = mixed()
    fused = snv2.fuse(model)
    assert_close(fused, model, x)
    with torch.no_grad():
        model[2].main[0].conv.weight.mul_(2)
    assert_close(fused, model, x)
    for m in (fused, model):
        m[1].main[1].norm.eps = 0.25
    assert_close(fused, model, x)
    assert count(fused, x) == 1
    for m in (fused, model):
        m[2] = nn.Identity()
    assert_close(fused, model, x)
    assert count(fused, x) == 2
    model[1].main[0].conv.weight.data.mul_(3)  # which shows nowhere
    assert_close(fused.eval(), model, x)


def test_hooks_and_train_mode() -> None:
    model, x = mixed()
    fused = snv2.fuse(model)
    seen: list[torch.Size] = []
    handle = fused[2].register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    assert_close(fused, model, x)
    assert seen == [(2, 28, 5, 6)]
    assert "has hooks" in str(snv2.explain(fused)).splitlines()[0]
    handle.remove()
    fused[3].train()
    twin = copy.deepcopy(model)
    twin[3].train()
    assert_close(fused, twin, x)
    means = [m[3].main[0].norm.running_mean for m in (fused, twin)]
    torch.testing.assert_close(*means)


def test_gradients() -> None:
    model, x = mixed()
    grads = []
    for m in (snv2.fuse(model), model):
        y = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(m(y).square().mean(), [y, *m.parameters()]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_conversion_and_tracing() -> None:
    model, x = mixed()
    fused = snv2.fuse(model)
    traced = torch.jit.trace(fused, x)
    assert_close(traced, model, x)
    fused.bfloat16()
    assert count(fused, x.bfloat16()) == 1
    assert model[2].main[0].conv.weight.dtype == torch.float32
