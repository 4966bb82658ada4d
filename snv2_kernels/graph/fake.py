"""The mode of tensors without values, which imports nothing of PyTorch's compilers.

They take seconds, once in a process, and PyTorch's own mode asks them about each function. A
forward of convolutions, norms, activations and moves of channels calls few functions, whose
results' shapes are told here; any other, and any other kind of arguments, goes to PyTorch's mode,
which is imported then.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch._subclasses.fake_tensor import (
    _DISPATCH_META_HANDLERS,
    FakeTensor,
    FakeTensorConverter,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LightMode"]

_aten: Any = torch.ops.aten
_RULES: dict[Any, Callable[..., Tensor | None]] = {}


def _overloads(names: str) -> list[Any]:
    operators = (name.split(".") for name in names.split())
    return [getattr(getattr(_aten, name), overload[0] if overload else "default")
            for name, *overload in operators]  # fmt: skip


# Kernels for "meta" that are written in C++.
_BY_META = frozenset(_overloads(
    "_nnpack_available _unsafe_view detach expand index_select select.int slice.Tensor"
    " split.Tensor split_with_sizes squeeze.dim squeeze.dims t transpose.int unsqueeze view"
))  # fmt: skip


def _rule(names: str) -> Callable[[Any], Any]:
    """Registers what the results of functions look like, in the memory of "meta" or an argument's;
    None where they may look otherwise."""

    def register(rule: Any) -> Any:
        _RULES.update(dict.fromkeys(_overloads(names), rule))
        return rule

    return register


def _is_plain(*tensors: Any) -> bool:
    """Whether these are floats of one dtype, and dimensions in memory in the order of their names,
    so that what is computed of them is contiguous."""
    kinds = {t.dtype for t in tensors}
    return len(kinds) == 1 and tensors[0].is_floating_point() and all(map(_descends, tensors))


def _descends(t: Tensor) -> bool:
    # Also of dimensions of one element, by whose strides PyTorch knows channels-last maps.
    strides = list(t.stride())
    return t.numel() > 0 and 0 not in strides and strides == sorted(strides, reverse=True)


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


@_rule("relu leaky_relu silu hardswish hardsigmoid hardtanh sigmoid clamp")
def _pointwise(x: Tensor, *limits: Any, **_: Any) -> Tensor | None:
    return _new(x, *x.shape) if _is_plain(x) and _are_numbers(limits) else None


@_rule("relu_ leaky_relu_ silu_ hardswish_ hardsigmoid_ hardtanh_ sigmoid_ clamp_")
def _pointwise_in_place(x: Tensor, *limits: Any) -> Tensor | None:
    return x if x.is_floating_point() and _are_numbers(limits) else None


def _are_numbers(values: Any) -> bool:
    return all(value is None or type(value) in (int, float, bool) for value in values)


@_rule("add.Tensor sub.Tensor mul.Tensor div.Tensor")
def _binary(a: Any, b: Any) -> Tensor | None:
    tensors = [each for each in (a, b) if isinstance(each, Tensor)]
    numbers = [each for each in (a, b) if not isinstance(each, Tensor)]
    if not tensors or not _is_plain(*tensors) or not _are_numbers(numbers):
        return None
    largest = max(tensors, key=Tensor.numel)
    if len({t.dim() for t in tensors}) > 1:
        return None
    pairs = (pair for t in tensors for pair in zip(t.shape, largest.shape, strict=True))
    fit = all(size in (1, n) for size, n in pairs)
    return _new(largest, *largest.shape) if fit else None


@_rule("empty.memory_format")
def _empty(size: Any, *, memory_format: Any = None, **kwargs: Any) -> Tensor:
    kwargs = {**kwargs, "device": "meta"}
    return torch.empty(size, memory_format=memory_format or torch.contiguous_format, **kwargs)


@_rule("empty_like")
def _empty_like(x: Tensor, **kwargs: Any) -> Tensor | None:
    return _new(x, *x.shape) if _is_plain(x) and not any(kwargs.values()) else None


@_rule("clone")
def _clone(x: Tensor, memory_format: Any = None) -> Tensor | None:
    kept = memory_format in (None, torch.preserve_format) and _is_plain(x)
    return _new(x, *x.shape) if kept or memory_format is torch.contiguous_format else None


@_rule("permute")
def _permute(x: Any, dims: Any) -> Tensor | None:
    order = list(range(x.dim()))
    if sorted(d % max(x.dim(), 1) for d in dims) != order:
        return None
    out: Tensor = x
    with in_kernel_invocation_manager(x.fake_mode):  # its own kernel asks for the device
        for i, dim in enumerate(dims):
            j = order.index(dim % len(order))
            out, order[i], order[j] = _aten.transpose(out, i, j), order[j], order[i]
    return out


@_rule("cat")
def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor | None:
    if not _is_plain(*tensors) or not 0 <= dim < tensors[0].dim():
        return None
    if len({(*t.shape[:dim], *t.shape[dim + 1 :]) for t in tensors}) > 1:
        return None
    first, length = tensors[0], sum(t.shape[dim] for t in tensors)
    return _new(first, *first.shape[:dim], length, *first.shape[dim + 1 :])


@_rule("mean.dim")
def _mean(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor | None:
    if not _is_plain(x) or not dim or not all(-x.dim() <= d < x.dim() for d in dim):
        return None
    left = {d % x.dim() for d in dim}
    if len(left) < len(dim):
        return None
    extents = [1 if i in left else extent for i, extent in enumerate(x.shape)]
    return _new(x, *(e for i, e in enumerate(extents) if keepdim or i not in left))


@_rule("mm")
def _mm(a: Tensor, b: Tensor) -> Tensor | None:
    fit = a.dtype == b.dtype and a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0]
    return _new(a, a.shape[0], b.shape[1]) if fit else None


@_rule("addmm")
def _addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    fits = bias.dtype == a.dtype and tuple(bias.shape) == (b.shape[-1],)
    return _mm(a, b) if fits else None


def _pooled(x: Tensor, window: Any, stride: Any, padding: Any) -> list[int] | None:
    """The extents behind a window, None where it does not fit."""
    stride = stride or window
    lists = window, stride, padding
    if x.dim() != 4 or not _is_plain(x) or any(len(each) != 2 for each in lists):
        return None
    if (
        min(window) < 1
        or min(stride) < 1
        or any(2 * p > k for p, k in zip(padding, window, strict=True))
    ):
        return None
    return [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(x.shape[2:], *lists, strict=True)]


@_rule("max_pool2d_with_indices")
def _max_pool(
    x: Tensor, window: Any, stride: Any = (), padding: Any = (0, 0), dilation: Any = (1, 1)
) -> Any:
    made = _pooled(x, window, stride, padding) if list(dilation) == [1, 1] else None
    if made is None or min(made) < 1:
        return None
    shape = *x.shape[:2], *made
    return _new(x, *shape), torch.empty(shape, dtype=torch.int64, device="meta")


@_rule("avg_pool2d")
def _avg_pool(
    x: Tensor, window: Any, stride: Any = (), padding: Any = (0, 0), ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor | None:  # fmt: skip
    made = _pooled(x, window, stride, padding)
    if made is None or ceil_mode:
        return None
    if min(made) < 1:  # as PyTorch says it
        given, told = ("x".join(map(str, (x.shape[1], *hw))) for hw in (x.shape[2:], made))
        raise RuntimeError(
            f"Given input size: ({given}). Calculated output size: ({told})."
            " Output size is too small"
        )
    return _new(x, *x.shape[:2], *made)


@_rule("convolution")
def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Tensor | None:  # fmt: skip
    if x.dim() != 4 or weight.dim() != 4 or transposed or x.dtype != weight.dtype or groups < 1:
        return None
    stride, padding, dilation = (list(v) * (2 // len(v)) for v in (stride, padding, dilation))
    outputs, inputs, *window = weight.shape
    fits = x.shape[1] == inputs * groups and outputs % groups == 0 and outputs > 0
    fits = fits and (bias is None or (bias.dtype == x.dtype and tuple(bias.shape) == (outputs,)))
    fits = fits and min(*stride, *dilation) > 0 and min(padding) >= 0 and math.prod(x.shape) > 0
    sizes = zip(x.shape[2:], window, stride, padding, dilation, strict=True)
    made = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    if not fits or min(made) < 1:
        return None
    order = _order_of(x, weight, bias, stride, padding, dilation, output_padding, groups)
    return _new(x, x.shape[0], outputs, *made).to(memory_format=order)


def _order_of(
    x: Any, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    output_padding: Any, groups: int,
) -> torch.memory_format:  # fmt: skip
    """The order in memory of a convolution's result, worked out once for each kind of arguments: it
    takes longer than all else here, and the units of a stage are alike."""
    mode: LightMode = x.fake_mode
    tensors = (x, weight) if bias is None else (x, weight, bias)
    kinds = ((t.shape, t.stride(), t.dtype, t.requires_grad) for t in tensors)
    numbers = map(tuple, (stride, padding, dilation, output_padding))
    key = *kinds, *numbers, groups, x.fake_device, torch.is_grad_enabled()
    if key not in mode.orders:
        with mode:  # where tensors tell what device they stand for
            backend = torch._C._select_conv_backend(
                x, weight, bias=bias, stride=stride, padding=padding, dilation=dilation,
                transposed=False, output_padding=output_padding, groups=groups, bias_sizes=None,
            )  # fmt: skip
            order = torch._C._conv_determine_backend_memory_format(x, weight, backend)
        mode.orders[key] = order
    return mode.orders[key]


class LightMode(FakeTensorMode):
    """PyTorch's mode, that is made whole where a call needs it."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        config: Any = torch._functorch.config
        self._is_whole = False
        self.orders: dict[Any, torch.memory_format] = {}  # of results of convolutions
        self.propagate_real_tensors = config.fake_tensor_propagate_real_tensors
        self.fake_tensor_converter = FakeTensorConverter(copy_data=False, export=False)
        self.static_shapes, self.shape_env = True, None
        self._allow_unsafe_data_ptr_access = config.fake_tensor_allow_unsafe_data_ptr_access
        self.allow_meta = config.fake_tensor_allow_meta
        self.allow_non_fake_inputs, self.in_kernel_invocation = True, False
        self.enter_stack = []
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE

    def _make_whole(self) -> None:
        if not self._is_whole:
            whole = vars(FakeTensorMode(allow_non_fake_inputs=True))
            vars(self).update({name: whole[name] for name in whole.keys() - vars(self).keys()})
            self._is_whole = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would import it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "torch._dynamo" in sys.modules:
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        return self.dispatch(func, types, args, kwargs)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DISPATCH_META_HANDLERS:
            return super().dispatch(func, types, args, kwargs)
        known = func in _RULES or func in _BY_META
        device = self._device_of(args, kwargs) if known else None
        if device is not None and (out := self._told(func, args, kwargs, device)) is not None:
            return out
        self._make_whole()
        return super().dispatch(func, types, args, kwargs)

    def _device_of(self, args: Any, kwargs: Any) -> torch.device | None:
        """The device of all tensors and results; None where there are several, or values."""
        tensors = _tensors_in((*args, *kwargs.values()))
        if not all(self.is_our_fake(t) and t.constant is None for t in tensors):
            return None
        devices = {t.fake_device for t in tensors}
        devices |= {kwargs["device"]} if kwargs.get("device") else set()
        return devices.pop() if len(devices) == 1 else None if devices else torch.device("cpu")

    def _told(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        """The result of a call, None where PyTorch's mode is to tell it."""
        if func in _RULES:
            try:
                out = _RULES[func](*args, **kwargs)
            except (TypeError, ValueError):  # arguments that a rule does not know
                return None
        else:
            try:
                with in_kernel_invocation_manager(self):
                    out = func(*args, **kwargs)
            except (NotImplementedError, IndexError, RuntimeError):  # to be told as PyTorch does
                return None
        return self._wrapped(out, device)

    def _wrapped(self, out: Any, device: torch.device) -> Any:
        """A result's tensors as those of this mode."""
        if isinstance(out, Tensor):
            return out if isinstance(out, FakeTensor) else FakeTensor(self, out, device)
        if isinstance(out, tuple | list):
            return type(out)([self._wrapped(part, device) for part in out])
        return out


def _tensors_in(values: Any) -> list[Any]:
    """Tensors among arguments, which are values and lists of them."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors_in(value)
    return found
