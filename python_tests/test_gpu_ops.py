"""gpu_network and gpu_network_out: opcheck, arguments that do not fit, plans that are damaged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _cases import (
    DTYPES,
    FORMATS,
    KINDS,
    VIEWS,
    case_id,
    draw,
    drawn,
    in_turn,
    plain_and_input,
    small_network,
)
from _plans import STEP_FIELDS
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import snv2_kernels as snv2
from snv2_kernels import _native, gpu
from snv2_kernels.ops import OPERATORS
from snv2_kernels.packing import GpuPlan
from snv2_kernels.runners import WORKSPACE_SLACK

ERRORS = (RuntimeError, ValueError, NotImplementedError)


def plan_and_input(
    kind: str, dtype: torch.dtype = torch.float32, taps: Any = ()
) -> tuple[GpuPlan, Tensor]:
    model, x = plain_and_input(kind)
    return snv2.fuse(model)._gpu_plan(dtype, x.device, taps), x.to(dtype)


def workspace(plan: GpuPlan, n: int, h: int, w: int) -> Tensor:
    device = plan.weights.device
    size = gpu.workspace_bytes(plan.words, n, h, w, gpu.current_device(device))
    return torch.zeros(size + WORKSPACE_SLACK, dtype=torch.uint8, device=device)


def out_arguments(plan: GpuPlan, x: Tensor) -> list[Any]:
    n, _, h, w = x.shape
    results = [
        torch.zeros(shape, dtype=x.dtype, device=x.device) for shape in plan.result_shapes(n, h, w)
    ]
    return [x, *plan.arrays, workspace(plan, n, h, w), results, [], []]


def on_bytes(plan: GpuPlan, image: Tensor) -> list[Any]:
    n, h, w, _ = image.shape
    results = [torch.zeros(shape, dtype=plan.dtype) for shape in plan.result_shapes(n, h, w)]
    pixels = [[0.01] * 3, [-1.0] * 3]
    return [image, *plan.arrays, workspace(plan, n, h, w), results, *pixels]


# opcheck --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "memory_format", "dtype"),
    in_turn(list(KINDS), FORMATS, DTYPES),
    ids=case_id,
)
def test_opcheck(
    gpu_backend: str, kind: str, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    ops = OPERATORS[gpu_backend]
    plan, x = plan_and_input(kind, dtype)
    torch.library.opcheck(ops.gpu_network_out.default, tuple(out_arguments(plan, x)))
    x = x.contiguous(memory_format=memory_format)
    torch.library.opcheck(ops.gpu_network.default, (x, *plan.arguments))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("view", VIEWS)
def test_fake_results_of_views_have_the_strides_of_real_ones(
    gpu_backend: str, view: str, memory_format: torch.memory_format
) -> None:
    plan, _ = plan_and_input("unit-s1")
    x = VIEWS[view](2, 34, 5, 7, memory_format=memory_format)
    op = OPERATORS[gpu_backend].gpu_network.default
    torch.library.opcheck(op, (x, *plan.arguments), test_utils="test_faketensor")


def test_opcheck_of_several_results(gpu_backend: str) -> None:
    plan, x = plan_and_input("network", taps=("stage2", "stage4"))
    ops = OPERATORS[gpu_backend]
    torch.library.opcheck(ops.gpu_network_out.default, tuple(out_arguments(plan, x)))
    with pytest.raises(ERRORS, match="plan must have one result, has 3"):
        ops.gpu_network(x, *plan.arguments)


def test_gpu_network_says_that_it_has_no_gradient(gpu_backend: str) -> None:
    plan, x = plan_and_input("unit-s1")
    out = OPERATORS[gpu_backend].gpu_network(x.requires_grad_(), *plan.arguments)
    with pytest.raises(NotImplementedError, match="no gradient"):
        out.sum().backward()


# Raw arguments --------------------------------------------------------------------------------


def refused(op: Any, good: list[Any], wrong: list[tuple[int, Any, str]]) -> None:
    for i, value, message in wrong:
        with pytest.raises(ERRORS, match=message):
            op(*good[:i], value, *good[i + 1 :])


def shifted(t: Tensor) -> Tensor:
    """The same values, one element further."""
    return torch.cat([t.new_zeros(1), t])[1:]


def test_raw_arguments(gpu_backend: str) -> None:
    plan, x = plan_and_input("unit-s1")
    good = [x, *plan.arguments]
    weights, parameters, tables, words = plan.arrays
    op = OPERATORS[gpu_backend].gpu_network
    arrays = [(1, "weights", weights), (2, "parameters", parameters), (3, "tables", tables)]
    wrong: list[tuple[int, Any, str]] = [
        (0, x[:, :-1], "x must have 34 channels"),
        (0, x.double(), "x must be float32"),
        (0, x.half(), "contiguous, of the plan's dtype|x must have the plan's dtype"),
        (0, x[0], "x must have 4 dimensions"),
        (0, x[:, :, :0], "x must have at least one pixel"),
        (4, words.int(), "plan must be a contiguous int64 CPU tensor"),
        (4, words.repeat(2)[::2], "plan must be a contiguous int64 CPU tensor"),
        (4, words[:-1], "plan|tables"),
        (4, words[:0], "plan"),
        (5, 35, "out_channels"),
        (6, 1, "halvings"),
        (7, True, "classify"),
    ]
    for i, name, array in arrays:
        wrong += [
            (i, array[:-1], f"{name} must have {array.numel()} elements"),
            (i, array.double(), f"{name} must be contiguous, of the plan's dtype and on the devi"),
            (i, array.repeat(2)[::2], f"{name} must be contiguous"),
            (i, shifted(array), f"{name} must be aligned to 16 bytes"),
            (i, array.to("meta"), f"{name} must be contiguous|one device|Meta"),
        ]
    refused(op, good, wrong)
    assert op(*good).isfinite().all()


def test_raw_arguments_of_gpu_network_out(gpu_backend: str) -> None:
    plan, x = plan_and_input("stage")
    good = out_arguments(plan, x)
    memory, (out,) = good[5], good[6]
    channels_last = torch.channels_last
    refused(
        OPERATORS[gpu_backend].gpu_network_out,
        good,
        [
            (0, x[..., ::2], "x must be dense"),
            (0, x.half(), "x must have the plan's dtype"),
            (0, x[:1], "results do not fit"),
            (0, x.contiguous(memory_format=channels_last), "results must be dense in x's memory"),
            (5, memory[:-256], "workspace is smaller"),
            (5, memory[:0], "workspace"),
            (5, memory.to(torch.int32), "workspace must be a contiguous uint8"),
            (5, memory.repeat(2)[::2], "workspace must be a contiguous uint8"),
            (6, [], "results must be 1, got 0"),
            (6, [out, out], "results must be 1, got 2"),
            (6, [out[:, :-1]], "results"),
            (6, [out[:, :, :-1].contiguous()], "results do not fit"),
            (6, [out.half()], "results must be of the plan's dtype"),
            (6, [out.flatten(1)], "results have the wrong rank"),
            (6, [out.contiguous(memory_format=channels_last)], "results must be dense"),
            (7, [1.0], "x must be contiguous uint8"),
            (8, [1.0], "x must be contiguous uint8"),
        ],
    )
    op = OPERATORS[gpu_backend]
    op.gpu_network_out(*good)
    assert torch.equal(out, op.gpu_network(x, *plan.arguments))


def test_raw_arguments_of_bytes(gpu_backend: str) -> None:
    plan, _ = plan_and_input("network")
    image = torch.zeros(2, 37, 45, 3, dtype=torch.uint8)
    good = on_bytes(plan, image)
    op = OPERATORS[gpu_backend].gpu_network_out
    refused(
        op,
        good,
        [
            (0, image.float(), "x must be contiguous uint8"),
            (0, image[0], "x must have 4 dimensions"),
            (0, image[..., :2].contiguous(), "x must have 3 channels"),
            (0, image.permute(0, 3, 1, 2), "x must be contiguous uint8"),
            (0, image[:, :0], "x must have at least one pixel"),
            (7, [0.1] * 2, "scale and shift must have 3 elements each"),
            (7, [], "scale and shift must have 3 elements each"),
            (8, [0.1] * 4, "scale and shift must have 3 elements each"),
        ],
    )
    op(*good)
    assert good[6][0].isfinite().all()
    unit, x = plan_and_input("unit-s2")
    arguments = out_arguments(unit, x)
    with pytest.raises(ERRORS, match="plan must begin with a stem"):
        op(x.byte().permute(0, 2, 3, 1).contiguous(), *arguments[1:7], [1.0] * 21, [0.0] * 21)


def test_tensors_of_another_device() -> None:
    plan, x = plan_and_input("unit-s1")
    for op in (OPERATORS["cuda"].gpu_network, OPERATORS["cuda-emulated"].gpu_network):
        with pytest.raises(ERRORS):
            op(x.to("meta"), *plan.arguments)
    with pytest.raises(NotImplementedError):  # the CUDA kernels are no kernels of the CPU's
        OPERATORS["cuda"].gpu_network(x, *plan.arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_at_any_address(gpu_backend: str, kind: str) -> None:
    """Views of a tensor start at addresses that no vector load may take."""

    def moved(t: Tensor) -> Tensor:
        return shifted(t.flatten()).view(t.shape)

    for dtype in (torch.float32, torch.float16):
        plan, x = plan_and_input(kind, dtype)
        op = OPERATORS[gpu_backend]
        expected = op.gpu_network(x, *plan.arguments)
        arguments = out_arguments(plan, moved(x))
        arguments[5:7] = moved(arguments[5]), [moved(out) for out in arguments[6]]
        op.gpu_network_out(*arguments)
        assert torch.equal(arguments[6][0], expected)


# Damaged plans --------------------------------------------------------------------------------


def run_corrupted(plan: GpuPlan, x: Tensor, words: Tensor) -> None:
    """An exception or a tensor: anything but the end of the interpreter."""
    op = OPERATORS["cuda-emulated"].gpu_network
    weights, parameters, tables, _, *rest = plan.arguments
    try:
        out = op(x, weights, parameters, tables, words, *rest)
    except ERRORS:
        return
    assert out.shape == plan.output_shape(x.shape[0], *x.shape[2:])


@pytest.fixture
def unfilled_memory(nan_filled_memory: None) -> None:
    """A wrong plan may ask for gigabytes, which are not to be touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False


VALUES = [-2, -1, 0, 1, 2, 17, 1 << 24, 1 << 40, (1 << 63) - 1, -(1 << 63)]


@pytest.mark.parametrize("field", STEP_FIELDS)
def test_extreme_words(unfilled_memory: None, field: str) -> None:
    for kind, step in (("stage", 0), ("stage", 1), ("network", 0), ("network", -1)):
        plan, x = plan_and_input(kind)
        x = x[:1, :, :5, :5].contiguous()
        i = step % len(plan.steps)
        at = _native.GPU_HEADER_WORDS + i * _native.GPU_STEP_WORDS + STEP_FIELDS.index(field)
        for value in VALUES:
            words = plan.words.clone()
            words[at] = value
            run_corrupted(plan, x, words)


@drawn
@given(data=st.data(), kind=st.sampled_from(list(KINDS)))
@example(data=None, kind="stage")
def test_random_corruption(unfilled_memory: None, data: st.DataObject | None, kind: str) -> None:
    plan, x = plan_and_input(kind)
    x = x[:1, :, :5, :5].contiguous()
    if data is None:
        run_corrupted(plan, x, torch.zeros_like(plan.words))
        return
    words = plan.words.clone()
    values = st.one_of(st.integers(-2, 600), st.sampled_from(VALUES))
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 5]))):
        words[data.draw(st.integers(0, len(words) - 1))] = data.draw(values)
    run_corrupted(plan, x, words)


def test_tables_that_are_not_the_plans() -> None:
    """They are on the GPU, so nobody looks; the emulator finds the access that goes wrong."""
    plan, x = plan_and_input("stage")
    weights, parameters, tables, *rest = plan.arguments
    for value in (1 << 20, -(1 << 20)):
        with pytest.raises(RuntimeError):
            OPERATORS["cuda-emulated"].gpu_network(
                x, weights, parameters, torch.full_like(tables, value), *rest
            )


def test_weights_that_are_not_numbers(gpu_backend: str) -> None:
    model = small_network()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
        out = snv2.fuse(model)(draw(2, 3, 37, 45))
    assert out.isnan().all()


@pytest.mark.parametrize("shape", [(1, 65, 6, 2), (1, 232, 3, 5)], ids=str)
def test_stride_2_of_many_small_planes(shape: tuple[int, int, int, int]) -> None:
    """More planes than a tile's parameters have room for."""
    c = shape[1]
    x, w, one = draw(*shape, dtype=torch.float16), draw(c, 1, 3, 3), torch.ones(c)
    out, expected = (
        snv2.ops.dw_conv3x3(x, w, one, one, 2, False, backend=backend)
        for backend in ("cuda-emulated", "cpu")
    )
    torch.testing.assert_close(out, expected)
