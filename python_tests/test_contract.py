"""The drop-in contract of fuse(): state, sharing, modes, threads."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from _cases import (
    FP32_BOUND,
    assert_agrees,
    draw,
    drop_in,
    each_drop_in,
    each_kind,
    ops_called,
    plain_and_input,
    runs_fused,
    same_state,
    small_network,
)
from _styles import Wrapped
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.testing import max_error, randomize_


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that could show that a model was touched."""
    return [
        (
            name,
            type(module),
            sorted(module.__dict__),
            module.training,
            [id(t) for t in (*module._parameters.values(), *module._buffers.values())],
            [id(child) for child in module._modules.values()],
            [len(v) for k, v in sorted(module.__dict__.items()) if k.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    ]


# State ----------------------------------------------------------------------------------------


@each_kind
def test_state_dict_is_the_models(kind: str) -> None:
    model, x = plain_and_input(kind)
    fused = snv2.fuse(model)
    assert same_state(fused, model)
    fused(x)
    assert same_state(fused, model)
    assert list(fused.state_dict()._metadata) == list(model.state_dict()._metadata)


@each_kind
def test_fuse_leaves_the_model_as_it_was(kind: str) -> None:
    model, x = plain_and_input(kind)
    model.register_forward_hook(lambda *args: None)
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    expected = model(x)
    fused = snv2.fuse(model)
    fused(x)
    fused.train()
    fused.eval()
    fused.register_forward_hook(lambda *args: None)
    next(fused.children()).register_forward_pre_hook(lambda *args: None)
    fused.extra = nn.Linear(2, 2)
    fused.half()
    assert snapshot(model) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(x), expected)


@each_kind
def test_parameters_and_buffers_are_shared(kind: str) -> None:
    model, _ = plain_and_input(kind)
    fused = snv2.fuse(model)
    pairs = zip(
        (*model.parameters(), *model.buffers()),
        (*fused.parameters(), *fused.buffers()),
        strict=True,
    )
    assert all(a is b for a, b in pairs)


@each_kind
def test_training_one_trains_the_other(kind: str) -> None:
    model, x = plain_and_input(kind)
    fused = snv2.fuse(model)
    before = fused(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(x).square().mean().backward()
    optimizer.step()
    model.eval()
    assert max_error(fused(x).detach(), before.detach()) > 1e-3
    assert_agrees(kind, fused, model, x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_mode_is_the_models(training: bool) -> None:
    fused = snv2.fuse(small_network().train(training))
    assert {m.training for m in fused.modules()} == {training}


# Modes ----------------------------------------------------------------------------------------


@each_drop_in
def test_eval_runs_one_op(kind: str) -> None:
    plain, module, x = drop_in(kind)
    module(x)  # packs
    with torch.no_grad():
        names = ops_called(module, x)
    op = "snv2::split_dw_cat_shuffle" if kind == "split" else "snv2::network"
    assert names == [op]
    assert_agrees(kind, module, plain, x)


@each_drop_in
def test_weights_are_packed_once(kind: str) -> None:
    _, module, x = drop_in(kind)
    assert module._packed_state is None
    module(x)
    first = module.packed()
    module(x)
    assert module.packed() is first


@each_drop_in
def test_training_step_is_the_plain_modules_to_the_bit(kind: str) -> None:
    plain, module, x = drop_in(kind)
    module(x)  # packed weights must not matter
    losses = []
    for m in (plain, module):
        m.train()
        optimizer = torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss = m(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert not runs_fused(m, x)
    assert [float(v) for v in losses[:3]] == [float(v) for v in losses[3:]]
    assert losses[0] != losses[2]
    for p, q in zip(plain.parameters(), module.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)
    assert same_state(plain, module)
    assert_agrees(kind, module.eval(), plain.eval(), x)


def test_batch_norm_statistics_update_in_both() -> None:
    model, x = plain_and_input("network")
    fused = snv2.fuse(model)
    before = copy.deepcopy(model.state_dict())
    fused.train()(x)
    key = "stage3.1.branch2.4.running_mean"
    assert not torch.equal(model.state_dict()[key], before[key])
    assert int(model.state_dict()["conv1.1.num_batches_tracked"]) == 1
    assert same_state(model, fused)


@pytest.mark.parametrize("path", ["conv1.1", "stage2.0", "stage2.0.branch1.1", "stage3"])
def test_submodule_in_train_mode(path: str) -> None:
    """Fine-tuning with some batch norms in train mode, or the other way round."""
    plain, fused, x = drop_in("network")
    fused(x)
    before = copy.deepcopy(plain.state_dict())
    for model in (plain, fused):
        model.get_submodule(path).train()
    with torch.no_grad():
        assert max_error(fused(x), plain(x)) < FP32_BOUND
    assert "train()" in str(fused.reason())
    moved = plain.state_dict()
    assert any(not torch.equal(moved[key], before[key]) for key in moved)
    for key, value in fused.state_dict().items():
        assert max_error(value, moved[key]) < FP32_BOUND
    for model in (plain, fused):
        model.get_submodule(path).eval()
    assert_agrees("network", fused, plain, x)


def test_train_flag_that_nothing_reads() -> None:
    """A fresh layer is in train mode, whether or not it has one."""
    plain, fused, x = drop_in("network")
    fc = nn.Linear(plain.fc.in_features, 7)
    for model in (plain, fused):
        model.fc = fc
        model.stage2.training = model.stage3[0].training = model.conv1[0].training = True
    assert fused.reason() is None
    assert_agrees("network", fused, plain, x)


def test_train_flag_that_another_module_reads() -> None:
    class Doubled(Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return 2 * y if self.main[0].conv.training else y

    plain = randomize_(Doubled(28, 28, 1)).eval()
    fused, x = snv2.fuse(plain), draw(2, 28, 9, 7)
    assert_agrees("unit", fused, plain, x)
    for model in (plain, fused):
        model.main[0].conv.train()
    assert torch.equal(fused(x), plain(x))


def test_eval_of_submodules_in_a_model_in_train_mode() -> None:
    plain, fused, x = drop_in("network")
    for model in (plain, fused):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    assert torch.equal(fused(x), plain(x))


# Threads --------------------------------------------------------------------------------------


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(6, initializer=torch.set_num_threads, initargs=(1,))


@each_drop_in
def test_calls_from_several_threads(kind: str) -> None:
    _, module, x = drop_in(kind)
    inputs = [x + i for i in range(30)]
    with torch.no_grad():
        expected = [copy.deepcopy(module)(x) for x in inputs]

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            return module(x)

    with _pool() as pool:
        results = list(pool.map(call, inputs))  # the first ones pack at once
    assert all(map(torch.equal, results, expected))


def test_threads_with_models_of_their_own() -> None:
    """One edits its weights between calls; the others must not notice, and it must."""

    def work(seed: int) -> float:
        plain = small_network(seed)
        fused = snv2.fuse(plain)
        worst = 0.0
        for i in range(10):
            x = draw(1, 3, 33, 33, seed=i)
            with torch.no_grad():
                worst = max(worst, max_error(fused(x), plain(x)))
                if seed == 0:
                    plain.stage2[0].branch2[0].weight.mul_(1.1)
                    plain.fc.bias.add_(0.1)
        return worst

    with _pool() as pool:
        assert max(pool.map(work, range(6))) < FP32_BOUND


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@each_drop_in
def test_grad_modes(kind: str, context: Any) -> None:
    plain, module, x = drop_in(kind)
    with context():
        out = module(x)
        assert max_error(out.detach(), plain(x).detach()) < FP32_BOUND
    assert out.requires_grad == (context is torch.enable_grad)
    assert out.is_inference() == (context is torch.inference_mode)
    assert_agrees(kind, module, plain, x)  # weights packed in there do outside
