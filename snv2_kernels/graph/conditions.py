"""Conditions that a forward may ask about: dtype, device, gradients, memory format.

A forward is recorded in one of them, and again where it asks and others hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ASKED_OF_TENSORS", "USUAL", "Conditions", "conditions_at"]

# Attributes, methods and functions of tensors that give no tensor, by the word for what they ask
# about; those that are empty ask for what is the same in all calls.
_QUESTIONS = {
    "": (
        "shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "__len__", "layout",
        "is_meta", "is_nested", "is_quantized", "is_sparse", "is_sparse_csr", "is_mkldnn",
        "is_conj", "is_neg", "promote_types", "can_cast", "broadcast_shapes", "is_same_size",
    ),
    "dtype": (
        "dtype", "is_floating_point", "is_complex", "is_signed", "element_size", "itemsize",
        "nbytes", "result_type", "type",
    ),
    "device": ("device", "is_cuda", "is_cpu", "is_xpu", "is_mps", "get_device", "type"),
    "grad": (
        "requires_grad", "is_leaf", "grad_fn", "retains_grad", "detach", "detach_",
        "requires_grad_", "_set_grad_enabled",
    ),
    "inference": ("is_inference",),
    "format": ("is_contiguous",),
}  # fmt: skip
ASKED_OF_TENSORS: dict[str, set[str]] = {
    name: {asked for asked, names in _QUESTIONS.items() if asked and name in names}
    for names in _QUESTIONS.values()
    for name in names
}


@dataclass(frozen=True)
class Conditions:
    """What holds while a module is called."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"  # its type
    grad: bool = False  # gradients are enabled
    requires_grad: bool = False  # of the input
    ones: tuple[bool, bool, bool] = (False, False, False)  # batch, height and width are one
    is_contiguous: bool = True
    is_channels_last: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.contiguous_format if self.is_contiguous else torch.channels_last

    def dtype_of(self, t: Tensor) -> torch.dtype:
        """Dtype of what takes the place of a parameter or buffer."""
        return torch.float32 if self == USUAL and t.is_floating_point() else t.dtype

    def about(self, asked: frozenset[str], module: nn.Module) -> tuple[Any, ...]:
        """The part of the conditions, those of a module's tensors included, that is asked about."""
        tensors = [*module.parameters(), *module.buffers()]
        parts = {
            "dtype": (self.dtype, *map(self.dtype_of, tensors)),
            "device": self.device,
            "grad": (self.grad, self.requires_grad, *(t.requires_grad for t in tensors)),
            "format": (self.ones, self.is_contiguous, self.is_channels_last),
        }
        return tuple(parts[word] for word in sorted(asked) if word in parts)


USUAL = Conditions()


def conditions_at(x: Tensor) -> tuple[Any, ...]:
    """The fields of :class:`Conditions` in a call with ``x``; Dynamo can trace it."""
    n, _, h, w = x.shape
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    grad = torch.is_grad_enabled(), x.requires_grad
    return x.dtype, x.device.type, *grad, (n == 1, h == 1, w == 1), x.is_contiguous(), channels_last
