"""What ``snv2 verify`` runs: ops, units and networks on real and odd shapes."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.cli.common import DTYPES, FORMATS, WIDTHS
from snv2_kernels.testing import float64_reference, max_error, randomize_

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Case", "all_cases"]

Shape = tuple[int, int, int, int]

# For split_dw_cat_shuffle and SplitDepthwiseShuffle; the first shapes are those of the networks.
_SPLIT_SHAPES = [
    (1, 116, 28, 28),
    (3, 58, 15, 9),
    (1, 48, 28, 28),
    (2, 352, 14, 14),
    (1, 976, 7, 7),
    (2, 58, 13, 7),
    (1, 2, 1, 1),
    (0, 116, 7, 7),
]
_CAT_SHAPES = [
    (1, 58, 28, 28),
    (3, 29, 15, 9),
    (2, 116, 14, 14),
    (1, 488, 7, 7),
    (1, 1, 1, 1),
    (0, 29, 7, 7),
]
_DEPTHWISE_SHAPES = [
    (1, 58, 28, 28),
    (3, 29, 15, 9),
    (1, 24, 56, 56),
    (2, 232, 14, 14),
    (1, 58, 1, 1),
    (1, 3, 2, 13),
    (0, 29, 7, 7),
]
# stride, channels in, channels out, batch, height, width
_UNITS = [
    (1, 116, 116, 1, 28, 28),
    (1, 58, 58, 3, 15, 9),
    (2, 24, 116, 1, 56, 56),
    (2, 29, 58, 3, 15, 9),
    (1, 48, 48, 1, 28, 28),
    (1, 352, 352, 2, 14, 14),
    (1, 976, 976, 1, 7, 7),
    (1, 58, 58, 1, 1, 1),
    (2, 24, 48, 1, 56, 56),
    (2, 116, 232, 2, 28, 28),
    (2, 24, 58, 1, 13, 1),
]
_NETWORK_SIZES = [(224, 224), (97, 131)]


@dataclass(frozen=True)
class Case:
    """One comparison; ``run(backend)`` gives our result, eager PyTorch's and the exact one."""

    name: str
    kind: str  # "op", "unit" or "network": which bound holds
    dtype: str
    memory_format: str
    run: Callable[[str], tuple[Tensor, Tensor, Tensor]]

    def errors(self, backend: str) -> tuple[float, float]:
        """Errors of our result and of eager PyTorch's.

        Raises:
            TypeError: if the result has another dtype than the input.
            ValueError: if it has the wrong shape.
        """
        with torch.no_grad():
            ours, eager, exact = self.run(backend)
        if ours.dtype != DTYPES[self.dtype]:
            raise TypeError(f"the result is {ours.dtype}")
        return max_error(ours, exact), max_error(eager, exact)


def all_cases(quick: bool) -> list[Case]:
    """Every case, or with ``quick`` one real and one odd shape of each kind and two networks."""
    return [*_op_cases(quick), *_unit_cases(quick), *_network_cases(quick)]


def _variants() -> Iterator[tuple[str, str]]:
    return itertools.product(DTYPES, FORMATS)


def _input(shape: Shape, dtype: str, memory_format: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    return x.contiguous(memory_format=FORMATS[memory_format])


def _depthwise_parameters(channels: int, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """A random weight in ``dtype`` and a folded batch norm in float32."""
    conv = nn.Conv2d(channels, channels, 3, groups=channels, bias=False)
    layer = randomize_(nn.Sequential(conv, nn.BatchNorm2d(channels)).eval(), seed=channels)
    bn = layer[1]
    assert isinstance(bn, nn.BatchNorm2d)
    return (conv.weight.detach().to(DTYPES[dtype]), *snv2.fold_bn(bn))


def _op(name: str, dtype: str, memory_format: str, inputs: Callable[[], list[Tensor]],
        call: Callable[[list[Tensor], str], Tensor]) -> Case:  # fmt: skip
    def run(backend: str) -> tuple[Tensor, Tensor, Tensor]:
        tensors = inputs()
        exact = call([t.double() for t in tensors], "reference")
        return call(tensors, backend), call(tensors, "reference"), exact

    return Case(name, "op", dtype, memory_format, run)


def _op_cases(quick: bool) -> Iterator[Case]:
    for shape, (dtype, fmt) in itertools.product(
        _SPLIT_SHAPES[: 2 if quick else None], _variants()
    ):
        yield _op(
            f"split_dw_cat_shuffle {_text(shape)}", dtype, fmt,
            lambda s=shape, d=dtype, f=fmt: [_input(s, d, f), *_depthwise_parameters(s[1] // 2, d)],
            lambda t, backend: snv2.ops.split_dw_cat_shuffle(*t, backend=backend),
        )  # fmt: skip
    for shape, (dtype, fmt) in itertools.product(_CAT_SHAPES[: 2 if quick else None], _variants()):
        yield _op(
            f"cat_shuffle {_text(shape)}", dtype, fmt,
            lambda s=shape, d=dtype, f=fmt: [_input(s, d, f), _input(s, d, f) + 1],
            lambda t, backend: snv2.ops.cat_shuffle(*t, backend=backend),
        )  # fmt: skip
    for shape, stride, (dtype, fmt) in itertools.product(
        _DEPTHWISE_SHAPES[: 2 if quick else None], (1, 2), _variants()
    ):
        yield _op(
            f"dw_conv3x3 stride {stride} {_text(shape)}", dtype, fmt,
            lambda s=shape, d=dtype, f=fmt: [_input(s, d, f), *_depthwise_parameters(s[1], d)],
            lambda t, backend, stride=stride: snv2.ops.dw_conv3x3(
                *t, stride=stride, relu=stride == 2, backend=backend
            ),
        )  # fmt: skip


def _module(
    name: str, kind: str, dtype: str, memory_format: str, shape: Shape,
    make: Callable[[], tuple[nn.Module, nn.Module, nn.Module | None]],
) -> Case:  # fmt: skip
    ...


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))
