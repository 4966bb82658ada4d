"""fuse() on PicoDet's units: a depthwise layer beside its input, layers behind the join."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _cases import assert_accurate, assert_close, draw, ops_called, run_fused, runs_fused
from _esnet import EsNet, EsUnit, EsUnitDS
from _told_deviations import gates_of, layers_of, recognized
from torch import nn

import snv2_kernels as snv2
from snv2_kernels.testing import float64_reference, randomize_


def test_ghost_unit() -> None:
    _, unit = recognized(EsUnit(28, 20), 28)
    pw, dw, last = layers_of(unit)
    assert [layer[2] for layer in (pw, dw, last)] == ["hardswish", "identity", "hardswish"]
    assert [layer[5] for layer in (pw, dw, last)] == [False, True, False]
    assert len(gates_of(unit)) == 1


ACTIVATIONS: dict[str, Any] = {
    "relu": nn.ReLU, "leaky": lambda: nn.LeakyReLU(0.2), "prelu": lambda: nn.PReLU(10),
    "prelu-one": nn.PReLU,
}  # fmt: skip


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("kernel", [3, 5])
def test_ghost_unit_with_an_activation(act: str, kernel: int) -> None:
    """Of the depthwise layer, which its input is not to pass; and before it slopes of its own."""
    _, unit = recognized(
        EsUnit(28, 20, ACTIVATIONS[act], ACTIVATIONS[act], kernel=kernel, gated=False)
        if act != "prelu"
        else EsUnit(28, 20, dw_act=ACTIVATIONS[act], kernel=kernel),
        28,
    )
    assert layers_of(unit)[1][2] == act.replace("leaky", "leaky_relu").removesuffix("-one")


def test_ghost_unit_that_kernels_lack() -> None:
    model = randomize_(EsUnit(28, 20, dw_act=nn.SiLU)).eval()
    x = draw(2, 28, 9, 11)
    fused = snv2.fuse(model)
    assert fused.reason() == "silu of a depthwise convolution beside its input"
    assert not runs_fused(fused, x)
    assert_close(fused, model, x)


def test_layers_behind_the_join() -> None:
    model = EsUnitDS(10, 16, 28)
    _, unit, chain = recognized(model, 10)
    assert unit[1] == 2
    assert (chain[4], chain[6]) == ("0:0", [])
    assert [layer[2] for layer in layers_of(chain)] == ["hardswish", "hardswish"]
    assert str(snv2.explain(model)) == "(model): unit: fused"


def es_stage() -> nn.Sequential:
    units = EsUnitDS(10, 16, 28), EsUnit(28, 32), EsUnitDS(28, 24, 36)
    return randomize_(nn.Sequential(*units)).eval()


def test_stage() -> None:
    model, x = es_stage(), draw(2, 10, 19, 23)
    fused = snv2.fuse(model)
    lines = str(snv2.explain(fused)).splitlines()
    assert lines == ["(model): stage: fused", *(f"{i}: unit: fused" for i in range(3))]
    exact = float64_reference(model)(x)
    with torch.no_grad():
        assert_accurate("stage", run_fused(fused, x), model(x), exact)
        narrow, x16 = es_stage().bfloat16(), x.bfloat16()
        fast = run_fused(copy.deepcopy(fused).bfloat16(), x16)
        assert_accurate("network", fast, narrow(x16), float64_reference(narrow)(x16))
    engine = snv2.Engine(fused, x.shape)
    assert engine.report().units == 5  # layers behind a join are one too
    assert_close(engine, model, x)


def test_changes_show() -> None:
    model, x = es_stage(), draw(2, 10, 9, 11)
    fused = snv2.fuse(model)
    assert_close(fused, model, x)
    for change in (model[1].conv_pw.conv, model[1].conv_dw.bn, model[0].conv_pw_mv1.conv):
        with torch.no_grad():
            change.weight.mul_(2)
        assert runs_fused(fused, x)
        assert_close(fused, model, x)
    for m in (fused, model):
        m[1].conv_dw.act = nn.ReLU().eval()
    assert_close(fused, model, x)
    assert runs_fused(fused, x)


def test_the_backbone_is_one_op() -> None:
    """Though its forward goes through a list that no module knows of."""
    model, x = randomize_(EsNet()).eval(), draw(2, 3, 70, 53)
    fused = snv2.fuse(model)
    assert str(snv2.explain(fused)).startswith("(model): backbone: fused")
    with torch.no_grad():
        assert [name for name in ops_called(fused, x) if "conv" in name or "snv2" in name] == [
            "snv2::network_results"
        ]
        maps = zip(fused(x), model(x), float64_reference(model)(x), strict=True)
        for out, eager, exact in maps:
            assert_accurate("network", out, eager, exact, "cpu")
