"""Arguments that do not fit raise an ordinary exception that names them; the rest is right."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _cases import (
    FP32_BOUND,
    KINDS,
    VIEWS,
    draw,
    drop_in,
    each_drop_in,
    runs_fused,
    small_network,
    unit_pair,
)
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels import ops
from snv2_kernels.testing import max_error, randomize_

MAP = (2, 6, 5, 7)


def zeros(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(*shape, **kwargs)


def cat(a: Any = None, b: Any = None) -> Tensor:
    return ops.cat_shuffle(zeros(*MAP) if a is None else a, zeros(*MAP) if b is None else b)


def depthwise(
    x: Any = None, weight: Any = None, scale: Any = None, shift: Any = None, **kwargs: Any
) -> Tensor:
    x = zeros(*MAP) if x is None else x
    c = x.shape[1] if isinstance(x, Tensor) and x.dim() > 1 else 6
    return ops.dw_conv3x3(
        x,
        zeros(c, 1, 3, 3) if weight is None else weight,
        zeros(c) if scale is None else scale,
        zeros(c) if shift is None else shift,
        **kwargs,
    )


def split(x: Any = None, weight: Any = None, scale: Any = None, shift: Any = None) -> Tensor:
    return ops.split_dw_cat_shuffle(
        zeros(*MAP) if x is None else x,
        zeros(3, 1, 3, 3) if weight is None else weight,
        zeros(3) if scale is None else scale,
        zeros(3) if shift is None else shift,
    )


# What a feature map may not be.
MAPS: dict[str, tuple[Any, type[Exception], str]] = {
    "list": ([[1.0]], TypeError, "expected a torch.Tensor, got list"),
    "numpy": (zeros(*MAP).numpy(), TypeError, "expected a torch.Tensor, got ndarray"),
    "int64": (zeros(*MAP, dtype=torch.int64), TypeError, "floating-point dtype, got torch.int64"),
    "uint8": (zeros(*MAP, dtype=torch.uint8), TypeError, "floating-point dtype, got torch.uint8"),
    "bool": (zeros(*MAP, dtype=torch.bool), TypeError, "floating-point dtype, got torch.bool"),
    "complex": (zeros(*MAP, dtype=torch.complex64), TypeError, "floating-point dtype"),
    "rank-3": (zeros(6, 5, 7), ValueError, r"expected 4 dimensions.*\(6, 5, 7\)"),
    "rank-5": (zeros(1, *MAP), ValueError, "expected 4 dimensions"),
    "rank-0": (zeros(()), ValueError, "expected 4 dimensions"),
    "no-rows": (zeros(2, 6, 0, 7), ValueError, "expected at least one pixel"),
    "no-columns": (zeros(2, 6, 5, 0), ValueError, "expected at least one pixel"),
}
FUNCTIONS: dict[str, Callable[[Any], Tensor]] = {
    "a": lambda t: cat(a=t),
    "b": lambda t: cat(b=t),
    "x-depthwise": lambda t: depthwise(t, zeros(6, 1, 3, 3), zeros(6), zeros(6)),
    "x-split": split,
}
each_map = pytest.mark.parametrize("case", MAPS)
each_backend = pytest.mark.parametrize("backend", ["reference", "cpu", "cuda-emulated"])


@each_backend
@each_map
@pytest.mark.parametrize("function", FUNCTIONS)
def test_maps_of_ops(function: str, case: str, backend: str) -> None:
    value, error, message = MAPS[case]
    with snv2.use_backend(backend), pytest.raises(error, match=f"^{function[0]}: .*{message}"):
        FUNCTIONS[function](value)


@each_map
@each_drop_in
def test_maps_of_modules(kind: str, case: str) -> None:
    """In eval mode. What plain PyTorch takes too, such as one image without a batch, is no
    exception."""
    _, module, _ = drop_in(kind)
    value, error, message = MAPS[case]
    with pytest.raises(error, match=f"^x: .*{message}"):
        module(value)


low = draw(*MAP, dtype=torch.float16)
DOES_NOT_FIT: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "cat-shape": (lambda: cat(b=zeros(2, 6, 5, 8)), ValueError, "b: expected shape"),
    "cat-channels": (lambda: cat(b=zeros(2, 5, 5, 7)), ValueError, "b: expected shape"),
    "cat-dtype": (lambda: cat(b=low), TypeError, "b: expected torch.float32, as a"),
    "cat-device": (lambda: cat(b=zeros(*MAP, device="meta")), ValueError, "b: expected device"),
    "dw-stride-0": (lambda: depthwise(stride=0), ValueError, "stride: expected 1 or 2, got 0"),
    "dw-stride-3": (lambda: depthwise(stride=3), ValueError, "stride: expected 1 or 2, got 3"),
    "dw-stride-negative": (lambda: depthwise(stride=-1), ValueError, "stride: expected 1 or 2"),
    "dw-stride-pair": (lambda: depthwise(stride=(1, 1)), ValueError, "stride: expected 1 or 2"),
    "dw-stride-str": (lambda: depthwise(stride="2"), ValueError, "stride: expected 1 or 2"),
    "dw-weight-channels": (
        lambda: depthwise(weight=zeros(5, 1, 3, 3)), ValueError, r"weight: expected shape \(6, 1"
    ),
    "dw-weight-groups": (lambda: depthwise(weight=zeros(6, 2, 3, 3)), ValueError, "weight: "),
    "dw-weight-5x5": (lambda: depthwise(weight=zeros(6, 1, 5, 5)), ValueError, "weight: "),
    "dw-weight-rank": (lambda: depthwise(weight=zeros(6, 3, 3)), ValueError, "weight: "),
    "dw-weight-dtype": (lambda: depthwise(weight=low), TypeError, "weight: expected torch.float32"),
    "dw-weight-int": (lambda: depthwise(weight=3), TypeError, "weight: expected a torch.Tensor"),
    "dw-weight-device": (
        lambda: depthwise(weight=zeros(6, 1, 3, 3, device="meta")), ValueError, "weight: expected d"
    ),
    "dw-scale-shape": (lambda: depthwise(scale=zeros(5)), ValueError, r"scale: expected shape \(6"),
    "dw-scale-dtype": (lambda: depthwise(scale=zeros(6).double()), TypeError, "scale: expected"),
    "dw-shift-shape": (lambda: depthwise(shift=zeros(6, 1, 1)), ValueError, "shift: expected sha"),
    "dw-shift-float": (lambda: depthwise(shift=0.0), TypeError, "shift: expected a torch.Tensor"),
    "split-odd": (lambda: split(zeros(2, 5, 5, 7)), ValueError, "x: expected an even number of ch"),
    "split-none": (lambda: split(zeros(2, 0, 5, 7)), ValueError, "x: expected an even number of "),
    "split-weight": (lambda: split(weight=zeros(6, 1, 3, 3)), ValueError, r"weight: .*\(3, 1, 3"),
    "split-scale": (lambda: split(scale=zeros(6)), ValueError, r"scale: expected shape \(3,\)"),
    "split-shift": (lambda: split(shift=zeros(3).int()), TypeError, "shift: expected"),
}  # fmt: skip


@each_backend
@pytest.mark.parametrize("case", DOES_NOT_FIT)
def test_arguments_of_ops(case: str, backend: str) -> None:
    call, error, message = DOES_NOT_FIT[case]
    with snv2.use_backend(backend), pytest.raises(error, match=f"^{message}"):
        call()


@pytest.mark.parametrize("backend", ["cpu", "cuda-emulated"])
def test_out_of_memory_says_how_much_for_what(backend: str) -> None:
    """More than addresses reach, so that no machine has it."""
    x = zeros(1).expand(1 << 20, 4, 4096, 4096)
    message = f"cannot allocate memory for the result: {1 << 49} bytes"
    with snv2.use_backend(backend), pytest.raises(RuntimeError, match=message):
        cat(x, x)
    if backend == "cpu":
        unit = snv2.nn.InvertedResidual(4, 4, 1).eval()
        message = f"cannot allocate memory for a dense copy of x: {1 << 48} bytes"
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            unit(x)


@each_drop_in
def test_channels_of_modules(kind: str) -> None:
    plain, module, x = drop_in(kind)
    for channels in (0, 1, x.shape[1] - 1, x.shape[1] + 1, 2 * x.shape[1]):
        wrong = zeros(2, channels, 9, 11)
        with pytest.raises(ValueError, match=rf"^x: expected {x.shape[1]} channels, got shape"):
            module(wrong)
        with pytest.raises((RuntimeError, ValueError)):
            plain(wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@each_drop_in
def test_dtypes_of_modules(kind: str, dtype: torch.dtype) -> None:
    _, module, x = drop_in(kind)
    with pytest.raises(TypeError, match=f"^x: expected torch.float32.*got {dtype}"):
        module(x.to(dtype))
    with pytest.raises(TypeError, match=r"^x: expected torch.bfloat16.*got torch.float32"):
        module.bfloat16()(x)


@each_drop_in
def test_devices_of_modules(kind: str) -> None:
    _, module, x = drop_in(kind)
    with pytest.raises((ValueError, RuntimeError)):
        module(x.to("meta"))
    with pytest.raises(ValueError, match=r"^x: expected device meta.*got cpu"):
        module.to("meta")(x)


def test_parameters_on_two_devices() -> None:
    """Left to plain PyTorch."""
    plain, unit = unit_pair(1, 34, 34)
    for module in (plain, unit):
        module.branch2[5].to("meta")
    assert "2 devices" in str(unit.reason())
    x = draw(2, 34, 9, 11)
    assert unit(x).device == plain(x).device


@each_drop_in
def test_sparse_input(kind: str) -> None:
    """Left to plain PyTorch, which says what it thinks of it."""
    plain, module, x = drop_in(kind)
    for m in (plain, module):
        with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError)):
            m(x.to_sparse())


@pytest.mark.parametrize("channels", [0, -2, 3, 7], ids=str)
def test_channels_of_split_depthwise_shuffle(channels: int) -> None:
    with pytest.raises(ValueError, match=r"^channels: expected an even positive number"):
        snv2.nn.SplitDepthwiseShuffle(channels)


# Unusual but right ----------------------------------------------------------------------------


def test_stride_3_runs_plain(isa: str) -> None:
    plain = randomize_(snv2.models.InvertedResidual(8, 8, 3)).eval()
    unit = snv2.nn.InvertedResidual(8, 8, 3).eval()
    unit.load_state_dict(plain.state_dict())
    x = draw(2, 8, 9, 11)
    assert not runs_fused(unit, x)
    assert torch.equal(unit(x), plain(x))
    assert unit.reason() == "depthwise with stride (3, 3)"


def test_odd_channels_lose_one_as_in_torchvision() -> None:
    plain, unit = unit_pair(2, 9, 21)
    x = draw(2, 9, 9, 11)
    with torch.no_grad():
        assert unit(x).shape == (2, 20, 5, 6)
        assert max_error(unit(x), plain(x)) < 1e-6


@pytest.mark.parametrize("view", VIEWS)
def test_network_of_views(view: str) -> None:
    model = small_network()
    x = VIEWS[view](2, 3, 37, 45)
    with torch.no_grad():
        assert max_error(snv2.fuse(model)(x), model(x)) < FP32_BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_share_memory(kind: str) -> None:
    _, module, x = drop_in(kind)
    with torch.no_grad():
        first = module(x)
        kept = first.clone()
        second = module(x + 1)
    assert torch.equal(first, kept)
    assert first.data_ptr() != second.data_ptr()


@each_backend
def test_channels_without_any(backend: str) -> None:
    for function in (cat, depthwise):
        try:
            with snv2.use_backend(backend):
                out = function(zeros(2, 0, 5, 7))
        except (ValueError, RuntimeError):
            continue
        assert out.shape == (2, 0, 5, 7)


def test_module_that_is_garbage_after_the_call() -> None:
    """The graph keeps alive what the backward pass needs."""
    x = draw(2, 34, 9, 11).requires_grad_()
    out = randomize_(snv2.nn.InvertedResidual(34, 34, 1)).eval()(x)
    out.sum().backward()
    assert x.grad is not None


def test_interpreter_exits_cleanly_with_models_alive() -> None:
    program = (
        "import torch, snv2_kernels as snv2\n"
        "fast = snv2.fuse(snv2.models.shufflenet_v2_x0_5().eval())\n"
        "out = fast(torch.zeros(1, 3, 64, 64))\n"
        "engine = snv2.Engine(fast, (1, 3, 32, 32))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_recursion_of_modules_is_not_special() -> None:
    """A fused unit inside a module that a fused network holds."""

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 1

    model = small_network()
    model.stage3[1] = Wrapped(model.stage3[1])
    x = draw(2, 3, 37, 45)
    with torch.no_grad():
        assert max_error(snv2.fuse(model)(x), model(x)) < FP32_BOUND
