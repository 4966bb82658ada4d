"""Quantized models: their kernels beside the integer network in plain PyTorch, and all the ways in
which a model is used."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from _small_networks import SmallNetwork
from _triton_units import depthwise, layer
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_bench.guidelines.networks import torchvision_models
from snv2_kernels import _native, models
from snv2_kernels.packing import PlanBuilder
from snv2_kernels.packing.units import Activation, Unit
from snv2_kernels.quantization import integer_layers, interpret
from snv2_kernels.quantization.calibrate import calibrate_builder
from snv2_kernels.testing import randomize_

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of the root mean square of the float network's scores.
NEAR = 0.05


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(width: str = "x0_5") -> nn.Module:
    make = getattr(models, f"shufflenet_v2_{width}")
    return randomize_(make(num_classes=37)).eval()


def pixels(n: int, size: int = 48) -> Tensor:
    shape = n, size, size, 3
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def normalized(image: Tensor) -> Tensor:
    x = image.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def error(found: Tensor, truth: Tensor) -> float:
    """Root mean square of the errors over that of what is expected."""
    return float(
        (found.double() - truth.double()).square().mean().sqrt()
        / truth.double().square().mean().sqrt()
    )


def interpreted(quantized: Any, x: Tensor, taps: tuple[str, ...] = ()) -> list[Tensor]:
    builder = PlanBuilder()
    quantized._tell(builder, taps)
    return interpret(builder, integer_layers(builder, quantized._ranges), x)


@pytest.fixture(scope="module")
def quantized() -> Any:
    return snv2.quantize(network(), draw(4, 3, 64, 64))


# Kernels --------------------------------------------------------------------------------------


@functools.cache
@torch.no_grad()
def quantized_network(width: str, shape: tuple[int, ...]) -> tuple[Any, Tensor, Tensor]:
    """A network, an input of that shape and the integers' scores; shared, so never changed."""
    x = draw(*shape, seed=2)
    made: Any = snv2.quantize(network(width), draw(2, *shape[1:]))
    (scores,) = interpreted(made, x)
    return made, x, scores


@pytest.mark.parametrize(
    ("width", "shape"),
    [
        ("x0_5", (2, 3, 47, 61)),
        ("x1_0", (1, 3, 96, 33)),
        ("x1_5", (3, 3, 33, 33)),
        ("x2_0", (1, 3, 64, 64)),
    ],
)
@torch.no_grad()
def test_networks_equal_the_integers_of_pytorch(
    width: str, shape: tuple[int, ...], isa: str
) -> None:
    """Sums are exact and rounded alike, so all scores are equal, on any number of threads; but
    where nothing multiplies and adds with one rounding a byte may be its neighbour."""
    shared, x, expected = quantized_network(width, shape)
    quantized = copy.deepcopy(shared)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        scores = quantized(x)
        torch.set_num_threads(before)
        if isa == "portable":
            assert error(scores, expected) < NEAR
        else:
            assert torch.equal(scores, expected)


def drawn_network(random: Random) -> SmallNetwork:
    """One to three units of any widths, splits and orders, one of which may be a result, with stem
    and head or without."""
    width = lambda: random.randint(1, 40)  # noqa: E731
    relu = [Activation("relu"), Activation("relu"), Activation("relu6")]
    inp = random.randint(1, 5)
    channels, steps = inp, list[Any]()
    if random.random() < 0.6:
        channels = width()
        conv = layer(inp, channels, random.choice(relu), 3, 2)
        steps.append(lambda b: b.add_stem(conv))
    else:
        steps.append(lambda b: b.add_import(inp))
    units = random.randint(1, 3)
    for i in range(units):
        stride, mid, out = random.choice([1, 1, 2]), width(), width()
        shuffled = random.sample(range(channels), channels)
        cut = channels if stride == 2 else random.randint(1, channels)
        main, passthrough, projection = shuffled[:cut], shuffled[cut:], None
        first = len(passthrough)
        if stride == 2:
            first = width()
            projection = depthwise(channels, 3, 2), layer(channels, first, random.choice(relu))
        branch = (
            layer(len(main), mid, random.choice(relu)),
            depthwise(mid, 3, stride),
            layer(mid, out, random.choice(relu)),
        )[random.choice([0, 0, 1]) :]
        if len(branch) == 2:
            branch = depthwise(len(main), 3, stride), layer(len(main), out, random.choice(relu))
        order = random.sample(range(first + out), first + out)
        unit = Unit(stride, branch, main, passthrough, order, projection)
        steps.append(lambda b, unit=unit: b.add_unit(unit))
        if i + 1 < units and random.random() < 0.3:
            steps.append(lambda b: b.add_result())
        channels = len(order)
    if random.random() < 0.6:
        features = layer(channels, width(), relu[0])
        fc = randomize_(nn.Linear(features.channels, width()))
        steps.append(lambda b: b.add_head(features, fc))
    return SmallNetwork(inp, steps, "network")


@torch.no_grad()
def test_drawn_networks_equal_the_integers_of_pytorch() -> None:
    """Planes lie in words that are read in part, and in panels of which half is computed."""
    for seed in range(150):
        random = Random(seed)
        net = drawn_network(random)
        builder = PlanBuilder()
        net.tell(builder)
        n, h, w = random.randint(1, 2), random.randint(1, 12), random.randint(1, 9)
        x = draw(n, net.channels, h, w, seed=seed).abs()
        integers = integer_layers(builder, calibrate_builder(builder, x, method="minmax"))
        plan = builder.build_integers(integers)
        results = torch.ops.snv2.network_results(x, plan.weights, plan.words, *plan.result_fields)
        for found, wanted in zip(results, interpret(builder, integers, x), strict=True):
            assert found.shape == wanted.shape
            bound = 1e-5 * wanted.abs().max()  # maps leave by a multiply-add of their own
            assert (found - wanted).abs().max() <= bound, seed


# Uses -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_engines_of_bytes_make_no_floats() -> None:
    net, image = network(), pixels(3)
    quantized = snv2.quantize(net, normalized(image), normalize=(MEAN, STD))
    shape = (3, 3, 48, 48)
    of_floats = snv2.Engine(quantized, shape)
    of_bytes = snv2.Engine(quantized, shape, normalize=(MEAN, STD))
    scores = of_floats(normalized(image)).clone()
    assert torch.equal(scores, quantized(normalized(image)))
    assert torch.equal(of_bytes(image), scores)
    assert of_bytes.input.dtype == torch.uint8
    assert error(scores, net(normalized(image))) < NEAR
    # Fewer images, another thread's engine, another process's.
    assert torch.equal(of_bytes(image[:2]), scores[:2])
    for other in (of_bytes.clone(), pickle.loads(pickle.dumps(of_bytes))):
        assert torch.equal(other(image), scores)
    assert "maps of uint8" in str(of_bytes.report())
    # Calibrated on other numbers than the engine's, bytes are converted on the way.
    other = snv2.Engine(quantized, shape, normalize=((0.5, 0.4, 0.45), (0.25, 0.2, 0.3)))
    x = image.permute(0, 3, 1, 2).float() / 255 - torch.tensor((0.5, 0.4, 0.45))[:, None, None]
    expected = quantized(x / torch.tensor((0.25, 0.2, 0.3))[:, None, None])
    assert error(other(image), expected) < 0.01


@torch.no_grad()
def test_dtypes_and_maps_on_the_way(quantized: Any) -> None:
    x = draw(2, 3, 64, 64, seed=3)
    engine = snv2.Engine(quantized, (2, 3, 64, 64), dtype=torch.float16, taps=["stage4", "stage2"])
    scores, maps = engine(x.half())
    expected = interpreted(quantized, x.half().float(), ("stage2", "stage4"))
    assert scores.dtype == torch.float16
    for found, wanted in zip((maps["stage2"], maps["stage4"], scores), expected, strict=True):
        assert torch.equal(found, wanted.half())
    other = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(quantized(other), quantized(x))


@torch.no_grad()
def test_parts_of_a_larger_model() -> None:
    """Those that the model calls are quantized, each on the maps that it is given."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = network()
            self.neck = nn.Conv2d(192, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            net = self.backbone
            x = net.maxpool(net.conv1(x))  # type: ignore[operator]
            for stage in (net.stage2, net.stage3, net.stage4):
                x = stage(x)  # type: ignore[operator]
            y: Tensor = self.neck(x)
            return y

    model, x = Detector().eval(), draw(2, 3, 64, 64)
    quantized = snv2.quantize(model, [x[:1], x[1:]])
    explained = str(snv2.explain(quantized))
    for stage in ("stage2", "stage3", "stage4"):
        assert f"backbone.{stage}: stage in int8: fused" in explained
    assert "unit in int8" not in explained
    assert error(quantized(x), model(x)) < 0.1
    assert torch.equal(snv2.fuse(model)(x), snv2.fuse(copy.deepcopy(model))(x))  # untouched


@torch.no_grad()
def test_units_between_other_layers() -> None:
    """Units of a container that follow each other are one call, in integers too."""
    net: Any = network()
    units = list(net.stage2)[:3]
    model = nn.Sequential(net.conv1, net.maxpool, *units, nn.Conv2d(48, 4, 1)).eval()
    x = draw(2, 3, 64, 64)
    quantized: Any = snv2.quantize(model, x)
    assert "2-4: stage in int8: fused" in str(snv2.explain(quantized))
    series = quantized.steps()["2-4"]
    entered = net.maxpool(net.conv1(x))
    (expected,) = interpreted(series, entered)
    assert torch.allclose(quantized(x), model[-1](expected), rtol=1e-4, atol=1e-4)
    assert error(quantized(x), model(x)) < NEAR
    # One that is not quantized is in no series with others that are.
    quantized[3]._ranges = quantized._made = None
    assert list(quantized.steps())[-5:] == ["1", "2", "3", "4", "5"]
    assert error(quantized(x), model(x)) < NEAR


@torch.no_grad()
def test_changed_weights_are_packed_again() -> None:
    net = network()
    x = draw(2, 3, 64, 64)
    quantized: Any = snv2.quantize(net, x)
    before = quantized(x)
    net.conv5[0].weight.mul_(0.5)  # type: ignore[index, operator, union-attr]
    after = quantized(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, interpreted(quantized, x)[0])
    copied = pickle.loads(pickle.dumps(quantized))
    assert torch.equal(copied(x), after)
    assert torch.equal(copy.deepcopy(quantized)(x), after)
    assert torch.equal(snv2.fuse(quantized)(x), after)


def test_gradients_are_those_of_the_float_network(quantized: Any) -> None:
    x = draw(1, 3, 64, 64).requires_grad_()
    quantized(x).sum().backward()
    found, x.grad = x.grad, None
    with snv2.use_backend("reference"):
        quantized(x).sum().backward()
    assert found is not None
    assert torch.allclose(found, x.grad, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_elsewhere_it_is_the_float_network(quantized: Any) -> None:
    x = draw(1, 3, 64, 64)
    plain = network()(x)
    with snv2.use_backend("reference"):
        assert torch.equal(quantized(x), plain)
    if snv2.backends()["cuda-emulated"].startswith("ok"):
        with snv2.use_backend("cuda-emulated"):
            assert torch.allclose(quantized(x), plain, atol=1e-4)
            assert "integers run on a CPU only" in str(snv2.explain(quantized))
            with pytest.raises(ValueError, match="integers run on a CPU only"):
                snv2.Engine(quantized, (1, 3, 64, 64))


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_models_that_pytorch_quantized() -> None:
    import torch.ao.quantization as ao

    make = torchvision_models().quantization.shufflenet_v2_x0_5
    model = randomize_(make(quantize=False)).eval()
    plain, x = copy.deepcopy(model), draw(8, 3, 64, 64)
    model.fuse_model(is_qat=False)
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = next(
        name for name in torch.backends.quantized.supported_engines if name != "none"
    )
    try:
        model.qconfig = ao.QConfig(  # with all eight bits
            ao.MinMaxObserver.with_args(dtype=torch.quint8), ao.default_per_channel_weight_observer
        )
        prepared = ao.prepare(model)
        prepared(x)
        converted = ao.convert(prepared)
        theirs = error(converted(x), plain(x))
        ours = snv2.quantization.from_torch_ao(converted)
        assert "network in int8: fused" in str(snv2.explain(ours))
        assert error(ours(x), plain(x)) < 1.1 * theirs
        with pytest.raises(ValueError, match=r"model: expected one that torch\.ao"):
            snv2.quantization.from_torch_ao(plain)
        part = nn.Sequential(converted.stage2)
        with pytest.raises(ValueError, match="0 stubs"):
            snv2.quantization.from_torch_ao(part)
    finally:
        torch.backends.quantized.engine = engine
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        snv2.quantization.from_torch_ao(3)  # type: ignore[arg-type]


@torch.no_grad()
def test_programs(quantized: Any, tmp_path: Path) -> None:
    path, x = tmp_path / "net.snv2", draw(2, 3, 64, 64, seed=4)
    snv2.save_program(quantized, path, (1, 3, 64, 64), normalize=(MEAN, STD))
    program = snv2.Program(path)
    assert program.plans == (("cpu", torch.uint8),)
    assert torch.equal(program(x), quantized(x))
    assert program(x.bfloat16()).dtype == torch.bfloat16
    image = pixels(1, 64)
    engine = snv2.Engine(quantized, (1, 3, 64, 64), normalize=(MEAN, STD))
    assert error(program(image), engine(image)) < 0.01
    with pytest.raises(ValueError, match="integers run on a CPU only"):
        snv2.save_program(quantized, path, (1, 3, 64, 64), targets=("cpu", "cuda"))


@torch.no_grad()
def test_networks_of_gray_images() -> None:
    net: Any = models.shufflenet_v2_x0_5(num_classes=7)
    net.conv1[0] = nn.Conv2d(1, 24, 3, 2, 1, bias=False)
    randomize_(net).eval()
    x = draw(2, 1, 33, 47)
    assert torch.equal(snv2.Engine(net, (2, 1, 33, 47))(x), snv2.fuse(net)(x))
    quantized: Any = snv2.quantize(net, x)
    assert torch.equal(snv2.Engine(quantized, (2, 1, 33, 47))(x), interpreted(quantized, x)[0])


# Errors ---------------------------------------------------------------------------------------


PLAIN = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
PLUS = models.shufflenet_v2_plus("Small").eval()


@pytest.mark.parametrize(
    ("model", "batches", "kind", "message"),
    [
        (3, draw(1, 3, 32, 32), TypeError, "model: expected a torch.nn.Module, got int"),
        (network().train(), draw(1, 3, 32, 32), ValueError, "model: expected eval"),
        (PLAIN, draw(1, 3, 8, 8), ValueError, "model: no part of it runs in integers"),
        (network(), [], ValueError, "batches: expected at least one image"),
        (network(), "images", TypeError, "batches"),
        (network(), draw(1, 4, 32, 32), ValueError, "batches"),
        (network(), draw(1, 3, 32, 32).int(), TypeError, "batches"),
        (network(), draw(1, 3, 32, 32) / 0, ValueError, "batches: expected finite numbers"),
        (PLUS, draw(1, 3, 224, 224), ValueError, "no part of it runs in .*unit 3, layer 1"),
    ],
)  # fmt: skip
def test_bad_arguments(model: Any, batches: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        snv2.quantize(model, batches)


def test_bytes_need_a_plan_that_takes_them(quantized: Any) -> None:
    """The operator is as careful as the public functions: nothing is read as what it is not."""
    plans = [quantized._cpu_plan(torch.float32), snv2.fuse(network())._cpu_plan(torch.float32)]  # type: ignore[operator]
    results = [torch.empty(1, 37)]
    for plan in plans:
        size = _native.workspace_bytes(plan.words.numpy(), plan.weights.numel(), 1, 32, 32, 1)
        workspace = torch.empty(size // 4 + 16)[: size // 4]
        run = torch.ops.snv2.network_out
        with pytest.raises((ValueError, RuntimeError)):  # [N, C, H, W] is no image
            run(
                torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
                plan.weights,
                plan.words,
                workspace,
                results,
            )
    image = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bytes"):
        run(image, plan.weights, plan.words, workspace, results)
