"""fuse() and explain() on what is almost a unit, and on what was recognised wrongly."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases import FP32_BOUND, assert_close, draw
from _esnet import EsUnit
from _styles import STYLES, Loop, Wrapped, check, conv_bn, shuffle, styled
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels import recognition
from snv2_kernels.nn import FusedModule
from snv2_kernels.testing import max_error, randomize_


class Near(nn.Module):
    """A unit but for one thing."""

    def __init__(self, what: str, act: nn.Module | None = None, **dw: Any) -> None:
        super().__init__()
        self.what = what
        self.pw1, self.bn1 = conv_bn(14, 14)
        self.dw, self.bn2 = conv_bn(14, 14, 3, 1, 14)
        if dw:
            self.dw = nn.Conv2d(14, 14, **{"kernel_size": 3, "padding": 1, "groups": 14, **dw})
        self.pw2, self.bn3 = conv_bn(14, 14)
        self.act = act or nn.ReLU()
        self.se, self.se2 = nn.Conv2d(14, 14, 1), nn.Conv2d(14, 14, 1)
        self.one = nn.Conv2d(14, 1, 1)
        self.calls = 0

    def gate(self, b: Tensor) -> Tensor:
        """Almost squeeze-and-excite."""
        if self.what in ("one gate for all", "one output"):
            means = b.mean([2, 3], keepdim=True)
            scale = self.one(means) if self.what == "one output" else self.se(means)[:, :1]
            return b * torch.sigmoid(scale)
        if self.what == "part of a map":
            pooled = F.avg_pool2d(b, (9, 7))  # the size that recognition tries
        elif self.what == "maximum":
            pooled = F.adaptive_max_pool2d(b, 1)
        else:
            pooled = b.mean([2, 3], keepdim=True)
        scale = self.se2(F.relu(self.se(pooled)))
        if self.what == "tanh gate":
            return b * torch.tanh(scale)
        if self.what == "other sigmoid":
            return b * torch.clamp(0.2 * scale + 0.5, 0, 1)
        if self.what == "permuted gate":
            return b * torch.sigmoid(scale).flip(1)
        if self.what == "other map":
            return (b + 1) * torch.sigmoid(scale)
        return b * torch.sigmoid(scale)

    def forward(self, x: Tensor) -> Any:
        if self.what == "size" and x.shape[2] > 5:
            return x
        if self.what == "values" and x.sum() > 0:
            return x
        if self.what == "counts":
            self.calls += 1
        a, b = x.chunk(2, 1)
        b = self.act(self.bn1(self.pw1(b)))
        b = self.bn2(self.dw(b))
        if self.what in (*GATES, "part of a map"):
            b = self.gate(b)
        b = self.act(self.bn3(self.pw2(b)))
        if self.what == "padding":
            a = a[:, :, 1:-1, 1:-1]
        if self.what in SUMS:
            b = SUMS[self.what](b, x[:, 14:], a)
        y = shuffle(torch.cat([a, b], 1), 2)
        if self.what == "written":
            x.mul_(2)
        return (y, a) if self.what == "tuple" else y + x if self.what == "added" else y


class Strided(nn.Module):
    """Halves the map twice."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.side, self.main = (
            nn.Sequential(
                *conv_bn(c, c, 3, 2, c), *conv_bn(c, c), nn.ReLU(), *conv_bn(c, c, 3, 2, c),
                *conv_bn(c, c), nn.ReLU(),
            )
            for _ in range(2)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.side(x), self.main(x)], 1)


class Grouped(Near):
    def __init__(self) -> None:
        super().__init__("")
        self.bn2 = nn.GroupNorm(2, 14)


class GhostAndMore(EsUnit):
    """The depthwise result is read once more."""

    def __init__(self) -> None:
        super().__init__(28, 20)

    def beside(self, x: Tensor) -> Tensor:
        y = self.conv_dw(x)
        return torch.cat([x, y + y.mean()], 1)


GATES = (
    "one gate for all", "one output", "maximum", "tanh gate", "other sigmoid", "permuted gate",
    "other map",
)  # fmt: skip
SUMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "of what passes by": lambda y, half, a: y + a,
    "of a multiple": lambda y, half, a: torch.add(y, half, alpha=2),
    "of another order": lambda y, half, a: y + half.flip(1),
    "of one channel": lambda y, half, a: y + half[:, :1],
    "into its input": lambda y, half, a: half.add_(y),
    "of it twice": lambda y, half, a: y.add_(half) + half,
}


class Residual(nn.Module):
    """MobileNet V2's unit."""

    def __init__(self) -> None:
        super().__init__()
        layers = (
            nn.Conv2d(28, 40, 1), nn.ReLU6(), nn.Conv2d(40, 40, 3, 1, 1, groups=40),
            nn.Conv2d(40, 28, 1),
        )  # fmt: skip
        self.branch = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.branch(x)
        return out


NEAR: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "part of a map": (
        functools.partial(Near, "part of a map"), "fails at other sizes of its input: "
    ),
    "gelu": (lambda: Near("gelu", nn.GELU()), "activation GELU"),
    "mish": (lambda: Near("mish", nn.Mish()), "activation Mish"),
    "sigmoid": (lambda: Near("sigmoid", nn.Sigmoid()), "activation Sigmoid"),
    "other clamp": (lambda: Near("clamp", nn.Hardtanh(-1, 6)), "activation Hardtanh"),
    "2x2": (lambda: Near("2x2", kernel_size=2, dilation=2), "depthwise 2x2"),
    "5x3": (lambda: Near("", kernel_size=(5, 3), padding=(2, 1)), "depthwise 5x3"),
    "padding": (lambda: Near("padding", padding=0), "depthwise with padding (0, 0)"),
    "reflected": (
        lambda: Near("padded", padding_mode="reflect"),
        "padding apart from the depthwise convolution",
    ),
    "into its input": (functools.partial(Near, "into its input"), "add in a branch"),
    "written": (lambda: Near("written"), "a map is written in place: mul_"),
    "size": (lambda: Near("size"), "its control flow depends on the size of its input"),
    "values": (lambda: Near("values"), "cannot be traced: "),
    "counts": (lambda: Near("counts"), "its forward sets 'calls'"),
    "ghost and more": (
        GhostAndMore, "the result of conv2d (conv_dw.conv) is read by mean and add"
    ),
    "ghost with gelu": (lambda: EsUnit(28, 20, nn.GELU), "activation GELU"),
    "strided twice": (
        lambda: Strided(28), "two depthwise convolutions with a stride in a branch"
    ),
    "residual": (
        Residual, "its units join nothing but the sum of their branch and their input"
    ),
}  # fmt: skip
# What fuses of others, and a function that is beside it.
PARTLY: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    **{
        what: (functools.partial(Near, what), "a chain", "conv2d (pw2)")
        for what in GATES
    },
    **{
        what: (functools.partial(Near, what), "a chain", "add")
        for what in SUMS if what != "into its input"
    },
    "added": (lambda: Near("added"), "a unit", "add"),
    "tuple": (lambda: Near("tuple"), "a unit", ""),
    "group norm": (Grouped, "a chain", "group_norm (bn2)"),
}  # fmt: skip


@pytest.mark.parametrize("what", NEAR)
def test_near_miss_stays_plain(what: str) -> None:
    make, reason = NEAR[what]
    model = randomize_(make()).eval()
    calls = vars(model).get("calls")
    fused, x = snv2.fuse(model), draw(2, 28, 9, 7)
    assert not any(isinstance(m, FusedModule) for m in fused.modules())
    kind = type(model).__name__
    assert str(snv2.explain(model)).startswith(f"(model): {kind}: not fused: {reason}")
    assert vars(model).get("calls") == calls
    with torch.no_grad():
        out, expected = fused(x.clone()), model(x.clone())
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("what", PARTLY)
def test_near_miss_fuses_but_for_what_differs(what: str) -> None:
    make, told, beside = PARTLY[what]
    model, x = randomize_(make()).eval(), draw(2, 28, 9, 7)
    part = snv2.explain(model).parts[0]
    assert (part.kind, part.reason) == (f"partition of {told}", None)
    assert beside in part.beside
    with torch.no_grad():
        outs = (m(x) for m in (snv2.fuse(model), model))
        for out, expected in zip(*(y if what == "tuple" else (y,) for y in outs), strict=True):
            assert max_error(out, expected) < FP32_BOUND


def test_other_groups_of_the_shuffle_are_right() -> None:
    class Four(Wrapped):
        def __init__(self) -> None:
            super().__init__(28, 28, 1)
            self.shuffle = nn.ChannelShuffle(4)

    check(randomize_(Four()).eval(), draw(2, 28, 9, 11), "unit")


def test_statistics_of_the_batch() -> None:
    model = Wrapped(28, 28, 1).eval()
    model.main[0].norm = nn.BatchNorm2d(28 // 2, track_running_stats=False)
    assert not isinstance(snv2.fuse(model), FusedModule)


def test_name_that_a_drop_in_needs() -> None:
    class Named(Wrapped):
        def _run(self, x: Tensor) -> Tensor:
            return super().forward(x)

        def forward(self, x: Tensor) -> Tensor:
            return self._run(x)

    model = randomize_(Named(28, 28, 1)).eval()
    assert "'_run' has another meaning" in str(snv2.explain(model))
    assert_close(snv2.fuse(model), model, draw(2, 28, 9, 11))


def test_one_that_differs_leaves_the_others() -> None:
    model = Loop([Wrapped(28, 28, 1), Near("gelu", nn.GELU()), Wrapped(28, 28, 1)])
    randomize_(model).eval()
    lines = str(snv2.explain(model)).splitlines()
    beside = "conv2d (units.1.pw1), batch_norm (units.1.bn1), gelu"
    assert lines == [
        f"(model): partition of 2 units and a chain: fused, but for {beside}",
        "units.0: unit: fused",
        "units.2: unit: fused",
    ]
    assert_close(snv2.fuse(model), model, draw(2, 28, 9, 11))


def test_wrong_recognition_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = randomize_(Wrapped(28, 28, 1)).eval(), draw(2, 28, 9, 11)
    describe = recognition.describe

    def wrong(*args: Any) -> Any:
        right = describe(*args)
        return dataclasses.replace(right, recipe=right.recipe.replace("14:28", "0:14"))

    monkeypatch.setattr(recognition, "describe", wrong)
    assert not isinstance(snv2.fuse(model), FusedModule)
    assert_close(snv2.fuse(model), model, x)
    assert "failed verification" in str(snv2.explain(model))
    assert isinstance(snv2.fuse(model, verify=False), FusedModule)


def test_wrong_recognition_is_caught_where_numbers_hide_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Wrapped(28, 28, 1).eval()
    nn.init.zeros_(model.main[2].norm.weight)
    describe = recognition.describe

    def swapped(*args: Any) -> Any:
        right = describe(*args)
        names = list(right.names)
        names[0], names[-5] = names[-5], names[0]  # weights of pw1 and pw2
        return dataclasses.replace(right, names=tuple(names))

    monkeypatch.setattr(recognition, "describe", swapped)
    assert "failed verification" in str(snv2.explain(model))


def test_parameters_stay_untouched() -> None:
    for style in itertools.islice(STYLES, 2):
        model, _ = styled(style)
        state = {key: (t.data_ptr(), t._version) for key, t in model.state_dict().items()}
        rng = torch.get_rng_state()
        snv2.explain(model)
        snv2.fuse(model)
        assert torch.equal(torch.get_rng_state(), rng)
        assert {k: (t.data_ptr(), t._version) for k, t in model.state_dict().items()} == state
