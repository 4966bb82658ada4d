"""Engine: fuse() frozen at one shape."""

from __future__ import annotations

import copy
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from _cases import (
    DTYPES,
    FP32_BOUND,
    KINDS,
    VIEWS,
    WIDTHS,
    assert_accurate,
    case_id,
    draw,
    each_kind,
    in_turn,
    needs_bfloat16,
    network,
    on_the_default_device,
    ops_called,
    plain_and_input,
    run_fused,
    small_network,
    threads,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import snv2_kernels as snv2
from snv2_kernels.testing import float64_reference, max_error

SHAPE = (2, 3, 37, 45)
MULTIPLY_ADDS = {"x0_5": 40.5e6, "x1_0": 144.9e6, "x1_5": 295.8e6, "x2_0": 583.3e6}


def small_engine(**kwargs: Any) -> snv2.Engine:
    return snv2.Engine(small_network(), SHAPE, **kwargs)


@pytest.mark.parametrize("batch", [0, 1, 3])
@each_kind
def test_equals_fuse(backend: str, kind: str, batch: int) -> None:
    model, x = plain_and_input(kind)
    x = draw(batch, *x.shape[1:])
    with snv2.use_backend(backend), torch.no_grad():
        engine = snv2.Engine(model, tuple(x.shape))
        expected = snv2.fuse(model)(x)
    assert torch.equal(engine(x), expected)
    assert engine.input_shape == tuple(x.shape)
    assert engine.report().backend == backend


@pytest.mark.parametrize(("width", "library"), in_turn(WIDTHS, ["torchvision", "snv2"]))
def test_networks(torchvision: Any, width: str, library: str) -> None:
    model = network(library, width)
    engine = snv2.Engine(model)
    x = draw(1, 3, 224, 224)
    with torch.no_grad():
        assert max_error(engine(x), model(x)) < FP32_BOUND


# Width, dtype and size of the images: the emulator takes a second for one, or half a minute.
NETWORKS = [
    pytest.param(
        width, dtype, size, id=f"{width}-{case_id(dtype)}-{size}",
        marks=[] if size == 64 else [pytest.mark.slow, *[pytest.mark.ci] * (width == "x1_0")],
    )
    for size in (64, 224)
    for width, dtype in in_turn(WIDTHS, DTYPES, turn=1)
]  # fmt: skip


@pytest.mark.supports("eval", "network")
@pytest.mark.parametrize(("width", "dtype", "size"), NETWORKS)
def test_networks_in_every_dtype(kernels: str, width: str, dtype: torch.dtype, size: int) -> None:
    model = on_the_default_device(network("snv2", width)).to(dtype)
    x = draw(1, 3, size, size, dtype=dtype)
    engine = snv2.Engine(model, tuple(x.shape))
    with torch.no_grad():
        eager, exact = model(x), float64_reference(model)(x)
        out = engine(x)
        assert_accurate("network", out, eager, exact, kernels)
        assert torch.equal(run_fused(snv2.fuse(model), x), out)


@pytest.mark.supports("eval", "Engine")
@pytest.mark.parametrize("dtype", DTYPES)
@each_kind
def test_dtype(kernels: str, kind: str, dtype: torch.dtype) -> None:
    model, x = plain_and_input(kind)
    engine = snv2.Engine(model, tuple(x.shape), dtype=dtype)
    assert engine.dtype == dtype
    low = copy.deepcopy(model).to(dtype)
    x = x.to(dtype)
    with torch.no_grad():
        eager = low(x)
    # The weights are not rounded, so the exact result is that of the float32 model.
    exact = float64_reference(model)(x)
    assert_accurate(kind.partition("-")[0], engine(x), eager, exact, kernels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.on_triton(1)
def test_dtype_defaults_to_the_parameters(kernels: str, dtype: torch.dtype) -> None:
    engine = snv2.Engine(small_network().to(dtype), SHAPE)
    assert engine.dtype == dtype
    assert engine(draw(*SHAPE, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("width", WIDTHS)
def test_report(width: str) -> None:
    model = network("snv2", width)
    report = snv2.Engine(model).report()
    assert abs(report.multiply_adds - MULTIPLY_ADDS[width]) < 0.05e6
    assert report.op_calls == 1
    assert report.units == 16
    assert report.backend == "cpu"
    assert report.dtype == torch.float32
    assert report.input_shape == (1, 3, 224, 224)
    assert report.output_shape == (1, 1000)
    assert report.input_bytes == 4 * 3 * 224 * 224
    assert report.output_bytes == 4000
    parameters = sum(p.numel() for p in model.parameters())
    assert 4 * parameters * 0.95 < report.weight_bytes < 4 * parameters * 1.3
    assert report.workspace_bytes > 0
    assert report.threads == torch.get_num_threads()
    assert f"{report.multiply_adds / 1e6:.1f} M multiply-adds" in str(report)


@needs_bfloat16
@pytest.mark.parametrize("width", WIDTHS)
def test_weights_of_bfloat16_take_half(width: str) -> None:
    model = network("snv2", width)
    single, narrow = (snv2.Engine(model, dtype=d) for d in (torch.float32, torch.bfloat16))
    assert narrow.report().weight_bytes < 0.6 * single.report().weight_bytes
    assert narrow.report().workspace_bytes < 0.85 * single.report().workspace_bytes
    assert narrow.report().multiply_adds == single.report().multiply_adds
    products = [engine._runner.plan.products(224, 224) for engine in (single, narrow)]
    assert len({tuple((p.step, p.name, p.multiply_adds) for p in ps) for ps in products}) == 1
    assert sum(p.multiply_adds for p in products[0]) == single.report().multiply_adds


def test_report_counts_all_images(kernels: str) -> None:
    one, three = (
        snv2.Engine(small_network(), (n, 3, 37, 45), dtype=torch.float16).report() for n in (1, 3)
    )
    assert three.multiply_adds == 3 * one.multiply_adds > 0
    assert three.input_bytes == 3 * one.input_bytes == 3 * 2 * 3 * 37 * 45


# A call ---------------------------------------------------------------------------------------


def test_call_is_one_op_that_allocates_nothing() -> None:
    engine = small_engine()
    x = draw(*SHAPE)
    first = engine(x)
    assert ops_called(engine, x) == ["snv2::network_out"]
    with torch.profiler.profile(profile_memory=True) as profile:
        second = engine(x)
    assert second.data_ptr() == first.data_ptr()
    assert sum(abs(event.cpu_memory_usage) for event in profile.events()) == 0


@pytest.mark.on_triton(0)
def test_output_is_overwritten_by_the_next_call(kernels: str) -> None:
    engine = small_engine()
    out = engine(draw(*SHAPE))
    before = out.clone()
    engine(draw(*SHAPE, seed=1))
    assert not torch.equal(out, before)
    assert torch.equal(engine(draw(*SHAPE)), before)


@pytest.mark.parametrize(("view", "kind"), in_turn(list(VIEWS), list(KINDS)))
@pytest.mark.on_triton(2)
def test_views(kernels: str, kind: str, view: str) -> None:
    model, x = plain_and_input(kind)
    x = VIEWS[view](*x.shape)
    engine = snv2.Engine(model, tuple(x.shape))
    assert torch.equal(engine(x), engine(x.contiguous()))
    cl = VIEWS[view](*x.shape, memory_format=torch.channels_last)
    assert torch.equal(engine(cl), engine(cl.contiguous()))


def test_input_is_not_written(kernels: str) -> None:
    x = draw(*SHAPE)
    small_engine()(x)
    assert torch.equal(x, draw(*SHAPE))


def _change_weights(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()


@pytest.mark.on_triton(0)
@pytest.mark.parametrize(
    "change", [_change_weights, nn.Module.half, nn.Module.train], ids=["zero", "half", "train"]
)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_weights_are_frozen(kernels: str, fused: bool, change: Any) -> None:
    model = snv2.fuse(small_network()) if fused else small_network()
    engine = snv2.Engine(model, SHAPE)
    x = draw(*SHAPE)
    before = engine(x).clone()
    change(model)
    assert torch.equal(engine(x), before)


def test_model_is_left_as_it_was() -> None:
    model = small_network()
    before = copy.deepcopy(model.state_dict())
    engine = snv2.Engine(model, SHAPE, dtype=torch.bfloat16)
    engine(draw(*SHAPE, dtype=torch.bfloat16))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(model) is snv2.models.ShuffleNetV2


@pytest.mark.on_triton(0)
def test_gradients(kernels: str) -> None:
    engine = small_engine()
    x = draw(*SHAPE).requires_grad_()
    with pytest.raises(ValueError, match="x: requires a gradient"):
        engine(x)
    with torch.no_grad():
        out = engine(x)
    assert not out.requires_grad
    assert torch.equal(out, engine(x.detach()))


@pytest.mark.on_triton(0)
@pytest.mark.parametrize("made", [False, True], ids=["made-outside", "made-inside"])
@pytest.mark.parametrize("contiguous", [False, True], ids=["strided", "contiguous"])
def test_inference_mode(kernels: str, made: bool, contiguous: bool) -> None:
    model = small_network()
    expected = snv2.Engine(model, SHAPE)(draw(*SHAPE)).clone()
    with torch.inference_mode(made):
        engine = snv2.Engine(model, SHAPE)
    x = draw(*SHAPE)
    x = x if contiguous else x.contiguous(memory_format=torch.channels_last)
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            assert max_error(engine(x), expected) == 0


@pytest.mark.on_triton(0)
def test_autocast_does_not_change_the_dtype(kernels: str) -> None:
    engine = small_engine()
    expected = engine(draw(*SHAPE)).clone()
    with torch.autocast(expected.device.type, torch.bfloat16):
        assert torch.equal(engine(draw(*SHAPE)), expected)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_another_number_of_threads(batch: int) -> None:
    """Made for one number of threads, called with more, and with fewer."""
    model = small_network()
    x = draw(batch, 3, 37, 45)
    expected = snv2.Engine(model, tuple(x.shape))(x).clone()
    for made in (1, 2, 4):
        with threads(made):
            engine = snv2.Engine(model, tuple(x.shape))
        for called in (4, 1, 3, 2, 8):
            with threads(called):
                assert max_error(engine(x), expected) < 1e-6


# Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 3, 37, 45), ValueError, r"or fewer images, got \(3, .*x\.split\(2\)"),
        (torch.zeros(2, 3, 37, 46), ValueError, r"x: expected shape \(2, 3, 37, 45\)"),
        (torch.zeros(2, 1, 37, 45), ValueError, r"x: expected shape \(2, 3, 37, 45\)"),
        (torch.zeros(3, 37, 45), ValueError, "x: expected 4 dimensions"),
        (torch.zeros(*SHAPE, dtype=torch.float16), TypeError, "x: expected torch.float32"),
        (torch.zeros(*SHAPE, dtype=torch.float64), TypeError, "x: expected torch.float32"),
        (torch.zeros(*SHAPE, dtype=torch.uint8), TypeError, "x: expected a floating-point"),
        (torch.zeros(*SHAPE, device="meta"), ValueError, "x: expected device cpu"),
        (None, TypeError, "x: expected a torch.Tensor"),
        ([[1.0]], TypeError, "x: expected a torch.Tensor"),
    ],
    ids=[
        "batch", "width", "channels", "rank", "fp16", "fp64", "uint8", "meta", "None", "list",
    ],
)  # fmt: skip
def test_input_that_does_not_fit(x: Any, error: type[Exception], message: str) -> None:
    engine = small_engine()
    with pytest.raises(error, match=message):
        engine(x)
    assert engine(draw(*SHAPE)).isfinite().all()


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 37), (2, 3, 37, 45, 1), (2, 4, 37, 45), (-1, 3, 37, 45), (2, 3, 0, 45), (2, 3, 37, 0),
     (2, 3, 37.0, 45), (2, 3, "a", 45), ()],
    ids=str,
)  # fmt: skip
def test_input_shape_that_does_not_fit(shape: Any) -> None:
    with pytest.raises(ValueError, match="input_shape: expected"):
        snv2.Engine(small_network(), shape)


def test_enormous_input_shape() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        snv2.Engine(small_network(), (1, 3, 1 << 20, 1 << 20))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64], ids=str)
def test_dtype_that_does_not_fit(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="dtype: expected float32, float16 or bfloat16"):
        small_engine(dtype=dtype)


def test_float64_model() -> None:
    with pytest.raises((TypeError, ValueError), match="float64"):
        snv2.Engine(small_network().double(), SHAPE)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "meta"])
def test_device_without_kernels(device: str) -> None:
    if device != "meta" and snv2.backends()["cuda"].startswith("ok"):
        pytest.skip("there are kernels for it")
    reason = "kernels run on" if device == "meta" else re.escape(snv2.backends()["cuda"])
    with pytest.raises(RuntimeError, match=f"device: .*{device}.*{reason}"):
        small_engine(device=device)


def test_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index beyond the last GPU was an assertion of torch's."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeError, match="device: there is no cuda:2; CUDA devices here: 2"):
        small_engine(device="cuda:2")


def test_backend_without_kernels() -> None:
    with (
        snv2.use_backend("reference"),
        pytest.raises(RuntimeError, match="device: the backend 'reference', which is set for cpu"),
    ):
        small_engine()


def test_cpu_device() -> None:
    for device in ("cpu", torch.device("cpu")):
        assert small_engine(device=device)(draw(*SHAPE)).device.type == "cpu"


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Conv2d(3, 8, 3).eval(), TypeError, "model: Conv2d is not a network, stage or unit"),
        (
            nn.Sequential(small_network(), nn.Softmax(1)).eval(),
            ValueError,
            "model: cannot run fused: 1 follows the network",
        ),
        (small_network().train(), ValueError, r"model: expected eval\(\) mode"),
        (3, TypeError, "model: expected a torch.nn.Module"),
        (snv2.models.InvertedResidual(6, 6, 3).eval(), TypeError, "model: InvertedResidual is not"),
    ],
    ids=["conv", "around", "train", "int", "stride-3"],
)
def test_model_that_does_not_fit(model: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        snv2.Engine(model, (1, 3, 32, 32))


def test_container_around_a_network() -> None:
    model = small_network()
    x = draw(1, 3, 32, 32)
    out = snv2.Engine(nn.Sequential(model).eval(), (1, 3, 32, 32))(x)
    assert torch.equal(out, snv2.Engine(model, (1, 3, 32, 32))(x))


def test_submodule_in_train_mode_or_with_hooks() -> None:
    model = small_network()
    model.stage2[0].branch1[1].train()
    with pytest.raises(ValueError, match=r"train\(\)"):
        snv2.Engine(model, SHAPE)
    model.eval().stage3.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="hooks"):
        snv2.Engine(model, SHAPE)


class _Reenters(TorchDispatchMode):
    def __init__(self, engine: snv2.Engine) -> None:
        super().__init__()
        self.engine = engine
        self.error: Exception | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            self.engine(args[0])
        except RuntimeError as error:
            self.error = error
        return func(*args, **(kwargs or {}))


def test_use_inside_use() -> None:
    engine = small_engine()
    x = draw(*SHAPE)
    expected = engine(x).clone()
    with _Reenters(engine) as mode:
        out = engine(x)
    assert "in use" in str(mode.error)
    assert "engine.clone()" in str(mode.error)
    assert torch.equal(out, expected)
    assert torch.equal(engine(x), expected)


def test_use_from_two_threads_is_right_or_an_error() -> None:
    engine = small_engine()
    expected = engine(draw(*SHAPE)).clone()

    def call(_: int) -> Tensor | None:
        try:
            return engine(draw(*SHAPE)).clone()
        except RuntimeError as error:
            if "in use" in str(error):
                return None
            raise

    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = [out for out in pool.map(call, range(60)) if out is not None]
    assert results
    assert all(torch.equal(out, expected) for out in results)
    assert torch.equal(engine(draw(*SHAPE)), expected)
