"""Forwards that depend on sizes of their input: seen, or the same at all sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _cases import FP32_BOUND, draw, runs_fused
from test_recognition_conditions import Unit, explained, same
from torch import Tensor

import snv2_kernels as snv2
from snv2_kernels.testing import max_error


def doubled_if(asks: Callable[[Tensor], Any]) -> Callable[[Unit, Tensor], Tensor]:
    return lambda unit, x: 2 * x if asks(x) else x


# Questions about sizes of which Python code takes the answer.
QUESTIONS: dict[str, Callable[[Tensor], Any]] = {
    "even": lambda x: x.shape[2] % 2 == 0,
    "bit": lambda x: x.shape[2] & 1,
    "square": lambda x: x.shape[2] == x.shape[3],
    "not square": lambda x: x.shape[2] != x.shape[3],
    "above a small number": lambda x: x.shape[2] > 7,
    "above a huge number": lambda x: x.shape[2] > 100_000,
    "quotient by a huge number": lambda x: x.shape[2] // 100_000 == 0,
    "one image": lambda x: x.shape[0] == 1,
    "batch by three": lambda x: x.shape[0] % 3 == 1,
    "difference": lambda x: x.shape[2] - 5,
    "twice its half": lambda x: x.shape[2] // 2 * 2 == x.shape[2],
    "pooled even": lambda x: F.max_pool2d(x, 2).shape != F.max_pool2d(x, 2, ceil_mode=True).shape,
    "maximum": lambda x: max(x.shape[2:]) > 12,
    "floor": lambda x: math.floor(x.shape[2] / 2) == 3,
    "is whole": lambda x: (x.shape[2] / 2).is_integer(),
    "root": lambda x: math.sqrt(x.shape[2]) > 12,
    "range": lambda x: [0 for _ in range(x.shape[2])],
    "index": lambda x: ([0] * 9 + [1])[x.shape[2]],
    "key": lambda x: {7: 1}.get(x.shape[3]),
    "tuple": lambda x: tuple(x.shape[2:]) == (9, 7),
    "text": lambda x: str(x.shape[2]) == "5",
    "formatted": lambda x: f"{x.shape[2]}x{x.shape[3]}" == "5x7",
    "percent": lambda x: "%d" % x.shape[2] == "5",  # noqa: UP031
    "array": lambda x: np.zeros(x.shape[2]).sum(),
    "numel": lambda x: x.numel() > 5000,
    "flattened": lambda x: x.flatten(1).shape[1] > 5000,
    "length": lambda x: len(x) > 3,
    "of an even map": lambda x: F.max_pool2d(x, 2, ceil_mode=True).shape[2] % 2,
}
# What a forward computes with sizes that its result depends on.
USES: dict[str, Callable[[Tensor], Tensor]] = {
    "half a map": lambda x: x + 0 * x[:, :, : x.shape[2] // 2].sum(),
    "least": lambda x: x[:, :, : torch.sym_min(x.shape[2], 4000)],
    "crop": lambda x: x[:, :, :4000],
    "interpolated": lambda x: F.interpolate(x, scale_factor=2)[..., ::2, ::2],
    "padded": lambda x: F.pad(x, (0, -x.shape[3] % 4))[..., : x.shape[3]],
    "tensor": lambda x: x * torch.tensor(x.shape[2]) / 9,
    "arange": lambda x: x + torch.arange(x.shape[3]),
    "quotient": lambda x: x * (x.shape[2] / 9),
    "floored quotient": lambda x: x * (x.shape[2] // 9),
    "factor": lambda x: torch.add(x, x, alpha=x.shape[2] - 9),
    "slope": lambda x: F.leaky_relu(x, x.shape[2] / 9),
    "average of the first size": lambda x: x + F.avg_pool2d(x, (9, 7)),
    "rows of a crop": lambda x: x + x[:, :, :4].shape[2],
    "images of a crop": lambda x: x + x[:2].shape[0],
    "least of two": lambda x: x + torch.sym_min(x.shape[2], 5),
}  # fmt: skip
# Of the same sizes at any input.
SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "shape of a result": lambda x: x if x.shape[2:] == x.relu().shape[2:] else 2 * x,
    "product": lambda x: x if math.prod(x.shape[2:]) == x.flatten(2).shape[2] else 2 * x,
    "difference": lambda x: 2 * x if x.shape[2] - x.relu().shape[2] else x,
    "quotient": lambda x: x.view(*x.shape[:2], x.numel() // (x.shape[0] * 16 * x.shape[3]), -1),
}  # fmt: skip


@pytest.mark.parametrize("what", QUESTIONS)
def test_question_about_a_size(what: str) -> None:
    reason = explained(Unit(doubled_if(QUESTIONS[what])))
    assert reason == "(model): Unit: not fused: its control flow depends on the size of its input"


@pytest.mark.parametrize("what", USES)
def test_result_that_depends_on_a_size(what: str) -> None:
    """It is no part of a unit. Where it runs beside one, it is right at other sizes than those that
    the forward was recorded at, and beyond the numbers in it."""
    plain = Unit(lambda unit, x: USES[what](x))
    fused = snv2.fuse(plain)
    told = explained(plain)
    assert "not fused" in told or "partition of a unit" in told
    for shape in ((2, 16, 9, 7), (1, 16, 10, 8), (3, 16, 4003, 7), (1, 16, 5, 4003), (2, 16, 4, 3)):
        x = draw(*shape)
        try:
            with torch.no_grad():
                expected = plain(x)
        except RuntimeError:  # the window of an average is larger than the map
            continue
        with torch.no_grad():
            assert max_error(fused(x), expected) < FP32_BOUND


@pytest.mark.parametrize("what", SAME)
def test_question_with_one_answer_at_all_sizes(what: str) -> None:
    plain = Unit(lambda unit, x: SAME[what](x))
    fused = snv2.fuse(plain)
    for shape in ((2, 16, 5, 7), (1, 16, 8, 8), (3, 16, 1, 4)):
        x = draw(*shape)
        with torch.no_grad():
            same(fused, plain, x)
        assert runs_fused(fused, x)


def test_question_inside_a_network() -> None:
    """Where the map has been halved."""

    class Halved(Unit):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.max_pool2d(x, 3, 2, 1))

    ask = doubled_if(lambda x: x.shape[2] % 2)
    assert "depends on the size" in explained(Halved(ask))
