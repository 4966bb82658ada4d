"""fuse() and explain() on units of classes that are not known, as they are written in the wild."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases import (
    assert_accurate,
    assert_close,
    draw,
    drawn,
    norms,
    ops_called,
    run_fused,
    runs_fused,
    same_state,
)
from _styles import (
    STYLES,
    ConvBNReLU,
    Listed,
    Loop,
    MegviiUnit,
    Renamed,
    WithInnerForward,
    Wrapped,
    check,
    each_style,
    shuffle,
    styled,
    three,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.testing import float64_reference, randomize_


@each_style
def test_stage(style: str) -> None:
    model, x = styled(style)
    before = copy.deepcopy(model)
    fused = check(model, x, "stage")
    lines = str(snv2.explain(model)).splitlines()
    assert sum(": unit: fused" in line for line in lines) == 3
    assert not any("not fused" in line for line in lines)
    assert same_state(fused, model)
    assert same_state(before, model)
    assert isinstance(fused, type(model))
    assert repr(fused) == repr(model)
    assert all(a is b for a, b in zip(fused.parameters(), model.parameters(), strict=True))
    for n, h, w in ((1, 1, 1), (3, 8, 5)):
        assert_close(fused, model, draw(n, 10, h, w))


@each_style
def test_units_alone(style: str) -> None:
    model, _ = styled(style)
    units = [
        m
        for m in model.modules()
        if isinstance(m, (MegviiUnit, Renamed, Wrapped, WithInnerForward, Listed))
    ]
    for unit, channels in zip(units, (10, 28, 28), strict=True):
        check(unit, draw(2, channels, 7, 6), "unit")


def test_network_of_another_class() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = ConvBNReLU(3, 10, 3, 2)
            self.body = Loop(three(Wrapped))
            self.last, self.fc = ConvBNReLU(28, 40), nn.Linear(40, 7)

        def forward(self, x: Tensor) -> Tensor:
            x = self.last(self.body(F.max_pool2d(self.stem(x), 3, 2, 1)))
            return self.fc(x.mean([2, 3]))

    model = randomize_(Network()).eval()
    fused = check(model, draw(2, 3, 33, 41), "network")
    assert "body: stage: fused" in str(snv2.explain(fused))
    engine = snv2.Engine(fused, (2, 3, 33, 41))
    x = draw(2, 3, 33, 41)
    assert_close(engine, model, x)


class Windowed(nn.Module):
    """As the authors', an average over a window of the map's size for one size of images."""

    def __init__(self, window: int = 3) -> None:
        super().__init__()
        self.stem, self.body = ConvBNReLU(3, 10, 3, 2), Loop(three(Wrapped))
        self.last, self.pool = ConvBNReLU(28, 40), nn.AvgPool2d(window)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(40, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.last(self.body(F.max_pool2d(self.stem(x), 3, 2, 1))))
        return self.fc(self.drop(x).contiguous().view(-1, 40))


def test_average_over_a_window(caplog: pytest.LogCaptureFixture) -> None:
    model = randomize_(Windowed()).eval()
    x = draw(2, 3, 17, 24)  # the last map is 3 x 3
    fused = check(model, x, "network")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    for h, w in ((24, 18), (25, 24), (24, 32), (40, 40)):
        x = draw(1, 3, h, w)
        assert_close(fused, model, x)
        with torch.no_grad():
            fully = not any("conv" in name for name in ops_called(fused, x))
        assert fully == (max(h, w) <= 24)
    with pytest.raises(RuntimeError, match="too small"):
        fused(draw(1, 3, 16, 16))
    assert_close(snv2.Engine(fused, (1, 3, 20, 20)), model, draw(1, 3, 20, 20))
    with pytest.raises(ValueError, match=r"input_shape: .* pools a part of its map"):
        snv2.Engine(fused, (1, 3, 40, 40))
    program = torch.export.export(fused, (draw(1, 3, 24, 24),)).module()
    assert_close(program, model, draw(1, 3, 24, 24))


# A drop-in as any module ----------------------------------------------------------------------


def test_train_mode_is_the_module() -> None:
    model, x = styled("wrapped")
    fused = snv2.fuse(model)
    twin = copy.deepcopy(model).train()
    fused.train()
    assert torch.equal(fused(x), twin(x))
    assert all(
        map(
            torch.equal,
            (n.running_mean for n in norms(model)),
            (n.running_mean for n in norms(twin)),
        )
    )
    assert runs_fused(fused.eval(), x)
    assert_close(fused, twin.eval(), x)
    in_training = snv2.fuse(model.train())
    assert all(m.training for m in in_training.modules())
    assert runs_fused(in_training.eval(), x)


def test_changes_show() -> None:
    model, x = styled("wrapped")
    fused = snv2.fuse(model)
    assert_close(fused, model, x)
    with torch.no_grad():
        model[0].main[0].conv.weight.mul_(2)
    assert runs_fused(fused, x)
    assert_close(fused, model, x)
    for m in (fused, model):
        m[1].main[2].norm.eps = 0.5
    assert_close(fused, model, x)
    assert runs_fused(fused, x)
    for m in (fused, model):
        m[2].main[0].activate = nn.Hardswish().eval()
    assert_close(fused, model, x)
    assert fused.reason() is None
    for m in (fused, model):
        m[2].main[0].activate = nn.GELU().eval()
    assert_close(fused, model, x)
    assert fused.reason() == "activation GELU"
    assert not runs_fused(fused[2], draw(1, 28, 3, 3))
    for m in (fused, model):
        m[2].main[0].activate = nn.ReLU().eval()
    assert_close(fused, model, x)
    assert runs_fused(fused, x)


def test_changed_constant_shows() -> None:
    """It is an attribute that only the forward's own code reads."""
    model, x = styled("renamed")
    fused = snv2.fuse(model[:1].eval())
    assert runs_fused(fused, x)
    fused[0].short, fused[0].s = nn.Sequential(), 1
    with pytest.raises(RuntimeError, match="channels"):  # the module's own complaint
        fused(x)


def test_hooks() -> None:
    model, x = styled("wrapped")
    fused = snv2.fuse(model)
    seen = []
    handle = fused[1].main.register_forward_hook(lambda *_: seen.append(1))
    assert "has hooks" in fused.reason()
    assert_close(fused, model, x)
    assert seen
    handle.remove()
    assert runs_fused(fused, x)
    model[1].main.register_forward_hook(lambda *_: seen.append(2))
    seen.clear()
    assert "has hooks" in str(snv2.explain(model))
    assert not seen


def test_copies_and_files() -> None:
    model, x = styled("megvii")
    fused = snv2.fuse(model)
    with torch.no_grad():
        expected = run_fused(fused, x)
        stream = io.BytesIO()
        torch.save(fused, stream)
        stream.seek(0)
        for other in (
            copy.deepcopy(fused),
            pickle.loads(pickle.dumps(fused)),
            torch.load(stream, weights_only=False),
        ):
            assert type(other) is type(fused)
            assert torch.equal(run_fused(other, x), expected)


def test_gradients() -> None:
    model, x = styled("wrapped")
    fused = snv2.fuse(model)
    grads = []
    for m in (fused, model):
        y = x.clone().requires_grad_()
        inputs = [y, *m.parameters()]
        grads.append(torch.autograd.grad(m(y).square().mean(), inputs))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    model, x = styled("listed")
    model, x = model.to(dtype), x.to(dtype)
    fused = snv2.fuse(model)
    exact = float64_reference(model)(x)
    with torch.no_grad():
        assert_accurate("stage", fused(x), model(x), exact)
    assert runs_fused(fused, x) == (dtype != torch.float64)


def test_autocast() -> None:
    for unit, channels in zip(three(Wrapped), (10, 28, 28), strict=True):
        randomize_(unit).eval()
        x = draw(2, channels, 7, 9)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert snv2.fuse(unit)(x).dtype == unit(x).dtype


def test_fused_twice_and_sliced() -> None:
    model, x = styled("renamed")
    once = snv2.fuse(model)
    twice = snv2.fuse(once)
    assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
    assert torch.equal(twice(x), once(x))
    assert runs_fused(twice, x)
    assert str(snv2.explain(once)) == str(snv2.explain(model))
    half = once[:2].eval()
    assert_close(half, model[:2].eval(), x)
    assert runs_fused(half, x)


def test_unit_in_two_places() -> None:
    unit = randomize_(Wrapped(28, 28, 1)).eval()
    model, x = Loop([unit, unit]), draw(2, 28, 9, 11)
    fused = check(model.eval(), x, "stage")
    assert fused.units[0] is fused.units[1]


def test_other_arguments_run_plain() -> None:
    class Optional(Wrapped):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale if scale != 1.0 else super().forward(x)

    unit, x = randomize_(Optional(28, 28, 1)).eval(), draw(2, 28, 9, 11)
    fused = check(unit, x, "unit")
    assert torch.equal(fused(x, 3.0), unit(x, 3.0))
    assert torch.equal(fused(x, scale=3.0), unit(x, scale=3.0))
    assert torch.equal(fused(x=x), unit(x))


def test_other_channels_run_plain() -> None:
    class Flexible(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            first, y = x.split((x.shape[1] - 14, 14), 1)
            return torch.cat((first, self.main(y)), 1)

    unit = randomize_(Flexible(28, 28, 1)).eval()
    fused = check(unit, draw(2, 28, 9, 7), "unit")
    for channels in (17, 40):
        x = draw(2, channels, 9, 7)
        assert torch.equal(fused(x), unit(x))


def test_compiled_and_exported() -> None:
    model, x = styled("wrapped")
    fused = snv2.fuse(model)
    with torch.no_grad():
        exported = torch.export.export(fused, (x,)).module()
        assert_close(exported, model, x)
        torch.compiler.reset()
        assert_close(torch.compile(fused, backend="eager", fullgraph=True), model, x)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = STYLES["megvii"]().eval()
    fused = snv2.fuse(model)
    assert str(snv2.explain(model)).splitlines()[0] == (
        "(model): stage: not fused: there are no kernels for device meta"
    )
    fused.to_empty(device="cpu")
    randomize_(fused)
    model = model.to_empty(device="cpu")
    model.load_state_dict(fused.state_dict())
    x = draw(2, 10, 9, 11)
    assert runs_fused(fused, x)
    assert_close(fused, model, x)


# Drawn units ----------------------------------------------------------------------------------

SPLITS: dict[str, Callable[[Tensor, int], Any]] = {
    "chunk": lambda x, c: x.chunk(2, 1),
    "split": lambda x, c: torch.split(x, [c, x.shape[1] - c], 1),
    "slices": lambda x, c: (x[:, :c], x[:, c:]),
    "last-first": lambda x, c: (x[:, -c:], x[:, :-c]),
    "even-odd": lambda x, c: (x[:, ::2], x[:, 1::2]),
    "narrow": lambda x, c: (x.narrow(1, 0, c), x.narrow(1, c, c)),
    "unbind": lambda x, c: x.unflatten(1, (2, c)).unbind(1),
}
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "shuffle": lambda a, b: shuffle(torch.cat([a, b], 1), 2),
    "main-first": lambda a, b: shuffle(torch.cat([b, a], 1), 2),
    "cat": lambda a, b: torch.cat([a, b], 1),
    "stack": lambda a, b: torch.stack([a, b], 2).flatten(1, 2),
    "function": lambda a, b: F.channel_shuffle(torch.cat([a, b], 1), 2),
}
RELUS: list[Callable[[Tensor], Tensor]] = [
    F.relu, torch.relu, Tensor.relu, torch.relu_, nn.ReLU(), nn.ReLU(inplace=True),
]  # fmt: skip


class Drawn(nn.Module):
    def __init__(
        self, half: int, mid: int, split: str, join: str, relu: int, bias: bool, norm: bool
    ) -> None:
        super().__init__()
        self.half, self.split, self.join, self.relu = half, SPLITS[split], JOINS[join], RELUS[relu]

        def layer(i: int, o: int, k: int = 1, g: int = 1) -> nn.Module:
            conv = nn.Conv2d(i, o, k, 1, k // 2, groups=g, bias=bias)
            return nn.Sequential(conv, nn.BatchNorm2d(o)) if norm else conv

        self.a, self.b, self.c = layer(half, mid), layer(mid, mid, 3, mid), layer(mid, half)

    def forward(self, x: Tensor) -> Tensor:
        first, y = self.split(x, self.half)
        y = self.relu(self.c(self.b(self.relu(self.a(y)))))
        return self.join(first, y)


@settings(drawn, max_examples=12)
@given(
    half=st.integers(2, 40), mid=st.integers(2, 40), split=st.sampled_from(sorted(SPLITS)),
    join=st.sampled_from(sorted(JOINS)), relu=st.integers(0, len(RELUS) - 1), bias=st.booleans(),
    norm=st.booleans(), size=st.tuples(*[st.integers(1, 9)] * 3),
)  # fmt: skip
def test_drawn_unit(size: tuple[int, int, int], **kwargs: Any) -> None:
    model = randomize_(Drawn(**kwargs)).eval()
    n, h, w = size
    check(model, draw(n, 2 * kwargs["half"], h, w), "unit")


def test_unequal_split() -> None:
    class Unequal(Drawn):
        def __init__(self) -> None:
            super().__init__(9, 12, "split", "cat", 0, False, True)
            self.parts = [20, 9]

        def forward(self, x: Tensor) -> Tensor:
            first, y = x.split(self.parts, 1)
            return torch.cat([F.relu(self.c(self.b(F.relu(self.a(y))))), first], 1)

    check(randomize_(Unequal()).eval(), draw(2, 29, 7, 5), "unit")


def test_networks_of_gray_images_are_recognised() -> None:
    """One channel is a guess like others, though many attributes are 1."""
    model = snv2.models.ShuffleNetV2([1, 1, 1], [24, 8, 12, 16, 16], 7).eval()
    model.conv1[0] = nn.Conv2d(1, 24, 3, 2, 1, bias=False)
    model.conv1[2] = nn.Hardswish()
    assert str(snv2.explain(model)).startswith("(model): network: fused")
    x = draw(2, 1, 35, 40)
    with torch.no_grad():
        torch.testing.assert_close(snv2.fuse(model)(x), model(x))
