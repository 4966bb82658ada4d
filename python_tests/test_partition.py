"""Forwards that are units and other layers: what runs fused, and that it is right."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases import DTYPES, FP32_BOUND, Recorder, draw, ops_called
from _mixed_networks import PARTITIONED, WHOLE, Detector, Network, PermutedUnit, SimAM, Unit
from _styles import shuffle
from test_gradients import gradients
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.nn.recognized import Recognized
from snv2_kernels.testing import float64_reference, max_error, randomize_

SIZES = [(2, 64, 64), (1, 41, 75), (3, 33, 96)]


def tensors(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in containers inside each other, in order."""
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def fused_kind(fused: nn.Module) -> str:
    assert isinstance(fused, Recognized)
    assert fused.reason() is None
    return fused.kind()


def assert_right(fused: nn.Module, model: nn.Module, *inputs: Tensor) -> None:
    """At most 1.5 times eager's error and four eps, each the largest over the inputs, of each
    tensor: of one input alone eager's may be next to nothing by luck. And the same containers."""
    reference, errors = float64_reference(model), []  # ours and eager's, by input and tensor
    for x in inputs:
        with torch.no_grad():
            exact, eager, actual = reference(x), model(x.clone()), fused(x.clone())
        assert type(actual) is type(eager)
        parts = list(zip(*map(list, map(tensors, (actual, eager, exact))), strict=True))
        assert all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b, _ in parts)
        errors.append([(max_error(a, c), max_error(b, c)) for a, b, c in parts])
    eps = torch.finfo(inputs[0].dtype).eps
    for of_tensor in zip(*errors, strict=True):
        ours, eagers = map(max, zip(*of_tensor, strict=True))
        assert ours <= 1.5 * eagers + 4 * eps


def ops(fused: nn.Module, x: Tensor) -> list[str]:
    with torch.no_grad():
        return ops_called(fused, x)


@pytest.mark.parametrize("name", PARTITIONED)
def test_units_among_other_layers_run_fused(name: str) -> None:
    told, make = PARTITIONED[name]
    model = randomize_(make()).eval()
    fused = snv2.fuse(model)
    assert fused_kind(fused) == f"partition of {told}"
    assert_right(fused, model, *(draw(n, 3, h, w) for n, h, w in SIZES))
    assert sum(op.startswith("snv2::") for op in ops(fused, draw(1, 3, 64, 64))) == regions(fused)


def regions(fused: Any) -> int:
    return len(fused._recognition.partition.regions)


@pytest.mark.parametrize("name", ["detector", "eca inside"])
def test_on_each_backend(kernels: str, name: str) -> None:
    model = randomize_(PARTITIONED[name][1]()).eval()
    fused, x = snv2.fuse(model), draw(1, 3, 33, 40)
    assert_right(fused, model, x)
    called = [op.partition("::")[0] for op in ops(fused, x)]
    assert sum(library.startswith("snv2") for library in called) >= regions(fused)


@pytest.mark.parametrize("name", WHOLE)
def test_spellings_of_whole_networks(name: str) -> None:
    model = randomize_(WHOLE[name]()).eval()
    fused = snv2.fuse(model)
    assert fused_kind(fused) == "network"
    assert_right(fused, model, draw(2, 3, 64, 96))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_formats(dtype: torch.dtype, order: torch.memory_format) -> None:
    model = randomize_(Detector()).eval().to(dtype)
    x = draw(2, 3, 64, 96, dtype=dtype, memory_format=order)
    fused = snv2.fuse(model)
    assert_right(fused, model, x)
    assert any(op.startswith("snv2::") for op in ops(fused, x))


def test_gradients_go_through_the_drop_ins_inside() -> None:
    model = randomize_(Network(head="max")).eval()
    fused = snv2.fuse(model)
    x = draw(2, 3, 64, 64)
    expected, actual = gradients(model, x), gradients(fused, x)
    for a, b in zip(actual, expected, strict=True):
        assert max_error(a, b) < FP32_BOUND
    # The stages' own: a backbone that is frozen runs fused under a head that learns.
    model.requires_grad_(False).fc.requires_grad_(True)
    with Recorder() as recorder:
        fused(x).sum().backward()
    assert sum(op.startswith("snv2::") for op in recorder.names) == len(model.stages)
    assert fused.fc.weight.grad is not None


def test_autocast_runs_plain() -> None:
    model = randomize_(Network(head="normalised")).eval()
    fused, x = snv2.fuse(model), draw(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert max_error(fused(x), model(x)) < 0.05
        assert fused(x).dtype == model(x).dtype


@pytest.mark.usefixtures("fresh_compiler")
def test_compilers_see_the_plain_forward() -> None:
    model, x = randomize_(Detector()).eval(), draw(2, 3, 64, 64)
    fused = snv2.fuse(model)
    assert_right(fused, model, x)
    assert_right(torch.compile(fused, backend="eager"), model, x)
    model = randomize_(PARTITIONED["simam behind"][1]()).eval()
    exported = torch.export.export(snv2.fuse(model), (x,)).module()
    assert_right(exported, model, x)


# Changes --------------------------------------------------------------------------------------


def test_changed_weights_and_layers_are_seen() -> None:
    model = randomize_(Network(lambda i, o, s: Unit(i, o, s, behind=SimAM))).eval()
    fused, x = snv2.fuse(model), draw(1, 3, 64, 64)
    assert_right(fused, model, x)
    with torch.no_grad():
        model.conv5[0].weight.mul_(2)  # of what PyTorch runs, and of a region
        model.stages[0][1].main[0][0].weight.mul_(3)
    assert_right(fused, model, x)
    for each in (model, fused):
        each.stages[1][2].behind = nn.Identity()
    assert fused(x).isfinite().all()
    assert_right(fused, model, x)
    assert fused_kind(fused).startswith("partition")
    for each in (model, fused):
        for stage in each.stages:
            for unit in stage:
                unit.behind = nn.Identity()
    assert_right(fused, model, x)
    assert fused_kind(fused) == "network"


def test_channels_in_a_buffer_may_change() -> None:
    model = randomize_(Network(lambda i, o, s: PermutedUnit(i, o, s, "buffer"))).eval()
    fused, x = snv2.fuse(model), draw(1, 3, 64, 64)
    compiled = torch.compile(fused, backend="eager")
    for _ in range(2):
        assert_right(fused, model, x)
        assert_right(compiled, model, x)
        order = model.stages[0][1].order
        order.copy_(order.roll(1))


def test_copies_and_pickles() -> None:
    model = randomize_(Network(head="max")).eval()
    fused = snv2.fuse(model)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), snv2.fuse(fused)):
        assert_right(copied, model, draw(2, 3, 33, 64))
        assert fused_kind(copied) == "partition of a stage"


def test_half_precision_in_place() -> None:
    fused = snv2.fuse(randomize_(Network(head="max")).eval()).half()
    assert_right(fused, copy.deepcopy(fused), draw(2, 3, 33, 64, dtype=torch.float16))


def test_parts_run_in_integers() -> None:
    """Quantized are the stages inside, which the plain forward then calls."""
    model, x = randomize_(Network(head="max")).eval(), draw(4, 3, 64, 64)
    for given in (model, snv2.fuse(model)):
        quantized = snv2.quantize(given, x)
        assert [part._ranges is not None for part in quantized.stages] == [True, True]
        assert "quantized in parts" in str(quantized.reason())
        called = ops(quantized, x)
        assert sum(op.startswith("snv2::") for op in called) == len(model.stages)
        with torch.no_grad():
            assert 0 < max_error(quantized(x), model(x)) < 0.2


def test_a_dropped_module_is_freed() -> None:
    fused = snv2.fuse(randomize_(Detector()).eval())
    ops(fused, draw(1, 3, 64, 64))
    held = [weakref.ref(t) for t in (fused.conv1[0].weight, fused.fc.weight)]
    gc.disable()
    try:
        del fused
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


# Writes in place ------------------------------------------------------------------------------


class Writing(nn.Module):
    """Units around a write to a map that one of them has made or reads."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.second, self.way = Unit(8, 8, 1), Unit(8, 8, 1), way

    def forward(self, x: Tensor) -> Any:
        if self.way == "input":
            x.mul_(2)
        x = x + 1
        y = self.first(x)
        if self.way == "between":
            y.mul_(2)
        if self.way == "part between":
            y[:, ::2].mul_(2)
        if self.way == "part of the source between":
            x[:, ::2].mul_(2)
        z = self.second(y)
        if self.way == "source behind":
            x.mul_(2)
        if self.way == "map behind":
            y.mul_(2)
        if self.way == "result":
            z[:, ::2].mul_(2)
        if self.way == "half":
            a, b = z.chunk(2, 1)
            a.add_(b)
        return z, x - y, F.relu_(z + 0)


@pytest.mark.parametrize(
    "way",
    [
        "none", "between", "part between", "part of the source between", "source behind",
        "map behind", "result", "half", "input",
    ],
)  # fmt: skip
def test_writes_in_place(way: str) -> None:
    """Right without verification, which would leave a wrong partition out."""
    model = randomize_(Writing(way)).eval()
    fused, x = snv2.fuse(model, verify=False), draw(2, 8, 9, 11)
    assert_right(fused, model, x)
    a, b = x.clone(), x.clone()
    with torch.no_grad():
        fused(a), model(b)
    torch.testing.assert_close(a, b)
    if way != "input":
        assert any(op.startswith("snv2::") for op in ops(fused, x))


# Drawn forwards -------------------------------------------------------------------------------


class Drawn(nn.Module):
    """Units and other functions in a drawn order, on maps of 12 channels."""

    STEPS = (
        "unit", "unit", "unit", "chain", "add", "scale", "relu_", "cat", "halves", "pool", "resize",
        "shuffle", "write", "gate", "size",
    )  # fmt: skip

    def __init__(self, seed: int) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)

        def pick(count: int) -> int:
            return int(torch.randint(count, (), generator=draws))

        self.steps = [
            (self.STEPS[pick(len(self.STEPS))], pick(1 << 16), pick(1 << 16)) for _ in range(9)
        ]
        self.parts = nn.ModuleDict()
        for i, (step, _, _) in enumerate(self.steps):
            if step == "unit":
                self.parts[str(i)] = Unit(12, 12, 1)
            elif step == "chain":
                self.parts[str(i)] = Unit(12, 12, 1).main
            elif step == "gate":
                self.parts[str(i)] = nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> list[Tensor]:  # noqa: PLR0912
        maps = [x]
        for i, (step, a, b) in enumerate(self.steps):
            first, second = maps[-1 - a % min(2, len(maps))], maps[b % len(maps)]
            if step == "unit":
                maps.append(self.parts[str(i)](first))
            elif step == "chain":
                half, other = first.chunk(2, 1)
                maps.append(torch.cat((self.parts[str(i)](half), other), 1) * 0.5)
            elif step == "add":
                maps.append(first + F.interpolate(second, size=first.shape[2:]))
            elif step == "scale":
                maps.append(first * second.mean((2, 3), keepdim=True))
            elif step == "relu_" and first is not x:
                maps.append(F.relu_(first) if a % 3 else F.relu(first))
            elif step == "cat":
                resized = F.interpolate(second, first.shape[-2:])
                maps.append(torch.cat((first[:, :6], resized[:, 3:9]), 1))
            elif step == "halves":
                p, q = first.split(6, 1)
                maps.append(torch.cat((q, p + 1), 1))
            elif step == "pool":
                maps.append(F.avg_pool2d(first, 3, 1 + a % 2, 1))
            elif step == "resize":
                maps.append(F.interpolate(first, scale_factor=2.0))
            elif step == "shuffle":
                maps.append(shuffle(first, 2 + a % 2))
            elif step == "write" and second is not x:
                second.mul_(0.5)
            elif step == "gate":
                maps.append(first * self.parts[str(i)](first.amax((2, 3), keepdim=True)).sigmoid())
            elif step == "size":
                n, _, h, w = first.size()
                maps.append((first.view(n, 12, h * w) / (h * w + 1)).reshape(n, 12, h, w))
        return maps[1:] or [x + 1]


def test_drawn_forwards() -> None:
    """None is wrong, whatever stands between its units, and without verification, which would leave
    it out; and most with a unit run it fused."""
    with_units = fused_ones = 0
    for seed in range(60):
        model = randomize_(Drawn(seed), seed).eval()
        fused = snv2.fuse(model, verify=False)
        for n, h, w in ((2, 17, 13), (1, 9, 20)):
            x = draw(n, 12, h, w, seed=seed)
            a, b = x.clone(), x.clone()
            with torch.no_grad():
                out, expected = fused(a), model(b)
            for got, plain in zip(out, expected, strict=True):
                assert got.shape == plain.shape
                assert max_error(got, plain) < 1e-4, (seed, model.steps)
            torch.testing.assert_close(a, b)
        if any(step == "unit" for step, _, _ in model.steps):
            with_units += 1
            fused_ones += any(op.startswith("snv2::") for op in ops(fused, x))
    assert fused_ones > 0.9 * with_units


# Refusals and explanations --------------------------------------------------------------------


class _Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage = snv2.models.shufflenet_v2_x0_5().stage2

    def forward(self, x: Tensor) -> Tensor:
        squared: Tensor = self.stage(x) ** 2
        return squared


def test_functions_without_a_signature() -> None:
    """Tensor.__pow__ wraps a builtin."""
    plain = _Squared().eval()
    fused, x = snv2.fuse(plain), draw(1, 24, 9, 9)
    with torch.no_grad():
        assert max_error(fused(x), plain(x)) < FP32_BOUND
    assert "fused" in str(snv2.explain(fused))


def test_what_is_beside_is_told() -> None:
    model = randomize_(Detector()).eval()
    part = snv2.explain(model).parts[0]
    assert part.reason is None
    for word in ("conv2d (sides.0)", "interpolate", "add"):
        assert word in part.beside or "more" in part.beside
    assert "partition of a stage and 3 chains: fused, but for conv2d (conv1.0)" in str(part)


class OfAnotherFamily(nn.Module):
    """MobileNet's: depthwise and pointwise layers, nothing is split."""

    def __init__(self) -> None:
        super().__init__()
        self.main = Unit(16, 16, 1).main

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x) * 2


def test_networks_of_other_families_are_left_alone() -> None:
    model = randomize_(OfAnotherFamily()).eval()
    assert type(snv2.fuse(model)) is OfAnotherFamily
