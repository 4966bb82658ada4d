"""Models that return maps on the way: one op call, whatever they return them in."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from _backbones import BACKBONES, Indexed, Looked, Named, stages
from _cases import assert_accurate, draw, ops_called
from _projects import General
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.graph.returned import Returned
from snv2_kernels.nn.recognized import Recognized
from snv2_kernels.nn.series import Mixed
from snv2_kernels.testing import float64_reference, max_error, randomize_

SIZE = (2, 21, 17)


def made(name: str) -> tuple[nn.Module, Tensor]:
    make, channels, _ = BACKBONES[name]
    n, h, w = SIZE
    return randomize_(make()).eval(), draw(n, channels, h, w)


def calls(model: nn.Module, x: Tensor) -> int:
    """Fused ops that a forward reaches, others beside them or not."""
    with torch.no_grad():
        return sum(name.startswith("snv2::") for name in ops_called(model, x))


def fused_ops(model: nn.Module, x: Tensor) -> list[str]:
    """The same by name; fails if convolutions run beside them."""
    with torch.no_grad():
        names = [name.partition("::") for name in ops_called(model, x)]
    fused = [name for space, _, name in names if space.startswith("snv2")]
    assert not (fused and any("conv" in name for space, _, name in names if space == "aten"))
    return fused


def same_maps(actual: Any, expected: Any, bound: float = 1e-5) -> None:
    """In equal containers, the same one where the same one was."""
    a, b = Returned.of(actual), Returned.of(expected)
    assert a is not None
    assert b is not None
    assert a[0] == b[0]
    for x, y in zip(a[1], b[1], strict=True):
        assert x.dtype == y.dtype
        assert max_error(x.detach(), y.detach()) < bound


def agree(model: nn.Module, plain: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        same_maps(model(x), plain(x))


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.on_triton(1)
def test_one_op(kernels: str, name: str) -> None:
    model, x = made(name)
    fused = snv2.fuse(model)
    with torch.no_grad():
        out, eager, exact = fused(x), model(x), float64_reference(model)(x)
    same_maps(out, eager, 1e-4)
    for t, plain, right in zip(*(Returned.of(o)[1] for o in (out, eager, exact)), strict=True):
        assert_accurate("network", t, plain, right, kernels)
    on_cuda = kernels.startswith("cuda")
    covered = BACKBONES[name][2] or not on_cuda
    kind = {"scored": "network"}.get(name, "backbone")
    first = str(snv2.explain(fused)).splitlines()[0]
    assert first.startswith(f"(model): {kind}: " + ("fused" if covered else "not fused: "))
    if covered:
        several = len(Returned.of(out)[1]) > 1
        op = "gpu_network" if on_cuda else "network"
        assert fused_ops(fused, x) == [f"{op}_results" if several else op]


@pytest.mark.parametrize("indices", [(0,), (2,), (0, 1, 2), (1, 2)], ids=str)
def test_indices(indices: tuple[int, ...]) -> None:
    model, x = randomize_(Indexed(indices)).eval(), draw(1, 3, 40, 33)
    fused = snv2.fuse(model)
    agree(fused, model, x)
    assert calls(fused, x) == 1  # without what runs behind the last map


def test_memory_format_batch_and_size() -> None:
    model, _ = made("openmmlab")
    fused = snv2.fuse(model)
    for shape in ((1, 3, 32, 32), (3, 3, 65, 47)):
        agree(fused, model, draw(*shape))
    x = draw(2, 3, 40, 33).contiguous(memory_format=torch.channels_last)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in fused(x))
    half = snv2.fuse(copy.deepcopy(model).bfloat16())
    x = draw(2, 3, 40, 33).bfloat16()
    with torch.no_grad():
        exact = float64_reference(copy.deepcopy(model).bfloat16())(x)
        for t, eager, right in zip(half(x), copy.deepcopy(model).bfloat16()(x), exact, strict=True):
            assert_accurate("network", t, eager, right)
    assert fused_ops(half, x) == ["network_results"]


# As any drop-in -------------------------------------------------------------------------------


def test_changes_show() -> None:
    model, x = made("nanodet")
    fused = snv2.fuse(model)
    agree(fused, model, x)
    with torch.no_grad():
        model.stage3[0].main[0].conv.weight.mul_(2)
    agree(fused, model, x)
    for m in (fused, model):
        m.stage2[1].main[2].norm.eps = 0.5
    agree(fused, model, x)
    assert fused_ops(fused, x) == ["network_results"]
    for m in (fused, model):
        m.out_stages = (4, 2)
    agree(fused, model, x)
    assert fused_ops(fused, x) == ["network_results"]
    for m in (fused, model):
        m.stage4 = nn.Sequential(nn.Identity()).eval()
    agree(fused, model, x)
    assert len(fused_ops(fused, x)) == 1
    for m in (fused, model):
        m.maxpool.stride = 3
    agree(fused, model, x)
    assert calls(fused, x) == 1  # behind a stem that PyTorch runs


def test_hooks_and_train_mode() -> None:
    model, x = made("openmmlab")
    fused = snv2.fuse(model)
    seen: list[torch.Size] = []
    handle = fused.layers[1].register_forward_hook(lambda module, x, out: seen.append(out.shape))
    agree(fused, model, x)
    assert seen == [(2, 44, 2, 2)]
    assert calls(fused, x) == 3
    handle.remove()
    assert len(fused_ops(fused, x)) == 1
    twin = copy.deepcopy(model)
    for m in (fused, twin):
        m.train()
    with torch.no_grad():
        for a, b in zip(fused(x), twin(x), strict=True):
            assert torch.equal(a, b)
    agree(fused.eval(), twin.eval(), x)
    frozen = randomize_(Indexed(frozen_stages=0))
    assert [m.training for m in snv2.fuse(frozen.train()).layers] == [False, True, True]


def test_copies() -> None:
    model, x = made("backwards")
    fused = snv2.fuse(model)
    expected = fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), snv2.fuse(fused)):
        assert type(other) is type(fused)
        same_maps(other(x), expected, 1e-30)
        assert fused_ops(other, x) == ["network_results"]


@pytest.mark.parametrize("name", ["yolox", "backwards"])
def test_gradients(name: str) -> None:
    model, x = made(name)
    grads = []
    for m in (snv2.fuse(model), model):
        y = x.clone().requires_grad_()
        _, maps = Returned.of(m(y))
        total = sum(t.square().mean() * (i + 1) for i, t in enumerate(maps))
        grads.append(torch.autograd.grad(total, [y, *m.parameters()]))
        (one,) = torch.autograd.grad(Returned.of(m(y))[1][0].sum(), [y])
        grads[-1] = (*grads[-1], one)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_autocast() -> None:
    for model, x in (made("yolox"), made("openmmlab")):
        fused = snv2.fuse(model)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            same_maps(fused(x), model(x), 0.1)
            assert len(fused_ops(fused, x)) == 1
    # A split passes float32 on, a projection does not.
    model = randomize_(SplitFirst()).eval()
    x = draw(2, 28, 9, 7)
    fused = snv2.fuse(model)
    assert fused_ops(fused, x) == ["network_results"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        same_maps(fused(x), model(x), 0.1)


class SplitFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = General(28, 28), General(28, 44, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.a(x)
        return x, self.b(x)


class NextShufflesFirst(nn.Module):
    """The second unit shuffles all of the map that the first one gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = General(28, 28, shuffled=False), General(28, 28, shuffled=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.a(x)
        return first, self.b(nn.functional.channel_shuffle(first, 2))


class Fpn(nn.Module):
    """Reads the maps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.lateral = Looked((2, 3)), nn.Conv2d(28, 44, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.body.maxpool(self.body.conv1(x))
        c3 = self.body.stage2(x)
        c4 = self.body.stage3(c3)
        return self.lateral(c3), c4


class WritesItsMap(Named):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = super().forward(x)
        maps["dark3"].mul_(2)
        return maps


@pytest.mark.parametrize(
    ("make", "channels", "ops"),
    [(Fpn, 3, 1), (WritesItsMap, 10, 2)],
)
def test_other_forwards_run_in_part(make: Any, channels: int, ops: int) -> None:
    model, x = randomize_(make()).eval(), draw(2, channels, 21, 17)
    fused = snv2.fuse(model)
    agree(fused, model, x)
    assert calls(fused, x) == ops


def test_a_map_that_the_next_unit_shuffles() -> None:
    model, x = randomize_(NextShufflesFirst()).eval(), draw(2, 28, 9, 7)
    fused = snv2.fuse(model)
    assert fused_ops(fused, x) == ["network_results"]
    agree(fused, model, x)


def test_engine(kernels: str) -> None:
    model, x = made("torchvision")
    engine = snv2.Engine(model, tuple(x.shape))
    same_maps(engine(x), snv2.fuse(model)(x), 1e-5)
    assert list(engine(x)) == ["fine", "coarse"]
    assert engine.report().op_calls == 1


# Containers -----------------------------------------------------------------------------------


def nested() -> tuple[nn.Sequential, Tensor]:
    """Stages in containers of other modules too, at two levels."""
    first, second, third = stages()
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 10, 3, 2, 1), nn.Hardtanh(), first),
        nn.Sequential(second, nn.Sequential(third, nn.Conv2d(60, 9, 1))),
        nn.Hardswish(),
    )
    return randomize_(model).eval(), draw(2, 3, 33, 21)


def test_series_across_containers() -> None:
    model, x = nested()
    fused = snv2.fuse(model)
    agree(fused, model, x)
    assert calls(fused, x) == 1
    lines = str(snv2.explain(fused)).splitlines()
    assert lines[0] == "0.2-1.1.0: stage: fused"
    plain = [line for line in lines if "not fused" in line]
    assert [line.split(":")[0] for line in plain] == ["0", "1.1"]  # for their convolutions
    assert all("computes more than units: conv2d" in line for line in plain)
    assert sum("-" in line for line in lines) == 1
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), snv2.fuse(fused)):
        assert type(other) is Mixed
        agree(other, model, x)
        assert calls(other, x) == 1
    for m in (fused, model):
        m[1][0] = nn.MaxPool2d(1)
        m[1][1][0] = nn.Conv2d(28, 60, 1, bias=False).requires_grad_(False)
        m[1][1][0].weight.fill_(0.1)
    agree(fused, model, x)
    assert calls(fused, x) == 1


def test_hooks_on_a_container_inside() -> None:
    model, x = nested()
    fused = snv2.fuse(model)
    seen: list[torch.Size] = []
    handle = fused[1].register_forward_hook(lambda module, x, out: seen.append(out.shape))
    agree(fused, model, x)
    assert seen == [(2, 9, 3, 2)]
    assert calls(fused, x) == 2
    handle.remove()
    assert calls(fused, x) == 1
    assert len(seen) == 2


def test_a_run_in_containers_is_a_stage() -> None:
    first, second, third = stages()
    model = nn.Sequential(nn.Sequential(first, second), third)
    for m in (model, nn.Sequential(*list(model), nn.ReLU())):
        randomize_(m).eval()
        fused, x = snv2.fuse(m), draw(1, 10, 17, 19)
        assert calls(fused, x) == 1
        agree(fused, m, x)
    assert isinstance(snv2.fuse(model), Recognized)
