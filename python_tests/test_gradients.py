"""Gradients of the fused path, and autocast, equal the plain modules'."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _cases import (
    FP32_BOUND,
    HALF_DTYPES,
    assert_accurate,
    assert_agrees,
    drop_in,
    each_drop_in,
    each_kind,
    norms,
    plain_and_input,
    run_fused,
    unit_pair,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import snv2_kernels as snv2
from snv2_kernels.testing import float64_reference, max_error


def weights_like(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(out.shape, generator=generator, device="cpu").to(out)


def gradients(module: nn.Module, x: Tensor, **kwargs: Any) -> list[Tensor]:
    """Of one weighted sum of the outputs, by the input and all parameters."""
    x = x.detach().clone().requires_grad_()
    out = module(x)
    inputs = [x, *module.parameters()]
    return list(torch.autograd.grad(out, inputs, weights_like(out), **kwargs))


@pytest.mark.supports("grad")
@each_drop_in
@pytest.mark.on_triton(2)
def test_gradients_in_eval_mode_are_the_plain_modules_to_the_bit(kernels: str, kind: str) -> None:
    """The backward pass runs the plain forward again, so nothing is lost."""
    plain, module, x = drop_in(kind)
    expected, actual = gradients(plain, x), gradients(module, x)
    assert all(map(torch.equal, actual, expected))
    assert all(g.abs().max() > 0 for g in actual)
    assert_agrees(kind, module, plain, x, kernels)


@each_drop_in
def test_gradients_accumulate(kind: str) -> None:
    plain, module, x = drop_in(kind)
    for m in (plain, module):
        for _ in range(2):
            out = m(x)
            out.backward(weights_like(out))
    for p, q in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@each_kind
def test_gradients_reach_the_shared_parameters(kind: str) -> None:
    plain, x = plain_and_input(kind)
    snv2.fuse(plain)(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in plain.parameters())


@each_drop_in
def test_only_the_input_needs_a_gradient(kind: str) -> None:
    plain, module, x = drop_in(kind)
    grads = []
    for m in (plain, module):
        m.requires_grad_(False)
        inp = x.clone().requires_grad_()
        out = m(inp)
        assert out.requires_grad
        grads += torch.autograd.grad(out, inp, weights_like(out))
        assert not m(x).requires_grad
    assert torch.equal(*grads)


@each_drop_in
def test_only_some_parameters_need_a_gradient(kind: str) -> None:
    plain, module, x = drop_in(kind)
    for m in (plain, module):
        parameters = list(m.parameters())
        for p in parameters[:-1]:
            p.requires_grad_(False)
        out = m(x)
        out.backward(weights_like(out))
        assert all(p.grad is None for p in parameters[:-1])
    last, expected = (list(m.parameters())[-1].grad for m in (module, plain))
    assert torch.equal(last, expected)


@each_drop_in
def test_second_derivatives(kind: str) -> None:
    plain, module, x = drop_in(kind)
    results = []
    for m in (plain, module):
        inp = x.clone().requires_grad_()
        wanted = [inp, *m.parameters()]
        first = torch.autograd.grad(m(inp).square().mean(), wanted, create_graph=True)
        total = sum(g.square().sum() for g in first)
        results.append(torch.autograd.grad(total, wanted, allow_unused=True))
    for actual, expected in zip(results[1], results[0], strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            assert max_error(actual, expected) < 1e-4


@each_drop_in
def test_backward_twice(kind: str) -> None:
    _, module, x = drop_in(kind)
    out = module(x)
    parameters = list(module.parameters())
    first = torch.autograd.grad(out, parameters, weights_like(out), retain_graph=True)
    second = torch.autograd.grad(out, parameters, weights_like(out))
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, parameters, weights_like(out))


@pytest.mark.parametrize("meanwhile", ["train", "eval", "half-of-another", "hook", "repack"])
@each_drop_in
def test_what_happens_between_forward_and_backward(kind: str, meanwhile: str) -> None:
    plain, module, x = drop_in(kind)
    expected = gradients(plain, x)
    inp = x.clone().requires_grad_()
    out = module(inp)
    if meanwhile == "train":
        module.train()
    elif meanwhile == "eval":
        module.eval()
    elif meanwhile == "half-of-another":
        copy.deepcopy(module).half()
    elif meanwhile == "hook":
        next(module.children()).register_forward_hook(lambda m, args, out: out * 2)
    else:
        module._packed_state = None
        module(x)
    actual = torch.autograd.grad(out, [inp, *module.parameters()], weights_like(out))
    assert all(map(torch.equal, actual, expected))
    assert module.training == (meanwhile == "train")


@each_drop_in
def test_weights_changed_before_backward_raise_as_in_plain_pytorch(kind: str) -> None:
    for module in drop_in(kind)[:2]:
        x = drop_in(kind)[2]
        out = module(x)
        with torch.no_grad():
            next(module.parameters()).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@each_drop_in
def test_gradients_with_a_hook_on_the_root(kind: str) -> None:
    """A hook counts once, in the forward pass."""
    plain, module, x = drop_in(kind)
    calls: list[nn.Module] = []

    def hook(m: nn.Module, args: Any, out: Tensor) -> Tensor:
        calls.append(m)
        return out * 3

    def pre_hook(m: nn.Module, args: Any) -> Any:
        return (args[0] * 2,)

    for m in (plain, module):
        m.register_forward_hook(hook)
        m.register_forward_pre_hook(pre_hook)
    expected, actual = gradients(plain, x), gradients(module, x)
    assert all(map(torch.equal, actual, expected))
    assert calls == [plain, module]


@each_drop_in
def test_backward_hook_on_the_root(kind: str) -> None:
    plain, module, x = drop_in(kind)
    seen: list[Tensor] = []
    for m in (plain, module):
        m.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(grad_out[0]))
    expected, actual = gradients(plain, x), gradients(module, x)
    assert len(seen) == 2
    assert torch.equal(*seen)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("reentrant", [True, False])
@each_drop_in
def test_checkpoint(kind: str, reentrant: bool) -> None:
    plain, module, x = drop_in(kind)
    grads = []
    for m in (plain, module):
        inp = x.clone().requires_grad_()
        out = checkpoint(m, inp, use_reentrant=reentrant)
        out.backward(weights_like(out))
        grads.append([inp.grad, *(p.grad for p in m.parameters())])
    assert all(map(torch.equal, *grads))


@each_drop_in
def test_gradients_of_tensors_in_the_place_of_parameters(kind: str) -> None:
    """Meta-learning runs a module on weights that are results themselves."""
    plain, module, x = drop_in(kind)
    module(x)
    grads = []
    for m in (plain, module):
        leaves = {k: p.detach().clone().requires_grad_() for k, p in m.named_parameters()}
        out = torch.func.functional_call(m, {k: p * 1.5 for k, p in leaves.items()}, (x,))
        assert out.requires_grad
        grads.append(torch.autograd.grad(out, list(leaves.values()), weights_like(out)))
    assert all(map(torch.equal, *grads))
    assert_agrees(kind, module, plain, x)


@pytest.mark.parametrize("tied", ["weight", "bias"])
def test_gradients_of_tied_parameters_count_each_use_once(tied: str) -> None:
    plain, module, x = drop_in("unit-s1")
    for m in (plain, module):
        first, last = norms(m)[::2]
        setattr(last, tied, getattr(first, tied))
    expected, actual = gradients(plain, x), gradients(module, x)
    assert all(map(torch.equal, actual, expected))
    assert_agrees("unit", module, plain, x)


def test_gradients_of_a_parameter_that_two_parts_share() -> None:
    """The second part's share of it ends at that part's input."""
    plain = nn.Sequential(unit_pair(1, 34, 34)[0], nn.ReLU(), unit_pair(1, 34, 34)[0])
    norms(plain)[3].weight = norms(plain)[0].weight
    x = plain_and_input("unit-s1")[1]
    expected, actual = gradients(plain, x), gradients(snv2.fuse(plain), x)
    for g, e in zip(actual, expected, strict=True):
        assert max_error(g, e) < FP32_BOUND


def test_gradient_through_a_model_around_fused_parts() -> None:
    plain, x = plain_and_input("stage")
    model = nn.Sequential(nn.Conv2d(3, 21, 3), plain, nn.Flatten(), nn.Linear(34 * 36, 4)).eval()
    fused = snv2.fuse(model)
    x = torch.ones(2, 3, 13, 13)
    expected, actual = gradients(model, x), gradients(fused, x)
    for g, e in zip(actual, expected, strict=True):
        assert max_error(g, e) < FP32_BOUND


# Autocast -------------------------------------------------------------------------------------


@pytest.mark.supports("autocast")
@pytest.mark.parametrize("low_input", [False, True], ids=["fp32-input", "low-input"])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@each_drop_in
@pytest.mark.on_triton(2)
def test_autocast(kernels: str, kind: str, dtype: torch.dtype, low_input: bool) -> None:
    plain, module, x = drop_in(kind)
    x = x.to(dtype) if low_input else x
    exact = float64_reference(plain)(x)
    with torch.no_grad(), torch.autocast(x.device.type, dtype):
        eager, out = plain(x), run_fused(module, x)
    assert out.dtype == eager.dtype
    low = torch.finfo(dtype).eps
    assert max_error(out, exact) <= 1.5 * max_error(eager, exact) + low
    assert_agrees(kind, module, plain, x.float(), kernels)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@each_drop_in
@pytest.mark.on_triton(2)
def test_autocast_of_a_low_precision_module(kernels: str, kind: str, dtype: torch.dtype) -> None:
    plain, module, x = drop_in(kind)
    plain, module, x = plain.to(dtype), module.to(dtype), x.to(dtype)
    exact = float64_reference(plain)(x)
    with torch.no_grad(), torch.autocast(x.device.type, dtype):
        eager, out = plain(x), run_fused(module, x)
    assert_accurate("network", out, eager, exact, kernels)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@each_drop_in
@pytest.mark.on_triton(1)
def test_autocast_gradients(kernels: str, kind: str, dtype: torch.dtype) -> None:
    """The backward pass is the plain one under the same autocast, wherever it is called."""
    plain, module, x = drop_in(kind)
    with torch.autocast(x.device.type, dtype):
        expected = gradients(plain, x)
        actual = gradients(module, x)
        out = module(x)
    late = torch.autograd.grad(out, list(module.parameters()), weights_like(out))
    for got in (actual[1:], late):
        assert all(map(torch.equal, got, expected[1:]))
    assert torch.equal(actual[0], expected[0])


@each_drop_in
def test_autocast_that_is_off(kind: str) -> None:
    _, module, x = drop_in(kind)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            inner = module(x)
        assert torch.equal(inner, module(x))
