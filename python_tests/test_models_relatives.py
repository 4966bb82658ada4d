"""The authors' form and the relatives: published counts and formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases import FP32_BOUND, draw, ops_called
from _styles import MegviiUnit as RestatedUnit
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_bench.floor import multiply_adds
from snv2_kernels import models
from snv2_kernels.testing import max_error, randomize_

SIZES = ("0.5x", "1.0x", "1.5x", "2.0x")


def sized(make: Callable[[str], nn.Module], size: str) -> Callable[[], nn.Module]:
    return lambda: make(size)


# Multiply-adds and parameters as published: the paper's Tables 6 and 8, and the READMEs of the
# authors' repository, which cut parameters to one digit.
PUBLISHED: dict[str, tuple[Callable[[], nn.Module], float, float | None]] = {
    "0.5x": (sized(models.megvii_shufflenet_v2, "0.5x"), 41e6, 1.4e6),
    "1.0x": (sized(models.megvii_shufflenet_v2, "1.0x"), 146e6, 2.3e6),
    "1.5x": (sized(models.megvii_shufflenet_v2, "1.5x"), 299e6, 3.5e6),
    "2.0x": (sized(models.megvii_shufflenet_v2, "2.0x"), 591e6, 7.4e6),
    "+ Small": (sized(models.shufflenet_v2_plus, "Small"), 156e6, 5.1e6),
    "+ Medium": (sized(models.shufflenet_v2_plus, "Medium"), 222e6, 5.6e6),
    "+ Large": (sized(models.shufflenet_v2_plus, "Large"), 360e6, 6.7e6),
    "v2-50": (models.shufflenet_v2_50, 2.3e9, None),
    "SE-v2-164": (models.se_shufflenet_v2_164, 12.7e9, None),
}


def count(make: Callable[[], nn.Module]) -> tuple[int, int]:
    with torch.device("meta"):
        model = make().eval()
        x = torch.empty(1, 3, 224, 224)
    return multiply_adds(model, x), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    make, published, published_parameters = PUBLISHED[name]
    operations, parameters = count(make)
    # 40.5 M is published as 41 M; all others agree within half of the last digit.
    assert operations == pytest.approx(published, rel=0.013 if name == "0.5x" else 0.0035)
    if published_parameters is not None:
        assert abs(parameters - published_parameters) < 0.1e6


def test_squeeze_and_excite_adds_what_is_published() -> None:
    """597 M against 591 M at 2.0x (Table 8)."""

    def squeezed(inp: int, oup: int, stride: int) -> nn.Module:
        return models.LargeUnit(inp, oup, stride, squeeze=True)

    plain, _ = count(models.shufflenet_v2_x2_0)
    more, _ = count(lambda: models.shufflenet_v2_x2_0(inverted_residual=squeezed))
    assert 5e6 <= more - plain <= 7e6


@pytest.mark.parametrize("size", SIZES)
def test_star_adds_little(size: str) -> None:
    """ "With only a few additional FLOPs": nine for each channel and pixel that a unit reads."""
    plain, _ = count(getattr(models, f"shufflenet_v2_x{size[:-1].replace('.', '_')}"))
    star, _ = count(lambda: models.shufflenet_v2_star(size))
    channels, pixels, added = 24, 56 * 56, 0
    for width, repeats in zip(models.blocks.WIDTHS[size][1:4], (4, 8, 4), strict=True):
        added += 9 * channels * pixels
        channels, pixels = width, pixels // 4
        added += (repeats - 1) * 9 * (width // 2) * pixels
    assert star - plain == added


# Formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inp", "oup", "stride"), [(12, 12, 1), (20, 20, 1), (10, 28, 2), (9, 20, 2)]
)
def test_megvii_unit(inp: int, oup: int, stride: int) -> None:
    ours = randomize_(models.MegviiUnit(inp, oup, stride)).eval()
    restated = RestatedUnit(inp if stride == 2 else inp // 2, oup, oup // 2, stride=stride).eval()
    assert list(ours.state_dict()) == list(restated.state_dict())
    restated.load_state_dict(ours.state_dict())
    x = draw(2, inp, 9, 7)
    assert torch.equal(ours(x), restated(x))


def test_star_unit() -> None:
    for stride, inp in ((1, 12), (2, 10)):
        unit = randomize_(models.StarUnit(inp, 12, stride)).eval()
        x = draw(2, inp, 9, 7)
        half = x.chunk(2, 1) if stride == 1 else (unit.branch1(x), x)
        dw, bn, *rest = unit.branch2
        assert (dw.kernel_size, dw.stride, dw.groups) == ((3, 3), (1, 1), dw.in_channels)
        plain = randomize_(models.InvertedResidual(inp, 12, stride)).eval()
        plain.branch2.load_state_dict(nn.Sequential(*rest).state_dict())
        expected = torch.cat([half[0], plain.branch2(bn(dw(half[1])))], 1)
        assert torch.equal(unit(x), models.channel_shuffle(expected, 2))


@pytest.mark.parametrize("stride", [1, 2])
def test_large_unit_is_the_plain_one(stride: int) -> None:
    plain = randomize_(models.InvertedResidual(12, 12, stride)).eval()
    large = models.LargeUnit(12, 12, stride).eval()
    large.load_state_dict(plain.state_dict())
    x = draw(2, 12, 9, 7)
    assert torch.equal(large(x), plain(x))


@torch.no_grad()
@pytest.mark.parametrize(("inp", "stride"), [(12, 1), (8, 1), (8, 2)])
def test_large_unit(inp: int, stride: int) -> None:
    unit = randomize_(models.LargeUnit(inp, 12, stride, squeeze=True, residual=True)).eval()
    state, x = unit.state_dict(), draw(2, inp, 9, 7)
    a, b = x.chunk(2, 1) if inp == 12 else (unit.branch1(x), x)
    main = unit.branch2(b)
    hidden = F.relu(F.conv2d(main.mean((2, 3), True), state["se.fc1.weight"], state["se.fc1.bias"]))
    assert hidden.shape == (2, 12, 1, 1)
    scale = torch.sigmoid(F.conv2d(hidden, state["se.fc2.weight"], state["se.fc2.bias"]))
    main = F.relu(main * scale + b) if inp == 12 else F.relu(main * scale)
    expected = models.channel_shuffle(torch.cat([a, main], 1), 2)
    assert max_error(unit(x), expected) < FP32_BOUND


def test_large_network() -> None:
    model = randomize_(models.ShuffleNetV2Large([6, 8], [2, 1, 1, 2], [12, 16, 20, 24, 32], 5))
    x = draw(2, 3, 70, 50)
    shapes = []
    for name in ("conv1", "maxpool", "stage2", "stage3", "stage4", "stage5", "conv6"):
        getattr(model, name).register_forward_hook(lambda m, i, out: shapes.append(out.shape[1:]))
    assert model.eval()(x).shape == (2, 5)
    assert shapes == [
        (8, 35, 25), (8, 18, 13), (12, 18, 13), (16, 9, 7), (20, 5, 4), (24, 3, 2), (32, 3, 2),
    ]  # fmt: skip


class FromKeys:
    """ShuffleNetV2+ as its authors' repository has it, computed from a state_dict alone."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, None, stride, weight.shape[2] // 2, groups=groups)

    def norm(self, name: str, x: Tensor) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.state[f"{name}.{key}"] for key in keys))

    def hs(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(x)

    def sigmoid(self, x: Tensor) -> Tensor:
        return torch.clamp(x + 3, 0, 6) / 6

    def squeeze(self, name: str, x: Tensor) -> Tensor:
        y = self.conv(f"{name}.SE_opr.1", x.mean((2, 3), True))
        y = self.conv(f"{name}.SE_opr.4", self.norm(f"{name}.SE_opr.2", y).relu())
        return x * self.sigmoid(y)

    def branch(self, name: str, x: Tensor, stride: int, act: Any, kinds: str) -> Tensor:
        """``kinds``: d and p are convolutions with their norm, a an activation, s the squeeze."""
        layer = 0
        for kind in kinds:
            if kind in "dp":
                x = self.conv(f"{name}.{layer}", x, stride if kind == "d" else 1)
                x = self.norm(f"{name}.{layer + 1}", x)
                stride, layer = (1, layer + 2) if kind == "d" else (stride, layer + 2)
            else:
                x = act(x) if kind == "a" else self.squeeze(f"{name}.{layer}", x)
                layer += 1
        return x

    def __call__(self, x: Tensor, repeats: list[int], kinds: list[int]) -> Tensor:
        x = self.hs(self.norm("first_conv.1", self.conv("first_conv.0", x, 2)))
        unit = 0
        for stage, number in enumerate(repeats):
            act = torch.relu if stage == 0 else self.hs
            for i in range(number):
                main = "dpadpadpa" if kinds[unit] == 3 else "padpa"
                main += "s" if stage >= 2 else ""
                name, stride = f"features.{unit}", 2 if i == 0 else 1
                a, b = (x, x) if i == 0 else (x[:, ::2], x[:, 1::2])
                if i == 0:
                    a = self.branch(f"{name}.branch_proj", a, 2, act, "dpa")
                x = torch.cat([a, self.branch(f"{name}.branch_main", b, stride, act, main)], 1)
                unit += 1
        x = self.hs(self.norm("conv_last.1", self.conv("conv_last.0", x)))
        x = self.squeeze("LastSE", x.mean((2, 3), True)).flatten(1)
        return self.hs(x @ self.state["fc.0.weight"].T) @ self.state["classifier.0.weight"].T


def test_plus_network() -> None:
    repeats, kinds = [2, 2, 3, 2], [0, 3, 1, 3, 2, 1, 3, 3, 0]
    model = models.ShuffleNetV2Plus(repeats, [8, 12, 20, 36, 64, 40], kinds, 6)
    model = randomize_(model).double().eval()
    x = draw(2, 3, 224, 224).double()
    with torch.no_grad():
        out, expected = model(x), FromKeys(model.state_dict())(x, repeats, kinds)
    assert out.shape == (2, 6)
    assert torch.allclose(out, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


def test_plus_architecture() -> None:
    with torch.device("meta"):
        units = list(models.shufflenet_v2_plus("Large").features)
    kernels = [
        max(m.kernel_size[0] for m in u.modules() if isinstance(m, nn.Conv2d)) for u in units
    ]
    assert kernels == [3, 3, 3, 5, 5, 5, 3, 3, 7, 3, 7, 5, 5, 3, 7, 3, 7, 5, 3, 7]
    xception = [isinstance(unit, models.XceptionUnit) for unit in units]
    assert [i for i, is_one in enumerate(xception) if is_one] == [2, 18]


@pytest.mark.parametrize(
    "make",
    [lambda: models.MegviiUnit(8, 12, 2), lambda: models.StarUnit(12, 12, 1),
     lambda: models.XceptionUnit(12, 12, 1, squeeze=models.plus.SELayer, activation=nn.Hardswish),
     lambda: models.LargeUnit(12, 12, 1, squeeze=True, residual=True)],
    ids=["megvii", "star", "xception", "large"],
)  # fmt: skip
def test_units_train(make: Callable[[], nn.Module]) -> None:
    unit = make().train()
    x = draw(2, 8 if isinstance(unit, models.MegviiUnit) and unit.branch_proj else 12, 9, 7)
    unit(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unit.parameters())


def test_dropout_is_the_authors() -> None:
    with torch.device("meta"):
        rates = [models.megvii_shufflenet_v2(size).dropout.p for size in SIZES]
    assert rates == [0, 0, 0, 0.2]


# Fused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "size", "calls", "left"),
    [(lambda: models.MegviiShuffleNetV2([2, 2, 1], [8, 12, 20, 32, 40], 5), 224, 1, 0),
     (lambda: models.ShuffleNetV2Plus([2, 1, 1, 2], [8, 12, 20, 32, 48, 40], [0, 0, 1, 3, 2, 0], 5),
      224, 1, 4),
     (lambda: models.ShuffleNetV2([2, 1, 1], [8, 12, 20, 32, 40], 5, models.StarUnit), 64, 1, 0),
     (lambda: models.ShuffleNetV2Large([8], [2, 2, 1, 1], [12, 16, 20, 24, 32], 5), 64, 1, 0),
     (lambda: models.ShuffleNetV2Large([8, 9], [2, 1, 1, 2], [12, 16, 20, 24, 8], 5, True, True),
      64, 1, 2)],
    ids=["megvii", "plus", "star", "v2-50", "SE-v2-164"],
)  # fmt: skip
def test_all_of_them_fuse(make: Callable[[], nn.Module], size: int, calls: int, left: int) -> None:
    """In so many op calls, and so many convolutions beside units."""
    model = randomize_(make()).eval()
    fused = snv2.fuse(model)
    parts = snv2.explain(fused).parts
    assert sum(part.kind == "unit" for part in parts) >= 4
    beside = {part.name for part in parts if part.beside or part.reason is not None}
    assert beside == ({""} if left else set())
    x = draw(2, 3, size, size)
    with torch.no_grad():
        names = ops_called(fused, x)
        assert max_error(fused(x), model(x)) < FP32_BOUND
    assert sum(name.startswith("snv2::") for name in names) == calls
    assert names.count("aten::convolution") == left


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: models.MegviiUnit(8, 12, 3), "stride: expected 1 or 2, got 3"),
     (lambda: models.MegviiUnit(8, 12, 1), "inp, oup: .* inp=8, oup=12"),
     (lambda: models.MegviiUnit(9, 9, 1), "inp, oup: .* inp=9, oup=9"),
     (lambda: models.MegviiUnit(12, 12, 2), "inp, oup: .* oup > inp, got inp=12, oup=12"),
     (lambda: models.MegviiUnit(8, 12, 2, 4), "kernel: expected an odd number, got 4"),
     (lambda: models.XceptionUnit(8, 12, 0), "stride: expected 1 or 2, got 0"),
     (lambda: models.StarUnit(8, 12, 1), "inp, oup: .* inp=8, oup=12"),
     (lambda: models.LargeUnit(8, 12, 3), "stride: expected 1 or 2, got 3"),
     (lambda: models.LargeUnit(8, 13, 2), "oup: expected an even number, got 13"),
     (lambda: models.megvii_shufflenet_v2("3x"), "model_size: expected one of 0.5x, .* got '3x'"),
     (lambda: models.shufflenet_v2_star("x1"), "model_size: expected one of 0.5x, .* got 'x1'"),
     (lambda: models.shufflenet_v2_plus("Tiny"), "one of Small, Medium, Large, got 'Tiny'"),
     (lambda: models.MegviiShuffleNetV2([4, 8], [1] * 5), "stages_repeats: expected 3 .* got 2"),
     (lambda: models.MegviiShuffleNetV2([4, 8, 4], [1] * 4), "channels: expected 5 .* got 4"),
     (lambda: models.ShuffleNetV2Plus([1] * 3, [1] * 6, [0] * 3), "repeats: expected 4 .* got 3"),
     (lambda: models.ShuffleNetV2Plus([1] * 4, [1] * 5, [0] * 4), "channels: expected 6 .* got 5"),
     (lambda: models.ShuffleNetV2Plus([1] * 4, [1] * 6, [0] * 3), "architecture: expected 4 .* 3"),
     (lambda: models.ShuffleNetV2Plus([1] * 4, [8, 12, 20, 32, 48, 8], [0, 1, 4, 0]),
      "architecture: expected integers from 0 to 3, got 4"),
     (lambda: models.ShuffleNetV2Large([], [1] * 4, [8] * 5), "stem_channels: expected at least 1"),
     (lambda: models.ShuffleNetV2Large([8], [1] * 3, [8] * 5), "repeats: expected 4 .* got 3"),
     (lambda: models.ShuffleNetV2Large([8], [1] * 4, [8] * 4), "channels: expected 5 .* got 4")],
)  # fmt: skip
def test_constructor_errors(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_maps_that_the_authors_pooling_does_not_take() -> None:
    model = models.MegviiShuffleNetV2([1, 1, 1], [8, 12, 20, 32, 40], 5).eval()
    assert model(draw(1, 3, 193, 416)).shape == (1, 5)
    for size in (192, 417):
        with pytest.raises(RuntimeError):
            model(draw(2, 3, size, 224))
