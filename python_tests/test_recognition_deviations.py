"""fuse() and explain() on units with other activations, windows, gates, branches and norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _cases import draw, drawn
from _projects import ACTIVATIONS, GATES, NORMS, PROJECTS, SHORTCUTS, General
from _styles import ConvBNReLU
from _told_deviations import gates_of, layers_of, recognized
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.testing import max_error, randomize_


@pytest.mark.parametrize("project", PROJECTS)
def test_project(project: str) -> None:
    make, channels = PROJECTS[project]
    model = make()
    steps = recognized(model, channels, "stage")
    assert [step[0] for step in steps] == ["import", *["unit"] * len(model)]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation(act: str) -> None:
    """After every layer of a branch and of a projection."""
    kind, _ = ACTIVATIONS[act]
    _, unit = recognized(General(10, 16, 2, act=act, dw_act=act), 10, size=5)
    layers = [*layers_of(unit), *unit[6]]
    assert [layer[2] for layer in layers] == [kind] * 5
    assert all(("a" in layer[0]) == (kind == "prelu") for layer in layers)


def test_slope() -> None:
    _, unit = recognized(General(16, 16, act="leaky-where"), 16)
    assert [layer[2:4] for layer in layers_of(unit)] == [
        ["leaky_relu", 0.25], ["identity", 0.0], ["leaky_relu", 0.25],
    ]  # fmt: skip


def test_no_activation_after_pw2() -> None:
    _, unit = recognized(General(16, 16, last="identity"), 16)
    assert [layer[2] for layer in layers_of(unit)] == ["relu", "identity", "identity"]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 2), (5, 1), (5, 3), (7, 1), (9, 1)])
def test_window(kernel: int, dilation: int, stride: int) -> None:
    model = General(16, 16, stride, kernel=kernel, dilation=dilation)
    _, unit = recognized(model, 16)
    depthwise = [layer for layer in (*layers_of(unit), *unit[6]) if "W" in layer[0]][1::2]
    assert depthwise[0][4] == dilation


def test_padding_in_words() -> None:
    model = General(16, 16, kernel=5)
    model.main[1].conv.padding = "same"
    recognized(model, 16)


@pytest.mark.parametrize("gate_after", [1, 2], ids=["dw", "pw2"])
@pytest.mark.parametrize("gate", GATES)
def test_gate(gate: str, gate_after: int) -> None:
    _, unit = recognized(General(16, 16, gate=gate, gate_after=gate_after), 16, size=5)
    assert isinstance(unit[2][gate_after + 1][0], list)
    (((*reduce, expand), *after),) = gates_of(unit)
    assert after == ["", "identity", 0.0, False]
    assert len(reduce) == (not gate.startswith("effective"))
    assert all(layer[2] in ("relu", "silu", "hardswish") for layer in reduce)
    sigmoid = gate in ("linear", "mean", "flat", "effective-linear")
    assert expand[2] == ("sigmoid" if sigmoid else "hardsigmoid")


@pytest.mark.parametrize("gate", [None, "conv", "effective"])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_shortcut(shortcut: str, gate: str | None) -> None:
    """What a branch reads is added to its result, scaled or not."""
    model = General(16, 16, last="identity", gate=gate, shortcut=shortcut, after="relu")
    _, unit = recognized(model, 16, size=5)
    ((layers, *rest),) = gates_of(unit)
    assert unit[2][-1] == [layers, *rest]
    assert len(layers) == {None: 0, "effective": 1, "conv": 2}[gate]
    assert rest == ["", "relu", 0.0, True]


@pytest.mark.parametrize("act", ["prelu", "leaky-where", "hardswish-by-hand", "identity"])
def test_activation_behind_a_gate(act: str) -> None:
    """With a shortcut, and at stride 2 without."""
    kind, _ = ACTIVATIONS[act]
    for stride, shortcut in ((1, "plus"), (2, None)):
        model = General(16, 16, stride, gate="conv", shortcut=shortcut, after=act)
        _, unit = recognized(model, 16, size=5)
        ((_, letters, found, slope, adds),) = gates_of(unit)
        assert (letters, found) == ("a" if kind == "prelu" else "", kind)
        assert (slope, adds) == (0.25 if kind == "leaky_relu" else 0.0, shortcut is not None)


def test_shortcut_beside_a_projection() -> None:
    """It leads around the branch."""
    model = General(8, 16, project=True, gate="conv", shortcut="plus", after="relu")
    _, unit = recognized(model, 8)
    assert len(unit[6]) == 2
    assert gates_of(unit)[0][4]


@pytest.mark.parametrize("layers", ["pw dw", "dw pw", "dw pw dw pw", "dw pw dw pw dw pw"])
def test_branch(layers: str) -> None:
    for stride in (1, 2):
        _, unit = recognized(General(16, 16, stride, layers=layers), 16)
        assert len(unit[2]) == len(layers.split())


def test_projection_without_a_stride() -> None:
    _, unit = recognized(General(10, 28, project=True, shuffled=False), 10)
    assert unit[1] == 1
    assert len(unit[6]) == 2


LETTERS = {
    "batch": "Wwbmv", "eps": "Wwbmv", "no-affine": "Wmv", "frozen": "Wwbmv", "frozen-4d": "Wwbmv",
    "affine": "Wwb", "none": "WB",
}  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
def test_norm(norm: str) -> None:
    _, unit = recognized(General(10, 16, 2, norm=norm), 10, size=5)
    layers = [*layers_of(unit), *unit[6]]
    assert [layer[0] for layer in layers] == [LETTERS[norm]] * 5
    assert {layer[1] for layer in layers} == {
        0.001 if norm == "eps" else 0.0 if norm in ("affine", "none") else 1e-5
    }


def test_frozen_norm_under_autocast() -> None:
    """It computes in float32, and so its result is."""
    unit = randomize_(General(16, 16, norm="frozen")).eval()
    x = draw(2, 16, 9, 7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert snv2.fuse(unit)(x).dtype == unit(x).dtype


@pytest.mark.parametrize("shortcut", ["plus", "in-place"])
@pytest.mark.parametrize("project", [False, True])
def test_shortcut_under_autocast(project: bool, shortcut: str) -> None:
    """It passes on the input's dtype."""
    unit = General(8, 16, project=True) if project else General(16, 16)
    unit.shortcut = shortcut
    x = draw(2, unit.inp, 9, 7)
    randomize_(unit).eval()
    fused = snv2.fuse(unit)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out, expected = fused(x.to(dtype)), unit(x.to(dtype))
        assert out.dtype == expected.dtype
        assert max_error(out, expected.double()) < 2 * torch.finfo(torch.bfloat16).eps


def test_ends() -> None:
    """A stem and a head with activations of their own."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last = ConvBNReLU(3, 10, 3, 2), ConvBNReLU(28, 40)
            self.stem.activate = nn.Hardswish()
            self.last.activate = nn.LeakyReLU(0.1)
            self.unit, self.fc = General(10, 28, 2, act="silu"), nn.Linear(40, 7)
            self.pools = nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.last(self.unit(self.pools[0](self.stem(x))))
            return self.fc(self.pools[1](x).flatten(1))

    steps = recognized(Network(), 3, "network", size=33)
    assert [step[0] for step in steps] == ["import", "stem", "unit", "head"][1:]
    assert steps[0][1][2] == "hardswish"
    assert steps[2][1][2:4] == ["leaky_relu", 0.1]


@settings(drawn, max_examples=8, phases=[Phase.generate])  # shrinking takes minutes
@given(
    half=st.integers(2, 20).map(lambda n: 2 * n), passing=st.integers(1, 20),
    stride=st.integers(1, 2), kernel=st.sampled_from([3, 5, 7]), dilation=st.integers(1, 3),
    act=st.sampled_from(sorted(ACTIVATIONS)), dw_act=st.sampled_from(sorted(ACTIVATIONS)),
    gate=st.sampled_from([None, *sorted(GATES)]),
    gate_after=st.integers(0, 3), norm=st.sampled_from(sorted(NORMS)),
    layers=st.sampled_from(["pw dw pw", "dw pw", "pw dw", "dw pw dw pw", "pw dw dw pw"]),
    shuffled=st.booleans(), project=st.booleans(),
    shortcut=st.sampled_from([None, *sorted(SHORTCUTS)]),
    after=st.sampled_from(sorted(ACTIVATIONS)),
)  # fmt: skip
def test_drawn_unit(
    half: int, passing: int, layers: str, gate_after: int, shuffled: bool, shortcut: str | None,
    after: str, **kwargs: Any,
) -> None:  # fmt: skip
    inp = half + passing
    shuffled = shuffled and (passing == half or kwargs["project"] or kwargs["stride"] == 2)
    gate_after = min(gate_after, len(layers.split()) - 1)
    shortcut = None if kwargs["project"] or kwargs["stride"] == 2 else shortcut
    gate = kwargs["gate"] is not None
    gated = gate and gate_after == len(layers.split()) - 1  # at the end
    after = after if shortcut is not None or gated else "identity"
    torch.manual_seed(0)  # of norms that draw their own
    model = General(
        inp, 2 * half, layers=layers, gate_after=gate_after, shuffled=shuffled, shortcut=shortcut,
        after=after, **kwargs,
    )  # fmt: skip
    _, unit = recognized(model, inp, size=5)
    assert len(layers_of(unit)) == len(layers.split())
    assert len(gates_of(unit)) == gate + (shortcut is not None and not gated)
    if shortcut is not None or gated:
        assert gates_of(unit)[-1][2::2] == [ACTIVATIONS[after][0], shortcut is not None]
    assert {layer[2] for layer in layers_of(unit)} == {
        ACTIVATIONS[kwargs["act" if kind == "pw" else "dw_act"]][0] for kind in layers.split()
    }
