"""Tracing and function transforms see plain PyTorch, and are right."""

from __future__ import annotations

import io

import pytest
import torch
from _cases import FP32_BOUND, assert_agrees, draw, drop_in, each_drop_in
from torch import Tensor, nn
from torch.autograd import forward_ad

import snv2_kernels as snv2
from snv2_kernels.testing import max_error

# torch.jit is deprecated but in use, and warns of every Python number that it makes a constant.
pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def agree(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert max_error(actual.detach(), expected.detach()) < FP32_BOUND


def test_compile_of_an_op() -> None:
    a, b = draw(2, 5, 7, 9), draw(2, 5, 7, 9, seed=1)
    compiled = torch.compile(snv2.ops.cat_shuffle, backend="eager", fullgraph=True)
    assert torch.equal(compiled(a, b), snv2.ops.cat_shuffle(a, b))


@each_drop_in
def test_jit_trace(kind: str) -> None:
    plain, module, x = drop_in(kind)
    module(x)
    traced = torch.jit.trace(module, (x,))
    agree(traced(x), plain(x))
    more = draw(3, *x.shape[1:], seed=5)
    agree(traced(more), plain(more))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    agree(torch.jit.load(file)(more), plain(more))
    assert_agrees(kind, module, plain, x)


@each_drop_in
def test_symbolic_trace(kind: str) -> None:
    plain, module, x = drop_in(kind)
    module(x)
    graph = torch.fx.symbolic_trace(module)
    agree(graph(x), plain(x))
    agree(graph(x[:1]), plain(x[:1]))
    assert any(node.op == "call_module" for node in graph.graph.nodes)
    assert_agrees(kind, module, plain, x)


@each_drop_in
def test_functional_call(kind: str) -> None:
    plain, module, x = drop_in(kind)
    module(x)
    state = {k: v * 1.5 for k, v in module.state_dict().items()}
    with torch.no_grad():
        agree(
            torch.func.functional_call(module, state, (x,)),
            torch.func.functional_call(plain, state, (x,)),
        )
    assert_agrees(kind, module, plain, x)


@each_drop_in
def test_func_grad(kind: str) -> None:
    plain, module, x = drop_in(kind)
    grads = [torch.func.grad(lambda x, m=m: m(x).square().mean())(x) for m in (plain, module)]
    assert torch.equal(*grads)


@each_drop_in
def test_vmap(kind: str) -> None:
    plain, module, x = drop_in(kind)
    stacked = torch.stack([x, x + 1])
    with torch.no_grad():
        agree(torch.func.vmap(module)(stacked), torch.stack([plain(x), plain(x + 1)]))


@each_drop_in
def test_per_sample_gradients(kind: str) -> None:
    plain, module, x = drop_in(kind)
    grads = []
    for m in (plain, module):
        parameters = {k: p.detach() for k, p in m.named_parameters()}

        def loss(p: dict[str, Tensor], sample: Tensor, m: nn.Module = m) -> Tensor:
            return torch.func.functional_call(m, p, (sample[None],)).square().mean()

        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        grads.append(list(per_sample.values()))
    for g, e in zip(*grads, strict=True):
        assert g.shape[0] == x.shape[0]
        agree(g, e)


@each_drop_in
def test_forward_mode(kind: str) -> None:
    plain, module, x = drop_in(kind)
    tangents = []
    for m in (plain, module):
        with forward_ad.dual_level():
            out = m(forward_ad.make_dual(x, torch.ones_like(x)))
            tangents.append(forward_ad.unpack_dual(out).tangent)
        tangents.append(torch.func.jvp(m, (x,), (torch.ones_like(x),))[1])
    for tangent in tangents[1:]:
        agree(tangent, tangents[0])


@each_drop_in
def test_tensor_subclass(kind: str) -> None:
    class Marked(Tensor):
        pass

    plain, module, x = drop_in(kind)
    out = module(x.as_subclass(Marked))
    assert type(out) is type(plain(x.as_subclass(Marked)))
    agree(out.as_subclass(Tensor), plain(x))


@each_drop_in
def test_parameter_as_input(kind: str) -> None:
    plain, module, x = drop_in(kind)
    image = nn.Parameter(x)
    module(image).square().mean().backward()
    expected = x.clone().requires_grad_()
    plain(expected).square().mean().backward()
    agree(image.grad, expected.grad)


@each_drop_in
def test_meta_device(kind: str) -> None:
    """Shapes can be asked for without memory."""
    plain, module, x = drop_in(kind)
    out = module.to("meta")(x.to("meta"))
    assert out.is_meta
    assert out.shape == plain(x).shape
    assert snv2.explain(module).parts


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    plain, module, x = drop_in("network")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        out = module(mode.from_tensor(x))
    assert out.shape == plain(x).shape
    assert_agrees("network", module, plain, x)
