"""The plain models are torchvision's, to the bit."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from _cases import WIDTHS, draw
from torch import nn

import snv2_kernels as snv2
from snv2_kernels.testing import randomize_

PARAMETERS = {"x0_5": 1366792, "x1_0": 2278604, "x1_5": 3503624, "x2_0": 7393996}


def build(library: Any, width: str, **kwargs: Any) -> nn.Module:
    return getattr(library, f"shufflenet_v2_{width}")(**kwargs)


def pair(torchvision: types.ModuleType, width: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    ours = randomize_(build(snv2.models, width, **kwargs))
    theirs = build(torchvision.models, width, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("width", WIDTHS)
def test_state_dict_is_torchvisions(torchvision: types.ModuleType, width: str) -> None:
    ours = build(snv2.models, width).state_dict()
    theirs = build(torchvision.models, width).state_dict()
    assert list(ours) == list(theirs)
    assert [t.shape for t in ours.values()] == [t.shape for t in theirs.values()]
    assert [t.dtype for t in ours.values()] == [t.dtype for t in theirs.values()]


@pytest.mark.parametrize("width", WIDTHS)
def test_submodules_are_torchvisions(torchvision: types.ModuleType, width: str) -> None:
    ours = build(snv2.models, width).named_modules()
    theirs = build(torchvision.models, width).named_modules()
    names = [(name, type(module).__name__) for name, module in ours]
    assert names == [(name, type(module).__name__) for name, module in theirs]


@pytest.mark.parametrize("width", WIDTHS)
def test_initial_state_is_torchvisions(torchvision: types.ModuleType, width: str) -> None:
    torch.manual_seed(3)
    ours = build(snv2.models, width).state_dict()
    torch.manual_seed(3)
    theirs = build(torchvision.models, width).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("width", WIDTHS)
def test_parameter_count(width: str) -> None:
    count = sum(p.numel() for p in build(snv2.models, width).parameters())
    assert count == PARAMETERS[width]


@pytest.mark.parametrize("size", [(224, 224), (97, 131), (1, 1)], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_eval_output_is_torchvisions(
    torchvision: types.ModuleType, width: str, size: tuple[int, int]
) -> None:
    ours, theirs = pair(torchvision, width)
    x = draw(2, 3, *size)
    with torch.no_grad():
        assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("width", WIDTHS)
def test_train_step_is_torchvisions(torchvision: types.ModuleType, width: str) -> None:
    ours, theirs = pair(torchvision, width)
    x = draw(2, 3, 64, 64)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        outputs.append(model.train()(x))
        outputs[-1].square().mean().backward()
    assert torch.equal(*outputs)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    for (name, b), c in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(b, c), name


def test_num_classes(torchvision: types.ModuleType) -> None:
    ours, theirs = pair(torchvision, "x0_5", num_classes=7)
    assert ours.fc.out_features == 7
    x = draw(1, 3, 64, 64)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_constructor_takes_another_unit() -> None:
    class Unit(snv2.models.InvertedResidual):
        pass

    model = snv2.models.shufflenet_v2_x0_5(inverted_residual=Unit)
    assert sum(isinstance(m, Unit) for m in model.modules()) == 16


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        (([4, 8], [24, 48, 96, 192, 1024]), "stages_repeats"),
        (([4, 8, 4, 4], [24, 48, 96, 192, 1024]), "stages_repeats"),
        (([4, 8, 4], [24, 48, 96, 192]), "stages_out_channels"),
        (([4, 8, 4], [24, 48, 96, 192, 1024, 7]), "stages_out_channels"),
    ],
    ids=["2-repeats", "4-repeats", "4-channels", "6-channels"],
)
def test_network_constructor_errors(
    torchvision: types.ModuleType, arguments: tuple[Any, ...], argument: str
) -> None:
    with pytest.raises(ValueError, match=argument):
        snv2.models.ShuffleNetV2(*arguments)
    with pytest.raises(ValueError):
        torchvision.models.ShuffleNetV2(*arguments)


@pytest.mark.parametrize("make", [snv2.models.InvertedResidual, snv2.nn.InvertedResidual])
@pytest.mark.parametrize(
    ("arguments", "argument"),
    [((8, 8, 0), "stride"), ((8, 8, 4), "stride"), ((8, 12, 1), "inp"), ((9, 9, 1), "inp")],
    ids=str,
)
def test_unit_constructor_errors(
    make: type[nn.Module], arguments: tuple[int, int, int], argument: str
) -> None:
    with pytest.raises(ValueError, match=argument):
        make(*arguments)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_unit_is_torchvisions(torchvision: types.ModuleType, stride: int) -> None:
    ours = randomize_(snv2.models.InvertedResidual(16, 16, stride)).eval()
    theirs = torchvision.models.shufflenetv2.InvertedResidual(16, 16, stride).eval()
    theirs.load_state_dict(ours.state_dict())
    x = draw(2, 16, 7, 9)
    assert torch.equal(ours(x), theirs(x))


def test_channel_shuffle() -> None:
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert snv2.models.channel_shuffle(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert snv2.models.channel_shuffle(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    with pytest.raises(RuntimeError, match="shape"):
        snv2.models.channel_shuffle(x, 4)
