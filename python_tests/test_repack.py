"""Whatever changes a parameter, buffer or submodule, the next eval() forward runs with it."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from _cases import (
    FP32_BOUND,
    assert_agrees,
    convs,
    draw,
    drop_in,
    each_drop_in,
    norms,
    plain_and_input,
)
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels._native import Stamps
from snv2_kernels.nn.watch import Watch
from snv2_kernels.testing import max_error, randomize_


def drawn_like(t: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + t.numel())
    return torch.empty(t.shape).uniform_(0.2, 1.0, generator=generator).to(t.dtype)


def set_grads(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = drawn_like(p) - 0.5


def other_state(model: nn.Module) -> dict[str, Tensor]:
    return randomize_(copy.deepcopy(model), seed=11).state_dict()


# Edits: each takes a module and changes it, the same for the same state -------------------------


def optimizer_step(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[..., None]:
    def edit(model: nn.Module) -> None:
        set_grads(model)
        make(list(model.parameters())).step()

    return edit


def train_step(model: nn.Module) -> None:
    was_training = model.training
    model.train()
    channels = convs(model)[0].in_channels
    channels *= 2 if getattr(model, "stride", None) == 1 or hasattr(model, "dw") else 1
    x = drawn_like(torch.empty(2, channels, 17, 17))
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.train(was_training)


@torch.no_grad()
def in_place(model: nn.Module) -> None:
    for p in model.parameters():
        p.mul_(drawn_like(p))


@torch.no_grad()
def last_parameter_only(model: nn.Module) -> None:
    list(model.parameters())[-1].add_(1)


@torch.no_grad()
def one_element(model: nn.Module) -> None:
    convs(model)[0].weight[0, 0, 0, 0] += 3


@torch.inference_mode()
def in_inference_mode(model: nn.Module) -> None:
    for p in model.parameters():
        p.mul_(drawn_like(p))


def new_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data * 2


def new_parameters(model: nn.Module) -> None:
    for m in (*convs(model), *norms(model)):
        m.weight = nn.Parameter(drawn_like(m.weight))


def parameters_to_plain_tensors(model: nn.Module) -> None:
    """As torch.func.functional_call does, and some pruning code."""
    for m in convs(model):
        value = m.weight.detach() * 2
        del m.weight
        m.register_buffer("weight", value)


def swapped_tensors(model: nn.Module) -> None:
    for m in convs(model):
        torch.utils.swap_tensors(m.weight, nn.Parameter(drawn_like(m.weight)))


def from_vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters((vector * 1.5).detach(), model.parameters())


@torch.no_grad()
def set_(model: nn.Module) -> None:
    for m in convs(model):
        m.weight.set_(drawn_like(m.weight))


def initialised(model: nn.Module) -> None:
    torch.manual_seed(4)
    for m in convs(model):
        nn.init.kaiming_normal_(m.weight)


def loaded(model: nn.Module) -> None:
    model.load_state_dict(other_state(model))


def loaded_by_assignment(model: nn.Module) -> None:
    model.load_state_dict(other_state(model), assign=True)


def statistics(model: nn.Module) -> None:
    for bn in norms(model):
        bn.running_mean.add_(drawn_like(bn.running_mean))
        bn.running_var.mul_(2)


@torch.no_grad()
def statistics_unseen(model: nn.Module) -> None:
    """As a norm without a counter does in train() mode: no version moves."""
    for bn in norms(model):
        assert bn.running_mean is not None
        versions = bn.running_mean._version
        x = drawn_like(torch.empty(2, bn.num_features, 5, 5))
        F.batch_norm(x, bn.running_mean, bn.running_var, training=True, momentum=0.7)
        assert bn.running_mean._version == versions


def reset_statistics(model: nn.Module) -> None:
    for bn in norms(model):
        bn.reset_running_stats()


def new_buffers(model: nn.Module) -> None:
    for bn in norms(model):
        bn.running_mean = drawn_like(bn.running_mean)


def eps(model: nn.Module) -> None:
    for bn in norms(model):
        bn.eps = 0.5


def half(model: nn.Module) -> None:
    model.half()


def bfloat16_and_back(model: nn.Module) -> None:
    model.bfloat16()
    model.float()


def through_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(drawn_like(p))
    model.eval()


def through_numpy(model: nn.Module) -> None:
    for p in model.parameters():
        p.detach().numpy()[...] *= 2
    model.eval()


def other_convolution(model: nn.Module) -> None:
    for parent in model.modules():
        for name, conv in parent.named_children():
            if isinstance(conv, nn.Conv2d):
                new = copy.deepcopy(conv)
                nn.init.constant_(new.weight, 0.1)
                setattr(parent, name, new)
                return


def with_biases(model: nn.Module) -> None:
    for conv in convs(model):
        conv.bias = nn.Parameter(drawn_like(conv.weight[:, 0, 0, 0]))


EDITS: dict[str, Callable[[nn.Module], None]] = {
    "sgd": optimizer_step(lambda ps: torch.optim.SGD(ps, 0.1)),
    "adam-foreach": optimizer_step(lambda ps: torch.optim.Adam(ps, 0.1, foreach=True)),
    "adam-fused": optimizer_step(lambda ps: torch.optim.Adam(ps, 0.1, fused=True)),
    **{
        f.__name__.replace("_", "-"): f
        for f in (
            train_step,
            in_place,
            last_parameter_only,
            one_element,
            in_inference_mode,
            new_data,
            new_parameters,
            parameters_to_plain_tensors,
            swapped_tensors,
            from_vector,
            set_,
            initialised,
            loaded,
            loaded_by_assignment,
            statistics,
            statistics_unseen,
            reset_statistics,
            new_buffers,
            eps,
            half,
            bfloat16_and_back,
            through_data,
            through_numpy,
            other_convolution,
            with_biases,
        )
    },
}


@pytest.mark.parametrize("edit", EDITS)
@each_drop_in
def test_edit_shows(kind: str, edit: str) -> None:
    plain, module, x = drop_in(kind)
    x = draw(8 * len(x), *x.shape[1:])  # so that no single pixel's rounding decides
    with torch.no_grad():
        before = module(x)
    for m in (plain, module):
        EDITS[edit](m)
    x = x.to(next(plain.parameters()).dtype)
    with torch.no_grad():
        change = max_error(plain(x), before)
        assert max_error(module(x), before) > 0.1 * change > 1e-5  # a cast changes only rounding
    assert_agrees(kind, module, plain, x)


def test_versions_and_addresses_are_found_in_memory() -> None:
    """Else each forward asks PyTorch's getters, which takes several times as long."""
    tensors = [draw(3, 4), draw(5)[2:], nn.Parameter(draw(2)), torch.empty(0)]
    stamps = Stamps(tensors, [0] * len(tensors))
    assert stamps.read_memory
    assert stamps.hold(tensors)
    for i, t in enumerate(tensors):
        with torch.no_grad():
            t.add_(1)
        assert not stamps.hold(tensors)
        stamps = Stamps(tensors, [0] * len(tensors))
        assert stamps.hold(tensors)
        tensors[i].data = torch.empty(9)[1:]
        assert not stamps.hold(tensors)
        stamps = Stamps(tensors, [0] * len(tensors))


def test_other_elements_of_the_same_memory_show() -> None:
    """At the offset that they had there, or at the address that an offset of bytes would give."""
    whole = torch.zeros(256)
    p = nn.Parameter(whole[64:96])
    stamps = Stamps([p], [0])
    p.data = whole.view(torch.float16)[64:96]
    assert not stamps.hold([p])
    stamps = Stamps([p], [0])
    p.data = torch.from_numpy(whole.numpy()[1:]).view(torch.float16)[62:94]
    assert not stamps.hold([p])


def test_another_order_of_the_same_elements_shows() -> None:
    """At the same address, offset and version."""
    p = nn.Parameter(torch.arange(24.0).view(2, 3, 4))
    views: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.view(3, 2, 4), lambda t: t[:1], lambda t: t[:, :1].expand(2, 3, 4),
        lambda t: t.as_strided((2, 3, 4), (1, 2, 6)), lambda t: t.unsqueeze(0), lambda t: t[..., 0],
    ]  # fmt: skip
    for view in views:
        whole, stamps = p.data, Stamps([p], [0])
        assert stamps.hold([p])
        p.data = view(whole)
        assert not stamps.hold([p])
        p.data = whole
        assert stamps.hold([p])


def test_memory_that_was_given_back() -> None:
    """PyTorch says so; the kernels would read at address 0."""
    model = randomize_(snv2.models.shufflenet_v2_x0_5()).eval()
    fused, x = snv2.fuse(model), draw(1, 3, 64, 64)
    with torch.no_grad():
        expected = fused(x)
        weight = next(fused.parameters())
        kept = weight.clone()
        weight.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=r"not allocated|storage"):
            fused(x)
        weight.untyped_storage().resize_(kept.nbytes)
        weight.copy_(kept)
        assert max_error(fused(x), expected) == 0


def test_first_looks_of_many_threads_do_not_wait_for_each_other() -> None:
    """PyTorch, which finds where it keeps versions, lets other threads run meanwhile."""
    program = """
        import threading, torch
        from snv2_kernels._native import Stamps
        barrier, tensors = threading.Barrier(8), [torch.ones(3) for _ in range(8)]
        def look(t):
            barrier.wait()
            assert Stamps([t], [0]).hold([t])
        threads = [threading.Thread(target=look, args=(t,)) for t in tensors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)


# These put other objects into the model, which the fused module does not share.
UNSHARED = {
    "new-parameters",
    "parameters-to-plain-tensors",
    "loaded-by-assignment",
    "eps",
    "new-buffers",
    "half",
    "bfloat16-and-back",
    "other-convolution",
    "with-biases",
}


@pytest.mark.parametrize("edit", [edit for edit in EDITS if edit not in UNSHARED])
def test_edit_of_the_shared_model_shows(edit: str) -> None:
    """The same edits to the model that was fused, where they reach shared tensors."""
    plain, x = plain_and_input("network")
    fused = snv2.fuse(plain)
    with torch.no_grad():
        before = fused(x)
    EDITS[edit](plain)
    if edit.startswith("through"):
        fused.eval()
    with torch.no_grad():
        assert max_error(fused(x), before) > 1e-5
        assert max_error(fused(x), plain(x)) < FP32_BOUND


@pytest.mark.parametrize("part", ["stage3", "stage3.1"])
def test_eval_of_a_part_packs_again(part: str) -> None:
    plain, fused, x = drop_in("network")
    fused(x)
    for model in (plain, fused):
        for p in model.get_submodule(part).parameters():
            p.data.mul_(drawn_like(p))
    fused.get_submodule(part).eval()
    assert_agrees("network", fused, plain, x)


def test_module_added_to_an_empty_container() -> None:
    plain, fused, x = drop_in("unit-s2")
    for model in (plain, fused):
        model.branch1[4].add_module(
            "noted", nn.Identity().eval()
        )  # a registry that had nothing in it
    watch = Watch(fused)
    fused.branch1[4].add_module("other", nn.Identity().eval())
    assert not watch.holds(fused)
    assert_agrees("unit-s2", fused, plain, x)


def test_edits_do_not_pile_up() -> None:
    """Repacking frees what it replaces: one state of packed weights at a time."""
    _, module, x = drop_in("unit-s1")
    states = set()
    for _ in range(3):
        module(x)
        states.add(id(module.__dict__["_packed_state"]))
        in_place(module)
    assert "_packed_state" in module.__dict__
    assert_agrees("unit-s1", module, *_plain_copy(module, x))


def _plain_copy(module: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    plain = snv2.models.InvertedResidual(34, 34, 1).eval()
    plain.load_state_dict(module.state_dict())
    return plain, x


def test_looking_for_hooks_hides_no_change() -> None:
    module = nn.Sequential(nn.BatchNorm2d(2)).eval()
    watch = Watch(module)
    assert not watch.runs_plain(module)
    module[0].train()
    assert watch.runs_plain(module)
    assert watch.holds(module)  # the mode is none of its business
    module[0].eval()
    handle = module[0].register_forward_hook(lambda *_: None)
    assert watch.runs_plain(module)
    handle.remove()
    module[0].eps = 1.0
    assert not watch.runs_plain(module)
    assert not watch.holds(module)
