"""Tensors without values look as in PyTorch's own mode."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from snv2_kernels.graph.fake import LightMode

X = (2, 8, 9, 7)
FUNCTIONS: dict[str, Any] = {
    "relu": F.relu, "leaky": lambda x: F.leaky_relu(x, 0.1), "silu": F.silu, "hswish": F.hardswish,
    "hsigmoid": F.hardsigmoid, "relu6": F.relu6, "sigmoid": torch.sigmoid,
    "clamp": lambda x: x.clamp(0, 6), "clamp max": lambda x: torch.clamp(x, max=6.0),
    "in place": lambda x: F.silu(F.relu_(x), inplace=True),
    "clamp in place": lambda x: x.clamp_(0, 1),
    "add": lambda x: x + x, "number": lambda x: x * 2.5 / 3 - 1, "scaled": lambda x: x + 2 * x,
    "alpha": lambda x: torch.add(x, x, alpha=2), "rows": lambda x: x * x[..., :1],
    "gate": lambda x: x * x.mean((2, 3), keepdim=True), "flat": lambda x: x + x[0, 0, 0],
    "outer": lambda x: x[:, :, :1] + x[..., :1], "halves": lambda x: x[:, ::2] * x[:, 1::2],
    "integers": lambda x: x * 2 + (x > 0), "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.transpose(1, 2).contiguous(),
    "permute": lambda x: x.permute(2, 0, 3, 1),
    "permuted": lambda x: x.permute(2, 0, 3, 1) + 1, "cat": lambda x: torch.cat([x, x[:, :3]], 1),
    "cat rows": lambda x: torch.cat([x, x], 2), "cat last": lambda x: torch.cat([x, x], -1),
    "cat halves": lambda x: torch.cat([x[:, 4:].relu(), x[:, :4], x[:, ::2]], 1),
    "avg ceil": lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    "wrong cat": lambda x: torch.cat([x, x[..., 1:]], 1),
    "mean": lambda x: x.mean([2, 3]), "mean kept": lambda x: x.mean((-1, -2), True),
    "mean of all": lambda x: x.mean(), "max": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max ceil": lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True),
    "max dilated": lambda x: F.max_pool2d(x, 3, 1, 1, 2), "avg": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg window": lambda x: F.avg_pool2d(x, (9, 7)), "avg too large": lambda x: F.avg_pool2d(x, 11),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive 3": lambda x: F.adaptive_avg_pool2d(x, 3),
    "linear": lambda x: F.linear(x.mean((2, 3)), x.new_empty(5, 8), x.new_empty(5)),
    "no bias": lambda x: F.linear(x.mean((2, 3)), x.new_empty(5, 8)),
    "wrong linear": lambda x: F.linear(x.mean((2, 3)), x.new_empty(5, 9)),
    "zeros": torch.zeros_like, "empty": lambda x: torch.empty_like(x, dtype=torch.float16),
    "view": lambda x: x.view(2, 2, 4, 9, 7).transpose(1, 2).reshape(x.shape),
    "wrong view": lambda x: x.transpose(1, 2).view(2, -1),
    "split": lambda x: x.split([3, 5], 1)[1].relu(), "select": lambda x: x[1] + 1,
    "batch norm": lambda x: F.batch_norm(x, *x.new_ones(4, 8)), "softmax": lambda x: x.softmax(1),
    "item": lambda x: x * x.sum().item(), "index": lambda x: x[:, torch.tensor([1, 0, 3])],
    "numbers": lambda x: x * torch.tensor([2.0, 3.0])[0].item(), "double": lambda x: x.double() + x,
}  # fmt: skip


def told(mode: Any, function: Any, layout: Any) -> Any:
    with mode:
        x = torch.empty(X).to(memory_format=layout)
        try:
            out = function(x)
        except Exception as error:
            return type(error).__name__, str(error).splitlines()[0]
    assert isinstance(out, Tensor)
    shared = out.untyped_storage()._cdata == x.untyped_storage()._cdata
    return out.shape, out.stride(), out.storage_offset(), out.dtype, out.device, shared, out is x


LAYOUTS = {"contiguous": torch.contiguous_format, "last": torch.channels_last}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(name: str, layout: str) -> None:
    function, order = FUNCTIONS[name], LAYOUTS[layout]
    whole = FakeTensorMode(allow_non_fake_inputs=True)
    assert told(LightMode(), function, order) == told(whole, function, order)


OF_ANY_SHAPE = {
    "add": lambda x: x + x, "cat rows": lambda x: torch.cat([x, x], 2), "silu": F.silu,
    "cat last": lambda x: torch.cat([x, x], -1), "clone": lambda x: x.clone(),
    "empty": torch.empty_like, "avg": lambda x: F.avg_pool2d(x, 1),
    "pointwise": lambda x: F.conv2d(x, x.new_empty(4, x.shape[1], 1, 1)),
    "gate": lambda x: x * x.mean((2, 3), keepdim=True),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 8, 1, 1), (1, 1, 5, 5), (1, 8, 3, 3)])
@pytest.mark.parametrize("name", OF_ANY_SHAPE)
def test_dimensions_of_one_element(name: str, shape: tuple[int, ...]) -> None:
    """Channels-last maps are known by the strides of these."""

    def function(x: Tensor) -> Tensor:
        of_shape = torch.empty(shape, memory_format=torch.channels_last)
        out: Tensor = OF_ANY_SHAPE[name](of_shape)
        return out

    layout, whole = torch.contiguous_format, FakeTensorMode(allow_non_fake_inputs=True)
    assert told(LightMode(), function, layout) == told(whole, function, layout)


KERNELS = [(1, 1, 1, 0, 1), (3, 2, 1, 1, 1), (3, 1, 8, 1, 1), (5, 1, 2, 4, 2), (9, 1, 1, 0, 2)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "stride", "groups", "padding", "dilation"), KERNELS)
def test_convolution(
    size: int, stride: int, groups: int, padding: int, dilation: int, bias: bool, layout: str
) -> None:
    def function(x: Tensor, wrong: int = 0) -> Tensor:
        weight = x.new_empty(16, 8 // groups + wrong, size, size)
        b = x.new_empty(16) if bias else None
        return F.conv2d(x, weight, b, stride, padding, dilation, groups)

    whole = FakeTensorMode(allow_non_fake_inputs=True)
    for wrong, part in itertools.product((0, 1), (lambda x: x, lambda x: x[:, ::1, 1:])):
        found, expected = (
            told(mode, lambda x, p=part, w=wrong: function(p(x), w), LAYOUTS[layout])
            for mode in (LightMode(), whole)
        )
        assert found == expected
