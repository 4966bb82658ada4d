"""Edits of a fused model and its plain twin, a rule for each kind."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _cases import draw
from _machine import TwinMachine, at, edit, seeds
from _twins import ATTRIBUTES, HOOK_REGISTRIES, HOOKS, LOOKS, MODES, Act, Reading
from hypothesis import strategies as st
from hypothesis.stateful import rule
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.nn import FusedModule
from snv2_kernels.testing import randomize_

__all__ = ["Machine"]

DTYPES = {
    "float": torch.float,
    "half": torch.half,
    "bfloat16": torch.bfloat16,
    "double": torch.double,
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, 0.1),
    "adam": lambda ps: torch.optim.Adam(ps, 0.05),
    "fused adam": lambda ps: torch.optim.Adam(ps, 0.05, fused=True),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "prelu": nn.PReLU,
    "identity": nn.Identity,
}
NUMBERS_OF_NORM: dict[str, tuple[Any, Any]] = {"eps": (1e-5, 0.3), "momentum": (0.1, None)}
PARTS_OF_NORM = ("tracks", "tracks not", "uncounted", "counted", "no statistics", "not affine")


def like(t: Tensor, seed: int) -> Tensor:
    """Other numbers of the same kind."""
    if not t.is_floating_point():
        return t + seed
    generator = torch.Generator().manual_seed(seed + t.numel())
    numbers = torch.empty(t.shape).uniform_(0.3, 1.2, generator=generator)
    signs = torch.empty(t.shape).uniform_(-1, 2, generator=generator).sign()
    return (numbers if t.dim() == 1 else numbers * signs / t[0].numel() ** 0.5).to(t.dtype)


def take_step(part: nn.Module, seed: int, optimizer: str) -> None:
    parameters = [p for p in part.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = like(p.detach(), seed)
    if parameters:
        OPTIMIZERS[optimizer](parameters).step()
    for p in parameters:
        p.grad = None


@torch.no_grad()
def run_in_train_mode(part: nn.Module, model: nn.Module, x: Tensor) -> None:
    part.train()
    model(x)
    part.eval()


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


class Machine(TwinMachine):
    """All edits that a compiled model takes too."""

    # Numbers ----------------------------------------------------------------------------------

    @edit(
        shares=True,
        at=at,
        seed=seeds,
        how=st.sampled_from(["copy_", "element", "inference", "data", "set_"]),
    )
    def write_parameter(self, model: nn.Module, at: int, seed: int, how: str) -> None:
        p = self.parameter(model, at)
        new = like(p, seed)
        if how == "inference":
            with torch.inference_mode():
                p.copy_(new)
        elif how == "data":
            p.data = new
        else:
            with torch.no_grad():
                if how == "element":
                    p.view(-1)[0] += 1
                elif how == "set_":
                    p.set_(new)
                else:
                    p.copy_(new)

    @edit(shares=True, at=at, seed=seeds, how=st.sampled_from(["data", "numpy"]))
    def write_unseen_then_eval(self, model: nn.Module, at: int, seed: int, how: str) -> None:
        part = model.get_submodule(self.fused_part(at))
        p = self.parameter(part, at)
        if how == "numpy" and p.dtype != torch.bfloat16:
            p.detach().numpy()[...] = like(p, seed).numpy()
        else:
            p.data.copy_(like(p, seed))
        part.eval()

    @edit(at=at, seed=seeds)
    def new_parameter(self, model: nn.Module, at: int, seed: int) -> None:
        name = self.name(at, nn.Conv2d, nn.BatchNorm2d, nn.Linear)
        if name and (module := model.get_submodule(name)).weight is not None:
            module.weight = nn.Parameter(like(module.weight.detach(), seed))

    @edit(shares=True, at=at, seed=seeds, optimizer=st.sampled_from(list(OPTIMIZERS)))
    def step(self, model: nn.Module, at: int, seed: int, optimizer: str) -> None:
        take_step(self.part(model, at), seed, optimizer)

    @edit(seed=seeds, assign=st.booleans())
    def load(self, model: nn.Module, seed: int, assign: bool) -> None:
        items = model.state_dict().items()
        state = {name: like(t, seed + 4 * i) for i, (name, t) in enumerate(items)}
        model.load_state_dict(state, assign=assign)

    @rule(seed=seeds, how=st.sampled_from(["train", "step"]))
    def train_the_source(self, seed: int, how: str) -> None:
        """The model that was fused, on the same tensors; the fused one is not called."""
        if self.source is None:
            return
        x = Reading(batch=2 + seed).input(self.kind, self.dtype())
        for model in (self.source, self.plain):
            if how == "step":
                take_step(model, seed, "fused adam")
            else:
                run_in_train_mode(model, model, x)

    # Norms ------------------------------------------------------------------------------------

    @edit(
        shares=True, at=at, seed=seeds, how=st.sampled_from(["whole", "part", "norm", "function"])
    )
    def move_statistics(self, model: nn.Module, at: int, seed: int, how: str) -> None:
        x = Reading(batch=2 + seed).input(self.kind, self.dtype())
        name = self.name(at, nn.BatchNorm2d)
        if how == "whole":
            run_in_train_mode(model, model, x)
        elif how == "part":
            run_in_train_mode(self.part(model, at), model, x)
        elif name is not None:
            norm = model.get_submodule(name)
            z = draw(2, norm.num_features, 3, 3, dtype=self.dtype()) + 1
            if how == "norm":
                run_in_train_mode(norm, norm, z)
            else:
                F.batch_norm(z, norm.running_mean, norm.running_var, training=True)

    @edit(at=at, seed=seeds, how=st.sampled_from(["add_", "mul_", "reset", "new"]))
    def write_statistics(self, model: nn.Module, at: int, seed: int, how: str) -> None:
        name = self.name(at, nn.BatchNorm2d)
        if name is None or (norm := model.get_submodule(name)).running_mean is None:
            return
        if how == "reset":
            norm.reset_running_stats()
        elif how == "new":
            norm.running_mean = like(norm.running_mean, seed)
        elif how == "add_":
            norm.running_mean.add_(like(norm.running_mean, seed))
        else:
            norm.running_var.mul_(like(norm.running_var, seed))

    @edit(at=at, what=st.sampled_from(list(NUMBERS_OF_NORM)))
    def change_number_of_norm(self, model: nn.Module, at: int, what: str) -> None:
        if name := self.name(at, nn.BatchNorm2d):
            norm, (usual, other) = model.get_submodule(name), NUMBERS_OF_NORM[what]
            setattr(norm, what, other if getattr(norm, what) == usual else usual)

    @edit(covered=False, at=at, what=st.sampled_from(PARTS_OF_NORM))
    def change_parts_of_norm(self, model: nn.Module, at: int, what: str) -> None:
        name = self.name(at, nn.BatchNorm2d)
        if name is None:
            return
        norm = model.get_submodule(name)
        if what.startswith("tracks"):
            norm.track_running_stats = what == "tracks"
        elif what in ("uncounted", "counted"):
            norm.num_batches_tracked = None if what == "uncounted" else torch.tensor(0)
        elif what == "no statistics":
            norm.running_mean = norm.running_var = None
        else:
            norm.weight = norm.bias = None

    # Conversions and modes --------------------------------------------------------------------

    @rule(dtype=st.sampled_from(list(DTYPES)))
    def convert(self, dtype: str) -> None:
        source, was = self.source, self.dtype()
        for model in (self.fused, self.plain):
            getattr(model, dtype)()
        if source is not None and isinstance(self.fused, FusedModule):
            assert all(p.dtype == was for p in source.parameters())
        self.source = None

    @edit(memory_format=st.sampled_from(list(FORMATS)))
    def convert_format(self, model: nn.Module, memory_format: str) -> None:
        model.to(memory_format=FORMATS[memory_format])

    @rule(at=at, dtype=st.sampled_from(list(DTYPES)), mode=st.sampled_from(MODES))
    def convert_a_part_and_back(self, at: int, dtype: str, mode: str) -> None:
        self.source, was = None, self.dtype()
        parts = [self.part(model, at) for model in (self.fused, self.plain)]
        for part in parts:
            getattr(part, dtype)()
        self.check(Reading(mode), converted=True)
        for part in parts:
            part.to(was)

    @edit(at=at, mode=st.booleans())
    def set_mode(self, model: nn.Module, at: int, mode: bool) -> None:
        self.part(model, at).train(mode)

    @edit(mode=st.booleans())
    def set_mode_of_all(self, model: nn.Module, mode: bool) -> None:
        model.train(mode)

    @edit(shares=True, at=at, wanted=st.booleans())
    def set_requires_grad(self, model: nn.Module, at: int, wanted: bool) -> None:
        self.part(model, at).requires_grad_(wanted)

    @edit(at=at, kind=st.sampled_from(list(HOOKS)))
    def hook(self, model: nn.Module, at: int, kind: str) -> None:
        HOOKS[kind](self.part(model, at))

    @edit()
    def unhook(self, model: nn.Module) -> None:
        for module in model.modules():
            for hooks in HOOK_REGISTRIES:
                getattr(module, hooks).clear()

    # Structure --------------------------------------------------------------------------------

    @edit(at=at, seed=seeds, bias=st.booleans())
    def swap_convolution(self, model: nn.Module, at: int, seed: int, bias: bool) -> None:
        if name := self.name(at, nn.Conv2d):
            old = model.get_submodule(name)
            sizes = old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding
            new = nn.Conv2d(*sizes, old.dilation, old.groups, bias)
            put(model, name, randomize_(new, seed).eval().to(old.weight.dtype))

    @edit(covered=False, at=at, kind=st.sampled_from(list(ACTIVATIONS)))
    def swap_activation(self, model: nn.Module, at: int, kind: str) -> None:
        classes = {type(make()) for make in ACTIVATIONS.values()}
        if name := self.name(at, *classes):
            put(model, name, ACTIVATIONS[kind]().eval().to(self.dtype()))

    @edit(covered=False, at=at)
    def drop_norm(self, model: nn.Module, at: int) -> None:
        if name := self.name(at, nn.BatchNorm2d):
            put(model, name, nn.Identity())

    @edit(at=at)
    def copy_part(self, model: nn.Module, at: int) -> None:
        if name := self.name(at):
            put(model, name, copy.deepcopy(model.get_submodule(name)))

    @rule(at=at)
    def put_plain_part(self, at: int) -> None:
        """What was not fused, in the place of what was."""
        if name := self.name(at):
            self.source, self.covered = None, False
            part = self.plain.get_submodule(name)
            for model in (self.fused, self.plain):
                put(model, name, copy.deepcopy(part))

    @edit(covered=False, at=at, what=st.sampled_from(["dilated", "tight", "circular", "strided"]))
    def change_convolution(self, model: nn.Module, at: int, what: str) -> None:
        if not (name := self.name(at, nn.Conv2d)):
            return
        conv = model.get_submodule(name)
        half = conv.kernel_size[0] // 2
        if what in ("dilated", "tight"):
            dilation = 2 if what == "dilated" else 1
            conv.dilation, conv.padding = (dilation, dilation), (half * dilation,) * 2
        elif what == "circular":
            conv.padding_mode = "circular" if conv.padding_mode == "zeros" else "zeros"
        else:
            conv.stride = (2, 2) if conv.stride == (1, 1) else (1, 1)

    @edit(at=at, attribute=st.sampled_from(list(ATTRIBUTES)), value=st.sampled_from(Act))
    def set_attribute(self, model: nn.Module, at: int, attribute: str, value: Act) -> None:
        if (name := self.unit(at)) is not None:
            setattr(model.get_submodule(name), attribute, ATTRIBUTES[attribute](value.value))

    @edit(
        at=at,
        attribute=st.sampled_from(["config", "names", "space", "flags", "functions"]),
        value=st.sampled_from(Act),
    )
    def change_attribute_in_place_then_eval(
        self, model: nn.Module, at: int, attribute: str, value: Act
    ) -> None:
        if (name := self.unit(at)) is None:
            return
        old = getattr(model.get_submodule(name), attribute)
        new = ATTRIBUTES[attribute](value.value)
        if isinstance(old, list):
            old[:] = new
        elif isinstance(old, types.SimpleNamespace):
            old.act = new.act
        else:
            old.clear()
            old.update(new)
        model.eval()

    @edit(covered=False, at=at, looks_at=st.sampled_from(list(LOOKS)))
    def look_around(self, model: nn.Module, at: int, looks_at: str) -> None:
        if (name := self.unit(at)) is not None:
            model.get_submodule(name).looks_at = looks_at

    @edit(covered=False, at=at, keeps=st.booleans())
    def keep_maps(self, model: nn.Module, at: int, keeps: bool) -> None:
        if (name := self.unit(at)) is not None:
            model.get_submodule(name).keeps = keeps

    # Sharing ----------------------------------------------------------------------------------

    @edit(at=at)
    def tie_parameters(self, model: nn.Module, at: int) -> None:
        if pair := self.pair(at, nn.Conv2d, nn.BatchNorm2d):
            a, b = map(model.get_submodule, pair)
            b.weight = a.weight

    @edit(at=at)
    def untie_parameters(self, model: nn.Module, at: int) -> None:
        if (name := self.name(at, nn.Conv2d)) and (conv := model.get_submodule(name)):
            conv.weight = nn.Parameter(conv.weight.detach().clone())

    @edit(at=at)
    def tie_buffers(self, model: nn.Module, at: int) -> None:
        if pair := self.pair(at, nn.BatchNorm2d):
            a, b = map(model.get_submodule, pair)
            b.running_mean = a.running_mean

    @edit(at=at)
    def put_a_module_twice(self, model: nn.Module, at: int) -> None:
        if pair := self.pair(at):
            put(model, pair[1], model.get_submodule(pair[0]))

    # The whole --------------------------------------------------------------------------------

    @edit(how=st.sampled_from(["pickle", "deepcopy"]))
    def copy_all(self, model: nn.Module, how: str) -> None:
        new = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        if model is self.fused:
            self.fused = new
        else:
            self.plain = new

    @rule()
    def fuse_again(self) -> None:
        self.covered &= self.may_run_fused()  # else what is there now may be left as it is
        self.fused = snv2.fuse(self.fused)

    @rule(at=at)
    def fuse_a_part(self, at: int) -> None:
        places = list(self.plain.named_modules(remove_duplicate=False))
        # A part in two places would go its own way in the other.
        alone = len(places) == len(list(self.plain.modules()))
        if alone and (name := self.name(at)):
            self.covered &= self.may_run_fused()
            put(self.fused, name, snv2.fuse(self.fused.get_submodule(name)))

    @rule()
    def explain(self) -> None:
        parts = snv2.explain(self.fused).parts
        if self.covered and self.may_run_fused():
            assert parts
            assert all(part.reason is None for part in parts), parts
