"""The ops as functions, each with its formula in plain PyTorch (backend ``reference``).

All take [N, C, H, W] tensors of float32, float16 or bfloat16, in contiguous or channels-last
memory, and return a new tensor of the same dtype in the same memory format; other strides are
copied first, float64 runs the reference. Arithmetic is in float32, rounded once. All have
gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from snv2_kernels import emulator
from snv2_kernels.backends import EMULATED, resolve
from snv2_kernels.graph.constant import constant_to_dynamo
from snv2_kernels.models.blocks import channel_shuffle, check_stride

if TYPE_CHECKING:
    from collections.abc import Callable

    from snv2_kernels.packing import GpuPlan, Plan, TritonPlan

__all__ = ["cat_shuffle", "dw_conv3x3", "run_plan", "split_dw_cat_shuffle"]

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Checks ---------------------------------------------------------------------------------------


def check_feature_map(x: Tensor, name: str = "x") -> None:
    """Raise TypeError or ValueError, naming the argument, unless ``x`` is a feature map."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(f"{name}: expected 4 dimensions [N, C, H, W], got {_shape(x)}")
    if shape[2] == 0 or shape[3] == 0:
        raise ValueError(f"{name}: expected at least one pixel, got {_shape(x)}")


def _shape(x: Tensor) -> str:
    return f"shape {tuple(x.shape)}"


def _check_depthwise(
    x: Tensor, channels: int, weight: Tensor, scale: Tensor, shift: Tensor
) -> None:
    dtypes, device, vector = (x.dtype, torch.float32), x.device, (channels,)
    for name, parameter, shape in (
        ("weight", weight, (channels, 1, 3, 3)),
        ("scale", scale, vector),
        ("shift", shift, vector),
    ):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(parameter).__name__}")
        if parameter.dtype not in dtypes:
            raise TypeError(f"{name}: expected {x.dtype} or torch.float32, got {parameter.dtype}")
        if parameter.shape != shape:
            raise ValueError(
                f"{name}: expected shape {shape} for x of {_shape(x)}, got {_shape(parameter)}"
            )
        if parameter.device != device:
            raise ValueError(f"{name}: expected device {device}, as x, got {parameter.device}")


def _check_split(x: Tensor) -> None:
    check_feature_map(x)
    if x.shape[1] % 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected an even number of channels, got {_shape(x)}")


# Reference ------------------------------------------------------------------------------------


def _cat_shuffle_reference(a: Tensor, b: Tensor) -> Tensor:
    shuffled = channel_shuffle(torch.cat([a, b], 1), 2)
    return shuffled.contiguous(memory_format=_format(a))


def _dw_conv3x3_reference(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride: int = 1, relu: bool = False
) -> Tensor:
    y = F.conv2d(x, weight.to(x.dtype), None, stride, 1, 1, x.shape[1])
    y = y * scale[:, None, None] + shift[:, None, None]
    return (y.relu() if relu else y).to(x.dtype)


def _split_dw_cat_shuffle_reference(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    passthrough, main = x.chunk(2, 1)
    main = _dw_conv3x3_reference(main, weight, scale, shift, 1, True)
    return _cat_shuffle_reference(passthrough, main).contiguous(memory_format=_format(x))


# Public ops -----------------------------------------------------------------------------------


# The dispatcher tells the CPU's kernels and the GPU's apart by the tensors.
OPERATORS = {
    "cpu": torch.ops.snv2,
    "cuda": torch.ops.snv2,
    "cuda-emulated": torch.ops.snv2_emulated,
    "triton": torch.ops.snv2_triton,
}


def operators(backend: str) -> Any:
    """The operators of a backend that is available, None for the reference."""
    if backend == "triton":
        import snv2_kernels.triton  # noqa: F401  # defines them
    return OPERATORS.get(backend)


def _kernels(x: Tensor, backend: str | None) -> Any:
    """The operators of the backend that runs ``x``, None for the reference."""
    name = resolve(x.device, backend)
    return operators(name) if x.dtype in KERNEL_DTYPES else None


def _parameters(*tensors: Tensor) -> list[Tensor]:
    return [
        t if t.dtype is torch.float32 and t.is_contiguous() else t.float().contiguous()
        for t in tensors
    ]


@constant_to_dynamo  # Dynamo guards both levels by itself
def inside_transform() -> bool:
    """Returns whether a functorch transform or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _called(op: Any, *args: Any) -> Any:
    """Calls an operator, below autograd where nobody can ask for gradients.

    Its part of autograd is Python code, which takes longer than a small map.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or inside_transform():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def cat_shuffle(a: Tensor, b: Tensor, backend: str | None = None) -> Tensor:
    """Concat and channel shuffle in one pass.

    ``y = channel_shuffle(torch.cat([a, b], 1), 2)``, that is ``y[:, 2 * i] = a[:, i]`` and
    ``y[:, 2 * i + 1] = b[:, i]``.

    Args:
        a: [N, C, H, W], the even channels of the result.
        b: the odd ones, of the same shape, dtype and device.
        backend: see :mod:`snv2_kernels.backends`.

    Returns:
        [N, 2 * C, H, W].

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_feature_map(a, "a")
    check_feature_map(b, "b")
    if a.shape != b.shape:
        raise ValueError(f"b: expected {_shape(a)}, as a, got {_shape(b)}")
    if a.dtype != b.dtype:
        raise TypeError(f"b: expected {a.dtype}, as a, got {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"b: expected device {a.device}, as a, got {b.device}")
    kernels = _kernels(a, backend)
    if kernels is None:
        return _cat_shuffle_reference(a, b)
    out: Tensor = _called(kernels.cat_shuffle, a, b)
    return out


def dw_conv3x3(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int = 1,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Depthwise 3x3 convolution, folded batch norm and, if asked, ReLU.

    ``y = F.conv2d(x, weight, None, stride, 1, 1, C) * scale + shift``, ``y.relu()``.

    Args:
        x: [N, C, H, W].
        weight: [C, 1, 3, 3], of x's dtype or float32.
        scale: [C], of x's dtype or float32, as :func:`snv2_kernels.fold_bn` gives it.
        shift: as ``scale``.
        stride: 1 or 2.
        relu: apply a ReLU last.
        backend: see :mod:`snv2_kernels.backends`.

    Returns:
        [N, C, ceil(H / stride), ceil(W / stride)].

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    check_feature_map(x)
    check_stride(stride)
    _check_depthwise(x, x.shape[1], weight, scale, shift)
    kernels = _kernels(x, backend)
    if kernels is None:
        return _dw_conv3x3_reference(x, weight, scale, shift, stride, relu)
    parameters = _parameters(weight, scale, shift)
    out: Tensor = _called(kernels.dw_conv3x3, x, *parameters, stride, relu)
    return out


def split_dw_cat_shuffle(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, backend: str | None = None
) -> Tensor:
    """Split, depthwise 3x3 + BN + ReLU on the main half, concat and shuffle, in one pass::

        a, b = x.chunk(2, 1)
        b = (F.conv2d(b, weight, None, 1, 1, 1, C // 2) * scale + shift).relu()
        y = channel_shuffle(torch.cat([a, b], 1), 2)

    Args:
        x: [N, C, H, W], C even.
        weight: [C / 2, 1, 3, 3], of x's dtype or float32.
        scale: [C / 2], of x's dtype or float32.
        shift: as ``scale``.
        backend: see :mod:`snv2_kernels.backends`.

    Returns:
        [N, C, H, W].

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
    """
    _check_split(x)
    _check_depthwise(x, x.shape[1] // 2, weight, scale, shift)
    kernels = _kernels(x, backend)
    if kernels is None:
        return _split_dw_cat_shuffle_reference(x, weight, scale, shift)
    out: Tensor = _called(kernels.split_dw_cat_shuffle, x, *_parameters(weight, scale, shift))
    return out


def run_plan(x: Tensor, plan: Plan | GpuPlan | TritonPlan, backend: str) -> Any:
    """Run a packed unit, stage or network on a backend's kernels, in one op call.

    Args:
        x: [N, plan.in_channels, H, W]; float32, float16 or bfloat16, a GPU plan's own dtype.
        plan: of the backend's kind, from :mod:`snv2_kernels.packing`.
        backend: "cpu", "cuda", "cuda-emulated" or "triton".

    Returns:
        [N, plan.out_channels] for a classifier, else a feature map in logical order. A tuple of
        all results, in the order of the network, where the plan has several.

    Raises:
        TypeError: if the plan is none, or of another backend's kind.
        ValueError, RuntimeError: naming what else does not fit.
    """
    if backend not in (known := tuple(OPERATORS)):
        raise ValueError(f"backend: expected one of {', '.join(known)}, got {backend!r}")
    if backend not in getattr(plan, "backends", ()):
        raise TypeError(f"plan: expected one for {backend}, got {type(plan).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    kernels = operators(backend)
    name = "gpu_network" if backend.startswith("cuda") else "network"
    if len(plan.results) == 1:
        return _called(getattr(kernels, name), x, *plan.arguments)
    return tuple(_called(getattr(kernels, f"{name}_results"), x, *plan.result_arguments))


# Fake kernels ---------------------------------------------------------------------------------


def _format(x: Tensor) -> torch.memory_format:
    """The memory format of a result for ``x``; the rule of ``layout_of`` in tensors.h."""
    smallest = 0
    if x.stride(1) == 0:
        return torch.contiguous_format
    for dim in (1, 3, 2, 0):
        size, stride = x.shape[dim], x.stride(dim)
        if size == 0 or stride < smallest or (dim == 0 and smallest == x.stride(1)):
            return torch.contiguous_format
        smallest = stride * max(size, 1)
    return torch.channels_last


def _empty_map(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (x.shape[0], channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_format(x))


def _check_one_device(x: Tensor, *others: Tensor) -> None:
    torch._check(
        all(t.device == x.device for t in others), lambda: "all tensors must be on one device"
    )


def _cat_shuffle_fake(a: Tensor, b: Tensor) -> Tensor:
    _check_one_device(a, b)
    return _empty_map(a, 2 * a.shape[1], a.shape[2], a.shape[3])


def _dw_conv3x3_fake(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride: int = 1, relu: bool = False
) -> Tensor:
    _check_one_device(x, weight, scale, shift)
    height, width = ((extent - 1) // stride + 1 for extent in x.shape[2:])
    return _empty_map(x, x.shape[1], height, width)


def _split_dw_cat_shuffle_fake(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    _check_one_device(x, weight, scale, shift)
    return _empty_map(x, x.shape[1], x.shape[2], x.shape[3])


def _cat_shuffle_backward_fake(grad: Tensor) -> tuple[Tensor, Tensor]:
    _, channels, height, width = grad.shape
    return (
        _empty_map(grad, channels // 2, height, width),
        _empty_map(grad, channels // 2, height, width),
    )


def _depthwise_backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int = 1,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_one_device(x, grad, weight, scale, shift)
    grads = [t.new_empty(t.shape) for t in (weight, scale, shift)]
    return _empty_map(x, x.shape[1], x.shape[2], x.shape[3]), grads[0], grads[1], grads[2]


_MOST_CHANNELS, _MOST_HALVINGS = 1 << 24, 1 << 10  # what a fake kernel, which sees no plan, takes


def _plan_fake(
    x: Tensor, out_channels: int, halvings: int, classify: bool, where: str = ""
) -> Tensor:
    for name, value, least, most in (
        (f"channels{where}" if where else "out_channels", out_channels, 1, _MOST_CHANNELS),
        (f"halvings{where}", halvings, 0, _MOST_HALVINGS),
    ):
        if not least <= value <= most:
            raise ValueError(f"{name}: expected {least} to {most}, got {value}")
    if classify:
        return x.new_empty(x.shape[0], out_channels)
    height, width = x.shape[2:]
    for _ in range(halvings):
        height, width = (height + 1) // 2, (width + 1) // 2
    return _empty_map(x, out_channels, height, width)


@torch.library.register_fake("snv2::network")
def _(
    x: Tensor, weights: Tensor, plan: Tensor, out_channels: int, halvings: int, classify: bool
) -> Tensor:
    return _plan_fake(x, out_channels, halvings, classify)


def _results_fake(
    x: Tensor, channels: list[int], halvings: list[int], classify: bool
) -> list[Tensor]:
    if len(channels) != len(halvings):
        raise ValueError(
            f"halvings: expected {len(channels)} elements, as channels, got {len(halvings)}"
        )
    last = len(channels) - 1
    return [
        _plan_fake(x, c, times, classify and i == last, f"[{i}]")
        for i, (c, times) in enumerate(zip(channels, halvings, strict=True))
    ]


@torch.library.register_fake("snv2::network_results")
def _(
    x: Tensor,
    weights: Tensor,
    plan: Tensor,
    channels: list[int],
    halvings: list[int],
    classify: bool,
) -> list[Tensor]:
    return _results_fake(x, channels, halvings, classify)


@torch.library.register_fake("snv2::network_out")
def _(x: Tensor, weights: Tensor, plan: Tensor, workspace: Tensor, results: list[Tensor]) -> None:
    return None


def _gpu_network_fake(
    x: Tensor,
    weights: Tensor,
    parameters: Tensor,
    tables: Tensor,
    plan: Tensor,
    out_channels: int,
    halvings: int,
    classify: bool,
) -> Tensor:
    _check_one_device(x, weights, parameters, tables)
    return _plan_fake(x, out_channels, halvings, classify)


def _gpu_network_results_fake(
    x: Tensor,
    weights: Tensor,
    parameters: Tensor,
    tables: Tensor,
    plan: Tensor,
    channels: list[int],
    halvings: list[int],
    classify: bool,
) -> list[Tensor]:
    _check_one_device(x, weights, parameters, tables)
    return _results_fake(x, channels, halvings, classify)


def _gpu_network_out_fake(
    x: Tensor,
    weights: Tensor,
    parameters: Tensor,
    tables: Tensor,
    plan: Tensor,
    workspace: Tensor,
    results: list[Tensor],
    scale: list[float],
    shift: list[float],
) -> None:
    return None


def _conformance_fake(words: Tensor, index: int) -> Tensor:
    cases = emulator.conformance_cases()
    if not 0 <= index < len(cases):
        raise ValueError(f"index: expected 0 to {len(cases) - 1}, got {index}")
    _, _, out_words = cases[index]
    return words.new_empty(out_words)


# Gradients ------------------------------------------------------------------------------------


# An op's gradient is a kernel, and the kernel's own gradient, for second derivatives, that of the
# formula.


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For ops whose tensors come first."""
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.rest = inputs[len(tensors) :]


def _second_gradients(
    reference: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    rest: tuple[Any, ...],
    grads: tuple[Tensor, ...],
) -> list[Tensor | None]:
    """Gradients by ``inputs``, the gradient of ``reference(*others, *rest)`` and the others, of its
    gradients by the others, which come with ``grads``."""
    create_graph = torch.is_grad_enabled()  # the caller wants a third derivative
    with torch.enable_grad():
        # Views, since one of them may depend on another.
        views = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
        grad, *others = views
        first = torch.autograd.grad(reference(*others, *rest), others, grad, create_graph=True)
    return list(
        torch.autograd.grad(first, views, grads, create_graph=create_graph, allow_unused=True)
    )


def _register_depthwise_gradient(
    namespace: str, name: str, reference: Callable[..., Tensor]
) -> None:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        op = getattr(getattr(torch.ops, namespace), f"{name}_backward")
        return *op(grad, *ctx.saved_tensors, *ctx.rest), *[None for _ in ctx.rest]

    def backward_twice(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        second = _second_gradients(reference, ctx.saved_tensors, ctx.rest, grads)
        return *second, *[None for _ in ctx.rest]

    register = torch.library.register_autograd
    register(f"{namespace}::{name}", backward, setup_context=_save_inputs)
    register(f"{namespace}::{name}_backward", backward_twice, setup_context=_save_inputs)


def _register_cat_shuffle_gradient(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)
    register = torch.library.register_autograd
    register(f"{namespace}::cat_shuffle", lambda ctx, grad: ops.cat_shuffle_backward(grad))
    register(f"{namespace}::cat_shuffle_backward", lambda ctx, a, b: ops.cat_shuffle(a, b))


def register_python_parts(namespace: str) -> None:
    """Fake kernels and gradients of the ops that every backend has."""
    for name, fake in (
        ("cat_shuffle", _cat_shuffle_fake),
        ("dw_conv3x3", _dw_conv3x3_fake),
        ("split_dw_cat_shuffle", _split_dw_cat_shuffle_fake),
        ("cat_shuffle_backward", _cat_shuffle_backward_fake),
        ("dw_conv3x3_backward", _depthwise_backward_fake),
        ("split_dw_cat_shuffle_backward", _depthwise_backward_fake),
    ):
        torch.library.register_fake(f"{namespace}::{name}", fake)
    _register_cat_shuffle_gradient(namespace)
    _register_depthwise_gradient(namespace, "dw_conv3x3", _dw_conv3x3_reference)
    _register_depthwise_gradient(namespace, "split_dw_cat_shuffle", _split_dw_cat_shuffle_reference)


def _no_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "a plan has no gradient of its own; the modules in snv2_kernels.nn have"
    )


def register_gpu_parts(namespace: str) -> None:
    """Fake kernels and gradients of a library of CUDA kernels."""
    register_python_parts(namespace)
    for name, fake in (
        ("gpu_network", _gpu_network_fake),
        ("gpu_network_results", _gpu_network_results_fake),
        ("gpu_network_out", _gpu_network_out_fake),
    ):
        torch.library.register_fake(f"{namespace}::{name}", fake)
    for name in ("gpu_network", "gpu_network_results"):
        torch.library.register_autograd(f"{namespace}::{name}", _no_gradient)


for _name in ("network", "network_results"):
    torch.library.register_autograd(f"snv2::{_name}", _no_gradient)
register_gpu_parts("snv2")
if EMULATED:
    register_gpu_parts("snv2_emulated")
    torch.library.register_fake("snv2_emulated::conformance", _conformance_fake)
