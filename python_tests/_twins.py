"""Small models for the stateful tests, ways to read them, and when two of them agree."""

from __future__ import annotations

import contextlib
import copy
import enum
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from _cases import PlainSplit, Recorder, draw, largest_error
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_bench.guidelines.networks import torchvision_models
from snv2_bench.peers import Unavailable
from snv2_kernels import models, recognition
from snv2_kernels.nn.recognized import NotRecognized
from snv2_kernels.nn.structure import Incomparable, structure
from snv2_kernels.testing import max_error, randomize_

# Models ---------------------------------------------------------------------------------------


class Act(enum.Enum):
    RELU = "relu"
    SILU = "silu"
    RELU6 = "relu6"


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "relu6": F.relu6,
}

# Attributes of a unit that can each name its activation.
ATTRIBUTES: dict[str, Callable[[str], Any]] = {
    "mode": Act,
    "config": lambda name: {"act": name},
    "names": lambda name: [name],
    "space": lambda name: types.SimpleNamespace(act=name),
    "dtype": lambda name: torch.float if name == "relu" else torch.half,
    "flags": lambda name: set() if name == "relu" else {name},
    "functions": lambda name: [FUNCTIONS[name]],
}

# What a forward may look at besides its parameters; where it is so the unit scales its input.
LOOKS: dict[str, Callable[[Tensor], bool]] = {
    "nothing": lambda x: False,
    "dtype": lambda x: x.dtype == torch.half,
    "autocast": lambda x: torch.is_autocast_enabled("cpu"),
    "grad mode": lambda x: torch.is_grad_enabled(),
    "requires_grad": lambda x: x.requires_grad,
    "strides": lambda x: not x.is_contiguous(),
    "anything": lambda x: True,
}


def _layer(kernel: int, groups: int) -> nn.Sequential:
    conv = nn.Conv2d(4, 4, kernel, 1, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(4))


class Unit(nn.Module):
    """A hand-written unit of 8 channels whose forward reads attributes of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.pw1, self.dw, self.pw2 = _layer(1, 1), _layer(3, 4), _layer(1, 1)
        for name, of in ATTRIBUTES.items():
            setattr(self, name, of("relu"))
        self.looks_at = "nothing"
        self.keeps = False
        self.kept: list[Tensor] = []

    def activation(self) -> Callable[[Tensor], Tensor]:
        named = [self.mode.value, self.config["act"], *self.names, self.space.act, *self.flags]
        named.append("silu" if self.dtype is torch.half else "relu")
        other = [name for name in named if name != "relu"]
        return FUNCTIONS[other[0]] if other else self.functions[0]

    def forward(self, x: Tensor) -> Tensor:
        if LOOKS[self.looks_at](x):
            x = x * 2
        act = self.activation()
        a, b = x.chunk(2, 1)
        b = act(self.pw2(self.dw(act(self.pw1(b)))))
        if self.keeps:
            self.kept.append(b.detach())
        return torch.stack([a, b], 2).flatten(1, 2)


class Two(nn.Module):
    """A hand-written network of two parts."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(x))


class Maps(Two):
    """A backbone, which returns both maps."""

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        return x, self.b(x)


def _unit(stride: int = 1, oup: int = 8) -> nn.Module:
    return models.InvertedResidual(8, oup, stride)


def _tied() -> nn.Module:
    model = Two(Unit(), Unit())
    model.b.dw[0].weight = model.a.dw[0].weight
    return model


def _twice() -> nn.Module:
    unit = Unit()
    return Two(unit, unit)


def _mixed() -> nn.Module:
    inner = nn.Sequential(_unit(), Unit())
    return nn.Sequential(nn.Conv2d(3, 8, 1), _unit(), inner, nn.ReLU(), _unit(2), _unit())


@dataclass(frozen=True)
class Model:
    """A small network of one kind."""

    make: Callable[[], nn.Module]  # the plain module
    shape: tuple[int, int, int]  # channels, height and width of its input
    calls: int = 1  # of fused operators in a forward
    bounds: str = "unit"  # of its errors, see ``_cases.largest_error``
    sequences: int = 4  # in the default tests; a module of another class takes longer to recognise


_MAP = (8, 5, 6)
MODELS = {
    "unit": Model(_unit, _MAP, sequences=8),
    "unit of stride 2": Model(lambda: _unit(2, 12), _MAP, sequences=5),
    "stage": Model(
        lambda: nn.Sequential(_unit(2), _unit()), _MAP, bounds="network", sequences=4
    ),
    "network": Model(
        lambda: models.ShuffleNetV2([1, 2, 1], [4, 8, 12, 16, 20], 7), (3, 33, 37),
        bounds="network", sequences=4,
    ),
    "written unit": Model(Unit, _MAP),
    "written stage": Model(lambda: Two(Unit(), Unit()), _MAP),
    "tied": Model(_tied, _MAP),
    "twice": Model(_twice, _MAP),
    "backbone": Model(lambda: Maps(_unit(2), Unit()), _MAP),
    "mixed": Model(_mixed, (3, 5, 6), calls=2, bounds="network"),
    "split": Model(lambda: PlainSplit(8), _MAP, sequences=5),
}  # fmt: skip
with contextlib.suppress(Unavailable):
    torchvision_models()
    from torchvision.models import shufflenetv2

    MODELS["torchvision's unit"] = Model(lambda: shufflenetv2.InvertedResidual(8, 8, 1), _MAP)


def twins(kind: str, seed: int) -> tuple[nn.Module, nn.Module]:
    """A model and its fused copy on the same parameters; on its own ones if there is no way but to
    construct it."""
    source = randomize_(MODELS[kind].make(), seed).eval()
    if kind != "split":
        return source, snv2.fuse(source)
    fused = snv2.nn.SplitDepthwiseShuffle(8).eval()
    fused.load_state_dict(source.state_dict())
    return source, fused


@contextlib.contextmanager
def recognizing_once() -> Iterator[None]:
    """Recognises each structure once, since that takes a hundred times as long as a forward."""
    known: dict[Any, Any] = {}
    original = recognition.recognize_module

    def recognize_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            key = type(module), structure(module), _facts(module), args
        except Incomparable:
            return original(module, *args, **kwargs)
        if key not in known:
            try:
                known[key] = original(module, *args, **kwargs)
            except NotRecognized as error:
                known[key] = copy.copy(error)  # without the traceback, which holds the module
        if isinstance(known[key], NotRecognized):
            raise copy.copy(known[key])
        return known[key]

    with mock.patch.object(recognition, "recognize_module", recognize_module):
        yield


def _facts(module: nn.Module) -> Any:
    """What a recognition may depend on besides the structure."""
    modules = list(module.modules())
    tensors = module.state_dict(keep_vars=True).values()
    return (
        tuple((t.dtype, t.requires_grad) for t in tensors),
        tuple(m.training for m in modules),
        tuple(hook for m in modules for of in HOOK_REGISTRIES for hook in getattr(m, of).values()),
    )


# Reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """A way to run a model."""

    mode: str = "no_grad"
    channels_last: bool = False
    batch: int = 2
    wider: int = 0

    def input(self, kind: str, dtype: torch.dtype) -> Tensor:
        channels, height, width = MODELS[kind].shape
        x = draw(self.batch, channels, height, width + self.wider, dtype=dtype)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x.requires_grad_(self.mode == "input_grad")

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.mode == "inference":
                stack.enter_context(torch.inference_mode())
            elif not self.differentiates:
                stack.enter_context(torch.no_grad())
            if self.mode == "autocast":
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            yield

    @property
    def differentiates(self) -> bool:
        return self.mode in ("grad", "input_grad")


MODES = ("no_grad", "inference", "autocast", "grad", "input_grad")


@dataclass
class Result:
    """What a model returned, or what it raised."""

    error: Exception | None
    outs: list[Tensor]
    grads: list[Tensor | None]
    calls: int = 0  # of fused operators in the forward


def read(model: nn.Module, x: Tensor, reading: Reading, counts: bool = False) -> Result:
    recorder = Recorder()
    try:
        with reading.context():
            with recorder if counts else contextlib.nullcontext():
                out = model(x)
            outs = list(out) if isinstance(out, tuple) else [out]
            grads = _gradients(model, x, outs) if reading.differentiates else []
    except Exception as error:
        return Result(error, [], [])
    calls = sum(name.startswith("snv2::") for name in recorder.names)
    return Result(None, [t.detach() for t in outs], grads, calls)


def _gradients(model: nn.Module, x: Tensor, outs: list[Tensor]) -> list[Tensor | None]:
    """Gradients of a linear function of the results, which reads nothing that a rounding can
    change."""
    wanted = [t for t in (x, *model.parameters()) if t.requires_grad]
    loss = sum((t.float() * draw(*t.shape)).sum() for t in outs if t.requires_grad)
    if not wanted or not isinstance(loss, Tensor):
        return []
    return list(torch.autograd.grad(loss, wanted, allow_unused=True))


def exact(plain: nn.Module, x: Tensor, reading: Reading) -> list[Tensor]:
    """The result in float64, where a forward that looks at its surroundings sees the same."""
    copied = copy.deepcopy(plain)
    units = [m for m in copied.modules() if isinstance(m, Unit)]
    if any(unit.looks_at != "nothing" for unit in units):
        seen: dict[Unit, bool] = {}
        handles = [
            unit.register_forward_pre_hook(
                lambda unit, args: seen.update({unit: LOOKS[unit.looks_at](args[0])})
            )
            for unit in units
        ]
        with reading.context():
            copied(x)
        for handle in handles:
            handle.remove()
        for unit, scaled in seen.items():
            unit.looks_at = "anything" if scaled else "nothing"
    return read(copied.double(), x.detach().double(), Reading()).outs


# Agreeing -------------------------------------------------------------------------------------


def assert_equal(actual: Result, expected: Result) -> None:
    """The same operations on the same numbers."""
    assert (actual.error is None) == (expected.error is None), (actual.error, expected.error)
    _assert_alike(actual, expected)
    for a, b in zip(actual.outs + actual.grads, expected.outs + expected.grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def assert_agree(
    actual: Result, expected: Result, kind: str, truth: Callable[[], list[Tensor]], narrow: bool
) -> None:
    """Within one of the bounds of ``_cases.assert_accurate``, each of which is far below what a
    weight that was not packed again makes.

    Args:
        actual: of the module under test.
        expected: of plain PyTorch in the same dtype.
        kind: "unit" or "network".
        truth: computes the same in float64.
        narrow: whether the layers in between are in bfloat16, whatever the result is in.
    """
    assert (actual.error is None) == (expected.error is None), (actual.error, expected.error)
    _assert_alike(actual, expected)
    exact_outs: list[Tensor] | None = None
    for i, (a, b) in enumerate(zip(actual.outs, expected.outs, strict=True)):
        dtype = torch.bfloat16 if narrow else b.dtype
        eps = torch.finfo(dtype).eps
        bound = eps * (0 if dtype == torch.double else largest_error(kind, dtype, "cpu"))
        assert b.isfinite().all()
        if max_error(a, b) <= bound:
            continue
        exact_outs = truth() if exact_outs is None else exact_outs
        error, eager = (max_error(t, exact_outs[i]) for t in (a, b))
        assert error <= max(1.5 * eager + eps, bound), f"{error / eps} eps, eager {eager / eps} eps"
    grads = [
        (a, b)
        for a, b in zip(actual.grads, expected.grads, strict=True)
        if a is not None and b is not None and a.dtype == torch.float
    ]
    largest = max((float(b.abs().max()) for _, b in grads), default=0.0)
    for a, b in grads:  # that of a bias before a norm in train() mode is zero but for rounding
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6 * largest


def _assert_alike(actual: Result, expected: Result) -> None:
    for actual_tensors, expected_tensors in (
        (actual.outs, expected.outs),
        (actual.grads, expected.grads),
    ):
        facts = [
            [None if t is None else (t.dtype, t.shape) for t in tensors]
            for tensors in (actual_tensors, expected_tensors)
        ]
        assert facts[0] == facts[1]


def assert_same_state(actual: nn.Module, plain: nn.Module) -> None:
    """Names, numbers and flags. Statistics of a norm behind a fused part round differently; then
    the plain module goes on with the other's."""
    mine, plains = actual.state_dict(), plain.state_dict()
    assert list(mine) == list(plains)
    for name, t in mine.items():
        expected = plains[name]
        assert (t.dtype, t.shape) == (expected.dtype, expected.shape), name
        if not torch.equal(t, expected):
            assert "running" in name, name
            assert max_error(t, expected) < 16 * torch.finfo(t.dtype).eps, name
            expected.copy_(t)
    assert list(_flags(actual)) == list(_flags(plain))


def _flags(model: nn.Module) -> Iterator[Any]:
    for name, module in model.named_modules():
        yield name, module.training
    for name, p in model.named_parameters():
        yield name, p.requires_grad


# Hooks, which are pickled by name -------------------------------------------------------------


def _halve_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * 0.5, *args[1:])


def _shift_output(module: nn.Module, args: Any, out: Any) -> Any:
    return out + 0.5 if isinstance(out, Tensor) else None


def _double_gradient(module: nn.Module, grads: Any, grads_of_outs: Any) -> Any:
    return tuple(None if g is None else 2 * g for g in grads)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "pre": lambda m: m.register_forward_pre_hook(_halve_input),
    "forward": lambda m: m.register_forward_hook(_shift_output),
    "backward": lambda m: m.register_full_backward_hook(_double_gradient),
}
HOOK_REGISTRIES = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")
