"""Units that deviate from the paper's run fused, at the packing level, on each backend."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from _cases import DTYPES, assert_same_specials, case_id, draw, in_turn, threads
from _deviations import (
    ACTIVATIONS,
    BUILDERS,
    ConvBn,
    DeviantUnit,
    Place,
    Shortcut,
    SqueezeExcite,
    check,
    paper_unit,
    plan_of,
)
from conftest import running_on
from torch import Tensor, nn

from snv2_kernels import _native
from snv2_kernels.ops import run_plan
from snv2_kernels.packing import Builder
from snv2_kernels.packing.units import Unsupported
from snv2_kernels.testing import float64_reference, max_error, randomize_

# Backends, the CPU's with each instruction set, and what their maps are of. The one that multiplies
# bfloat16 is the one before it in all else.
CPU_FLOAT32 = [
    (f"cpu-{isa}", torch.float32)
    for isa in _native.available_cpu_isas()
    if isa not in ("amx", "avx512_bf16", "avx512_vnni", "neon_bf16")
]
CPU_BFLOAT16 = [("cpu", torch.bfloat16)][: _native.cpu_has_bfloat16()]
CPU = [*CPU_FLOAT32, *CPU_BFLOAT16]


def place_id(value: Any) -> str:
    return "-".join(map(case_id, value)) if isinstance(value, tuple) else case_id(value)


@pytest.fixture(params=CPU, ids=place_id)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A backend, and a dtype that its maps may have."""
    name, dtype = request.param
    with running_on(name) as backend:
        yield backend, dtype


def on_gpus_too(
    names: str, *factors: Sequence[Any], triton: Sequence[tuple[Any, ...]] = ()
) -> pytest.MarkDecorator:
    """All cases on the CPU, and on CUDA's kernels each in one dtype, in turn. These and Triton's
    have more tests of their own: test_gpu_deviations.py, test_triton_deviations.py."""
    rows = [(*row, cpu) for row in itertools.product(*factors) for cpu in CPU]
    rows += [(*row, ("triton", torch.float32)) for row in triton]
    for name in ("cuda-emulated", "cuda"):
        dtypes = [((name, *dtype.values),) for dtype in DTYPES]
        marks = [pytest.mark.gpu][: name == "cuda"]
        rows += [pytest.param(*row, marks=marks) for row in in_turn(*factors, dtypes)]
    return pytest.mark.parametrize(f"{names}, place", rows, indirect=["place"], ids=place_id)


each_activation = pytest.mark.parametrize("act", ACTIVATIONS)
each_stride = pytest.mark.parametrize("stride", [1, 2])
WIDTHS = [20, 58, 26]


# Activations ----------------------------------------------------------------------------------


@each_activation
@each_stride
def test_activation_of_each_layer(place: Place, act: str, stride: int) -> None:
    """One after the other, then of all."""
    places = 5 if stride == 2 else 3
    for i in range(places + 1):
        acts: list[str | None] = [None] * 5
        for layer in range(places) if i == places else [i]:
            acts[layer] = act
        channels = WIDTHS[i % len(WIDTHS)]
        kind = "unit" if i < places else "stage"
        check(place, [paper_unit(channels, stride, acts)], (2, channels, 15, 9), kind)


def test_stage_of_mixed_activations(place: Place) -> None:
    units = [
        paper_unit(58, 1, ["silu", None, "prelu", None, None]),
        paper_unit(58, 2, ["prelu", "hardswish", None, "leaky_relu", "identity"]),
        paper_unit(116, 1, [None, None, "silu", None, None]),
        paper_unit(116, 1, ["relu6", "prelu-one", "leaky_relu", None, None]),
    ]
    for batch in (0, 1, 3):
        check(place, units, (batch, 58, 13, 11), "stage")


@each_activation
def test_specials_of_activations(place: Place, act: str) -> None:
    """NaN, infinities and numbers of any size go through as PyTorch's function lets them."""
    unit = DeviantUnit(1, [ConvBn(1, 1, act=act)], passthrough=False)
    bn = unit.branch[0].bn
    bn.eps = 0.0
    nn.init.ones_(unit.branch[0].conv.weight)
    plan = plan_of(place, nn.Sequential(unit.eval()), 1)
    magnitudes = torch.logspace(-37, 37, 300).tolist() + torch.linspace(0, 110, 3000).tolist()
    numbers = [*magnitudes, float("nan"), float("inf"), 3.0, 6.0, 87.33, 88.73]
    backend, dtype = place
    x = torch.tensor([numbers, [-number for number in numbers]])[None, None].to(dtype)
    out, exact = run_plan(x, plan, backend), float64_reference(unit)(x)
    with torch.no_grad():
        eager = unit.to(dtype)(x)
    assert_same_specials(out, eager)
    finite = exact.isfinite()
    error = (out - exact)[finite].abs()
    # Two ulps of the result, or of what is multiplied where a sum went before.
    size = (x if act == "hardswish" else exact)[finite].abs()
    assert (error <= 2 * torch.finfo(dtype).eps * size + 1e-35).all()


# Windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "dilation"), [(5, 1), (7, 1), (3, 2), (3, 3), (5, 2), (9, 1), (7, 3)], ids=str
)
@each_stride
def test_windows(place: Place, window: int, dilation: int, stride: int) -> None:
    """In branch and projection, at maps that are larger and smaller than the window."""
    for i, (h, w) in enumerate([(17, 23), (7, 6), (2, 9), (1, 1)]):
        channels = WIDTHS[i % len(WIDTHS)]
        acts = [None, "silu" if i == 1 else None, None, "relu" if i == 1 else None, None]
        unit = paper_unit(channels, stride, acts, window, dilation)
        check(place, [unit], (1 + i % 2, channels, h, w))


# Gates ----------------------------------------------------------------------------------------


def gated_unit(channels: int, place: int, stride: int, act: str, gate: str) -> DeviantUnit:
    """A gate behind the depthwise convolution, at the end, or at both."""
    inp = channels if stride == 2 else channels // 2
    branch: list[Any] = [
        ConvBn(inp, inp + 5),
        ConvBn(inp + 5, inp + 5, 3, stride),
        ConvBn(inp + 5, inp),
    ]
    if place != 0:
        branch.append(SqueezeExcite(inp, act, gate))
    if place != 1:
        branch.insert(2, SqueezeExcite(inp + 5, act, gate))
    projection = [ConvBn(channels, channels, 3, 2), ConvBn(channels, inp)] if stride == 2 else []
    return DeviantUnit(channels, branch, stride, projection)


# Where, the stride, and the two activations.
GATED = in_turn(
    [0, 1, 2], [1, 2], [("relu", "sigmoid"), ("hardswish", "hardsigmoid"), ("silu", "sigmoid")]
)


@on_gpus_too("gated", GATED)
def test_gates(place: Place, gated: tuple[int, int, str, str]) -> None:
    at, stride, act, gate = gated
    large = (116, 14, 13) if place[0] == "cpu" else (44, 5, 13)  # emulated: many threads
    for channels, h, w in ((26, 9, 7), (58, 1, 1), large):
        unit = gated_unit(channels, at, stride, act, gate)
        check(place, [unit], (2, channels, h, w), "stage")


@on_gpus_too(
    "form, after", ["scaled", "added", "both"], ["relu", "identity", "prelu", "hardswish"],
    triton=[("scaled", "relu"), ("added", "prelu"), ("both", "identity")],
)  # fmt: skip
@pytest.mark.on_triton(2)
def test_what_follows_a_gate(place: Place, form: str, after: str) -> None:
    """Units one after the other, which read what others made, in one order or another."""
    units: list[DeviantUnit] = []
    for channels, half in ((20, 8), (20, 12), (20, 10)):
        parts = {
            "scaled": SqueezeExcite(half, after=after),
            "added": Shortcut(half, after),
            "both": SqueezeExcite(half, "silu", "hardsigmoid", after, adds_source=True),
        }
        branch = [ConvBn(half, 11), ConvBn(11, 11, 3), ConvBn(11, half, act="identity")]
        units.append(DeviantUnit(channels, [*branch, parts[form]]))
    for shape in ((5, 20, 9, 14), (24, 20, 1, 3)):  # many pixels, so that no single one decides
        check(place, units, shape, "stage")


@on_gpus_too("count", [1, 2, 3, 4])
def test_shortcut_around_any_branch(place: Place, count: int) -> None:
    """With a projection beside it, with none, and around a branch of a depthwise end."""
    pair = ConvBn(10, 10, 5), ConvBn(10, 10)
    whole = ConvBn(20, 13), ConvBn(13, 13, 3), ConvBn(13, 20), SqueezeExcite(20, adds_source=True)
    units = [
        DeviantUnit(20, [*pair, *pair, Shortcut(10)]),
        DeviantUnit(20, whole, 1, [ConvBn(20, 20, 3), ConvBn(20, 9)]),
        DeviantUnit(29, [ConvBn(29, 29), ConvBn(29, 29, 3), Shortcut(29)], passthrough=False),
        DeviantUnit(29, [ConvBn(17, 17), ConvBn(17, 17, 3, act="silu"), Shortcut(17, "relu6")]),
    ]
    check(place, units[:count], (2, 20, 5, 7), "stage")


# Other branches -------------------------------------------------------------------------------


def pairs(inp: int, oup: int, count: int, stride: int, window: int = 3) -> list[ConvBn]:
    """dw, pw, dw, pw, ...: ShuffleNetV2+'s "Xception" branch has three pairs."""
    layers = []
    for i in range(count):
        layers += [
            ConvBn(inp, inp, window, stride if i == 0 else 1),
            ConvBn(inp, oup, act="hardswish"),
        ]
        inp = oup
    return layers


BRANCHES: dict[str, Any] = {
    "xception": lambda inp, oup, s: pairs(inp, oup, 3, s),
    "xception-gated": lambda inp, oup, s: [*pairs(inp, oup, 3, s, 5), SqueezeExcite(oup)],
    "dw-pw": lambda inp, oup, s: pairs(inp, oup, 1, s),
    "pw-dw": lambda inp, oup, s: [ConvBn(inp, oup), ConvBn(oup, oup, 3, s, act="relu")],
    "dw-first": lambda inp, oup, s: [
        ConvBn(inp, inp, 3, s), ConvBn(inp, oup), ConvBn(oup, oup, 3), ConvBn(oup, oup)
    ],
    "gate-before-dw": lambda inp, oup, s: [
        ConvBn(inp, oup), SqueezeExcite(oup), ConvBn(oup, oup, 3, s), ConvBn(oup, oup)
    ],
    "dw-gate-pw": lambda inp, oup, s: [
        ConvBn(inp, inp, 3, s), SqueezeExcite(inp), ConvBn(inp, oup)
    ],
    "pw-gate-dw": lambda inp, oup, s: [
        ConvBn(inp, oup), SqueezeExcite(oup), ConvBn(oup, oup, 3, s, act="relu")
    ],
    "gates-between-dw": lambda inp, oup, s: [
        ConvBn(inp, oup), SqueezeExcite(oup), ConvBn(oup, oup, 3), SqueezeExcite(oup),
        ConvBn(oup, oup, 5, s), SqueezeExcite(oup)
    ],
    "two-pw": lambda inp, oup, s: [
        ConvBn(inp, oup), ConvBn(oup, oup), ConvBn(oup, oup, 5, s), ConvBn(oup, oup)
    ],
    "two-dw": lambda inp, oup, s: [
        ConvBn(inp, oup), ConvBn(oup, oup, 3, s), ConvBn(oup, oup, 3), ConvBn(oup, oup)
    ],
    # The stride is not of the first depthwise convolution: ShuffleNet V2*, and others.
    "strided-second": lambda inp, oup, s: [
        ConvBn(inp, inp, 3), ConvBn(inp, oup), ConvBn(oup, oup, 3, s), ConvBn(oup, oup)
    ],
    "strided-last": lambda inp, oup, s: [
        ConvBn(inp, oup), ConvBn(oup, oup, 3), ConvBn(oup, oup), SqueezeExcite(oup),
        ConvBn(oup, oup, 5), ConvBn(oup, oup, 3, s), ConvBn(oup, oup)
    ],
}  # fmt: skip


@on_gpus_too(
    "branch", list(BRANCHES),
    triton=[("xception-gated",), ("dw-gate-pw",), ("two-dw",), ("strided-second",)],
)  # fmt: skip
@pytest.mark.on_triton(2)
def test_branches(place: Place, branch: str) -> None:
    """A strided unit with a projection, then units that read what others made."""
    make = BRANCHES[branch]
    first = DeviantUnit(20, make(20, 29, 2), 2, [ConvBn(20, 20, 3, 2), ConvBn(20, 30, act="silu")])
    units = [first, *(DeviantUnit(59, make(inp, inp, 1)) for inp in (29, 30))]
    for shape in ((1, 20, 13, 18), (2, 20, 1, 3)):
        check(place, units, shape, "stage")


@on_gpus_too("branch", ["xception-gated", "pw-dw", "pw-gate-dw", "two-pw"])
def test_projection_at_stride_1(place: Place, branch: str) -> None:
    make = BRANCHES[branch]
    projection = [ConvBn(20, 20, 5, act="relu"), ConvBn(20, 30)]
    units = [DeviantUnit(20, make(width, 29, 1), 1, projection) for width in (20, 12)]
    for unit in units:
        check(place, [unit], (2, 20, 5, 7), "stage")


@on_gpus_too("stride", [1, 2])
def test_unit_without_passthrough(place: Place, stride: int) -> None:
    branch = [ConvBn(26, 40), ConvBn(40, 40, 3, stride), ConvBn(40, 33, act="identity")]
    unit = DeviantUnit(26, branch, stride, passthrough=False)
    check(place, [unit], (3, 26, 8, 9))


@on_gpus_too("act", ["silu", "relu", "identity"])
def test_unit_of_one_pointwise_convolution(place: Place, act: str) -> None:
    check(place, [DeviantUnit(20, [ConvBn(12, 17, act=act)])], (2, 20, 5, 30))


# Threads, networks, errors --------------------------------------------------------------------


def test_threads_give_the_same_bits(place: Place) -> None:
    """Means of a gate are summed in one order; and products, in strips of many pixels."""
    units = [
        gated_unit(58, 2, 2, "silu", "sigmoid"),
        DeviantUnit(116, pairs(58, 58, 3, 1)),
        paper_unit(116, 1, ["silu", "relu", "prelu", None, None], 5),
    ]
    module = randomize_(nn.Sequential(*units)).eval()
    plan = plan_of(place, module, 58)
    x = draw(1, 58, 40, 40, dtype=place[1])
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(run_plan(x, plan, place[0]))
    assert torch.equal(*results)


class DeviantNetwork(nn.Module):
    def __init__(self, act: str) -> None:
        super().__init__()
        self.stem = ConvBn(3, 20, act=act)
        self.stem.conv = nn.Conv2d(3, 20, 3, 2, 1)
        self.units = nn.Sequential(
            paper_unit(20, 2, [act, None, act, None, act]),
            paper_unit(40, 1, [act, None, act, None, None]),
        )
        self.head, self.fc = ConvBn(40, 70, act=act), nn.Linear(70, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.stem(x), 3, 2, 1)
        return self.fc(self.head(self.units(x)).mean([2, 3]))

    def add_to(self, builder: Builder) -> None:
        builder.add_stem(self.stem.layer())
        for unit in self.units:
            unit.add_to(builder)
        builder.add_head(self.head.layer(), self.fc)


@each_activation
def test_networks(place: Place, act: str) -> None:
    """Stem and head too; the map before the head is smaller and larger than a few tiles."""
    model = randomize_(DeviantNetwork(act)).eval()
    backend, dtype = place
    builder = BUILDERS[backend]()
    model.add_to(builder)
    plan = builder.build(dtype)
    for n, h, w in ((2, 65, 49), (1, 130, 130)):
        x = draw(n, 3, h, w, dtype=dtype)
        out, exact = run_plan(x, plan, backend), float64_reference(model)(x)
        with torch.no_grad():
            eager = max_error(model.to(dtype)(x), exact)
        model.float()
        eps = torch.finfo(dtype).eps
        # Of as few numbers as a classifier gives, eager's error is one throw of the dice.
        assert max_error(out, exact) <= max(1.5 * eager, 4 * eps) + eps


def test_products_of_a_general_branch() -> None:
    """Names, and what they add up to."""
    units = [
        DeviantUnit(20, pairs(20, 29, 3, 2), 2, [ConvBn(20, 20, 5, 2), ConvBn(20, 29)]),
        gated_unit(58, 0, 1, "relu", "sigmoid"),
    ]
    plan = plan_of(("cpu", torch.float32), nn.Sequential(*units), 20)
    products = plan.products(15, 9)
    names = [(product.step, product.name) for product in products]
    first = ["dw1", "pw1", "dw2", "pw2", "dw3", "pw3", "projection dw", "projection pw"]
    second = ["pw1", "dw", "gate reduce", "gate expand", "pw2"]
    assert sorted(names) == sorted(
        [("stage2.0", n) for n in first] + [("stage2.1", n) for n in second]
    )
    assert sum(product.multiply_adds for product in products) == plan.multiply_adds(15, 9)


def test_what_the_cpu_does_not_cover() -> None:
    def reason(*branch: Any, stride: int = 1) -> str:
        unit = DeviantUnit(20, branch, stride, passthrough=stride == 1)
        with pytest.raises(Unsupported) as raised:
            plan_of(("cpu", torch.float32), nn.Sequential(unit), 20)
        return str(raised.value)

    pw, dw = ConvBn(10, 10), ConvBn(10, 10, 3)
    assert reason(SqueezeExcite(10), pw) == "squeeze-and-excite that follows no convolution"
    around = "a shortcut that does not lead around a whole branch"
    assert reason(pw, dw, ConvBn(10, 9), Shortcut(9)) == around
    assert reason(pw, Shortcut(10), dw, pw) == around
    assert reason(ConvBn(20, 20), ConvBn(20, 20, 3, 2), Shortcut(20), stride=2) == around
    alone = "a branch of depthwise convolutions alone"
    assert reason(dw) == reason(dw, SqueezeExcite(10), dw) == alone
    assert reason(pw, ConvBn(10, 10, 33), pw) == "a depthwise window of 33"
    assert reason(pw, ConvBn(10, 10, 3, 1, 65), pw) == "dilation 65"
    assert reason(pw, stride=2) == "stride 2 without a depthwise convolution"
