"""What ``snv2 verify`` runs: ops, units and networks on real and odd shapes."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_bench.cli.common import DTYPES, FORMATS, WIDTHS
from snv2_bench.cli.rule import EAGER_FACTOR
from snv2_kernels.backends import DEVICES
from snv2_kernels.testing import float64_reference, max_error, randomize_

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Case", "all_cases"]

Shape = tuple[int, int, int, int]
Results = Tensor | tuple[Tensor, ...]

# The first shape of each list is one that a network has, the second an odd one: --quick runs
# these two.
_SPLIT_SHAPES: list[Shape] = [
    (1, 116, 28, 28),
    (3, 58, 15, 9),
    (1, 48, 28, 28),
    (2, 352, 14, 14),
    (1, 976, 7, 7),
    (2, 58, 13, 7),
    (1, 2, 1, 1),
    (0, 116, 7, 7),
]
_CAT_SHAPES: list[Shape] = [
    (1, 58, 28, 28),
    (3, 29, 15, 9),
    (2, 116, 14, 14),
    (1, 488, 7, 7),
    (1, 1, 1, 1),
    (0, 29, 7, 7),
]
_DEPTHWISE_SHAPES: list[Shape] = [
    (1, 58, 28, 28),
    (3, 29, 15, 9),
    (1, 24, 56, 56),
    (2, 232, 14, 14),
    (1, 58, 1, 1),
    (1, 3, 2, 13),
    (0, 29, 7, 7),
]
_OPS: list[tuple[str, dict[str, int], list[Shape]]] = [
    ("split_dw_cat_shuffle", {}, _SPLIT_SHAPES),
    ("cat_shuffle", {}, _CAT_SHAPES),
    ("dw_conv3x3", {"stride": 1, "relu": False}, _DEPTHWISE_SHAPES),
    ("dw_conv3x3", {"stride": 2, "relu": True}, _DEPTHWISE_SHAPES),
]
# Stride, channels of the output, shape of the input.
_UNITS: list[tuple[int, int, Shape]] = [
    (1, 116, (1, 116, 28, 28)),
    (1, 58, (3, 58, 15, 9)),
    (1, 48, (1, 48, 28, 28)),
    (1, 352, (2, 352, 14, 14)),
    (1, 976, (1, 976, 7, 7)),
    (1, 58, (1, 58, 1, 1)),
    (2, 116, (1, 24, 56, 56)),
    (2, 58, (3, 29, 15, 9)),
    (2, 48, (1, 24, 56, 56)),
    (2, 232, (2, 116, 28, 28)),
    (2, 58, (1, 24, 13, 1)),
]
_QUICK_UNITS = [_UNITS[0], _UNITS[1], _UNITS[6], _UNITS[7]]
_SIZES = [(224, 224), (97, 131)]
_EMULATED_SIZES = [(64, 64), (33, 45)]  # the emulator takes thousands of times as long as a GPU


@dataclass(frozen=True)
class Case:
    """One comparison; ``run`` gives our result, eager PyTorch's and the exact one, each a tensor or
    several."""

    name: str
    kind: str  # "op", "gradient", "unit" or "network": says which bound holds
    dtype: str
    memory_format: str
    run: Callable[[], tuple[Results, Results, Results]]

    def errors(self) -> tuple[float, float]:
        """Errors of our result and of eager PyTorch's; of several, those of the worst one.

        Raises:
            TypeError: if our result has another dtype than the input.
            ValueError: if it has the wrong shape.
        """
        with torch.no_grad():
            ours, eager, exact = (r if isinstance(r, tuple) else (r,) for r in self.run())
        errors = []
        for a, b, c in zip(ours, eager, exact, strict=True):
            if a.dtype != DTYPES[self.dtype]:
                raise TypeError(f"the result is {a.dtype}")
            errors.append((max_error(a, c), max_error(b, c)))
        return max(errors, key=lambda e: (math.isnan(e[0]), e[0] - EAGER_FACTOR * e[1]))


def all_cases(backend: str, quick: bool) -> list[Case]:
    """Every case for a backend; with ``quick`` fewer shapes and only the smallest network."""
    return [
        *_op_cases(backend, quick),
        *_split_cases(backend, quick),
        *_unit_cases(backend, quick),
        *_networks(backend, quick),
    ]


def _op_cases(backend: str, quick: bool) -> Iterator[Case]:
    for op, options, shapes in _OPS:
        suffix = f" stride {options['stride']}" if options else ""
        for shape, (dtype, fmt) in itertools.product(shapes[: 2 if quick else None], _variants()):
            x = _input(backend, shape, DTYPES[dtype], FORMATS[fmt])
            for name, kind, function in (
                (op, "op", _run_op),
                (f"{op}_backward", "gradient", _run_backward),
            ):
                run = functools.partial(function, backend, op, options, x)
                yield Case(f"{name}{suffix} {_text(shape)}", kind, dtype, fmt, run)


def _unit_cases(backend: str, quick: bool) -> Iterator[Case]:
    for (stride, oup, shape), (dtype, fmt) in itertools.product(
        _QUICK_UNITS if quick else _UNITS, _variants()
    ):
        run = functools.partial(
            _run_unit, backend, stride, oup, _input(backend, shape, DTYPES[dtype], FORMATS[fmt])
        )
        yield Case(f"unit stride {stride} {_text(shape)} -> {oup}", "unit", dtype, fmt, run)


def _split_cases(backend: str, quick: bool) -> Iterator[Case]:
    for shape, (dtype, fmt) in itertools.product(
        _SPLIT_SHAPES[: 2 if quick else None], _variants()
    ):
        run = functools.partial(
            _run_split, backend, _input(backend, shape, DTYPES[dtype], FORMATS[fmt])
        )
        yield Case(f"SplitDepthwiseShuffle {_text(shape)}", "op", dtype, fmt, run)


def _networks(backend: str, quick: bool) -> Iterator[Case]:
    sizes = _EMULATED_SIZES if backend == "cuda-emulated" else _SIZES
    for width, (height, wide), (dtype, fmt) in itertools.product(
        list(WIDTHS)[: 1 if quick else None], sizes, _variants()
    ):
        x = _input(backend, (1, 3, height, wide), DTYPES[dtype], FORMATS[fmt])
        name = f"network {width} {height}x{wide}"
        yield Case(name, "network", dtype, fmt, functools.partial(_run_network, backend, width, x))
        if backend != "reference" and fmt == "contiguous":  # an engine's own layout
            run = functools.partial(_run_engine, backend, width, x)
            yield Case(f"engine {width} {height}x{wide}", "network", dtype, fmt, run)


def _variants() -> Iterator[tuple[str, str]]:
    return itertools.product(DTYPES, FORMATS)


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _input(
    backend: str, shape: Shape, dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator).to(DEVICES.get(backend, "cpu"), dtype)
    return x.contiguous(memory_format=memory_format)


def _op_arguments(op: str, x: Tensor) -> list[Tensor]:
    if op == "cat_shuffle":
        return [x, x.flip(1) + 1]
    channels = x.shape[1] // (2 if op == "split_dw_cat_shuffle" else 1)
    conv = nn.Conv2d(channels, channels, 3, groups=channels, bias=False)
    bn = nn.BatchNorm2d(channels)
    randomize_(nn.Sequential(conv, bn), seed=channels)
    return [x, conv.weight.detach().to(x), *(t.to(x.device) for t in snv2.fold_bn(bn))]


def _run_op(
    backend: str, op: str, options: dict[str, int], x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    function = getattr(snv2.ops, op)
    arguments = _op_arguments(op, x)
    exact = function(*(t.double() for t in arguments), **options, backend="reference")
    eager = function(*arguments, **options, backend="reference")
    return function(*arguments, **options, backend=backend), eager, exact


@torch.enable_grad()
def _run_backward(
    backend: str, op: str, options: dict[str, int], x: Tensor
) -> tuple[Results, Results, Results]:
    """All gradients of an op, of a sum of its result with random weights."""
    arguments = [t.to(x.dtype) for t in _op_arguments(op, x)]

    def gradients(name: str, dtype: torch.dtype) -> Results:
        inputs = [t.detach().to(dtype).requires_grad_() for t in arguments]
        out = getattr(snv2.ops, op)(*inputs, **options, backend=name)
        n, c, h, w = out.shape
        weights = _input(backend, (n, c, h, w), x.dtype, torch.contiguous_format)
        return torch.autograd.grad(out, inputs, weights.to(dtype))

    return (
        gradients(backend, x.dtype),
        gradients("reference", x.dtype),
        gradients("reference", torch.float64),
    )


def _run_module(
    backend: str, module: nn.Module, plain: nn.Module, x: Tensor
) -> tuple[Tensor, Tensor]:
    """The outputs of ``module`` and, from eager PyTorch, of ``plain``."""
    with snv2.use_backend("reference"):
        eager = plain(x)
    with snv2.use_backend(backend):
        reason = module.reason() if isinstance(module, snv2.nn.FusedModule) else None
        if reason is not None and backend != "reference":
            raise RuntimeError(f"did not run fused: {reason}")
        return module(x), eager


def _run_unit(backend: str, stride: int, oup: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    inp = x.shape[1]
    plain = randomize_(snv2.models.InvertedResidual(inp, oup, stride).eval())
    unit = snv2.nn.InvertedResidual(inp, oup, stride).eval()
    for module in (plain, unit):
        module.to(x.device, x.dtype)
    unit.load_state_dict(plain.state_dict())
    return *_run_module(backend, unit, plain, x), float64_reference(plain)(x)


def _run_split(backend: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    module = randomize_(snv2.nn.SplitDepthwiseShuffle(x.shape[1]).eval())
    module.to(x.device, x.dtype)
    return *_run_module(backend, module, module, x), float64_reference(module)(x)


@functools.lru_cache(maxsize=1)  # cases that differ in memory format only follow each other
def _exact_network(
    backend: str, width: str, shape: Shape, dtype: torch.dtype
) -> tuple[snv2.models.ShuffleNetV2, Tensor]:
    """A random network, and its exact output for the input of that shape."""
    x = _input(backend, shape, dtype, torch.contiguous_format)
    plain = randomize_(WIDTHS[width]().eval()).to(x.device, dtype)
    with torch.no_grad():
        return plain, float64_reference(plain)(x)


def _run_network(backend: str, width: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, c, h, w = x.shape
    plain, exact = _exact_network(backend, width, (n, c, h, w), x.dtype)
    return *_run_module(backend, snv2.fuse(plain, backend), plain, x), exact


def _run_engine(backend: str, width: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, c, h, w = x.shape
    plain, exact = _exact_network(backend, width, (n, c, h, w), x.dtype)
    with snv2.use_backend(backend):
        engine = snv2.Engine(plain, input_shape=(n, c, h, w))
        return engine(x), plain(x), exact
