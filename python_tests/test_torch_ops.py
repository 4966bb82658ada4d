"""torch.ops.snv2.*: opcheck, arguments that do not fit, plans that are not plans."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from itertools import product
from operator import attrgetter
from typing import Any

import pytest
import torch
from _cases import (
    DTYPES,
    FORMATS,
    KINDS,
    MAPS,
    VIEWS,
    case_id,
    draw,
    drawn,
    in_turn,
    needs_bfloat16,
    plain_and_input,
    small_network,
)
from conftest import instruction_set, running_on
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels import _native, emulator
from snv2_kernels.graph.recipe import RecipeBuilder
from snv2_kernels.nn.planned import plan_element
from snv2_kernels.ops import operators
from snv2_kernels.packing import Plan
from snv2_kernels.packing.cpu_plan import Step

OPS = torch.ops.snv2


@pytest.fixture(params=["snv2", "snv2_emulated", "snv2_triton"])
def namespace(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "snv2_triton":
        yield request.param
        return
    with running_on("triton"):
        operators("triton")
        yield request.param


# Of the maps inside a plan: where bfloat16 is not multiplied, its plans are for float32.
each_element = pytest.mark.parametrize(
    "dtype", [DTYPES[0], *DTYPES[2:][: _native.cpu_has_bfloat16()]]
)
ERRORS = (RuntimeError, ValueError)


def _fields(step: Any, within: str = "") -> Iterator[str]:
    for field in dataclasses.fields(step):
        value = getattr(step, field.name)
        if isinstance(value, int):
            yield within + field.name
        else:
            yield from _fields(value, f"{within}{field.name}.")


STEP_FIELDS = list(_fields(Step(0)))
MAP = (2, 6, 5, 7)


def depthwise_arguments(channels: int, count: int) -> list[Tensor]:
    return [
        draw(channels, 1, 3, 3), draw(channels, seed=1), draw(channels, seed=2)
    ][:count]  # fmt: skip


def plan_of(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Plan, Tensor]:
    return _plan_of(kind, dtype, plan_element(dtype))


@functools.cache  # nobody changes it
def _plan_of(kind: str, dtype: torch.dtype, element: torch.dtype) -> tuple[Plan, Tensor]:
    """``element`` depends on the instruction set in use."""
    model, x = plain_and_input(kind)
    fused = snv2.fuse(model)
    return fused.packed().weights(fused, "cpu", dtype), x.to(dtype)


def out_arguments(plan: Plan, x: Tensor) -> tuple[Any, ...]:
    size = _native.workspace_bytes(
        plan.words.numpy(), plan.weights.numel(), x.shape[0], *x.shape[2:], torch.get_num_threads()
    )
    workspace = torch.zeros(size // 4)
    shapes = plan.result_shapes(x.shape[0], *x.shape[2:])
    results = [torch.zeros(shape, dtype=x.dtype) for shape in shapes]
    return x, plan.weights, plan.words, workspace, results


# opcheck --------------------------------------------------------------------------------------


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")  # of an op alone


@pytest.mark.parametrize(("dtype", "memory_format"), [MAPS[0], MAPS[3], MAPS[4]], ids=case_id)
@pytest.mark.on_triton(1)
def test_opcheck(dtype: torch.dtype, memory_format: torch.memory_format, namespace: str) -> None:
    ops = getattr(torch.ops, namespace)
    # The gradient's part is slow, and the same for all dtypes and formats.
    requires_grad = dtype == torch.float32 and memory_format == torch.contiguous_format
    a, b = (draw(*MAP, dtype=dtype, memory_format=memory_format, seed=i) for i in range(2))
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.cat_shuffle, (a, b)),
        (ops.dw_conv3x3, (a, *depthwise_arguments(6, 3), 1, False)),
        (ops.dw_conv3x3, (a, *depthwise_arguments(6, 3), 2, True)),
        (ops.split_dw_cat_shuffle, (a, *depthwise_arguments(3, 3))),
        (ops.cat_shuffle_backward, (a,)),
        (ops.dw_conv3x3_backward, (b[:, :, :3, :4], a, *depthwise_arguments(6, 3), 2, True)),
        (ops.split_dw_cat_shuffle_backward, (b, a, *depthwise_arguments(3, 3))),
    ]
    for op, call in calls:
        args = tuple(t.detach() if isinstance(t, Tensor) else t for t in call)
        for t in args:
            if isinstance(t, Tensor):
                t.requires_grad_(requires_grad)
        # Compiled and run once more, which is slow; the formulas of gradients are all namespaces'.
        whole = namespace == "snv2" or torch.cuda.is_available()
        more = ("test_aot_dispatch_dynamic",) if whole else ()
        torch.library.opcheck(op.default, args, test_utils=(*CHECKS, *more))


def test_opcheck_of_conformance() -> None:
    cases = emulator.conformance_cases()
    for index in (0, len(cases) // 2, len(cases) - 1):
        words = torch.zeros(cases[index][1], dtype=torch.int32)
        torch.library.opcheck(torch.ops.snv2_emulated.conformance.default, (words, index))


@pytest.mark.parametrize(("view", "memory_format"), in_turn(list(VIEWS), FORMATS), ids=case_id)
@pytest.mark.on_triton(3)
def test_fake_results_of_views_have_the_strides_of_real_ones(
    view: str, memory_format: torch.memory_format, namespace: str
) -> None:
    ops = getattr(torch.ops, namespace)
    a = VIEWS[view](*MAP, memory_format=memory_format)
    plan, _ = plan_of("unit-s1")
    wide = VIEWS[view](2, 34, 5, 7, memory_format=memory_format)
    for op, args in (
        (ops.cat_shuffle, (a, a.clone())),
        (ops.dw_conv3x3, (a, *depthwise_arguments(6, 3), 2, True)),
        (ops.split_dw_cat_shuffle, (a, *depthwise_arguments(3, 3))),
        (ops.cat_shuffle_backward, (a,)),
        (ops.split_dw_cat_shuffle_backward, (draw(*MAP), a, *depthwise_arguments(3, 3))),
        (OPS.network, (wide, *plan.arguments)),
    ):
        torch.library.opcheck(op.default, args, test_utils="test_faketensor")


@pytest.mark.parametrize(
    ("kind", "memory_format", "dtype"), in_turn(list(KINDS), FORMATS, DTYPES), ids=case_id
)
def test_opcheck_of_plans(
    kind: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    plan, x = plan_of(kind, dtype)
    torch.library.opcheck(OPS.network_out.default, out_arguments(plan, x))
    x = x.contiguous(memory_format=memory_format)
    torch.library.opcheck(OPS.network.default, (x, *plan.arguments))


def test_opcheck_of_several_results() -> None:
    plan, x = tapped_plan()
    torch.library.opcheck(OPS.network_out.default, out_arguments(plan, x))
    torch.library.opcheck(OPS.network_results.default, (x, *plan.result_arguments))


def tapped_plan() -> tuple[Plan, Tensor]:
    x = draw(2, 3, 37, 45)
    return snv2.fuse(small_network())._cpu_plan(torch.float32, ("stage2", "stage4")), x


def test_raw_arguments_of_several_results() -> None:
    plan, x = tapped_plan()
    good = [x, *plan.result_arguments]
    channels, halvings, classify = plan.result_fields
    wrong: list[tuple[int, Any, str]] = [
        (3, channels[:-1], "channels and halvings must have .* 3, got 2 and 3"),
        (4, halvings[:-1], "channels and halvings must have .* 3, got 3 and 2"),
        (3, [channels[0] + 1, *channels[1:]], "channels.0. must be 20, as in plan, got 21"),
        (4, [halvings[0] + 1, *halvings[1:]], "halvings.0. must be 3, as in plan, got 4"),
        (5, not classify, "classify must be 1, as in plan, got 0"),
    ]
    for i, value, message in wrong:
        with pytest.raises(ERRORS, match=message):
            OPS.network_results(*good[:i], value, *good[i + 1 :])
    with pytest.raises(ERRORS, match="plan must have one result, has 3"):
        OPS.network(x, *plan.arguments)
    arguments = list(out_arguments(plan, x))
    with pytest.raises(ERRORS, match="results are not as many as the plan's"):
        OPS.network_out(*arguments[:4], arguments[4][1:])
    OPS.network_out(*arguments)
    for a, b in zip(arguments[4], OPS.network_results(*good), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("kind", "dtype"), in_turn(list(KINDS), DTYPES), ids=case_id)
def test_opcheck_of_recipes(kind: str, dtype: torch.dtype) -> None:
    model, x = plain_and_input(kind)
    recipe = RecipeBuilder()
    snv2.fuse(model.requires_grad_(dtype == torch.float32))._tell(recipe)
    # The gradient's part is slow, and the same for all.
    autocast = None if dtype == torch.float32 else dtype
    args = (x, recipe.state, recipe.text, "auto", dtype, autocast)
    torch.library.opcheck(OPS.fused.default, args)
    grad = torch.ones_like(OPS.fused(*args)).detach()
    wanted = [True, *(isinstance(t, nn.Parameter) for t in recipe.state)]
    state = [t.detach() for t in recipe.state]
    torch.library.opcheck(
        OPS.fused_backward.default, ([grad], x, state, recipe.text, autocast, wanted)
    )


def test_network_says_that_it_has_no_gradient() -> None:
    plan, x = plan_of("unit-s1")
    out = OPS.network(x.requires_grad_(), *plan.arguments)
    with pytest.raises(NotImplementedError, match="no gradient"):
        out.sum().backward()


# Raw arguments --------------------------------------------------------------------------------


def w(channels: int) -> list[Tensor]:
    return depthwise_arguments(channels, 3)


def zeros(*shape: int, **kwargs: Any) -> Tensor:
    return torch.zeros(*shape, **kwargs)


half = zeros(*MAP, dtype=torch.float16)
RAW: dict[str, tuple[Callable[[Any], Any], str]] = {
    "cat-rank": (lambda o: o.cat_shuffle(zeros(3), zeros(3)), "a must have 4 dimensions"),
    "cat-dtypes": (lambda o: o.cat_shuffle(zeros(*MAP), half), "a and b"),
    "cat-shapes": (lambda o: o.cat_shuffle(zeros(*MAP), zeros(2, 6, 5, 6)), "a and b"),
    "cat-float64": (lambda o: o.cat_shuffle(zeros(*MAP).double(), zeros(*MAP).double()), "a must"),
    "dw-int": (lambda o: o.dw_conv3x3(zeros(*MAP).int(), *w(6)), "x must be float32"),
    "dw-pixels": (lambda o: o.dw_conv3x3(zeros(2, 6, 0, 7), *w(6)), "x must have at least one pix"),
    "dw-stride": (lambda o: o.dw_conv3x3(zeros(*MAP), *w(6), 3), "stride must be 1 or 2"),
    "dw-weight": (lambda o: o.dw_conv3x3(zeros(*MAP), *w(5)), "weight must have 54 elements"),
    "dw-half-weight": (lambda o: o.dw_conv3x3(half, *(t.half() for t in w(6))), "weight must be a"),
    "dw-strided-weight": (
        lambda o: o.dw_conv3x3(zeros(*MAP), w(12)[0][::2], *w(6)[1:]), "weight must be a contig"
    ),
    "dw-scale": (lambda o: o.dw_conv3x3(zeros(*MAP), w(6)[0], *w(5)[1:]), "scale must have 6"),
    "dw-shift": (lambda o: o.dw_conv3x3(zeros(*MAP), *w(6)[:2], w(5)[2]), "shift must have 6"),
    "split-odd": (lambda o: o.split_dw_cat_shuffle(zeros(2, 5, 5, 7), *w(2)), "x must have an eve"),
    "split-weight": (lambda o: o.split_dw_cat_shuffle(zeros(*MAP), *w(6)), "weight must have 27"),
    "cat-grad-odd": (lambda o: o.cat_shuffle_backward(zeros(2, 5, 5, 7)), "grad must have an even"),
    "cat-grad-rank": (lambda o: o.cat_shuffle_backward(zeros(3)), "grad must have 4 dimensions"),
    "dw-grad-shape": (
        lambda o: o.dw_conv3x3_backward(zeros(*MAP), zeros(*MAP), *w(6), 2), "grad must be 2 x 6 x"
    ),
    "dw-grad-dtype": (
        lambda o: o.dw_conv3x3_backward(half, zeros(*MAP), *w(6)), "grad and x must have the same d"
    ),
    "dw-grad-weight": (
        lambda o: o.dw_conv3x3_backward(zeros(*MAP), zeros(*MAP), *w(5)), "weight must have 54"
    ),
    "split-grad-shape": (
        lambda o: o.split_dw_cat_shuffle_backward(zeros(2, 6, 5, 6), zeros(*MAP), *w(3)),
        "grad must be 2 x 6 x 5 x 7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RAW)
def test_raw_arguments(case: str, namespace: str) -> None:
    call, message = RAW[case]
    with pytest.raises(ERRORS, match=message):
        call(getattr(torch.ops, namespace))


def test_raw_arguments_on_two_devices(namespace: str) -> None:
    ops = getattr(torch.ops, namespace)
    with pytest.raises((RuntimeError, NotImplementedError)):
        ops.cat_shuffle(zeros(*MAP), zeros(*MAP, device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        ops.dw_conv3x3(zeros(*MAP), *(t.to("meta") for t in w(6)))


def test_raw_arguments_of_network() -> None:
    plan, x = plan_of("unit-s1")
    good = [x, *plan.arguments]
    wrong: list[tuple[int, Any, str]] = [
        (0, x[:, :-1], "x must have 34 channels"),
        (0, x.double(), "x must be float32"),
        (0, x[0], "x must have 4 dimensions"),
        (0, x[:, :, :0], "x must have at least one pixel"),
        (1, plan.weights[:-1], "plan"),
        (1, plan.weights.double(), "weights must be a contiguous float32"),
        (1, plan.weights.repeat(2)[::2], "weights must be a contiguous float32"),
        (2, plan.words.int(), "plan must be a contiguous int64"),
        (2, plan.words.repeat(2)[::2], "plan must be a contiguous int64"),
        (2, plan.words[:-1], "plan"),
        (2, plan.words[:0], "plan"),
        (3, 35, "out_channels"),
        (4, 1, "halvings"),
        (5, True, "classify"),
    ]
    for i, value, message in wrong:
        with pytest.raises(ERRORS, match=message):
            OPS.network(*good[:i], value, *good[i + 1 :])
    assert OPS.network(*good).isfinite().all()


def test_raw_arguments_of_network_out() -> None:
    plan, x = plan_of("stage")
    good = list(out_arguments(plan, x))
    workspace, (out,) = good[3], good[4]
    wrong: list[tuple[int, Any, str]] = [
        (0, x[..., ::2], "x must be dense"),
        (0, x.half(), "results must be CPU tensors of x's dtype"),
        (0, x[:1], "out"),
        (0, x.contiguous(memory_format=torch.channels_last), "results must be dense"),
        (3, workspace[:-1], "workspace"),
        (3, workspace[:0], "workspace"),
        (3, workspace.double(), "workspace must be a contiguous float32"),
        (3, workspace.repeat(2)[::2], "workspace must be a contiguous float32"),
        (4, [out[:, :-1]], "results must be dense"),
        (4, [out.half()], "results must be CPU tensors of x's dtype"),
        (4, [out.flatten(1)], "results have the wrong rank"),
        (4, [out.contiguous(memory_format=torch.channels_last)], "results must be dense"),
        (4, [out.repeat(2, 1, 1, 1)[::2]], "results must be dense"),
        (4, [], "results are not as many"),
    ]
    for i, value, message in wrong:
        with pytest.raises(ERRORS, match=message):
            OPS.network_out(*good[:i], value, *good[i + 1 :])
    OPS.network_out(*good)
    assert torch.equal(out, OPS.network(x, *plan.arguments))


@pytest.mark.parametrize("dtype", DTYPES[::2])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_at_any_address(isa: str, kind: str, dtype: torch.dtype) -> None:
    """Views of a tensor start at addresses that no vector instruction likes."""

    def moved(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    plan, x = plan_of(kind, dtype)
    expected = OPS.network(x, *plan.arguments)
    *tensors, (out,) = out_arguments(plan, x)
    shifted = moved(out)
    OPS.network_out(*map(moved, tensors), [shifted])
    assert torch.equal(shifted, expected)
    assert torch.equal(
        OPS.network(moved(x), moved(plan.weights), moved(plan.words), *plan.arguments[2:]), expected
    )


# Plans that are not plans ---------------------------------------------------------------------


@pytest.fixture
def unfilled_memory(nan_filled_memory: None) -> None:
    """A wrong plan may ask for gigabytes, which are not to be touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False


def run_corrupted(plan: Plan, x: Tensor, words: Tensor) -> None:
    """An exception or a tensor: anything but the end of the interpreter."""
    try:
        out = OPS.network(x, plan.weights, words, *plan.arguments[2:])
    except ERRORS:
        return
    assert out.shape == plan.output_shape(x.shape[0], *x.shape[2:])


def word_of_step(plan: Plan, step: int, field: str) -> int:
    return _native.HEADER_WORDS + step * _native.STEP_WORDS + STEP_FIELDS.index(field)


EXTREMES = [-1, 0, 1, 2, 3, 15, 16, 17, 1 << 20, 1 << 24, 1 << 31, 1 << 40, 1 << 60, (1 << 63) - 1,
            -(1 << 63), -(1 << 40), -16]  # fmt: skip


@each_element
@pytest.mark.parametrize("field", STEP_FIELDS)
def test_extreme_words(unfilled_memory: None, field: str, dtype: torch.dtype) -> None:
    """Steps of every kind, and units of both strides."""
    for kind, i in product(("stage", "network"), (0, 1, 2, -1)):
        plan, x = plan_of(kind, dtype)
        at = word_of_step(plan, i % len(plan.steps), field)
        for value in EXTREMES:
            words = plan.words.clone()
            words[at] = value
            run_corrupted(plan, x, words)


@each_element
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_header_and_tables(unfilled_memory: None, kind: str, dtype: torch.dtype) -> None:
    plan, x = plan_of(kind, dtype)
    tables = _native.HEADER_WORDS + len(plan.steps) * _native.STEP_WORDS
    for i in (*range(_native.HEADER_WORDS), tables, tables + 1, -1):
        for value in EXTREMES:
            words = plan.words.clone()
            words[i] = value
            run_corrupted(plan, x, words)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_magic_and_size(kind: str) -> None:
    plan, x = plan_of(kind)
    words = plan.words.clone()
    words[0] += 1
    with pytest.raises(ERRORS, match="plan"):
        OPS.network(x, plan.weights, words, *plan.arguments[2:])
    for size in (0, 1, 5, 6, 7, 26, 46, len(words) // 2, len(words) - 1):
        with pytest.raises(ERRORS, match="plan"):
            OPS.network(x, plan.weights, plan.words[:size], *plan.arguments[2:])
    for size in (0, 1, plan.weights.numel() - 1):
        with pytest.raises(ERRORS, match="plan"):
            OPS.network(x, plan.weights[:size], plan.words, *plan.arguments[2:])


PROJECTION_PW1 = "projection.pw1.weights"  # which no plan has


@pytest.mark.parametrize(
    "field", [f for f in STEP_FIELDS if f.endswith(("table", ".weights")) and f != PROJECTION_PW1]
)
@each_element
def test_offsets_out_of_range(unfilled_memory: None, field: str, dtype: torch.dtype) -> None:
    plan, x = plan_of("unit-s2", dtype)
    for value in (-1, 1 << 24, 1 << 40):
        words = plan.words.clone()
        words[word_of_step(plan, 1, field)] = value
        with pytest.raises(ERRORS, match=f"plan: step 1: {field.removesuffix('.weights')}"):
            OPS.network(x, plan.weights, words, *plan.arguments[2:])


@pytest.mark.parametrize("value", [-1000, 1000, 1 << 40])
@pytest.mark.parametrize("field", ["parts", "in_channels", "depth"])
def test_projection_of_a_unit_that_has_none(unfilled_memory: None, field: str, value: int) -> None:
    plan, x = plan_of("unit-s1")
    words = plan.words.clone()
    words[word_of_step(plan, 1, f"projection.{field}")] = value
    with pytest.raises(ERRORS, match=rf"plan: step 1: projection\.{field}"):
        OPS.network(x, plan.weights, words, *plan.arguments[2:])


@drawn
@given(data=st.data(), kind=st.sampled_from(list(KINDS)))
@example(data=None, kind="stage")
@each_element
def test_random_corruption(
    unfilled_memory: None, data: st.DataObject | None, kind: str, dtype: torch.dtype
) -> None:
    plan, x = plan_of(kind, dtype)
    if data is None:
        run_corrupted(plan, x, torch.zeros_like(plan.words))
        return
    words = plan.words.clone()
    values = st.one_of(
        st.integers(-2, 600), st.sampled_from(EXTREMES), st.integers(-(1 << 63), (1 << 63) - 1)
    )
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 5]))):
        words[data.draw(st.integers(0, len(words) - 1))] = data.draw(values)
    run_corrupted(plan, x, words)


@each_element
def test_half_words(dtype: torch.dtype) -> None:
    """A product of bfloat16 reads pairs of planes, which start at even ones."""
    plan, x = plan_of("unit-s2", dtype)
    for field in ("main.in_table", "main.table", "projection.table"):
        words = plan.words.clone()
        tables = _native.HEADER_WORDS + len(plan.steps) * _native.STEP_WORDS
        words[tables + attrgetter(field)(plan.steps[1])] = 1
        if plan.element == torch.float32:
            OPS.network(x, plan.weights, words, *plan.arguments[2:])
            continue
        with pytest.raises(ERRORS, match=f"plan: step 1: {field}"):
            OPS.network(x, plan.weights, words, *plan.arguments[2:])


@needs_bfloat16
def test_instruction_sets_that_cannot_multiply_bfloat16() -> None:
    plan, x = plan_of("unit-s2", torch.bfloat16)
    for name in _native.available_cpu_isas():
        with instruction_set(name):
            if _native.cpu_has_bfloat16():
                OPS.network(x, *plan.arguments)
                continue
            with pytest.raises(RuntimeError, match=f"plan: it is for bfloat16, .*{name}"):
                OPS.network(x, *plan.arguments)


@each_element
def test_weights_that_are_not_numbers(dtype: torch.dtype) -> None:
    plan, x = plan_of("network", dtype)
    ones = torch.full_like(plan.weights.view(torch.int32), -1)  # NaN in either element
    out = OPS.network(x, ones.view(torch.float32), *plan.arguments[1:])
    assert out.isnan().all()
