"""Units other than the paper's, as plans of the Triton kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from _cases import assert_accurate, draw
from _triton_units import (
    ACTIVATED,
    BF16,
    CHAINS,
    CONTIGUOUS,
    FOLLOWED,
    FP16,
    FP32,
    GATED,
    LAST,
    RELU6,
    SILU,
    UNITS,
    WINDOWS,
    Told,
    alone,
    check,
    depthwise,
    gate,
    layer,
    plain,
    planned,
    prelu,
)
from torch import Tensor, nn

from snv2_kernels.ops import operators
from snv2_kernels.packing import Builder, TritonPlanBuilder
from snv2_kernels.packing.triton import COPY, DW, DW_PW, GATES, MEANS, PW, SCALE, TritonStep
from snv2_kernels.packing.units import ACTIVATIONS, Activation, Layer, Unit, Unsupported
from snv2_kernels.testing import randomize_

# Activations ----------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 3.0, -3.0, 6.0, 1e30, -1e30, 1e-30]


def applied(kind: str, x: Tensor, slope: float) -> Tensor:
    """By a depthwise convolution that changes nothing."""
    from snv2_kernels.triton.branch_kernels import depthwise_kernel

    y, count = torch.empty_like(x), x.numel()
    parameters = torch.tensor([1.0, 0.0, slope])
    depthwise_kernel[(1,)](
        x, y, y, torch.zeros(1, dtype=torch.int32), parameters, 1, 1, count, count, count,
        0, 0, 2, 1, 0, 0, count, count, 1, count, 0, 0, 0,
        STRIDE=1, TO_PLANES=True, TO_MAP=False, WINDOW=1, DILATION=1,
        ACTIVATION=ACTIVATIONS.index("prelu" if kind == "leaky_relu" else kind), BM=1, BP=count,
    )  # fmt: skip
    return y


@pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")  # by the interpreter
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation(triton: Any, kind: str) -> None:
    """Each within two units in the last place of the exact value, and PyTorch's specials."""
    slope = {"leaky_relu": 0.1, "prelu": -0.75}.get(kind)
    values = torch.cat([torch.tensor(SPECIAL), torch.linspace(-95, 95, 4096 - len(SPECIAL))])
    x = values.to(torch.get_default_device())
    torch_slope = torch.tensor([slope]) if kind == "prelu" else slope
    function = Activation(kind, torch_slope)
    actual, eager = applied(kind, x, slope or 0.0), function(x)
    n = len(SPECIAL)
    torch.testing.assert_close(actual[:n], eager[:n], rtol=1e-6, atol=0, equal_nan=True)
    exact = Activation(kind, torch_slope.double() if kind == "prelu" else slope)(x[n:].double())
    # Beside a zero of the activation, x + 3 is rounded as PyTorch rounds it.
    error = (actual[n:] - exact).abs() - (eager[n:] - exact).abs()
    normal = exact.abs() >= torch.finfo(torch.float32).tiny
    ulp = exact.abs() * torch.finfo(torch.float32).eps
    assert (error <= 2 * ulp)[normal].all(), (error / ulp)[normal].max()


# Units ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in UNITS if name not in FOLLOWED])
def test_unit(triton: Any, name: str) -> None:
    """Each in one dtype and memory format, in turn."""
    (channels, told), turn = UNITS[name], list(UNITS).index(name)
    memory_format = (CONTIGUOUS, LAST)[turn % 2]
    x = draw(2, channels, 7, 9, dtype=(FP32, FP16, BF16)[turn % 3], memory_format=memory_format)
    deep = name in GATED or name in CHAINS
    check(told, x, "stage" if deep else "unit")


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("name", FOLLOWED)
def test_what_follows_a_gate(triton: Any, name: str, dtype: torch.dtype) -> None:
    """Each in all dtypes and memory formats of the caller's map, a part of a larger map's channels
    among them."""
    (channels, told), turn = FOLLOWED[name], list(FOLLOWED).index(name)
    layout = (turn + [FP32, FP16, BF16].index(dtype)) % 3
    memory_format = LAST if layout == 1 else CONTIGUOUS
    x = draw(2, 2 * channels, 7, 9, dtype=dtype)[:, ::2]
    check(told, x if layout == 2 else x.contiguous(memory_format=memory_format), "stage")


def test_shortcut_in_several_tiles(triton: Any) -> None:
    channels, told = FOLLOWED["gated-shortcut-projection"]
    with triton.use_tile(triton.ProductTile(16, 16, 16, 4)):
        check(told, draw(2, channels, 5, 7), "stage")


def joined(*names: str) -> tuple[int, Told]:
    """Units one after the other; each must have the channels that the one before gives."""

    def tell(builder: Builder) -> None:
        for i, name in enumerate(names):
            following = _Following(builder) if i else builder
            UNITS[name][1](following)  # type: ignore[arg-type]

    return UNITS[names[0]][0], tell


class _Following:
    """Told a unit that is not the first."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder

    def add_import(self, channels: int) -> None:
        assert channels == self._builder.channels

    def add_unit(self, unit: Unit[Layer]) -> None:
        self._builder.add_unit(unit)


STAGE = "gate-after-pw2", "pairs", "gate-after-pw2-s2", "prelu", "pairs-gate"
SHORTCUTS = "gated-shortcut", "gate-activation-s2", "shortcut", "gated-shortcut-projection"


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_stage(triton: Any, dtype: torch.dtype) -> None:
    """Units of several kinds hand their planes on."""
    channels, told = joined(*STAGE)
    check(told, draw(2, channels, 9, 5, dtype=dtype), "stage")


@pytest.mark.parametrize("stage", [STAGE, SHORTCUTS], ids=["stage", "shortcuts"])
def test_results_on_the_way(triton: Any, stage: tuple[str, ...]) -> None:
    """Each unit's map, whoever writes it."""
    # So many pixels that no single rounding decides.
    x, builder = draw(4, 20, 5, 6), TritonPlanBuilder()

    def tell(names: tuple[str, ...], taps: bool) -> Told:
        def told(builder: Builder) -> None:
            for i, name in enumerate(names):
                UNITS[name][1](_Following(builder) if i else builder)  # type: ignore[arg-type]
                if taps and i < len(names) - 1:
                    builder.add_result()

        return told

    tell(stage, True)(builder)
    plan = builder.build(FP32, torch.get_default_device())
    results = [x.new_empty(shape) for shape in plan.result_shapes(4, 5, 6)]
    memory = triton.network.allocate(plan.weights, plan.steps, 4, 5, 6).tensors
    operators("triton").network_out(x, *plan.arrays, plan.step_words, memory, results, [])
    for i, result in enumerate(results):
        told = tell(stage[: i + 1], False)
        assert_accurate("stage", result, plain(told, x), plain(told, x.double()), "triton")


@pytest.mark.parametrize("activation", [SILU, prelu(20), RELU6], ids=lambda a: a.kind)
def test_ends(triton: Any, activation: Activation) -> None:
    """Stem and head with other activations, some of which fall somewhere."""
    stem, conv5 = layer(3, 20, activation, 3, 2), layer(20, 20, activation)
    fc = randomize_(nn.Linear(20, 7), 5)

    def told(builder: Builder) -> None:
        builder.add_stem(stem)
        UNITS["leaky-s1"][1](_Following(builder))  # type: ignore[arg-type]
        builder.add_head(conv5, fc)

    check(told, draw(2, 3, 19, 23, dtype=FP32), "network")


# Tiles ----------------------------------------------------------------------------------------


def shallow(builder: Builder) -> None:
    """All kinds of launches but for those of gates."""
    builder.add_stem(layer(3, 20, kernel=3, stride=2))
    UNITS["none"][1](_Following(builder))  # type: ignore[arg-type]
    builder.add_head(layer(23, 40), randomize_(nn.Linear(40, 7), 5))


@pytest.mark.parametrize("dtype", [FP16, pytest.param(FP32, marks=pytest.mark.slow)], ids=str)
def test_every_tile_of_products(triton: Any, dtype: torch.dtype) -> None:
    x, tiles = draw(2, 3, 17, 29, dtype=dtype), triton.tiles.PRODUCT_TILES
    plan = planned(shallow, dtype)
    eager, exact = plain(shallow, x), plain(shallow, x.double())
    of_dtype = [t for (_, n), each in tiles.items() if n == (dtype != FP32) for t in each]
    for tile in dict.fromkeys(of_dtype):
        with triton.use_tile(tile):
            out = operators("triton").network(x, *plan.arguments)
        assert_accurate("network", out, eager, exact, "triton")


def test_pooling_over_several_tiles(triton: Any) -> None:
    """The head's sums, and a gate's means, of images that are larger than a tile."""

    def told(builder: Builder) -> None:
        UNITS["gate-after-pw2"][1](builder)
        builder.add_head(layer(20, 24), randomize_(nn.Linear(24, 7), 5))

    with triton.use_tile(triton.ProductTile(64, 16, 64, 4)):
        check(told, draw(2, 20, 5, 9), "network")


# Plans ----------------------------------------------------------------------------------------


def kinds_of(name: str) -> list[int]:
    return [step.kind for step in planned(UNITS[name][1]).steps]


def test_launches(triton: Any) -> None:
    """No more than the module says."""
    for name in (*ACTIVATED, *WINDOWS):
        assert kinds_of(name) == [PW, DW_PW], name
    assert kinds_of("gate-before-pw2") == [PW, DW, MEANS, GATES, PW, DW_PW]
    assert kinds_of("gate-after-pw2-s2") == [PW, DW_PW, MEANS, GATES, SCALE, DW_PW]
    assert kinds_of("shortcut") == [PW, DW_PW, SCALE, DW_PW]
    assert kinds_of("gated-shortcut") == [PW, DW_PW, MEANS, GATES, SCALE, DW_PW]
    assert kinds_of("gate-activation-before-pw") == [PW, MEANS, GATES, SCALE, PW, DW_PW]
    assert kinds_of("activation") == [PW, DW, SCALE, PW, DW_PW]
    assert kinds_of("pairs") == [DW_PW, DW_PW, DW_PW]
    assert kinds_of("dw-first") == [DW_PW, DW_PW]


def test_launches_of_a_stage_of_shortcuts(triton: Any) -> None:
    """What passes through stays where it is, and nothing is written that its launch reads."""
    _, told = joined("gated-shortcut", "shortcut", "gated-shortcut")
    plan, gated = planned(told), [PW, DW_PW, MEANS, GATES, SCALE]
    kinds = [step.kind for step in plan.steps]
    assert kinds == [COPY, *gated, PW, DW_PW, SCALE, *gated, DW_PW]
    first, second, last = (step for step in plan.steps if step.kind == SCALE)
    for step in (first, second):
        read, written = (
            set(plan.tables[table : table + step.rows].tolist())
            for table in (step.side_table, step.target_table)
        )
        assert step.side_source == step.target
        assert len(read) == len(written) == 10
        assert not read & written
    assert [step.gated for step in (first, second, last)] == [1, 0, 1]


@pytest.mark.parametrize("name", ["gate-before-pw2-s2", "pairs", "prelu", "gated-shortcut"])
def test_words(triton: Any, name: str) -> None:
    for step in planned(UNITS[name][1]).steps:
        assert TritonStep.of_words(step.words()) == step


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (alone(gate(10), layer(10, 10))[1], "squeeze-and-excite of a unit's input"),
        (alone(layer(10, 10))[1], "a branch of one pointwise convolution"),
        (
            alone(depthwise(20), projection=(layer(20, 20), layer(20, 10)))[1],
            r"a projection of windows \[1, 1\]",
        ),
    ],
    ids=["gate", "pw", "projection"],
)
def test_unsupported(triton: Any, told: Told, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        planned(told)


def check_refused(name: str, *cases: tuple[int, dict[str, Any], str]) -> None:
    """Each is a step of the unit's plan, what it has instead, and the message."""
    x, plan = draw(1, 20, 3, 3), planned(UNITS[name][1])
    for i, changes, message in cases:
        steps = list(plan.steps)
        steps[i] = replace(steps[i], **changes)
        words = [word for step in steps for word in step.words()]
        with pytest.raises(RuntimeError, match=f"step {i} .*{message}"):
            operators("triton").network(x, *plan.arrays, words, *plan.arguments[4:])


def test_steps_that_do_not_fit(triton: Any) -> None:
    """What would read beyond an array, or is no step, raises."""
    plan = planned(UNITS["gate-before-pw2-s2"][1])
    check_refused(
        "gate-before-pw2-s2",
        (0, {"kind": 10}, "is not known"),
        (1, {"dw": replace(plan.steps[1].dw, window=4)}, "is not known"),
        (1, {"dw": replace(plan.steps[1].dw, channels=17)}, "is not known"),
        (3, {"pw": replace(plan.steps[3].pw, depth=17)}, "is not known"),
        (4, {"pw": replace(plan.steps[4].pw, activation=9)}, "is not known"),
        (5, {"side_channels": 19}, "is not known"),
        (2, {"source": -1}, "is not known"),
        (1, {"source": 1}, "reads a map that no step made"),
        (1, {"dw": replace(plan.steps[1].dw, window=99)}, "reads beyond its parameters"),
        (5, {"side_pw": replace(plan.steps[5].side_pw, slopes=1 << 20)}, "beyond its parameters"),
        (5, {"result_table": 1 << 20}, "reads beyond its tables"),
    )


def test_shortcuts_that_do_not_fit(triton: Any) -> None:
    after = planned(UNITS["shortcut"][1]).steps[2].pw
    check_refused(
        "shortcut",
        (2, {"pw": replace(after, rows=9)}, "is not known"),
        (2, {"pw": replace(after, depth=10)}, "is not known"),
        (2, {"pw": replace(after, slopes=1 << 20)}, "reads beyond its parameters"),
        (2, {"side_pw": after}, "is not known"),
        (2, {"stride": 2}, "is not known"),
        (2, {"side_channels": 9}, "is not known"),
        (2, {"side_source": 2}, "is not known"),
        (2, {"side_source": 0}, "reads a map that no step made"),
        (2, {"side_table": 1 << 20}, "reads beyond its tables"),
        (2, {"gated": 1}, "reads means or gates that no step made"),
    )
    gates = planned(UNITS["gated-shortcut"][1]).steps[3]
    nine = {
        "channels": 9,
        "pw": replace(gates.pw, depth=9),
        "side_pw": replace(gates.side_pw, rows=9),
    }
    check_refused("gated-shortcut", (3, nine, "reads means or gates that no step made"))
