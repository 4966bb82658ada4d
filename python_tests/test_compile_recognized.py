"""torch.compile of modules that were recognised: one operator, and guards on what it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _backbones import Indexed, Named
from _cases import draw
from _styles import Loop, Wrapped, styled, three
from test_backbones import same_maps
from test_compile import calls, compiled
from test_recognition import Windowed
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.graph.returned import Returned
from snv2_kernels.testing import randomize_

pytestmark = pytest.mark.usefixtures("fresh_compiler")

FUSED = ["snv2.fused"]
FUSED_RESULTS = ["snv2.fused_results", *["<built-in function getitem>"] * 2]


def agree(fast: Any, plain: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        same_maps(fast(x), plain(x))


def test_changes_are_seen_or_guarded() -> None:
    model, x = styled("wrapped")
    fused = snv2.fuse(model)
    fast, counter = compiled(fused)
    agree(fast, model, x)
    assert calls(counter) == FUSED
    with torch.no_grad():
        model[0].main[0].conv.weight.mul_(2)
        model[1].main[1].norm.running_var.add_(1)
    agree(fast, model, x)
    model[1].main[1].conv.weight.data = model[1].main[1].conv.weight.data.flip(0)
    agree(fast, model, x)
    weight = model[2].main[0].conv.weight.detach() * 3
    for m in (model, fused):
        m[2].main[0].conv.weight = nn.Parameter(weight.clone())
    agree(fast, model, x)
    assert counter.frame_count == 1
    for m in (fused, model):
        m[1].main[2].norm.eps = 0.5
    agree(fast, model, x)
    assert (counter.frame_count, calls(counter)) == (2, FUSED)
    for m in (fused, model):
        m[2].main[0].activate = nn.Hardswish().eval()
    agree(fast, model, x)
    assert (counter.frame_count, calls(counter)) == (3, FUSED)
    for m in (fused, model):
        m[2].main[0].activate = nn.GELU().eval()
    agree(fast, model, x)
    assert counter.frame_count == 4
    assert calls(counter).count("snv2.fused") == 2  # the other units


def test_a_constant_of_the_forward_is_guarded() -> None:
    model, x = Indexed(), draw(2, 3, 21, 17)
    model.layers = nn.ModuleList(stage[:1] for stage in model.layers)  # it is compiled three times
    fused = snv2.fuse(randomize_(model).eval())
    fast, counter = compiled(fused)
    agree(fast, model, x)
    assert calls(counter) == FUSED_RESULTS
    for m in (fused, model):
        m.out_indices = (2, 1)
    agree(fast, model, x)
    assert (counter.frame_count, calls(counter)) == (2, FUSED_RESULTS)
    for m in (fused, model):
        m.out_indices = (2,)
    agree(fast, model, x)
    assert (counter.frame_count, calls(counter)) == (3, FUSED)


def test_gradients_and_sizes() -> None:
    model = randomize_(Named()).eval()
    fast, counter = compiled(snv2.fuse(model), "aot_eager", dynamic=True)
    frames = []
    for shape in ((2, 10, 21, 17), (3, 10, 9, 12)):
        grads, outs = [], []
        for m in (fast, model):
            x = draw(*shape).requires_grad_()
            outs.append(m(x))
            maps = Returned.of(outs[-1])[1]
            inputs = [x, *model.parameters()]
            both = torch.autograd.grad(maps[0].sum() + maps[1].square().mean(), inputs)
            (one,) = torch.autograd.grad(m(x)["dark3"].sum(), [x])
            grads.append((*both, one))
        same_maps(*outs)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        frames.append(counter.frame_count)
    assert calls(counter) == FUSED_RESULTS
    assert frames[0] == frames[1]


def test_part_of_a_model() -> None:
    body = Loop(three(Wrapped))
    model = nn.Sequential(nn.Conv2d(3, 10, 1), body, nn.Hardtanh(), Wrapped(28, 28, 1))
    randomize_(model).eval()
    x = draw(1, 3, 9, 11)
    fast, counter = compiled(snv2.fuse(model))
    agree(fast, model, x)
    assert calls(counter).count("snv2.fused") == 2
    assert sum("conv" in name for name in calls(counter)) == 1


def test_exported() -> None:
    model = randomize_(Named()).eval()
    x = draw(2, 10, 21, 17)
    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        program = torch.export.export(snv2.fuse(model), (x,), dynamic_shapes=({0: batch},))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names[0] == "snv2.network_results.default"
    assert not any("conv" in name for name in names)
    agree(program.module(), model, draw(3, 10, 21, 17))


def test_average_over_a_window() -> None:
    model = randomize_(Windowed()).eval()
    fast, counter = compiled(snv2.fuse(model))
    agree(fast, model, draw(2, 3, 17, 24))
    assert calls(counter) == FUSED
    agree(fast, model, draw(2, 3, 24, 20))
    agree(fast, model, draw(2, 3, 33, 32))
    assert any("avg_pool2d" in name for name in calls(counter))


def test_opcheck_of_several_results() -> None:
    fused, x = snv2.fuse(randomize_(Named()).eval()), draw(2, 10, 9, 7)
    known = fused._recognition
    arguments = x, known.state(fused), known.recipe, "auto", torch.float32, None
    torch.library.opcheck(torch.ops.snv2.fused_results.default, arguments)
