"""Shared by the test files: case lists with readable ids, inputs, and how large an error may be."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import snv2_kernels as snv2
from snv2_kernels import _native
from snv2_kernels.testing import float64_reference, max_error, randomize_

# Workers of pytest-xdist share the cores. Tests of several threads ask for them.
torch.set_num_threads(1)

WIDTHS = ["x0_5", "x1_0", "x1_5", "x2_0"]
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16"),
]
HALF_DTYPES = DTYPES[1:]
FORMATS = [
    pytest.param(torch.contiguous_format, id="contiguous"),
    pytest.param(torch.channels_last, id="channels_last"),
]

SPECIALS = [float("nan"), float("inf"), float("-inf")]
# What a map may be: dtype and memory format.
MAPS = [(dtype.values[0], order.values[0]) for dtype in DTYPES for order in FORMATS]

needs_bfloat16 = pytest.mark.skipif(
    not _native.cpu_has_bfloat16(), reason="this machine does not multiply bfloat16"
)

drawn = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def in_turn(*factors: Sequence[Any], turn: int = 0) -> list[tuple[Any, ...]]:
    """The product of all factors but the last, each of its rows with one of the last factor's
    values (a tuple stands for several) in turn. If no two of them are shorter than the last one,
    all pairs occur."""
    *crossed, last = ([_without_id(value) for value in factor] for factor in factors)
    rows = []
    for row in itertools.product(*(enumerate(factor) for factor in crossed)):
        value = last[(sum(i for i, _ in row) + turn) % len(last)]
        rows.append((*(v for _, v in row), *(value if isinstance(value, tuple) else (value,))))
    return rows


def _without_id(value: Any) -> Any:
    return value.values[0] if isinstance(value, type(pytest.param())) else value


def case_id(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(case_id, value))
    return str(value).removeprefix("torch.").removesuffix("_format")


# Errors ---------------------------------------------------------------------------------------
#
# An error is max |y - exact| / max |exact| against float64, in units of eps = finfo(dtype).eps.
#
# float32: a sum of k products errs by about sqrt(k) / 2 roundings: k is nine in an op and up to 488
# in a unit; a stage has eight units and a network sixteen, whose errors add like independent ones.
FLOAT32_BOUNDS = {"op": 2, "unit": 8, "stage": 16, "network": 16}
# 16 bits on the CPU: the kernels compute in float32 and round once, which costs at most half an
# eps, whatever the depth.
_NARROW_BOUND = 1
# 16 bits on a GPU, and bfloat16 where the CPU multiplies it: products are summed in float32, but
# what is multiplied is in 16 bits. On the way through a unit the map is rounded after each of its
# three products (on the CPU after two), and the two matrices when they were folded: five roundings,
# each at most half an eps. Products pass errors on as they are, on average: 2.5 for a unit. Those
# of several units are independent, so they add as squares: a stage has eight (sqrt(8) * 2.5 = 7.1),
# a network sixteen, and stem and head, which round as one unit each (sqrt(18) * 2.5 = 10.6).
_NARROW_PRODUCT_BOUNDS = {"op": 1, "unit": 2.5, "stage": 7.1, "network": 10.6}

# Between two ways to sum in float32, through at most a network.
FP32_BOUND = 1e-5


def largest_error(kind: str, dtype: torch.dtype, backend: str) -> float:
    """The bound for ``kind`` in units of eps, however large eager's error is."""
    if dtype == torch.float32:
        return FLOAT32_BOUNDS[kind]
    narrow_products = backend != "cpu" or (dtype == torch.bfloat16 and _native.cpu_has_bfloat16())
    return _NARROW_PRODUCT_BOUNDS[kind] if narrow_products else _NARROW_BOUND


def assert_accurate(
    kind: str, actual: Tensor, eager: Tensor, exact: Tensor, backend: str = "cpu"
) -> None:
    """The rule: at most 1.5 times eager's error plus one eps, and within the bound for ``kind``.

    Args:
        kind: "op", "unit", "stage" or "network".
        actual: the result under test.
        eager: plain PyTorch's, in the same dtype; ``actual`` must have its dtype and shape.
        exact: plain PyTorch's in float64.
        backend: that gave ``actual``.
    """
    assert actual.dtype == eager.dtype
    assert actual.shape == eager.shape
    eps = torch.finfo(eager.dtype).eps
    bound = largest_error(kind, eager.dtype, backend)
    allowed = min(1.5 * max_error(eager, exact) + eps, bound * eps)
    error = max_error(actual, exact)
    assert error <= allowed, f"{error / eps:.2f} eps, eager {max_error(eager, exact) / eps:.2f} eps"


def assert_close(module: nn.Module, plain: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        assert max_error(module(x), plain(x)) < FP32_BOUND


def assert_same_specials(actual: Tensor, eager: Tensor) -> None:
    """NaN and infinities stand at the same places."""
    torch.testing.assert_close(actual.isnan(), eager.isnan(), rtol=0, atol=0)
    torch.testing.assert_close(actual.isposinf(), eager.isposinf(), rtol=0, atol=0)
    torch.testing.assert_close(actual.isneginf(), eager.isneginf(), rtol=0, atol=0)


def keeps_format(out: Tensor, x: Tensor) -> bool:
    """Whether a result is dense in the memory format that a dense x has; x may have both."""
    formats = [
        order
        for order in (torch.contiguous_format, torch.channels_last)
        if x.is_contiguous(memory_format=order)
    ]
    assert formats
    return any(out.is_contiguous(memory_format=order) for order in formats)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Inputs ---------------------------------------------------------------------------------------


def draw(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    seed: int = 0,
) -> Tensor:
    """Normal values on the default device, the same for the same arguments on every device, and in
    every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device(), dtype)
    return x.contiguous(memory_format=memory_format) if len(shape) == 4 else x


def _misaligned(n: int, c: int, h: int, w: int, **kwargs: Any) -> Tensor:
    x = draw(n, c, h, w, **kwargs)
    storage = x.new_zeros(x.numel() + 1)
    return storage[1:].as_strided(x.shape, x.stride(), 1).copy_(x)


# Tensors of shape [n, c, h, w] in every kind of memory that is not freshly allocated.
VIEWS: dict[str, Callable[..., Tensor]] = {
    "channel_slice": lambda n, c, h, w, **kw: draw(n, 2 * c + 3, h, w, **kw)[:, 2 : c + 2],
    "every_second_channel": lambda n, c, h, w, **kw: draw(n, 2 * c, h, w, **kw)[:, 1::2],
    "width_slice": lambda n, c, h, w, **kw: draw(n, c, h, w + 3, **kw)[..., 2 : w + 2],
    "every_second_row": lambda n, c, h, w, **kw: draw(n, c, 2 * h, w, **kw)[:, :, ::2],
    "batch_slice": lambda n, c, h, w, **kw: draw(2 * n, c, h, w, **kw)[::2],
    "expanded_batch": lambda n, c, h, w, **kw: draw(1, c, h, w, **kw).expand(n, c, h, w),
    "expanded_channels": lambda n, c, h, w, **kw: draw(n, 1, h, w, **kw).expand(n, c, h, w),
    "expanded_pixels": lambda n, c, h, w, **kw: draw(n, c, 1, 1, **kw).expand(n, c, h, w),
    "transposed_pixels": lambda n, c, h, w, **kw: draw(n, c, w, h, **kw).transpose(2, 3),
    "transposed_batch": lambda n, c, h, w, **kw: draw(c, n, h, w, **kw).transpose(0, 1),
    "misaligned": _misaligned,
}

# Models ---------------------------------------------------------------------------------------


def unit_pair(stride: int, inp: int, oup: int, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A plain unit in eval mode, and a drop-in with a state of its own that is the same."""
    plain = randomize_(snv2.models.InvertedResidual(inp, oup, stride), seed).eval()
    unit = snv2.nn.InvertedResidual(inp, oup, stride).eval()
    unit.load_state_dict(plain.state_dict())
    return plain, unit


# A network of all kinds of steps that takes a millisecond: units of a stage, channels.
SMALL = [1, 3, 1], [8, 20, 36, 58, 40]


def small_network(seed: int = 0, num_classes: int = 10) -> snv2.models.ShuffleNetV2:
    """Returns a plain network of the sizes in ``SMALL``."""
    model = snv2.models.ShuffleNetV2(*SMALL, num_classes)
    return randomize_(model, seed).eval()


@functools.cache
def network(library: str, width: str) -> nn.Module:
    """A network in eval mode with random state, on the CPU; shared, so never changed. The library
    is "torchvision" or "snv2"."""
    if library == "torchvision":
        from torchvision import models as torchvision_models

        constructor = getattr(torchvision_models, f"shufflenet_v2_{width}")
    else:
        constructor = getattr(snv2.models, f"shufflenet_v2_{width}")
    with torch.device("cpu"):
        return randomize_(constructor()).eval()


def on_the_default_device(module: nn.Module) -> nn.Module:
    """A copy of a shared module."""
    return copy.deepcopy(module).to(torch.get_default_device())


class PlainSplit(nn.Module):
    """What snv2.nn.SplitDepthwiseShuffle computes, layer by layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.dw = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.stack([a, self.bn(self.dw(b)).relu()], 2).flatten(1, 2)


def plain_stage(strides: list[int], oup: int, inp: int) -> nn.Sequential:
    stage = nn.Sequential()
    for stride in strides:
        stage.append(snv2.models.InvertedResidual(inp, oup, stride))
        inp = oup
    return randomize_(stage, seed=oup).eval()


# A small module of each kind that fuse() recognises, and an input shape for it.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int, int]]] = {
    "unit-s1": (lambda: unit_pair(1, 34, 34)[0], (2, 34, 9, 11)),
    "unit-s2": (lambda: unit_pair(2, 21, 34)[0], (2, 21, 9, 11)),
    "stage": (lambda: plain_stage([2, 1, 1], 34, 21), (2, 21, 9, 11)),
    "network": (small_network, (2, 3, 37, 45)),
}
each_library = pytest.mark.parametrize("library", ["torchvision", "snv2"])
each_kind = pytest.mark.parametrize("kind", KINDS)
each_drop_in = pytest.mark.parametrize("kind", [*KINDS, "split"])


def plain_and_input(kind: str) -> tuple[nn.Module, Tensor]:
    make, shape = KINDS[kind]
    return make(), draw(*shape)


def drop_in(kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A plain module in eval mode, its drop-in with a state of its own that is the same, and an
    input."""
    if kind != "split":
        plain, x = plain_and_input(kind)
        return plain, snv2.fuse(copy.deepcopy(plain)), x
    split = randomize_(snv2.nn.SplitDepthwiseShuffle(34)).eval()
    alike = PlainSplit(34).eval()
    alike.load_state_dict(split.state_dict())
    return alike, split, draw(2, 34, 9, 11)


def assert_agrees(
    kind: str, module: nn.Module, plain: nn.Module, x: Tensor, backend: str = "cpu"
) -> None:
    """The rule for a module that runs fused."""
    with torch.no_grad():
        error_kind = {"split": "op"}.get(kind, kind.partition("-")[0])
        exact = float64_reference(plain)(x)
        assert_accurate(error_kind, run_fused(module, x), plain(x), exact, backend)


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def convs(model: nn.Module) -> list[nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[k], y[k]) for k in x)


# Operators that compute no tensor.
_PLANNING = ("gpu_device", "gpu_launches", "gpu_workspace_bytes")


class Recorder(TorchDispatchMode):
    """Names of all operators that are called, such as "aten::convolution", but those that plan."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if not name.endswith(_PLANNING):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def ops_called(function: Callable[..., Any], *args: Any) -> list[str]:
    """Names of all operators that a call reaches, such as "aten::convolution"."""
    with Recorder() as recorder:
        function(*args)
    return recorder.names


_FUSED = ("snv2::", "snv2_emulated::", "snv2_ptx::", "snv2_triton::")


def _fused_calls(names: list[str]) -> int:
    """Fused ops among those that a forward reached; fails if it is a mixture."""
    fused = [name for name in names if name.startswith(_FUSED)]
    convolutions = [name for name in names if "conv" in name and name not in fused]
    assert not (fused and convolutions)
    assert len(fused) <= 1
    return len(fused)


def runs_fused(module: nn.Module, x: Tensor) -> bool:
    """Whether a forward is one fused op call; fails if it is a mixture."""
    with torch.no_grad():
        return _fused_calls(ops_called(module, x)) == 1


def run_fused(module: nn.Module, x: Tensor) -> Tensor:
    """The output of a forward; fails if that is not one fused op call."""
    with torch.no_grad(), Recorder() as recorder:
        out: Tensor = module(x)
    assert _fused_calls(recorder.names) == 1
    return out
