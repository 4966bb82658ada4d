"""Conversions, copies and pickles of drop-in modules."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from _cases import (
    assert_agrees,
    drop_in,
    each_drop_in,
    each_kind,
    norms,
    plain_and_input,
    runs_fused,
    same_state,
    small_network,
)
from torch import nn

import snv2_kernels as snv2
from snv2_kernels.testing import max_error, randomize_

CONVERSIONS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "half-float": lambda m: m.half().float(),
    "bfloat16-half": lambda m: m.bfloat16().half(),
    "double-float": lambda m: m.double().float(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "to_empty": lambda m: randomize_(m.to_empty(device="cpu"), seed=7),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@each_drop_in
def test_conversion(kind: str, conversion: str) -> None:
    plain, module, x = drop_in(kind)
    module(x)
    for m in (plain, module):
        assert CONVERSIONS[conversion](m) is m
    x = x.to(next(plain.parameters()).dtype)
    if conversion == "double":
        assert not runs_fused(module, x)
        assert max_error(module(x).detach(), plain(x).detach()) < 1e-14
    else:
        assert_agrees(kind, module, plain, x)
    assert same_state(module, plain)


@pytest.mark.parametrize("backend", [None, "eager", "snv2"])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_norm_that_pytorch_refuses_is_refused(backend: str | None) -> None:
    plain, module, x = drop_in("unit-s1")
    options = {"inner": "eager"} if backend == "snv2" else None
    for m in (plain, module):
        norms(m)[1].half()
        if backend is not None:
            m.compile(backend=backend, options=options)
        with pytest.raises(RuntimeError, match="dtype"):
            m(x)


@pytest.mark.parametrize("conversion", CONVERSIONS)
@each_kind
def test_conversion_leaves_the_model_as_it_was(kind: str, conversion: str) -> None:
    model, x = plain_and_input(kind)
    expected = model(x)
    expected.square().mean().backward()
    state = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    fused = snv2.fuse(model)
    CONVERSIONS[conversion](fused)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad.dtype == torch.float32
        assert torch.equal(p.grad, grad)
    assert torch.equal(model(x), expected)
    assert len(list(fused.parameters())) == len(grads)


@each_kind
def test_conversion_of_the_model_is_seen(kind: str) -> None:
    """model.half() changes the memory of parameters that the fused module shares."""
    model, x = plain_and_input(kind)
    fused = snv2.fuse(model)
    fused(x)
    model.half()
    for name, buffer in model.named_buffers():  # a module owns its registry of buffers
        fused.get_buffer(name).data = buffer
    assert_agrees(kind, fused, model, x.half())


class Tied(nn.Module):
    """Two units of one weight with a plain layer between them that has it too, if it is told to."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.first, self.second = (snv2.models.InvertedResidual(8, 8, 1) for _ in range(2))
        self.between = nn.Conv2d(8, 8, 1, groups=2)
        self.second.branch2[0].weight = self.first.branch2[0].weight
        if between:
            self.between.weight = nn.Parameter(torch.ones(8, 4, 1, 1))
            self.second.branch2[5].weight = nn.Parameter(torch.ones(4, 4, 1, 1))
            self.second.branch2[5].bias = self.between.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.between(self.first(x)).tanh())
        return y


@pytest.mark.parametrize("between", [False, True], ids=["units", "plain-layer-too"])
def test_conversion_keeps_ties(between: bool) -> None:
    model = randomize_(Tied(between)).eval()
    fused = snv2.fuse(model)
    assert fused.double() is fused
    assert fused.second.branch2[0].weight is fused.first.branch2[0].weight
    assert fused.second.branch2[0].weight is not model.second.branch2[0].weight
    assert model.second.branch2[0].weight.dtype == torch.float32
    assert (fused.second.branch2[5].bias is fused.between.bias) is between


def test_optimizer_follows_a_conversion_where_the_model_is_gone() -> None:
    fused = snv2.fuse(randomize_(snv2.models.InvertedResidual(8, 8, 1)).eval())
    before = list(fused.parameters())
    fused.double()
    assert all(a is b for a, b in zip(fused.parameters(), before, strict=True))
    again = snv2.fuse(fused)  # shares them, and keeps its dtype
    fused.half()
    assert next(again.parameters()).dtype == torch.float64


def test_freed_memory_that_is_used_again() -> None:
    plain, module, x = drop_in("network")
    for _ in range(5):
        module(x)
        for m in (plain, module):
            m.half()
            m.float()  # the allocator may hand out the old addresses
            with torch.no_grad():
                for p in m.parameters():
                    p.data = p.data * 1.01
        assert_agrees("network", module, plain, x)


@each_drop_in
def test_convolutions_and_norms_of_two_dtypes(kind: str) -> None:
    """As plain PyTorch allows: bfloat16 convolutions, float32 batch norms."""
    plain, module, x = drop_in(kind)
    for m in (plain, module):
        m.bfloat16()
        for norm in m.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.float()
    x = x.bfloat16()
    assert_agrees(kind, module, plain, x)


# Copies ---------------------------------------------------------------------------------------


def _pickled(module: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(module))
    return copied


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": _pickled, "torch.save": _saved}


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
@pytest.mark.parametrize("how", COPIES)
@each_drop_in
def test_copies(kind: str, how: str, packed: bool) -> None:
    plain, module, x = drop_in(kind)
    if packed:
        module(x)
    copied = COPIES[how](module)
    assert type(copied) is type(module)
    assert same_state(copied, plain)
    assert_agrees(kind, copied, plain, x)
    if how == "copy":
        return
    with torch.no_grad():  # a copy has weights of its own
        next(module.parameters()).zero_()
    assert_agrees(kind, copied, plain, x)


@pytest.mark.parametrize("fused_first", [True, False], ids=["from-fused", "from-plain"])
def test_saved_state_dict_loads_in_the_other(tmp_path: Path, fused_first: bool) -> None:
    source, x = plain_and_input("network")
    target = randomize_(small_network(), seed=9)
    saved, loaded = (snv2.fuse(source), target) if fused_first else (source, snv2.fuse(target))
    loaded(x)
    torch.save(saved.state_dict(), tmp_path / "state.pt")
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    assert same_state(loaded, source)
    assert_agrees("network", snv2.fuse(loaded), source, x)


def test_a_plain_part_that_was_fused_again_leaves_the_source_alone() -> None:
    """It stands inside a fused module, and is a plain copy of what the source has."""
    source = plain_and_input("stage")[0]
    fused = snv2.fuse(source)
    fused[0].branch2 = snv2.fuse(fused[0].branch2)
    fused.half()
    assert all(p.dtype == torch.half for p in fused.parameters())
    assert all(p.dtype == torch.float for p in source.parameters())
