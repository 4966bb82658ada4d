"""What torch.export sees: packed weights as constants, and the kernels' own operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from snv2_kernels.backends import resolve
from snv2_kernels.nn.clone import clone_tree
from snv2_kernels.nn.fused import FusedModule, Packed
from snv2_kernels.packing.units import Unsupported

__all__ = ["run_exported"]


def run_exported(module: FusedModule, x: Tensor) -> Any:
    """The fused forward of a module whose parameters torch.export has replaced by fake ones.

    Raises:
        Unsupported: if it is to run plain.
    """
    backend = resolve(x.device, module._backend)
    with _disable_current_modes():
        real = _with_real_tensors(module)
        packed = Packed(real)
        if packed.runs_plain(real):
            raise Unsupported("plain")
    dtype = real._check(packed, x)
    with _disable_current_modes():
        weights = packed.weights(real, backend, dtype)
        if not real._covers(weights, _like(x)):
            raise Unsupported("plain")
    results = real._run(weights, x if x.dtype == dtype else x.to(dtype), backend)
    return module._finish(results)


def _with_real_tensors(module: FusedModule) -> FusedModule:
    """The module as it was before its tensors were replaced; the fake ones' mode knows of which."""
    real = clone_tree(module)
    assert isinstance(real, FusedModule)
    tensors = {id(t): t for t in (*real.parameters(), *real.buffers())}
    modes = {t.fake_mode for t in tensors.values() if isinstance(t, FakeTensor)}
    found = {}
    for mode in modes:
        converter = mode.fake_tensor_converter.meta_converter
        for t, number in converter.describer.lookup_tensor.items():
            found[id(converter.tensor_memo.get(number))] = t
    for child in real.modules():
        for registry in (child._parameters, child._buffers):
            for name, t in registry.items():
                if isinstance(t, FakeTensor):
                    if id(t) not in found:
                        raise Unsupported("parameters without values")
                    registry[name] = found[id(t)]
    return real


def _like(x: Tensor) -> Tensor:
    """A real tensor of x's shape without memory; a size that is not known yet is as in the example
    that was exported."""
    sizes = [size if isinstance(size, int) else size.node.hint for size in x.shape]
    return torch.empty((), dtype=x.dtype, device=x.device).expand(sizes)
