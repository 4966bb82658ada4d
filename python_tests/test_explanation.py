"""explain() tells of a module as it is; spellings and shapes of models that once kept it plain."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases import FP32_BOUND, assert_close, draw, run_fused
from _styles import conv_bn, shuffle
from torch import Tensor, fx, nn

import snv2_kernels as snv2
from snv2_kernels.graph.reasons import why_no_unit
from snv2_kernels.graph.record import record
from snv2_kernels.nn import FusedModule
from snv2_kernels.testing import max_error, randomize_

SIZE = (2, 12, 9, 7)
Split, Join = Callable[[Tensor], Any], Callable[[Tensor, Tensor], Tensor]


class Unit(nn.Module):
    """A unit of 12 channels, split and joined as its functions do it."""

    def __init__(
        self,
        split: Split = lambda x: x.chunk(2, 1),
        join: Join = lambda a, b: torch.cat([a, b], 1),
        mix: Callable[[Tensor], Tensor] = lambda y: shuffle(y, 2),
    ) -> None:
        super().__init__()
        self.functions = split, join, mix
        layers = *conv_bn(6, 6), nn.ReLU(), *conv_bn(6, 6, 3, 1, 6), *conv_bn(6, 6), nn.ReLU()
        setattr(self, "main.branch", nn.Sequential(*layers))  # names may have dots

    def forward(self, x: Tensor) -> Tensor:
        split, join, mix = self.functions
        a, b = split(x)
        branch: Any = self._modules["main.branch"]
        return mix(join(a, branch(b)))


def made(module: nn.Module) -> Any:
    return randomize_(module).eval()


# Spellings ------------------------------------------------------------------------------------


def _named_mix(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    y = torch.reshape(input=y, shape=(n, 2, c // 2, h, w))
    return torch.flatten(input=torch.transpose(input=y, dim0=1, dim1=2), start_dim=1, end_dim=2)


SPELLINGS: dict[str, dict[str, Any]] = {
    "chunk": {"split": lambda x: torch.chunk(input=x, chunks=2, dim=1)},
    "split": {"split": lambda x: torch.split(tensor=x, split_size_or_sections=6, dim=1)},
    "cat": {"join": lambda a, b: torch.cat(tensors=[a, b], dim=1)},
    "hstack": {"join": lambda a, b: torch.hstack((a, b))},
    "hstack-named": {"join": lambda a, b: torch.hstack(tensors=(a, b))},
    "shuffle": {"mix": _named_mix},
    "permute": {
        "mix": lambda y: y.unflatten(1, (2, 6)).permute(dims=(0, 2, 1, 3, 4)).flatten(1, 2)
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_arguments_by_name(spelling: str) -> None:
    unit = made(Unit(**SPELLINGS[spelling]))
    fused = snv2.fuse(unit)
    assert isinstance(fused, FusedModule), snv2.explain(unit)
    assert_close(fused, unit, draw(*SIZE))


def test_compiled_unit_whose_names_have_dots() -> None:
    unit = made(Unit())
    compiled = torch.compile(snv2.fuse(unit), backend="eager", fullgraph=True)
    assert_close(compiled, unit, draw(*SIZE))


class Pooled(nn.Module):
    """A network whose pool and dropout are passed their arguments by name or not."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.named, self.unit, self.fc = named, Unit(), nn.Linear(10, 4)
        self.last = nn.Sequential(*conv_bn(12, 10), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.unit(x))
        size = x.shape[2:]
        if self.named:
            x = F.avg_pool2d(input=x, kernel_size=size).flatten(1)
            x = F.dropout(input=x, training=self.training)
        else:
            x = F.dropout(F.avg_pool2d(x, size).flatten(1), 0.5, self.training)
        out: Tensor = self.fc(x)
        return out


@pytest.mark.parametrize("named", [False, True])
def test_pool_and_dropout_by_name(named: bool) -> None:
    model = made(Pooled(named))
    fused, x = snv2.fuse(model), draw(*SIZE)
    assert str(snv2.explain(fused)).startswith("(model): network: fused")
    run_fused(fused, x)
    assert_close(fused, model, x)


class Idle(nn.Module):
    """A layer whose result nobody takes."""

    def __init__(self, inplace: bool, returns: bool = False) -> None:
        super().__init__()
        self.unit, self.returns = Unit(), returns
        self.idle = nn.Sequential(*conv_bn(12, 6), nn.ReLU(inplace))

    def forward(self, x: Tensor) -> Any:
        y = self.unit(x)
        idle = self.idle(y)
        return (y, idle) if self.returns else y


@pytest.mark.parametrize("inplace", [False, True])
def test_layer_whose_result_nobody_takes(inplace: bool) -> None:
    model = made(Idle(inplace))
    fused = snv2.fuse(model)
    assert isinstance(fused, FusedModule), snv2.explain(model)
    assert_close(fused, model, draw(*SIZE))


class Clears(Unit):
    """What it writes to is seen from outside: its input, or a map that it returns."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        (x if self.what == "input" else y[:, :1]).relu_()
        return y


@pytest.mark.parametrize("what", ["input", "view of the result"])
def test_writes_that_are_seen_are_kept(what: str) -> None:
    model, x = made(Clears(what)), draw(*SIZE)
    fused, seen, expected = snv2.fuse(model), x.clone(), x.clone()
    with torch.no_grad():
        assert max_error(fused(seen), model(expected)) < FP32_BOUND
    assert torch.equal(seen, expected)


# Reasons --------------------------------------------------------------------------------------


class Summed(nn.Module):
    """Two layers whose sum is to become one, as in networks that are reparametrised later."""

    def __init__(self) -> None:
        super().__init__()
        (self.dw, self.dw_norm), (self.pw, self.pw_norm) = conv_bn(6, 6, 3, 1, 6), conv_bn(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.dw_norm(self.dw(x)) + self.pw_norm(self.pw(x)))


def test_reason_of_two_layers_summed() -> None:
    assert str(snv2.explain(nn.Sequential(Summed()).eval())) == (
        "0: Summed: not fused: add in a branch, with batch_norm (pw_norm)"
    )


JOINS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"join": lambda a, b: b, "mix": lambda y: y}, "is joined with nothing"),
    "a sum": ({"join": lambda a, b: a + b, "mix": lambda y: y}, "add in a branch"),
    "its input": (
        {"join": lambda a, b: torch.cat([a, a[:, :2], b], 1)},
        "cat of a branch and its input, not of each channel once",
    ),
    "a map": (
        {"split": lambda x: (x[:, :6].cumsum(1), x[:, 6:])},
        "cat with cumsum, which is no projection",
    ),
}  # fmt: skip


@pytest.mark.parametrize("join", JOINS)
def test_reason_of_a_branch_that_is_joined_otherwise(join: str) -> None:
    """Its layers are a chain."""
    how, reason = JOINS[join]
    unit = made(Unit(**how))
    assert reason in why_no_unit(record(unit, 12).graph)
    assert str(snv2.explain(unit)).startswith("(model): partition of a chain: fused")


def test_plain_layers_around_a_unit_are_told() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.unit = nn.Conv2d(3, 12, 3, padding=1), Unit()
            self.heads = nn.ModuleList(nn.Conv2d(12, 4, 3) for _ in range(2))

        def forward(self, x: Tensor) -> list[Tensor]:
            x = self.unit(self.stem(x))
            return [head(x) for head in self.heads]

    assert str(snv2.explain(made(Detector()))).splitlines() == [
        "unit: unit: fused",
        "(model): Detector: not fused: returns maps that no unit makes: conv2d (heads.0);"
        " plain: stem, heads",
    ]


def test_mode_flags_as_they_are() -> None:
    unit = made(Unit())
    unit._modules["main.branch"][1].train()
    assert "'main.branch.1' is in train() mode" in str(snv2.explain(unit))
    assert str(snv2.explain(unit.train())) == "(model): unit: not fused: it is in train() mode"
    unit.eval()._modules["main.branch"][2].train()  # a ReLU, which has no mode
    assert str(snv2.explain(unit)) == "(model): unit: fused"


# Graph modules --------------------------------------------------------------------------------


class _UnitsAsLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return type(m).__name__ == "InvertedResidual" or super().is_leaf_module(m, qualified_name)


def _features(model: nn.Module) -> nn.Module:
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(model, ["stage2", "stage3"])


def _folded(model: nn.Module) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


TRACED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "symbolic_trace": fx.symbolic_trace,
    "feature-extractor": _features,
    "folded-norms": _folded,
}


@pytest.mark.parametrize("traced", TRACED)
def test_graph_modules(torchvision: types.ModuleType, traced: str) -> None:
    model = made(torchvision.models.ShuffleNetV2([1, 1, 1], [24, 20, 36, 58, 40], num_classes=4))
    module, x = TRACED[traced](model).eval(), draw(1, 3, 65, 49)
    (part,) = snv2.explain(module).parts
    assert part.reason is not None
    assert 'torch.compile(model, backend="snv2") fuses its units' in part.reason
    fused = snv2.fuse(module)
    with torch.no_grad():
        expected, actual = module(x), fused(x)
    torch.testing.assert_close(actual, expected)


def test_graph_module_of_units(torchvision: types.ModuleType) -> None:
    """It keeps its code when its units are replaced, and so does the module that was fused."""
    unit = torchvision.models.shufflenetv2.InvertedResidual
    model = made(nn.Sequential(unit(12, 12, 1), nn.Conv2d(12, 12, 1), unit(12, 12, 1)))
    module = fx.GraphModule(model, _UnitsAsLeaves().trace(model))
    fused, x = snv2.fuse(module), draw(*SIZE)
    assert sum(isinstance(part, FusedModule) for part in fused.modules()) == 2
    assert_close(fused, model, x)
    fused.recompile()
    assert_close(module, model, x)
