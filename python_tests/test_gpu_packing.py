"""Plans for GPUs, followed word by word in PyTorch: no kernel takes part."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _cases import (
    DTYPES,
    HALF_DTYPES,
    KINDS,
    WIDTHS,
    draw,
    drawn,
    network,
    plain_and_input,
    plain_stage,
    small_network,
    unit_pair,
)
from _deviations import ConvBn, DeviantUnit, Shortcut, SqueezeExcite
from _plans import (
    COPY,
    EXPORT,
    GATE,
    HEAD,
    STEM,
    STEP_FIELDS,
    UNIT,
    GeneralUnit,
    authors_units,
    general_units,
    interpret,
    steps_of,
    styled_unit,
    tell,
    unpack_tiles,
)
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels import _native, gpu
from snv2_kernels.packing import GpuPlan, GpuPlanBuilder
from snv2_kernels.packing.gpu_plan import pack_tiles
from snv2_kernels.testing import float64_reference, max_error, randomize_

# Weights are rounded to float32 once, the rest is float64.
FLOAT32 = 1e-6


def plan_of(model: nn.Module, dtype: torch.dtype = torch.float32, taps: Any = ()) -> GpuPlan:
    fused = snv2.fuse(model)
    assert isinstance(fused, snv2.nn.planned.PlannedModule)
    return fused._gpu_plan(dtype, torch.device("cpu"), taps)


def general_plan(channels: int, units: nn.Sequential, taps: Any = ()) -> GpuPlan:
    builder = GpuPlanBuilder()
    builder.add_import(channels)
    for i, unit in enumerate(units):
        unit.add_to(builder)
        if i in taps:
            builder.add_result()
    return builder.build()


def check(plan: GpuPlan, x: Tensor, expected: list[Tensor]) -> None:
    n, _, h, w = x.shape
    gpu.workspace_bytes(plan.words, n, h, w)  # which checks the words
    results = interpret(plan, x)
    assert len(results) == len(expected)
    shapes = plan.result_shapes(n, h, w)
    for result, exact, shape in zip(results, expected, shapes, strict=True):
        assert tuple(exact.shape) == shape
        assert max_error(result, exact) < FLOAT32
    assert shapes[-1] == plan.output_shape(n, h, w)


def planes_of(plan: GpuPlan) -> list[int]:
    return [step["out_planes"] for step in steps_of(plan.words)[1]]


# Tiles ----------------------------------------------------------------------------------------


@drawn
@given(
    rows=st.integers(1, 50),
    depth=st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_pack_tiles(rows: int, depth: int, dtype: torch.dtype) -> None:
    weight = draw(rows, depth).double()
    packed = pack_tiles(weight, dtype)
    assert packed.dtype == dtype
    assert packed.is_contiguous()
    assert torch.equal(unpack_tiles(packed, rows, depth), weight.to(dtype).double())


# Plans ----------------------------------------------------------------------------------------


@drawn
@given(
    case=general_units(),
    taps=st.sets(st.integers(0, 3)),
    shape=st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(1, 9)),
)
def test_any_index_lists(
    case: tuple[int, nn.Sequential], taps: set[int], shape: tuple[int, int, int]
) -> None:
    channels, units = case
    randomize_(units).eval()
    n, h, w = shape
    x = draw(n, channels, h, w)
    maps, exact = [], x
    for i, unit in enumerate(units):
        exact = float64_reference(unit)(exact)
        if i in taps or i == len(units) - 1:
            maps.append(exact)
    check(general_plan(channels, units, taps), x, maps)


PARTS = {
    "p": lambda inp, oup, s: ConvBn(inp, oup, act="silu"),
    "d": lambda inp, oup, s: ConvBn(inp, inp, 3 if s == 1 else 5, s),
    "g": lambda inp, oup, s: SqueezeExcite(inp),
}


@drawn
@given(
    branches=st.lists(st.from_regex(r"\A([pd]g?){1,5}\Z"), min_size=1, max_size=3),
    strides=st.lists(st.sampled_from([1, 2]), min_size=3, max_size=3),
    projects=st.lists(st.booleans(), min_size=3, max_size=3),
    taps=st.sets(st.integers(0, 2)),
    mains=st.lists(st.integers(1, 20), min_size=3, max_size=3),
    shortcuts=st.lists(st.booleans(), min_size=3, max_size=3),
)
@example(["pdgp", "dgp", "pdpg"], [2, 2, 1], [True, True, False], {0, 1}, [20, 20, 3], 3 * [True])
@example(["dpdpdpg", "d", "ppdp"], [2, 1, 2], [True, False, False], {1}, [20, 5, 3], 3 * [True])
def test_any_branches(
    branches: list[str],
    strides: list[int],
    projects: list[bool],
    taps: set[int],
    mains: list[int],
    shortcuts: list[bool],
) -> None:
    """Whatever is cut, and wherever gates stand; ``mains`` are read of each unit's channels."""
    channels = first = 20
    units, maps = nn.Sequential(), []
    choices = zip(branches, strides, projects, mains, shortcuts, strict=False)
    for branch, stride, projected, main, shortcut in choices:
        inp, left = min(main, channels), stride if "d" in branch else 1
        layers, width, halves = [], inp, left == 2
        for part in branch:
            layers.append(PARTS[part](width, width + 3, left))
            width += 3 * (part == "p")
            left = 1 if part == "d" else left
        if shortcut and not halves:
            layers += [ConvBn(width, inp), Shortcut(inp, "silu")]
        projection = [ConvBn(channels, channels, 3, 1 + halves), ConvBn(channels, 7)]
        projection, keeps = projection[: 2 * projected], not (halves or projected)
        units.append(DeviantUnit(channels, layers, 1 + halves, projection, keeps))
        channels = len(units[-1].order)
    randomize_(units).eval()
    x = exact = draw(2, first, 7, 5)
    for i, unit in enumerate(units):
        exact = float64_reference(unit)(exact)
        if i in taps or i == len(units) - 1:
            maps.append(exact)
    check(general_plan(first, units, taps), x, maps)


@pytest.mark.parametrize("turn", range(9))
def test_any_activations_and_windows(turn: int) -> None:
    windows = {"window": 5, "dilation": 1 + turn % 3, "proj_window": 7, "proj_dilation": 2}
    units = nn.Sequential(
        styled_unit(1, 7, 10, turn, window=7), styled_unit(2, 19, 20, turn, **windows)
    )
    randomize_(units).eval()
    x = draw(2, 20, 15, 9)
    check(general_plan(20, units), x, [float64_reference(units)(x)])


def test_shuffle_at_the_input() -> None:
    channels, units = authors_units()
    randomize_(units).eval()
    x = draw(2, 24, 15, 9)
    check(general_plan(channels, units), x, [float64_reference(units)(x)])


@pytest.mark.parametrize("kind", KINDS)
def test_modules(kind: str) -> None:
    model, x = plain_and_input(kind)
    plan = plan_of(model)
    check(plan, x, [float64_reference(model)(x)])
    cpu = snv2.fuse(model)._pack("cpu", torch.float32, torch.device("cpu"))
    assert plan.multiply_adds(*x.shape[2:]) == cpu.multiply_adds(*x.shape[2:])
    assert plan.units == cpu.units


@pytest.mark.parametrize("width", WIDTHS)
def test_networks(width: str) -> None:
    model = network("snv2", width)
    x = draw(1, 3, 64, 64)
    check(plan_of(model), x, [float64_reference(model)(x)])


@pytest.mark.parametrize(
    "taps", [("stage3",), ("stage4", "stage2"), ("stage2", "stage3", "stage4")]
)
def test_taps(taps: list[str]) -> None:
    model, x = small_network(), draw(2, 3, 37, 45)
    plan = plan_of(model, taps=taps)
    reference, maps = copy.deepcopy(model).double(), []
    y = reference.maxpool(reference.conv1(x.double()))
    with torch.no_grad():
        for name in ("stage2", "stage3", "stage4"):
            y = getattr(reference, name)(y)
            maps += [y] if name in taps else []
        check(plan, x, [*maps, reference(x.double())])
    assert plan.results[-1] == (10, 5)
    # The network runs as it would without them.
    assert planes_of(plan) == planes_of(plan_of(model))


def test_passthrough_is_copied() -> None:
    unit = GeneralUnit(8, 1, 4, 4, [0, 1, 2, 3], [7, 6, 5, 4], 0, list(range(8)))
    plan = general_plan(8, randomize_(nn.Sequential(unit)).eval())
    x = draw(2, 8, 5, 5)
    x[0, 5, 2, 2] = float("nan")
    (out,) = interpret(plan, x)
    expected = x[:, [7, 6, 5, 4]].double()
    torch.testing.assert_close(out[:, :4], expected, rtol=0, atol=0, equal_nan=True)
    assert out[:, 4:].isfinite().all()


# Planes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_a_stage_takes_its_channels_and_half_of_them(width: str) -> None:
    model = network("snv2", width)
    plan = plan_of(model)
    channels = model._stage_out_channels[:4]
    expected = [channels[0]]
    for repeats, c in zip((4, 8, 4), channels[1:], strict=True):
        expected += repeats * [c + c // 2]
    assert planes_of(plan) == [*expected, 0]
    assert set(planes_of(plan_of(model, taps=("stage2", "stage4")))) == set(planes_of(plan))


def test_planes_rotate() -> None:
    """A unit never writes a plane that it reads, and the next one gets those it has freed."""
    plan = plan_of(plain_stage([1, 1, 1, 1, 1, 2], 12, 12))
    _, steps, tables = steps_of(plan.words)
    before: set[int] = set()
    for step in steps[1:5]:
        read = set(tables[step["in_table"] :][: step["in_channels"]].tolist())
        written = set(tables[step["out_table"] :][: step["out_channels"]].tolist())
        assert len(read) == len(written) == 6
        assert not read & written
        assert written == (before or set(range(12, 18)))
        before = read
    assert planes_of(plan) == [18, 18, 18, 18, 18, 18, 0]


def test_pieces_give_planes_back() -> None:
    """What lies between pieces of a unit takes planes that the unit's input had, or its result."""
    branch = [ConvBn(6, 6, 3), ConvBn(6, 6), ConvBn(6, 6, 3), ConvBn(6, 6), SqueezeExcite(6)]
    units = nn.Sequential(*(DeviantUnit(12, branch) for _ in range(4)))
    plan = general_plan(12, units)
    assert [step["kind"] for step in steps_of(plan.words)[1]] == [
        COPY, *4 * [UNIT, UNIT, GATE], EXPORT
    ]  # fmt: skip
    assert planes_of(plan) == [18] * 13 + [0]


def test_a_shortcut_keeps_its_planes() -> None:
    """No piece of the branch takes those, which are free where nothing is added."""
    pair = [ConvBn(6, 6, 3), ConvBn(6, 6)]

    def written(*gate: Shortcut) -> list[set[int]]:
        """By each piece of the unit in the middle."""
        units = nn.Sequential(*(DeviantUnit(12, [*pair, *pair, *pair, *gate]) for _ in range(3)))
        randomize_(units).eval()
        plan, x = general_plan(12, units), draw(2, 12, 5, 7)
        check(plan, x, [float64_reference(units)(x)])
        _, steps, tables = steps_of(plan.words)
        count = 3 + len(gate)
        pieces = [steps[1 + count], *steps[2 + count : 1 + 2 * count]]
        source = set(tables[pieces[0]["in_table"] :][:6].tolist())
        if gate:
            assert set(tables[pieces[3]["in_table"] :][6:12].tolist()) == source
        return [set(tables[p["out_table"] :][:6].tolist()) & source for p in pieces]

    assert any(written())
    assert not any(written(Shortcut(6)))


def kinds_and_buffers(plan: GpuPlan) -> list[tuple[int, int, int]]:
    return [(s["kind"], s["in_buffer"], s["out_buffer"]) for s in steps_of(plan.words)[1]]


def test_where_pieces_lie() -> None:
    """A projection runs beside the first piece, or else before it."""
    branch = [ConvBn(12, 12, 3, 2), ConvBn(12, 6), ConvBn(6, 6, 3), ConvBn(6, 6)]
    projection = [ConvBn(12, 12, 3, 2), ConvBn(12, 6)]
    plan = general_plan(12, nn.Sequential(DeviantUnit(12, branch, 2, projection)))
    copy, end = (COPY, -1, 0), (EXPORT, 1, -2)
    assert kinds_and_buffers(plan) == [copy, (UNIT, 0, 1), (UNIT, 1, 1), end]
    assert [step["proj_channels"] for step in steps_of(plan.words)[1]] == [0, 6, 0, 0]
    # The gate's channels are halved behind it.
    branch = [ConvBn(12, 12), SqueezeExcite(12), *branch]
    plan = general_plan(12, nn.Sequential(DeviantUnit(12, branch, 2, projection)))
    pieces = [(UNIT, 0, 1), (UNIT, 0, 0), (GATE, 0, 0), (UNIT, 0, 1), (UNIT, 1, 1)]
    assert kinds_and_buffers(plan) == [copy, *pieces, end]
    # The first piece reads the caller's map where that is all that does.
    branch = [ConvBn(12, 12), ConvBn(12, 12, 3, 2), ConvBn(12, 6), SqueezeExcite(6)]
    plan = general_plan(12, nn.Sequential(DeviantUnit(12, branch, 2, projection)))
    assert kinds_and_buffers(plan) == [(UNIT, -1, 0), (GATE, 0, 0), (EXPORT, 0, -2)]
    # So it is at stride 1, unless a shortcut reads it too.
    branch = [ConvBn(12, 12), ConvBn(12, 12, 3), ConvBn(12, 12)]
    for gate, read, in_place in (
        (SqueezeExcite(12), [], (UNIT, -1, 0)), (Shortcut(12), [copy], (UNIT, 0, 0))
    ):  # fmt: skip
        plan = general_plan(12, nn.Sequential(DeviantUnit(12, [*branch, gate], passthrough=False)))
        assert kinds_and_buffers(plan) == [*read, in_place, (GATE, 0, 0), (EXPORT, 0, -2)]


STAGES = {
    "one-s1": ([1], [(UNIT, -1, -2)], [0]),
    "one-s2": ([2], [(UNIT, -1, -2)], [0]),
    "two-s1": ([1, 1], [(COPY, -1, 0), (UNIT, 0, 0), (UNIT, 0, -2)], [12, 12, 0]),
    "s1-first": ([1, 2], [(COPY, -1, 0), (UNIT, 0, 0), (UNIT, 0, -2)], [12, 12, 0]),
    "s2-only": ([2, 2, 2], [(UNIT, -1, 0), (UNIT, 0, 1), (UNIT, 1, -2)], [8, 8, 0]),
    "s2-first": (
        [2, 1, 2, 1],
        [(UNIT, -1, 0), (UNIT, 0, 0), (UNIT, 0, 1), (UNIT, 1, -2)],
        [12, 12, 8, 0],
    ),
}


@pytest.mark.parametrize("case", STAGES)
def test_where_maps_lie(case: str) -> None:
    strides, expected, planes = STAGES[case]
    plan = plan_of(plain_stage(strides, 8, 8))
    assert kinds_and_buffers(plan) == expected
    assert planes_of(plan) == planes


def test_where_maps_of_a_network_lie() -> None:
    steps = kinds_and_buffers(plan_of(small_network()))
    assert steps[0] == (STEM, -1, 0)
    assert steps[1] == (UNIT, 0, 1)
    assert steps[-1] == (HEAD, 1, -2)


# Arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_are_rounded_once(dtype: torch.dtype) -> None:
    """From the parameters as they are, not as they would be in that dtype."""
    model = small_network()
    plan, exact = plan_of(model, dtype), plan_of(model)
    assert plan.dtype == plan.weights.dtype == dtype
    assert plan.parameters.dtype == torch.float32
    assert torch.equal(plan.parameters, exact.parameters)
    _, steps, _ = steps_of(plan.words)
    _, exact_steps, _ = steps_of(exact.words)
    for step, twin in zip(steps, exact_steps, strict=True):
        if step["kind"] == UNIT:
            shape = (step["mid_channels"], step["in_channels"])
            matrix = unpack_tiles(plan.weights[step["pw1_weights"] :], *shape)
            expected = unpack_tiles(exact.weights[twin["pw1_weights"] :], *shape)
            assert torch.equal(matrix, expected.to(dtype).double())
    header, _, _ = steps_of(plan.words)
    assert header["dtype"] == [torch.float32, torch.float16, torch.bfloat16].index(dtype)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_arrays_are_aligned(dtype: torch.dtype) -> None:
    _, steps, _ = steps_of(plan_of(small_network(), dtype).words)
    for step in steps:
        for name, value in step.items():
            if name.endswith("_weights"):
                assert value % 256 == 0
            elif name.endswith("_bias") or name in ("dw", "proj_dw"):
                assert value % 4 == 0


def test_weight_that_is_too_large_runs_plain() -> None:
    """Its batch norm's scale is part of it, so PyTorch, which multiplies later, may have no such
    weight."""
    plain, unit = unit_pair(2, 8, 8)
    for module in (plain, unit):
        module.branch2[1].running_var.fill_(1e-12)
        module.branch2[1].eps = 1e-12
        module.branch2[0].weight.data *= 1e-3
        module.branch2[0].weight.data[0] = 1
        module.eval()
    plain, unit = plain.half(), unit.half()
    x = draw(1, 8, 5, 5, dtype=torch.float16)
    with snv2.use_backend("cuda-emulated"), torch.no_grad():
        assert unit.reason() == "a folded weight is too large for torch.float16"
        torch.testing.assert_close(unit(x), plain(x), rtol=0, atol=0, equal_nan=True)
    assert unit.reason() is None


def test_what_the_builder_does_not_take() -> None:
    builder = GpuPlanBuilder()
    builder.add_import(8)
    with pytest.raises(ValueError, match="only the map that a unit makes can be a result"):
        builder.add_result()
    GeneralUnit(8, 1, 4, 4, [0, 1, 2, 3], [4, 5, 6, 7], 0, list(range(8))).add_to(builder)
    with pytest.raises(ValueError, match="dtype: expected float32, float16 or bfloat16, got torch"):
        builder.build(torch.float64)


def test_a_builder_builds_for_any_dtype() -> None:
    builder = GpuPlanBuilder()
    tell(builder, *authors_units())
    plans = [builder.build(dtype) for dtype in (torch.float16, torch.float32, torch.float16)]
    assert torch.equal(plans[0].words, plans[2].words)
    assert torch.equal(plans[0].weights, plans[2].weights)


# Damaged plans --------------------------------------------------------------------------------

EXTREMES = [-3, -2, -1, 0, 1, 2, 3, 15, 16, 17, 255, 256, 1 << 20, 1 << 24, 1 << 31, 1 << 40,
            1 << 60, (1 << 63) - 1, -(1 << 63), -(1 << 40)]  # fmt: skip


def is_refused(words: Tensor) -> bool:
    """A ValueError or an answer: anything but the end of the interpreter."""
    try:
        gpu.workspace_bytes(words, 1, 9, 11)
    except ValueError as error:
        return str(error).startswith("plan: ")
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_words(kind: str) -> None:
    plan = plan_of(plain_and_input(kind)[0])
    assert not is_refused(plan.words)
    refused = 0
    fields = _native.GPU_HEADER_WORDS + _native.GPU_STEP_WORDS * len(plan.steps)
    for i in [*range(fields), fields, len(plan.words) - 1]:
        for value in EXTREMES:
            words = plan.words.clone()
            words[i] = value
            refused += is_refused(words)
    assert refused > fields * len(EXTREMES) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_words_that_are_cut_short(kind: str) -> None:
    plan = plan_of(plain_and_input(kind)[0])
    for size in range(len(plan.words)):
        assert is_refused(plan.words[:size])


@pytest.mark.parametrize("field", [f for f in STEP_FIELDS if f.endswith(("_table", "_weights"))])
@pytest.mark.parametrize("value", [-1, 1 << 24, 1 << 40])
def test_offsets_out_of_range(field: str, value: int) -> None:
    plan = plan_of(small_network(), taps=("stage2",))
    for step in (1, 2):  # of both strides; the second one is tapped
        if field == ("result_table" if step == 1 else "proj_weights"):
            continue
        words = plan.words.clone()
        at = _native.GPU_HEADER_WORDS + step * _native.GPU_STEP_WORDS
        words[at + STEP_FIELDS.index(field)] = value
        with pytest.raises(ValueError, match=f"plan: step {step}: {field}"):
            gpu.workspace_bytes(words, 1, 37, 45)


@drawn
@given(data=st.data(), kind=st.sampled_from(list(KINDS)))
@example(data=None, kind="stage")
def test_random_corruption(data: st.DataObject | None, kind: str) -> None:
    words = plan_of(plain_and_input(kind)[0]).words.clone()
    if data is None:
        assert is_refused(torch.zeros_like(words))
        return
    values = st.one_of(
        st.integers(-2, 600), st.sampled_from(EXTREMES), st.integers(-(1 << 63), (1 << 63) - 1)
    )
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 5]))):
        words[data.draw(st.integers(0, len(words) - 1))] = data.draw(values)
    is_refused(words)
