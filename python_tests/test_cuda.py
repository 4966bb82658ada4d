"""On a GPU: streams, graphs, devices; and its instructions beside the emulator's."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from _cases import (
    FP32_BOUND,
    draw,
    drop_in,
    each_drop_in,
    each_kind,
    ops_called,
    plain_and_input,
    run_fused,
    small_network,
)
from _conformance import assert_same, draw_words
from torch import Tensor

import snv2_kernels as snv2
from snv2_kernels import emulator
from snv2_kernels.gpu import current_device
from snv2_kernels.testing import max_error

SHAPE = (4, 58, 28, 28)
CASES = emulator.conformance_cases()
each_case = pytest.mark.parametrize("index", range(len(CASES)), ids=[name for name, *_ in CASES])


def words_for(name: str, count: int, seed: int) -> Tensor:
    """Random bits, or finite numbers of a matrix instruction's dtype; on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    if name == "reciprocal":  # which is not of all numbers
        return torch.from_numpy(draw_words(name, count, seed).view(np.int32))
    if not name.startswith("mma"):
        bits = torch.iinfo(torch.int32)
        return torch.randint(
            bits.min, bits.max, (count,), generator=generator, dtype=torch.int32, device="cpu"
        )
    values = torch.randn(2 * count, generator=generator, device="cpu")
    for mark, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        if mark in name:
            return values.to(dtype).view(torch.int32)
    return values[:count].view(torch.int32)


# The emulator alone ---------------------------------------------------------------------------


@each_case
def test_emulated_conformance(index: int) -> None:
    name, count, out_count = CASES[index]
    out = torch.ops.snv2_emulated.conformance(words_for(name, count, 0), index)
    assert out.dtype == torch.int32
    assert out.shape == (out_count,)


def test_conformance_arguments() -> None:
    run = torch.ops.snv2_emulated.conformance
    _, count, _ = CASES[0]
    words = torch.zeros(count + 4, dtype=torch.int32)
    for wrong, index, message in (
        (words[:count], -1, "index must be in"),
        (words[:count], len(CASES), "index must be in"),
        (words[: count - 1], 0, f"words must be {count} contiguous int32"),
        (words[:count].float(), 0, f"words must be {count} contiguous int32"),
        (words.repeat(2)[: 2 * count : 2], 0, f"words must be {count} contiguous int32"),
        (words[1 : count + 1], 0, "words must be aligned"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(wrong, index)


# On the GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@each_case
def test_conformance(gpu: None, index: int) -> None:
    """The same bits; sums of a matrix instruction up to the order of their terms."""
    name, count, _ = CASES[index]
    needs_clusters = name.startswith(("cluster", "copy_bulk", "barrier_", "store_async"))
    if needs_clusters and current_device(torch.device("cuda"))["cluster"] == 1:
        pytest.skip("this GPU has no clusters")
    for seed in range(16):
        words = words_for(name, count, seed)
        if name == "to_tf32":  # the instruction drops the end of a NaN's payload, perhaps all of it
            words = words.where(~words.view(torch.float32).isnan(), 0)
        emulated = torch.ops.snv2_emulated.conformance(words, index)
        real = torch.ops.snv2.conformance(words.cuda(), index).cpu()
        if name.startswith("mma"):
            emulated, real = emulated.view(torch.float32), real.view(torch.float32)
            assert max_error(real, emulated) < FP32_BOUND
        else:
            assert_same(name, *(t.numpy().view(np.uint32) for t in (real, emulated)))


def depthwise_parameters(channels: int) -> list[Tensor]:
    return [draw(channels, 1, 3, 3), draw(channels), draw(channels)]


DEPTHWISE_CHANNELS = {"cat_shuffle": 0, "dw_conv3x3": 58, "split_dw_cat_shuffle": 29}
each_op = pytest.mark.parametrize("op", DEPTHWISE_CHANNELS)


def prepared(op: str) -> Callable[[Tensor], Tensor]:
    """An op as a function of its map. Its parameters lie on the GPU, since copying them there
    would wait for the stream."""
    kernel = getattr(torch.ops.snv2, op)
    if op == "cat_shuffle":
        return lambda x: kernel(x, x)
    parameters = depthwise_parameters(DEPTHWISE_CHANNELS[op])
    return lambda x: kernel(x, *parameters)


@pytest.mark.gpu
def test_auto_takes_cuda(gpu: None) -> None:
    x = draw(*SHAPE)
    assert "snv2::cat_shuffle" in ops_called(snv2.ops.cat_shuffle, x, x)
    with pytest.raises(ValueError, match="backend: 'cpu' cannot run a tensor on device cuda:0"):
        snv2.ops.cat_shuffle(x, x, backend="cpu")
    with pytest.raises(ValueError, match="backend: 'cuda-emulated' cannot run a tensor on"):
        snv2.ops.cat_shuffle(x, x, backend="cuda-emulated")


@pytest.mark.gpu
def test_raw_arguments_on_two_devices(gpu: None) -> None:
    x, weights = draw(*SHAPE), depthwise_parameters(58)
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.ops.snv2.cat_shuffle(x, x.cpu())
    with pytest.raises(RuntimeError, match="a must be a CUDA tensor"):
        torch.ops.snv2.cat_shuffle(x.cpu(), x)
    with pytest.raises(RuntimeError, match="weight must be a contiguous float32 tensor on the dev"):
        torch.ops.snv2.dw_conv3x3(x, weights[0].cpu(), *weights[1:])


@pytest.mark.gpu
@each_op
def test_runs_on_the_current_stream(gpu: None, op: str) -> None:
    """On any other, the kernel would not wait for its input."""
    run, x, values = prepared(op), torch.zeros(SHAPE), draw(*SHAPE)
    expected = run(values)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clock cycles
        x.copy_(values)
        out = run(x)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["dense", "strided"])
@each_op
def test_graph(gpu: None, op: str, memory: str) -> None:
    """A strided input is copied inside the graph."""
    n, c, h, w = SHAPE
    run = prepared(op)
    x = draw(n, c, h, w) if memory == "dense" else draw(n, c, h, 2 * w)[..., ::2]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    for seed in (1, 2):
        x.copy_(draw(*SHAPE, seed=seed))
        graph.replay()
        assert torch.equal(out, run(x))


@pytest.mark.gpu
@each_op
def test_device_that_is_not_the_current_one(gpu: None, op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = prepared(op)(draw(*SHAPE)).cpu()
    with torch.device("cuda:1"):  # of new tensors: the current device stays
        out = prepared(op)(draw(*SHAPE))
    assert out.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(out.cpu(), expected)


@pytest.mark.gpu
def test_compile_of_an_op(gpu: None) -> None:
    a, b = draw(*SHAPE), draw(*SHAPE, seed=1)
    torch.compiler.reset()
    compiled = torch.compile(snv2.ops.cat_shuffle, backend="eager", fullgraph=True)
    assert torch.equal(compiled(a, b), snv2.ops.cat_shuffle(a, b))


# Networks on the GPU --------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.sanitize
@each_drop_in
def test_modules(gpu: None, kind: str) -> None:
    plain, module, x = drop_in(kind)
    with torch.no_grad():
        assert max_error(run_fused(module, x), plain(x)) < FP32_BOUND
    assert module.reason() is None


@pytest.mark.gpu
@each_kind
def test_modules_equal_the_emulators(gpu: None, kind: str) -> None:
    """Products add up in the same order there, but for what tensor cores do inside."""
    model, x = plain_and_input(kind)
    copied = copy.deepcopy(model).cpu()
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        with torch.no_grad():
            real = snv2.fuse(model.to(dtype))(x.to(dtype))
            with snv2.use_backend("cuda-emulated"):
                emulated = snv2.fuse(copied.to(dtype))(x.cpu().to(dtype))
        assert max_error(real.cpu(), emulated) < bound


@pytest.mark.gpu
@each_kind
def test_modules_run_on_the_current_stream(gpu: None, kind: str) -> None:
    model, values = plain_and_input(kind)
    module, x = snv2.fuse(model), torch.zeros_like(values)
    with torch.no_grad():
        expected = module(values)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            x.copy_(values)
            out = module(x)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.gpu
@each_kind
def test_modules_in_a_graph(gpu: None, kind: str) -> None:
    model, x = plain_and_input(kind)
    module = snv2.fuse(model)
    with torch.no_grad():
        module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x)
        for seed in (1, 2):
            x.copy_(draw(*x.shape, seed=seed))
            graph.replay()
            assert torch.equal(out, module(x))


@pytest.mark.gpu
def test_engine_replays_one_graph(gpu: None) -> None:
    model, x = plain_and_input("network")
    engine = snv2.Engine(model, tuple(x.shape))
    assert engine.report().graph
    expected = engine(x).clone()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        engine(engine.input)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if "Memcpy" not in event.name]
    assert len(kernels) >= engine.report().launches
    assert torch.equal(engine(x), expected)


@pytest.mark.gpu
def test_engine_runs_on_the_current_stream(gpu: None) -> None:
    model, values = plain_and_input("network")
    engine, x = snv2.Engine(model, tuple(values.shape)), torch.zeros_like(values)
    expected = engine(values).clone()
    engine(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(values)
        out = engine(x)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_engine_of_an_empty_batch(gpu: None) -> None:
    model, x = plain_and_input("network")
    engine = snv2.Engine(model, (0, *x.shape[1:]))
    assert not engine.report().graph
    assert engine(x[:0]).shape == (0, 10)


@pytest.mark.gpu
def test_engine_from_parameters_on_the_cpu(gpu: None) -> None:
    model, x = plain_and_input("network")
    expected = snv2.Engine(model, tuple(x.shape))(x)
    moved = snv2.Engine(copy.deepcopy(model).cpu(), tuple(x.shape), device="cuda")
    assert torch.equal(moved(x), expected)


@pytest.mark.gpu
def test_engine_on_a_device_that_is_not_the_current_one(gpu: None) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model, x = plain_and_input("network")
    expected = snv2.Engine(model, tuple(x.shape))(x).cpu()
    engine = snv2.Engine(model, tuple(x.shape), device="cuda:1")
    assert torch.equal(engine(x.to("cuda:1")).cpu(), expected)
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="x: expected device cuda:1, got cuda:0"):
        engine(x)


@pytest.mark.gpu
def test_device_of_the_kernels(gpu: None) -> None:
    """What they are cut to, told in the order of the emulator's."""
    properties = torch.cuda.get_device_properties(0)
    fields = current_device(torch.device("cuda"))
    assert list(fields) == list(emulator.device())
    assert fields["sms"] == properties.multi_processor_count
    assert fields["l2_bytes"] == properties.L2_cache_size
    assert fields["shared_per_cta"] <= fields["shared_per_sm"]
    assert fields["images"] == 0
    torch.ops.snv2.gpu_tune(images=2)
    try:
        assert current_device(torch.device("cuda"))["images"] == 2
        model, x = small_network(), draw(5, 3, 37, 45)
        tuned = snv2.Engine(model, tuple(x.shape))(x)
    finally:
        torch.ops.snv2.gpu_tune()
    assert torch.equal(tuned, snv2.Engine(model, tuple(x.shape))(x))
