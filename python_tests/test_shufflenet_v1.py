"""ShuffleNet v1, in the spellings of its authors and of ONNX files: grouped pointwise layers,
shuffles inside a branch, average pools beside it, sums around it, heads without conv5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases import DTYPES, FP32_BOUND, assert_accurate, draw, ops_called
from _cpu_plans import interpret
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_bench.floor import multiply_adds
from snv2_kernels import emulator, models
from snv2_kernels.graph.recipe import Recipe, RecipeBuilder
from snv2_kernels.graph.recognize import recognize
from snv2_kernels.graph.record import record
from snv2_kernels.packing import PlanBuilder
from snv2_kernels.testing import float64_reference, max_error, randomize_


class FileUnit(nn.Module):
    """The unit of the ONNX model zoo's files: shuffled before the depthwise layer, joined with an
    average of the pixels inside the map, the activation behind the join."""

    def __init__(self, inp: int, oup: int, stride: int, groups: int, mid: int) -> None:
        super().__init__()
        out = oup if stride == 1 else oup - inp
        self.stride, self.groups = stride, groups
        self.pw1 = nn.Conv2d(inp, mid, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.dw = nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.pw2 = nn.Conv2d(mid, out, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.pw1(x)))
        n, c, h, w = y.shape
        y = y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        y = self.bn3(self.pw2(self.bn2(self.dw(y))))
        if self.stride == 1:
            return F.relu(y + x)
        pool = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        return F.relu(torch.cat([y, pool], 1))


class Network(nn.Module):
    """A stem, units and scores of their means."""

    def __init__(self, channels: int, units: nn.Sequential, features: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.units = units
        self.fc = nn.Linear(features, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.units(self.stem(x)).mean([2, 3]))
        return out


def authors_units() -> nn.Sequential:
    """Groups of 5 rows, which fill no vector, and of 15 channels, which are not the groups of rows
    that make them; two maps that lie as the ones before."""
    unit = models.ShuffleNetV1Unit
    return nn.Sequential(
        unit(6, 45, 2, 3, 15, 1), unit(45, 45, 1, 3, 15), unit(45, 45, 1, 3, 15)
    )  # fmt: skip


def file_units() -> nn.Sequential:
    """A group of 18 rows, which take half a vector more than one."""
    return nn.Sequential(
        FileUnit(8, 72, 2, 4, 24), FileUnit(72, 72, 1, 4, 72), FileUnit(72, 72, 1, 4, 72),
        FileUnit(72, 96, 2, 4, 72),
    )  # fmt: skip


UNITS: dict[str, tuple[Callable[[], nn.Sequential], int]] = {
    "authors": (authors_units, 6),
    "file": (file_units, 8),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", UNITS)
def test_units(kernels: str, name: str, dtype: torch.dtype) -> None:
    make, channels = UNITS[name]
    model = randomize_(make()).eval()
    x = draw(2, channels, 13, 9, dtype=dtype)
    fused = snv2.fuse(model)
    model, fused = model.to(x), fused.to(x)
    exact = float64_reference(model)(x)
    assert str(snv2.explain(fused)).splitlines()[0].endswith("stage: fused")
    with torch.no_grad():
        emulator.reset_counters()
        assert_accurate("stage", fused(x), model(x), exact, kernels)
    if kernels == "cuda-emulated":
        assert emulator.counters()["launches"] > 0


@pytest.mark.parametrize("name", UNITS)
def test_networks_are_one_call(name: str) -> None:
    make, channels = UNITS[name]
    units = make()
    features = 45 if name == "authors" else 96
    model = randomize_(Network(channels, units, features)).eval()
    fused = snv2.fuse(model)
    x = draw(2, 3, 61, 45)
    with torch.no_grad():
        assert max_error(fused(x), float64_reference(model)(x)) < FP32_BOUND
        called = [name for name in ops_called(fused, x) if "conv" in name or "snv2" in name]
    assert called == ["snv2::network"]


@pytest.mark.parametrize("name", UNITS)
def test_autocast_gives_eager_dtype(name: str) -> None:
    """A pool passes the input's float32 on into the join."""
    make, channels = UNITS[name]
    units = randomize_(make()).eval()
    fused, x = snv2.fuse(units), draw(1, channels, 9, 7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == units(x).dtype


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
def test_published_networks(groups: int) -> None:
    """Multiply-adds of Table 2 of the ShuffleNet paper, within 2 %, and one call."""
    with torch.device("meta"):
        model = models.shufflenet_v1(groups).eval()
        count = multiply_adds(model, torch.empty(1, 3, 224, 224))
    published = {1: 143e6, 2: 140e6, 3: 137e6, 4: 133e6, 8: 137e6}[groups]
    assert count == pytest.approx(published, rel=0.02)


def plan_of(units: nn.Sequential, channels: int, element: torch.dtype) -> Any:
    """Its plan for a machine that may not be this one."""
    recording = record(units, channels)
    (run,) = recognize(recording.graph, recording.outs)
    builder: Any = RecipeBuilder()
    run.tell(builder)
    named = dict((*units.named_parameters(), *units.named_buffers()))
    plan = PlanBuilder()
    state = [named[node.target].detach() for node in builder.state]
    Recipe.read(builder.text).tell(plan, state)
    return plan.build(element)


@pytest.mark.parametrize("element", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", UNITS)
def test_plans_keep_groups_apart(name: str, element: torch.dtype) -> None:
    """A plan of bfloat16 may place two groups' planes in one word: a NaN then leaks from one into
    the other, and a half-read word is a wrong sum."""
    make, channels = UNITS[name]
    units = randomize_(make()).eval()
    plan = plan_of(units, channels, element)
    x = draw(1, channels, 9, 7)
    exact = float64_reference(units)
    expected = exact(x)
    error = (interpret(plan, x) - expected).abs().max() / expected.abs().max()
    assert error < 4 * torch.finfo(element).eps
    x[0, channels // 2, 4, 3] = torch.nan
    assert torch.equal(interpret(plan, x).isnan(), exact(x).isnan())


def test_nan_stays_in_its_group() -> None:
    """In the kernels too."""
    units = randomize_(file_units()).eval()
    fused = snv2.fuse(units)
    x = draw(1, 8, 9, 7)
    x[0, 5, 4, 3] = torch.nan
    with torch.no_grad():
        assert torch.equal(fused(x).isnan(), units(x).isnan())


class Other(FileUnit):
    """A unit with a change that it is no longer for its sum, pool or shuffle."""

    def __init__(self, change: str) -> None:
        super().__init__(8, 16 if change.startswith("pool") else 8,
                         2 if change.startswith("pool") else 1, 2, 8)  # fmt: skip
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.pw1(x)))
        if self.change == "shuffle-read-twice":
            shuffled = models.channel_shuffle(y, 2)
            return F.relu(self.bn3(self.pw2(self.bn2(self.dw(shuffled)))) + x) + y
        if self.change == "half-shuffled":
            y = torch.cat([y[:, :4], y[:, :4]], 1)
        y = self.bn3(self.pw2(self.bn2(self.dw(y))))
        pools = {
            "pool-ceil": lambda: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
            "pool-divisor": lambda: F.avg_pool2d(x, 3, 2, 1, divisor_override=7),
            "pool-of-others": lambda: F.avg_pool2d(x.flip(1), 3, 2, 1),
            "pool-max": lambda: F.max_pool2d(x, 3, 2, 1),
        }
        if self.change in pools:
            return F.relu(torch.cat([y, pools[self.change]()], 1))
        added = {"sum-of-others": x.flip(1), "sum-twice": 2 * x}.get(self.change, x)
        return F.relu(y + added)


@pytest.mark.parametrize(
    "change",
    ["half-shuffled", "shuffle-read-twice", "pool-ceil", "pool-divisor", "pool-of-others",
     "pool-max", "sum-of-others", "sum-twice"],
)  # fmt: skip
def test_what_is_no_such_unit_computes_the_same(change: str) -> None:
    """Taken for a unit, each of these would give other numbers."""
    model = randomize_(Other(change)).eval()
    recording = record(model, 8)
    assert not recognize(recording.graph, recording.outs)
    fused = snv2.fuse(model)
    x = draw(2, 8, 9, 8)  # an even width: a pool in ceil mode has one more column
    with torch.no_grad():
        if change == "pool-ceil":
            x = draw(2, 8, 8, 8)
            with pytest.raises(RuntimeError, match="Sizes of tensors"):
                model(x)
            with pytest.raises(RuntimeError, match="Sizes of tensors"):
                fused(x)
            return
        assert max_error(fused(x), float64_reference(model)(x)) < FP32_BOUND


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 5}, r"groups: expected one of 1, 2, 3, 4, 8, got 5"),
        ({"width": 0}, r"width: expected a number above 0, at most 16, got 0"),
        ({"groups": [3]}, r"groups: expected one of 1, 2, 3, 4, 8, got \[3\]"),
        ({"groups": 8, "width": 0.3}, r"width: 0.3 leaves channels that 8 groups do not divide"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.shufflenet_v1(**arguments)
