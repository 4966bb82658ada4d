"""torch.compile of fused modules: the kernels stay in the graph, and see every change."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from _cases import (
    FP32_BOUND,
    assert_accurate,
    convs,
    draw,
    drop_in,
    each_drop_in,
    in_turn,
    norms,
    ops_called,
    plain_and_input,
    small_network,
)
from test_gradients import gradients
from test_repack import EDITS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import snv2_kernels as snv2
from snv2_kernels.graph import op
from snv2_kernels.nn import fused
from snv2_kernels.nn.watch import beside
from snv2_kernels.testing import float64_reference, max_error

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(
    module: nn.Module, backend: str = "eager", **options: Any
) -> tuple[Any, CompileCounterWithBackend]:
    """Without graph breaks; the counter has the graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, backend=counter, fullgraph=True, **options), counter


def calls(counter: CompileCounterWithBackend) -> list[str]:
    """What the last graph calls."""
    return [
        str(node.target) for node in counter.graphs[-1].graph.nodes if node.op.startswith("call")
    ]


def agree(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert max_error(actual.detach(), expected.detach()) < FP32_BOUND


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one each time the operator packs weights."""
    made: list[str] = []
    pack = op.RecipeModule._pack

    def count(self: Any, backend: str, *args: Any) -> Any:
        made.append(backend)
        return pack(self, backend, *args)

    monkeypatch.setattr(op.RecipeModule, "_pack", count)
    return made


# The graph ------------------------------------------------------------------------------------


@each_drop_in
def test_graph_holds_the_fused_op(kind: str) -> None:
    plain, module, x = drop_in(kind)
    fast, counter = compiled(module)
    with torch.no_grad():
        out, eager = fast(x), plain(x)
    assert_accurate("network", out, eager, float64_reference(plain)(x))
    names = calls(counter)
    assert sum(name.startswith("snv2.") for name in names) == 1
    assert not any("conv" in name for name in names)
    agree(fast(x), eager)  # gradients enabled


def test_dynamo_that_always_says_that_it_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11's does while it traces for torch.compile."""

    def whenever_tracing() -> bool:
        return torch.compiler.is_dynamo_compiling()

    monkeypatch.setattr(torch.compiler, "is_exporting", whenever_tracing)
    plain, module, x = drop_in("unit-s2")
    fast, counter = compiled(module)
    with torch.no_grad():
        agree(fast(x), plain(x))
    assert calls(counter) == ["snv2.fused"]


def test_inductor_and_shapes_that_change() -> None:
    plain, module, x = drop_in("unit-s2")
    fast, counter = compiled(module, "inductor", dynamic=True)
    with torch.no_grad():
        agree(fast(x), plain(x))
        first = counter.frame_count
        for shape in ((3, 21, 9, 11), (7, 21, 9, 11), (2, 21, 16, 12)):
            agree(fast(draw(*shape)), plain(draw(*shape)))
        assert counter.frame_count == first
        x = x.contiguous(memory_format=torch.channels_last)
        assert_same_layout(fast(x), module(x))
    assert calls(counter) == ["snv2.fused"]


def assert_same_layout(actual: Tensor, expected: Tensor) -> None:
    agree(actual, expected)
    assert actual.stride() == expected.stride()


def test_marked_batch() -> None:
    plain, module, x = drop_in("stage")
    fast, counter = compiled(module)
    for n in (2, 5, 16):
        more = draw(n, *x.shape[1:])
        torch._dynamo.mark_dynamic(more, 0)
        agree(fast(more), plain(more))
    assert counter.frame_count == 1


class Detector(nn.Module):
    """Fused parts between others, with a map that two of them read."""

    def __init__(self) -> None:
        super().__init__()
        trunk = small_network()
        self.stem = nn.Sequential(trunk.conv1, trunk.maxpool)
        self.stage2, self.stage3 = trunk.stage2, trunk.stage3
        self.lateral = nn.Conv2d(36, 20, 1)
        self.box = nn.Conv2d(20, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.stage2(self.stem(x))
        coarse = self.stage3(fine)
        up = nn.functional.interpolate(self.lateral(coarse), fine.shape[2:])
        return {"boxes": self.box(up + fine), "coarse": coarse}


def test_fused_parts_of_a_model() -> None:
    plain, x = Detector().eval(), draw(2, 3, 40, 48)
    fast, counter = compiled(snv2.fuse(plain), "aot_eager")
    with torch.no_grad():
        expected, out = plain(x), fast(x)
    assert list(out) == list(expected)
    for name, t in expected.items():
        agree(out[name], t)
    assert calls(counter).count("snv2.fused") == 2
    assert sum("conv" in name for name in calls(counter)) == 3


def test_units_that_are_alike_share_a_graph(packed: list[str]) -> None:
    """Compiling the parts of a model one by one is not to compile each anew."""
    pairs = [drop_in("unit-s1")[:2] for _ in range(10)]
    x = drop_in("unit-s1")[2]
    for i, pair in enumerate(pairs):
        for m in pair:
            with torch.no_grad():
                convs(m)[0].weight.mul_(i)
    counter = CompileCounterWithBackend("eager")
    with torch.no_grad():
        for plain, module in pairs:
            module.compile(backend=counter, fullgraph=True)
            agree(module(x), plain(x))
    assert counter.frame_count == 1
    assert len(packed) == len(pairs)


# Changes --------------------------------------------------------------------------------------


# torch.compile itself refers to tensors weakly, which torch.utils.swap_tensors refuses.
@pytest.mark.parametrize(
    ("edit", "kind"),
    in_turn([edit for edit in EDITS if edit != "swapped-tensors"], ["unit-s2", "split"]),
)
def test_edit_after_compiling_shows(kind: str, edit: str) -> None:
    plain, module, x = drop_in(kind)
    fast, counter = compiled(module)
    with torch.no_grad():
        before = fast(x)
        names = calls(counter)
    for m in (plain, module):
        EDITS[edit](m)
    x = x.to(next(plain.parameters()).dtype)
    with torch.no_grad():
        change = max_error(plain(x), before)
        assert max_error(fast(x), before) > 0.1 * change > 1e-5
        assert_accurate("network", fast(x), plain(x), float64_reference(plain)(x))
    assert names[-1].startswith("snv2.")
    assert calls(counter)[-1] == names[-1]


def test_weights_are_packed_once_and_freed(packed: list[str]) -> None:
    gc.collect()  # what other tests have left
    _, module, x = drop_in("stage")
    fast, _ = compiled(module, "aot_eager")
    before = len(beside)
    for _ in range(3):
        fast(x)  # with gradients
        with torch.no_grad():
            fast(x)
            fast(x.contiguous(memory_format=torch.channels_last))
    assert packed == ["cpu"]
    assert len(beside) == before + 1
    EDITS["in-place"](module)
    fast(x)
    assert packed == ["cpu"] * 2
    assert len(beside) == before + 1
    del module, fast
    torch.compiler.reset()
    gc.collect()
    assert len(beside) == before


def test_copies_have_weights_of_their_own() -> None:
    plain, module, x = drop_in("stage")
    fast, _ = compiled(module)
    with torch.no_grad():
        fast(x)
        for copied in (copy.deepcopy(fast), torch.compile(copy.deepcopy(module), backend="eager")):
            alike = copy.deepcopy(plain)
            EDITS["in-place"](copied)
            EDITS["in-place"](alike)
            agree(copied(x), alike(x))
        agree(fast(x), plain(x))


def test_parameter_that_changes_inside_the_graph() -> None:
    plain, module, x = drop_in("unit-s1")

    def step(m: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        first = m(x)
        m.branch2[5].weight.mul_(2)
        second = m(x)
        m.branch2[5].weight.add_(1)
        return first, second, m(x)

    for backend in ("eager", "inductor"):
        fast = torch.compile(step, backend=backend, fullgraph=True)
        with torch.no_grad():
            for _ in range(2):
                for actual, expected in zip(fast(module), step(plain), strict=True):
                    agree(actual, expected)
            agree(module(x), plain(x))


def test_training_loop_around_compiled_evaluation(packed: list[str]) -> None:
    plain, module, x = drop_in("network")
    fast, counter = compiled(module)
    for m in (plain, fast):
        optimizer = torch.optim.SGD(m.parameters(), 0.01)
        for _ in range(2):
            m.train()
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
            m.eval()
            m(x)
    agree(fast(x), plain(x))
    assert packed == ["cpu"] * 2
    # One graph for each mode: plain with statistics that move, and fused.
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "change", ["training", "hook", "gelu", "recognised", "float64", "reference"]
)
def test_what_the_kernels_do_not_cover_compiles_plain(change: str) -> None:
    plain, module, x = drop_in("stage")
    fast, counter = compiled(module)
    with torch.no_grad():
        fast(x)
        assert calls(counter) == ["snv2.fused"]
        for m in (plain, module):
            unit = m[1]
            if change == "training":
                norms(unit)[0].train()
            elif change == "hook":
                unit.register_forward_hook(lambda m, args, out: out * 3)
                torch.compiler.reset()  # torch.compile takes hooks for constant
            elif change in ("gelu", "recognised"):
                unit.branch2[2] = nn.GELU() if change == "gelu" else nn.SiLU()
            elif change == "float64":
                m.double()
            else:
                m._backend = unit._backend = "reference"
        if change == "float64":
            x = x.double()
        assert max_error(fast(x), plain(x)) < FP32_BOUND
    # The other units of a stage stay fused, and so does one that has a hook around it.
    expected = {"float64": (0, 11), "hook": (3, 0), "recognised": (1, 0)}.get(change, (2, 3))
    names = calls(counter)
    assert (names.count("snv2.fused"), sum("conv" in name for name in names)) == expected


def test_bad_input_raises_as_plain_pytorch_does() -> None:
    _, module, _ = drop_in("unit-s1")
    fast, _ = compiled(module)
    for x in (draw(2, 20, 9, 11), draw(34, 9, 11), draw(2, 34, 9, 11).double()):
        with pytest.raises(RuntimeError):
            fast(x)


# Backends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unit-s1", "network"])
@pytest.mark.on_triton(1)
def test_backend_is_chosen_where_the_graph_runs(kernels: str, kind: str, packed: list[str]) -> None:
    plain, module, x = drop_in(kind)
    fast, counter = compiled(module)
    with torch.no_grad():
        with snv2.use_backend("reference"):
            agree(fast(x), plain(x))
        assert packed == []
        agree(fast(x), plain(x))
    assert packed == [kernels]
    assert calls(counter) == ["snv2.fused"]


def test_state_in_inference_tensors() -> None:
    plain, x = plain_and_input("unit-s1")
    with torch.inference_mode():
        plain = copy.deepcopy(plain)
        fast, _ = compiled(snv2.fuse(plain))
        agree(fast(x), plain(x))
        convs(plain)[0].weight.mul_(2)
        agree(fast(x), plain(x))


# Gradients and autocast -----------------------------------------------------------------------


@each_drop_in
def test_gradients_are_the_plain_modules_to_the_bit(kind: str) -> None:
    plain, module, x = drop_in(kind)
    expected = gradients(plain, x)
    fast, counter = compiled(module, "aot_eager")
    actual = gradients(fast, x)
    assert all(map(torch.equal, actual, expected))
    assert (calls(counter)[-1] == "snv2.fused") == (kind != "split")


def test_gradients_under_inductor() -> None:
    plain, _ = plain_and_input("stage")
    model = nn.Sequential(nn.Conv2d(3, 21, 3), plain, nn.Flatten(), nn.Linear(34 * 36, 4)).eval()
    list(model.parameters())[5].requires_grad_(False)
    fast, _ = compiled(snv2.fuse(model), "inductor")
    grads = []
    for m in (model, fast):
        m.zero_grad()
        m(draw(2, 3, 13, 13)).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for actual, expected in zip(*grads, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert max_error(actual, expected) < FP32_BOUND


@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("kind", ["unit-s1", "unit-s2", "split"])
def test_autocast(kind: str, where: str) -> None:
    plain, module, x = drop_in(kind)

    def low(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x)

    with torch.no_grad():
        eager, exact = low(plain, x), float64_reference(plain)(x)
        if where == "around":
            fast, counter = compiled(module, "aot_eager")
            out = low(fast, x)
        else:
            counter = CompileCounterWithBackend("aot_eager")
            out = torch.compile(lambda x: low(module, x), backend=counter, fullgraph=True)(x)
    assert out.dtype == eager.dtype
    eps = torch.finfo(torch.bfloat16).eps
    assert max_error(out, exact) <= 1.5 * max_error(eager, exact) + eps
    assert any(name.startswith("snv2.") for name in calls(counter))


def test_autocast_gradients() -> None:
    """Their formula runs under the autocast that the forward had."""
    plain, module, x = drop_in("unit-s2")
    fast, _ = compiled(module, "aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        expected, out = plain(x), fast(x)
    weights = draw(*out.shape).to(out.dtype)
    expected = torch.autograd.grad(expected, list(plain.parameters()), weights)
    actual = torch.autograd.grad(out, list(module.parameters()), weights)
    assert all(map(torch.equal, actual, expected))


def test_a_dynamo_that_does_not_read_fused_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.11's: the call stays out of the graph, and is fused."""
    monkeypatch.setattr(fused, "_beside_graph", torch.compiler.disable(fused._run_eager))
    model = nn.Sequential(
        nn.Conv2d(3, 24, 1), snv2.models.InvertedResidual(24, 48, 2), nn.ReLU()
    ).eval()
    x = draw(1, 3, 9, 9)
    torch.compiler.reset()
    compiled = torch.compile(snv2.fuse(model), backend="aot_eager")
    with torch.no_grad():
        assert max_error(compiled(x), model(x)) < 1e-5
        assert "snv2::network" in ops_called(compiled, x)
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="disable"):
        torch.compile(snv2.fuse(model), backend="aot_eager", fullgraph=True)(x)
