"""torch.compile(model, backend="snv2"): units found in a graph, however they are spelled."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases import (
    FP32_BOUND,
    SMALL,
    assert_accurate,
    convs,
    draw,
    norms,
    plain_and_input,
    plain_stage,
    small_network,
)
from _projects import General
from test_gradients import gradients
from test_repack import EDITS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import snv2_kernels as snv2
from snv2_kernels.graph.recipe import read_channels, write_channels
from snv2_kernels.graph.recognize import recognize
from snv2_kernels.testing import float64_reference, max_error, randomize_

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(model: Any, **options: Any) -> tuple[Any, CompileCounterWithBackend]:
    """The counter sees what is left to the inner backend."""
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(
        model, backend="snv2", fullgraph=True, options={"inner": counter, **options}
    )
    return fast, counter


def calls(counter: CompileCounterWithBackend) -> list[str]:
    nodes = counter.graphs[-1].graph.nodes
    return [getattr(n.target, "__name__", str(n.target)) for n in nodes if n.op.startswith("call")]


def agree(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert max_error(actual.detach(), expected.detach()) < FP32_BOUND


# Known models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["snv2", "torchvision"])
def test_network_is_one_op(library: str, torchvision: types.ModuleType) -> None:
    model = small_network()
    if library == "torchvision":
        constructor = torchvision.models.ShuffleNetV2
        alike = constructor(*SMALL, num_classes=10).eval()
        alike.load_state_dict(model.state_dict())
        model = alike
    fast, counter = compiled(model)
    with torch.no_grad():
        for n in (2, 3, 5):  # the second batch is taken for dynamic
            x = draw(n, 3, 37, 45)
            out, eager = fast(x), model(x)
            assert_accurate("network", out, eager, float64_reference(model)(x))
    assert calls(counter) == ["fused"]
    assert counter.frame_count == 2


class Pooled(nn.Module):
    """A network whose dropout is before or behind what makes a row of a column, or is both."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.body, self.order, self.dropout = small_network(), order, nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        body = self.body
        x = body.stage4(body.stage3(body.stage2(body.maxpool(body.conv1(x)))))
        x = nn.functional.adaptive_avg_pool2d(body.conv5(x), 1)
        for step in self.order.split():
            x = self.dropout(x) if step == "dropout" else x.flatten(1)
        out: Tensor = body.fc(x)
        return out


@pytest.mark.parametrize("order", ["flatten dropout", "dropout flatten", "dropout flatten dropout"])
def test_idle_dropout_in_a_head(order: str) -> None:
    model, x = Pooled(order).eval(), draw(2, 3, 37, 45)
    fast, counter = compiled(model)
    with torch.no_grad():
        agree(fast(x), model(x))
    assert calls(counter) == ["fused"]
    for inside in (False, True):
        with torch.inference_mode(inside):
            fused = snv2.fuse(model)
            assert str(snv2.explain(fused)).startswith("(model): network: fused")
            agree(fused(x), model(x))


def test_all_shapes_dynamic() -> None:
    model, x = plain_and_input("stage")
    fast = torch.compile(
        model, backend="snv2", fullgraph=True, dynamic=True, options={"inner": "eager"}
    )
    for shape in (x.shape, (3, 21, 9, 11), (2, 21, 30, 20)):
        agree(fast(draw(*shape)), model(draw(*shape)))


def test_name_is_found_without_import() -> None:
    code = """
import sys, torch
assert "snv2" in torch._dynamo.list_backends()
assert "snv2_kernels" not in sys.modules
print(torch.compile(lambda x: x + 1, backend="snv2", options={"inner": "eager"})(torch.ones(1)))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert result.stdout.strip() == "tensor([2.])"


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        trunk = small_network()
        self.stem = nn.Sequential(trunk.conv1, trunk.maxpool)
        self.stage2, self.stage3 = trunk.stage2, trunk.stage3
        self.lateral = nn.Conv2d(36, 20, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.stage2(self.stem(x))
        coarse = self.stage3(fine)
        return F.interpolate(self.lateral(coarse), fine.shape[2:]) + fine, coarse


def test_maps_that_are_read_elsewhere_end_a_run() -> None:
    """And the rest is compiled by inductor."""
    model, x = Detector().eval(), draw(2, 3, 40, 48)
    fast, counter = compiled(model)
    for actual, expected in zip(fast(x), model(x), strict=True):
        agree(actual, expected)
    names = calls(counter)
    assert names.count("fused") == 2
    assert names.count("conv2d") == 1
    for actual, expected in zip(torch.compile(model, backend="snv2")(x), model(x), strict=True):
        agree(actual, expected)


# Spellings ------------------------------------------------------------------------------------


class Unit(nn.Module):
    """A unit with layers of its own, and a function that says how they go together."""

    def __init__(self, inp: int, width: int, stride: int, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.stride, self.way = stride, forward
        half = inp if stride == 2 else inp - width

        def block(i: int, o: int, k: int, s: int = 1, g: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o)]

        self.main = nn.Sequential(
            *block(half, width, 1), nn.ReLU(), *block(width, width, 3, stride, width),
            *block(width, width, 1), nn.ReLU(),
        )  # fmt: skip
        if stride == 2:
            self.side = nn.Sequential(
                *block(inp, inp, 3, 2, inp), *block(inp, width, 1), nn.ReLU(inplace=True)
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def sides(unit: Unit, x: Tensor, split: Callable[[Tensor], Any]) -> tuple[Tensor, Tensor]:
    if unit.stride == 2:
        return unit.side(x), unit.main(x)
    a, b = split(x)
    return a, unit.main(b)


def with_stack(unit: Unit, x: Tensor) -> Tensor:
    return torch.stack(sides(unit, x, lambda x: x.chunk(2, 1)), 2).flatten(1, 2)


def with_function(unit: Unit, x: Tensor) -> Tensor:
    a, b = sides(unit, x, lambda x: torch.split(x, x.shape[1] // 2, dim=1))
    return F.channel_shuffle(torch.concat([a, b], dim=1), 2)


def with_slices(unit: Unit, x: Tensor) -> Tensor:
    c = x.shape[1] // 2
    a, b = sides(unit, x, lambda x: (x[:, :c], x[:, c:]))
    y = torch.cat((a, b), -3)
    return y.reshape(y.shape[0], 2, -1, *y.shape[2:]).permute(0, 2, 1, 3, 4).reshape(y.shape)


def with_main_first(unit: Unit, x: Tensor) -> Tensor:
    a, b = sides(unit, x, lambda x: (x.narrow(1, x.shape[1] // 2, x.shape[1] // 2),
                                     x.narrow(1, 0, x.shape[1] // 2)))  # fmt: skip
    return shuffled(torch.cat([b, a], 1))


def with_even_and_odd(unit: Unit, x: Tensor) -> Tensor:
    return torch.cat(sides(unit, x, lambda x: (x[:, ::2], x[:, 1::2])), 1)


def with_shuffle_at_the_input(unit: Unit, x: Tensor) -> Tensor:
    """As the paper's authors wrote it."""

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        n, c, h, w = x.size()
        x = x.reshape(n * c // 2, 2, h * w).permute(1, 0, 2).reshape(2, -1, c // 2, h, w)
        return x[0], x[1]

    return torch.cat(sides(unit, x, split), 1)


WAYS = [
    with_stack, with_function, with_slices, with_main_first, with_even_and_odd,
    with_shuffle_at_the_input,
]  # fmt: skip


def spelled(way: Callable[..., Tensor], strides: tuple[int, ...] = (2, 1, 1)) -> nn.Sequential:
    units = [Unit(10 if stride == 2 else 24, 12, stride, way) for stride in strides]
    return randomize_(nn.Sequential(*units)).eval()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_spelling(way: Callable[..., Tensor], batch: int) -> None:
    model, x = spelled(way), draw(batch, 10, 9, 11)
    fast, counter = compiled(model)
    with torch.no_grad():
        out, eager = fast(x), model(x)
    assert_accurate("stage", out, eager, float64_reference(model)(x))
    assert calls(counter)[0] == "fused"
    assert not {"conv2d", "cat", "batch_norm"} & set(calls(counter))
    # Nothing is left of the shuffle but of the last one, where it is not the units' own.
    assert calls(counter) == ["fused"]


def test_spelling_with_a_batch_that_changes() -> None:
    model = spelled(with_shuffle_at_the_input)
    fast, counter = compiled(model)
    for n in (2, 3, 5):
        x = draw(n, 10, 9, 11)
        agree(fast(x), model(x))
    assert counter.frame_count == 2
    assert calls(counter) == ["fused"]


def test_folded_batch_norms() -> None:
    model, x = spelled(with_stack), draw(2, 10, 9, 11)
    for unit in model:
        for branch in (unit.main, *([unit.side] if unit.stride == 2 else [])):
            for i, conv in enumerate(list(branch)):
                if isinstance(conv, nn.Conv2d):
                    branch[i] = nn.utils.fuse_conv_bn_eval(conv, branch[i + 1])
                    branch[i + 1] = nn.Identity()
    fast, counter = compiled(model)
    with torch.no_grad():
        assert_accurate("stage", fast(x), model(x), float64_reference(model)(x))
    assert calls(counter) == ["fused"]


def test_description_of_the_authors_unit_in_an_exported_graph() -> None:
    """The graph is aten's here."""
    model, x = spelled(with_shuffle_at_the_input, (1,)), draw(2, 24, 9, 11)
    (run,) = recognize(torch.export.export(model, (x,)).graph)
    (found,) = run.units
    unit = found.told
    assert (unit.stride, unit.projection, found.in_channels) == (1, None, 24)
    assert unit.passthrough == tuple(range(0, 24, 2))
    assert unit.main == tuple(range(1, 24, 2))
    assert unit.order == tuple(range(24))
    assert [part.kind for part in unit.branch] == ["pw", "dw", "pw"]
    assert "main" in unit.branch[0].conv.weight.name
    assert unit.branch[0].norm.eps == 1e-5


# Units that differ, and what is no unit -------------------------------------------------------


def _silu(unit: nn.Module) -> None:
    unit.branch2[2] = nn.SiLU()


def _relu_after_depthwise(unit: nn.Module) -> None:
    unit.branch2[4] = nn.Sequential(unit.branch2[4], nn.ReLU())


def _wide_window(unit: nn.Module) -> None:
    unit.branch2[3] = nn.Conv2d(17, 17, 5, 1, 2, groups=17, bias=False)


def _dilated(unit: nn.Module) -> None:
    unit.branch2[3].dilation = unit.branch2[3].padding = (2, 2)


def _moving_statistics(unit: nn.Module) -> None:
    unit.branch2[1].train()


def _read_inside(unit: nn.Module) -> None:
    unit.forward = lambda x: (
        snv2.models.InvertedResidual.forward(unit, x) + unit.branch2[:3](x.chunk(2, 1)[1]).mean()
    )


def _written_between(unit: nn.Module) -> None:
    def forward(x: Tensor) -> Tensor:
        x = x * 1
        a, b = x.chunk(2, 1)
        b = unit.branch2(b)
        x.mul_(2)
        return torch.cat([a, b], 1)

    unit.forward = forward


@pytest.mark.parametrize("change", [_silu, _relu_after_depthwise, _wide_window, _dilated])
def test_unit_that_differs(change: Callable[[nn.Module], None]) -> None:
    model = plain_stage([1, 1, 1], 34, 34)
    change(model[1])
    x = draw(2, 34, 9, 11)
    fast, counter = compiled(model)
    with torch.no_grad():
        agree(fast(x), model(x))
    assert calls(counter) == ["fused"]


@pytest.mark.parametrize(
    ("gate", "dynamic"), [("linear", False), ("window", True)], ids=["linear", "window-dynamic"]
)
def test_unit_with_a_gate(gate: str, dynamic: bool) -> None:
    unit = General(
        16, 16, gate=gate, act="hardswish-by-hand", norm="frozen", shortcut="augmented",
        after="leaky",
    )  # fmt: skip
    model, x = randomize_(unit).eval(), draw(2, 16, 9, 7)
    counter = CompileCounterWithBackend("eager")
    options = {"inner": counter}
    fast = torch.compile(model, backend="snv2", fullgraph=True, dynamic=dynamic, options=options)
    agree(fast(x), model(x))
    assert "fused" in calls(counter)
    assert not {"conv2d", "mul", "relu6", "iadd", "leaky_relu"} & set(calls(counter))


@pytest.mark.parametrize("change", [_moving_statistics, _written_between])
def test_what_is_no_unit_is_left(change: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    model = plain_stage([1, 1, 1], 34, 34)
    change(model[1])
    x = draw(2, 34, 9, 11)
    fast, counter = compiled(model)
    with torch.no_grad():
        agree(fast(x), model(x))
    names = calls(counter)
    assert names.count("fused") == 2
    assert names.count("conv2d") == 3


def test_result_inside_a_unit_that_is_read_elsewhere() -> None:
    model = plain_stage([1, 1], 34, 34)
    _read_inside(model[0])
    x = draw(2, 34, 9, 11)
    fast, _ = compiled(model)
    agree(fast(x), model(x))


def test_float64_is_left() -> None:
    model = plain_stage([2, 1], 34, 21).double()
    fast, counter = compiled(model)
    x = draw(2, 21, 9, 11).double()
    assert torch.equal(fast(x), model(x))
    assert "fused" not in calls(counter)


# Changes, gradients, autocast -----------------------------------------------------------------


@pytest.mark.parametrize(
    "edit", ["sgd", "adam-fused", "in-place", "new-data", "loaded", "loaded-by-assignment",
             "statistics", "eps", "half", "train-step"],
)  # fmt: skip
def test_edit_after_compiling_shows(edit: str) -> None:
    model, x = plain_and_input("unit-s2")
    fast, counter = compiled(model)
    with torch.no_grad():
        before = fast(x)
    EDITS[edit](model)
    with torch.no_grad():
        x = x.to(convs(model)[0].weight.dtype)
        assert max_error(model(x), before) > 1e-5
        assert_accurate("network", fast(x), model(x), float64_reference(model)(x))
    assert calls(counter) == ["fused"]


def test_train_mode_is_left() -> None:
    model, x = plain_and_input("stage")
    expected = gradients(model.train(), x)
    means = [bn.running_mean.clone() for bn in norms(model)]
    fast, counter = compiled(model)
    actual = gradients(fast, x)
    assert all(max_error(a, e) < FP32_BOUND for a, e in zip(actual, expected, strict=True))
    assert "fused" not in calls(counter)
    assert not any(map(torch.equal, means, (bn.running_mean for bn in norms(model))))


def test_gradients_in_eval_mode() -> None:
    model, x = plain_and_input("stage")
    expected = gradients(model, x)
    fast, counter = compiled(model, inner="aot_eager")
    assert all(
        max_error(a, e) < FP32_BOUND for a, e in zip(gradients(fast, x), expected, strict=True)
    )
    assert counter.frame_count == 0


@pytest.mark.parametrize("kind", ["unit-s1", "unit-s2"])
def test_autocast(kind: str) -> None:
    model, x = plain_and_input(kind)
    fast, counter = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        eager, out = model(x), fast(x)
    exact = float64_reference(model)(x)
    assert out.dtype == eager.dtype
    eps = torch.finfo(torch.bfloat16).eps
    assert max_error(out, exact) <= 1.5 * max_error(eager, exact) + eps
    assert calls(counter) == ["fused"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_follows_the_input(memory_format: torch.memory_format) -> None:
    model, x = plain_and_input("stage")
    fast, _ = compiled(model)
    out = fast(x.contiguous(memory_format=memory_format))
    assert out.is_contiguous(memory_format=memory_format)


# Options --------------------------------------------------------------------------------------


def test_backend_of_the_kernels(gpu_backend: str) -> None:
    model, x = plain_and_input("unit-s1")
    fast, counter = compiled(model, backend=gpu_backend)
    agree(fast(x), model(x))
    (node,) = (n for n in counter.graphs[-1].graph.nodes if n.op == "call_function")
    assert node.args[3] == gpu_backend


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outer": 1}, "options: expected 'inner' or 'backend', got 'outer'"),
        ({"backend": "tpu"}, "backend: expected one of"),
        ({"inner": "nothing"}, "nothing"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    model, x = plain_and_input("unit-s1")
    with pytest.raises(Exception, match=message):
        torch.compile(model, backend="snv2", options=options)(x)


@pytest.mark.parametrize(
    ("channels", "text"),
    [
        ([0, 2, 1, 3], "0:2|2:4"),
        (list(range(58, 116)), "58:116"),
        (list(range(1, 10, 2)), "1:10:2"),
        ([], "0:0"),
        ([7], "7:8"),
        ([3, 1, 2, 9, 4], "3,1,2,9,4"),
    ],
)
def test_text_of_channels(channels: list[int], text: str) -> None:
    assert write_channels(channels) == text
    assert read_channels(text) == channels
