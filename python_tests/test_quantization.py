"""Calibration, integer layers and the integer network, beside their definitions."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _benchmarks import load
from _triton_units import alone, depthwise, gate, layer, plain
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels import models
from snv2_kernels.packing import PlanBuilder
from snv2_kernels.packing.units import Activation, Unsupported
from snv2_kernels.quantization import (
    Affine,
    Quantization,
    Ranges,
    calibrate,
    integer_layers,
    interpret,
)
from snv2_kernels.quantization.calibrate import calibrate_builder
from snv2_kernels.quantization.histogram import Histogram
from snv2_kernels.quantization.interpret import fused_multiply_add, quantized
from snv2_kernels.quantization.network import steps
from snv2_kernels.testing import randomize_

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(count: int, seed: int, size: int = 64) -> Tensor:
    """Smooth patterns in [0, 1] around a color of each image; whole bytes."""
    generator = torch.Generator().manual_seed(seed)
    color = torch.rand(count, 3, 1, 1, generator=generator)
    coarse = 0.4 * color + 0.6 * torch.rand(count, 3, 6, 6, generator=generator)
    return (F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 255).round() / 255


def small(classes: int = 5) -> nn.Module:
    """A network with units of both strides."""
    return randomize_(models.ShuffleNetV2([1, 2, 1], [8, 8, 16, 24, 32], classes)).eval()


def told(model: nn.Module) -> tuple[Any, PlanBuilder]:
    """The fused model, and a builder that knows it."""
    fused: Any = snv2.fuse(model)
    builder = PlanBuilder()
    fused._tell(builder)
    return fused, builder


def error(found: Tensor, truth: Tensor) -> float:
    """Root mean square of the errors over that of what differs between images."""
    spread = (truth - truth.mean(0)).double().square().mean()
    return float(((found - truth).double().square().mean() / spread).sqrt())


# Arguments ------------------------------------------------------------------------------------


def no_batches() -> Iterator[Tensor]:
    yield from ()


@pytest.mark.parametrize(
    ("batches", "error_class", "message"),
    [
        (3, TypeError, "batches: expected tensors, got int"),
        ([3], TypeError, r"batches\[0\]: expected a floating-point tensor, got int"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "batches: .* got torch.uint8"),
        (no_batches(), ValueError, "batches: expected at least one image, got none"),
        (torch.zeros(0, 3, 8, 8), ValueError, "batches: expected at least one image, got none"),
        (torch.zeros(1, 4, 8, 8), ValueError, r"batches: expected \[N, 3, H, W\], got \[1, 4,"),
        ([torch.zeros(3, 8, 8)], ValueError, r"batches\[0\]: expected \[N, 3, H, W\]"),
        (torch.full((1, 3, 8, 8), torch.nan), ValueError, "batches: expected finite numbers"),
        (torch.full((1, 3, 8, 8), 1e300, dtype=torch.float64), ValueError, "batches: .* finite"),
        (torch.zeros(1, 3, 8, 8).to_sparse(), TypeError, "batches: expected a dense tensor"),
        (torch.zeros(1, 3, 8, 8, device="meta"), TypeError, "batches: .* one without values"),
    ],
)
def test_bad_batches(batches: Any, error_class: type[Exception], message: str) -> None:
    with pytest.raises(error_class, match=message):
        calibrate(snv2.fuse(small()), batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method: expected one of .*, got 'best'"),
        ({"method": ["mse"]}, "method: expected one of .*, got"),
        ({"normalize": (MEAN[:2], STD)}, r"normalize: expected \(mean, std\) of 3 finite"),
        ({"normalize": (MEAN, (1, 0, 1))}, r"normalize: expected \(mean, std\) of 3 finite"),
        ({"normalize": 5}, r"normalize: expected \(mean, std\) of 3 finite numbers .* got 5"),
        ({"normalize": ((1, 2, 0), STD)}, "normalize: expected a mean between 0 and 1"),
    ],
    ids=str,
)
def test_bad_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(snv2.fuse(small()), images(1, 0), **options)


def test_only_fused_modules_are_calibrated() -> None:
    with pytest.raises(TypeError, match=r"fused: expected a module fused as a whole, got ReLU"):
        calibrate(nn.ReLU(), images(1, 0))


POINTWISE, LAST = layer(10, 10), layer(10, 12)
NO_INTEGERS = {
    "unit 0, layer 0: activation silu": alone(layer(10, 10, Activation("silu")), LAST),
    "unit 0, layer 1: a window of 5x5 with dilation 1": alone(POINTWISE, depthwise(10, 5), LAST),
    "unit 0, layer 1: a window of 3x3 with dilation 2": alone(
        POINTWISE, depthwise(10, dilation=2), LAST
    ),
    "unit 0, layer 0: a pointwise layer of groups": alone(layer(10, 10, groups=2), LAST),
    "unit 0, layer 1: no activation": alone(POINTWISE, layer(10, 12, Activation("identity"))),
    "unit 0: squeeze-and-excite": alone(POINTWISE, depthwise(10), LAST, gate(12)),
}


@pytest.mark.parametrize("reason", NO_INTEGERS)
def test_what_has_no_integer_form_is_named(reason: str) -> None:
    channels, tell = NO_INTEGERS[reason]
    builder = PlanBuilder()
    tell(builder)
    with pytest.raises(Unsupported, match=reason):
        calibrate_builder(builder, torch.rand(1, channels, 4, 4))


def test_a_depthwise_layer_reads_no_negative_numbers() -> None:
    unit = randomize_(models.InvertedResidual(8, 16, 2)).eval()
    fused, builder = told(unit)
    x = torch.rand(2, 8, 6, 6)
    integer_layers(builder, calibrate(fused, x))
    with pytest.raises(Unsupported, match="unit 0, layer 3: a depthwise layer pads with 0"):
        integer_layers(builder, calibrate(fused, x - 0.5))


def test_ranges_of_another_network() -> None:
    ranges = calibrate(snv2.fuse(small()), images(1, 0))
    _, builder = told(models.shufflenet_v2_x0_5().eval())
    with pytest.raises(ValueError, match="ranges: stem: expected 24 channels, got 8"):
        integer_layers(builder, ranges)
    with pytest.raises(ValueError, match="ranges: there is none for stem"):
        integer_layers(builder, Ranges(ranges.input, {}))


def test_results_stay_in_int32() -> None:
    fused, builder = told(small())
    ranges = calibrate(fused, images(1, 0))
    stem = ranges.results["stem"]
    results = {**ranges.results, "stem": Affine(stem.scale * 1e-9, stem.zero)}
    with pytest.raises(Unsupported, match="stem: its results could leave the range of int32"):
        integer_layers(builder, Ranges(ranges.input, results))


def test_results_that_are_not_finite() -> None:
    model = small()
    with torch.no_grad():
        model.stage3[0].branch2[0].weight[0] = torch.inf
    with pytest.raises(Unsupported, match=r"unit 1, layer 0: its results .* are not finite"):
        calibrate(snv2.fuse(model), images(1, 0))


# Histograms -----------------------------------------------------------------------------------


def test_histogram_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 100, 100, generator=generator)
    x[:, 1] = -2 * x[:, 1]
    x[0, 0, 0, 0], x[:, 2] = 3.0, 0.0
    histogram = Histogram(3)
    for batch in (x[1:], x[:1]):  # the second widens the bins
        histogram.add(batch)
    low, high = histogram.minmax()
    assert high.tolist() == pytest.approx([3, 0, 0], abs=1e-3)
    assert low.tolist() == pytest.approx([0, -2, 0], abs=1e-3)
    low, high = histogram.percentile(99.9)
    assert high.tolist() == pytest.approx([1, 0, 0], abs=0.01)
    assert low.tolist() == pytest.approx([0, -2, 0], abs=0.01)
    assert histogram.nonzero().tolist() == [40000, 40000, 0]


@pytest.mark.parametrize("signed", [False, True])
def test_least_error(signed: bool) -> None:
    """No end on a grid has a much smaller error, measured by rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200000, generator=generator)
    x = x + 1 if signed else x.clamp(min=0)
    histogram = Histogram(1, signed)
    histogram.add(x.view(1, 1, -1))

    def measured(low: float, high: float) -> float:
        step = (high - low) / 255
        return float(((x.clamp(low, high) / step).round() * step - x).square().mean())

    (low,), (high,) = (end.tolist() for end in histogram.least_error())
    assert high < 0.95 * x.max()
    fractions = [0.9**i for i in range(30)]
    lows = [f * float(x.min()) for f in fractions] if signed else [0.0]
    best = min(measured(a, f * float(x.max())) for a in lows for f in fractions)
    assert measured(low, high) < 1.1 * best


def test_image_bytes_stay_as_they_are() -> None:
    fused, _ = told(small())
    values = torch.arange(256.0)
    mean, std = (torch.tensor(t).view(3, 1) for t in (MEAN, STD))
    x = ((values / 255 - mean) / std).view(1, 3, 16, 16)
    normalized = calibrate(fused, x, normalize=(MEAN, STD)).input
    assert torch.equal(quantized(x, normalized), values.byte().view(1, 1, 16, 16).expand_as(x))
    plain = calibrate(fused, images(2, 0)).input
    assert torch.equal(plain.zero, torch.zeros(3, dtype=torch.float64))


# Arithmetic -----------------------------------------------------------------------------------


def test_fused_multiply_add_rounds_once() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, 1000, generator=generator)
    b *= 2.0 ** torch.randint(-40, 40, b.shape, generator=generator)
    # A bit below a tie, which float64 does not keep.
    a = torch.cat([a, torch.tensor([2.0**-24 * (1 + 2.0**-15)])])
    b = torch.cat([b, torch.tensor([1 - 2.0**-15])])
    c = torch.cat([c, torch.tensor([1 + 2.0**-23])])
    found = fused_multiply_add(a, b, c)
    for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), found, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        distances = [
            abs(Fraction(float(torch.nextafter(result, torch.tensor(end)))) - exact)
            for end in (-torch.inf, torch.inf)
        ]
        assert abs(Fraction(float(result)) - exact) <= min(distances)
    assert found[-1] == c[-1]
    one = torch.ones(1)
    assert fused_multiply_add(one, one, one * 2.0**-24) == 1  # halfway: to even
    assert fused_multiply_add(one, c[-1:], one * 2.0**-24) == 1 + 2.0**-22


def defined(layer: Any, patches: Tensor) -> Tensor:
    """The bytes of a layer by its definition: patches are int64 [N, O or 1, K, pixels]."""
    sums = (layer.weight.long()[None, :, :, None] * patches).sum(2)
    real = sums.double() * layer.multiplier.double()[:, None] + layer.offset.double()[:, None]
    return real.float().round().clamp(0, 255).long()


def windows(x: Tensor, stride: int, border: Tensor) -> Tensor:
    """Windows of 3x3, [N, C, 9, pixels], around bytes with a border for each channel."""
    n, channels = x.shape[:2]
    border = border.double()[:, None, None]
    centered = x.double() - border  # so that the border is 0
    cut = F.unfold(centered, 3, padding=1, stride=stride).view(n, channels, 9, -1)
    return (cut + border).long()


def test_integers_are_those_of_the_definition() -> None:
    fused, builder = told(small())
    x = (images(3, 0, 33) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    quantization = integer_layers(builder, calibrate(fused, x, normalize=(MEAN, STD)))
    seen: dict[Any, Tensor] = {}
    (scores,) = interpret(builder, quantization, x, lambda key, values: seen.update({key: values}))
    assert set(seen) == set(quantization.layers) == {step.key for step in steps(builder)}

    layers = quantization.layers
    border = quantization.input.zero.round()
    cut = windows(quantized(x, quantization.input), 2, border)
    stem = defined(layers["stem"], cut.flatten(1, 2)[:, None]).view(3, 8, 17, 17)
    assert torch.equal(seen["stem"].long(), stem)

    pooled = F.max_pool2d(stem.double(), 3, 2, 1).long()  # [3, 8, 9, 9]
    none = torch.zeros(8)
    dw = defined(layers[0, 3], windows(pooled, 2, none))
    assert torch.equal(seen[0, 3].long().flatten(2), dw)
    pw = defined(layers[0, 4], dw[:, None])
    assert torch.equal(seen[0, 4].long().flatten(2), pw)

    other = defined(layers[0, 0], pooled.flatten(2)[:, None]).view(3, 4, 9, 9)
    assert torch.equal(seen[0, 0].long(), other)
    other = defined(layers[0, 1], windows(other, 2, none[:4]))
    other = defined(layers[0, 2], other[:, None])
    joined = torch.stack([pw, other], 2).flatten(1, 2)  # shuffled
    main = defined(layers[1, 0], joined[:, None])  # of a unit that halves once more
    assert torch.equal(seen[1, 0].long().flatten(2), main)

    last = layers["fc"]
    sums = seen["features"].long() @ last.weight.long().T
    assert torch.equal(seen["fc"], scores)
    expected = sums * last.multiplier.double() + last.offset.double()
    assert torch.equal(scores, expected.float())


def test_numbers_that_integers_hold_are_exact() -> None:
    """Weights, maps and results that are whole multiples of scales which are powers of two."""
    unit = models.InvertedResidual(8, 8, 1).eval()
    generator = torch.Generator().manual_seed(0)
    for module in unit.modules():
        if isinstance(module, nn.Conv2d):
            whole = torch.randint(-1, 2, module.weight.shape, generator=generator)
            whole.flatten(1)[:, 0] = 1
            module.weight.data = whole.float()
        elif isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0
    _, builder = told(unit)
    one, none = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    # 127 / 128 of a step would be left of weights 1 whose largest is 1, but for the multiplier.
    results = {
        (0, 0): Affine(one[:4], none[:4]),
        (0, 1): Affine(one[:4], none[:4] + 128),
        (0, 2): Affine(one[:4] * 2, none[:4]),
    }
    quantization = integer_layers(builder, Ranges(Affine(one, none), results))
    x = torch.randint(0, 4, (2, 8, 5, 5), generator=generator).float()
    (found,) = interpret(builder, quantization, x)
    truth = unit(x).detach()
    assert truth.max() < 255
    assert (found - truth).abs().max() == 1  # steps of 2
    assert torch.equal(found[:, 0::2], x[:, :4])  # passed through


# Networks -------------------------------------------------------------------------------------


def lively() -> nn.Module:
    """Random weights, but scores that depend on the image."""
    model: nn.Module = load("quantization_accuracy").lively("x0_5", 0)
    return model


@pytest.mark.parametrize("method", ["mse", "percentile", "minmax"])
def test_scores_are_near_those_of_float(method: Any) -> None:
    model = lively()
    fused, builder = told(model)
    calibration = images(8, 0, 128).split(3)
    quantization = integer_layers(builder, calibrate(fused, calibration, method=method))
    x = images(8, 1, 128)
    with torch.no_grad():
        truth = model(x)
    (scores,) = interpret(builder, quantization, x)
    assert error(scores, truth) < 0.2  # 0.02 of the scores themselves, which are much alike
    assert (scores - truth).square().mean() < (0.02 * truth).square().mean()


def test_uncorrected_means_are_further_off() -> None:
    """Offsets make good what rounding weights moves."""
    model = lively()
    fused, builder = told(model)
    ranges = calibrate(fused, images(8, 0))
    x = images(8, 1)
    with torch.no_grad():
        truth = model(x).mean(0)
    corrected, plain = (
        interpret(builder, integer_layers(builder, r), x)[0].mean(0)
        for r in (ranges, Ranges(ranges.input, ranges.results))
    )
    assert (corrected - truth).square().mean() < (plain - truth).square().mean()


def test_constant_channels() -> None:
    """A range need not hold 0 where no activation follows."""
    model = small()
    norm = model.stage2[0].branch2[4]
    with torch.no_grad():
        norm.weight[:2] = 0
        norm.bias[:2] = 100
    fused, builder = told(model)
    quantization = integer_layers(builder, calibrate(fused, images(2, 0)))
    seen: dict[Any, Tensor] = {}
    interpret(builder, quantization, images(2, 1), lambda key, values: seen.update({key: values}))
    result = quantization.layers[0, 1].result
    assert result is not None
    real = (seen[0, 1][:, :2] - result.zero[:2, None, None]) * result.scale[:2, None, None]
    assert (real - 100).abs().max() < 0.01


def test_maps_on_the_way() -> None:
    model = small()
    fused: Any = snv2.fuse(model)
    builder = PlanBuilder()
    fused._tell(builder, ["stage2", "stage3"])
    found = interpret(
        builder, integer_layers(builder, calibrate(fused, images(8, 0))), images(4, 1)
    )
    with torch.no_grad():
        x = model.maxpool(model.conv1(images(4, 1)))
        stage2 = model.stage2(x)
        truth = [stage2, model.stage3(stage2), model(images(4, 1))]
    for name, result, expected in zip(("stage2", "stage3", "fc"), found, truth, strict=True):
        assert result.shape == expected.shape
        assert error(result, expected) < 0.1, name


def test_relu6_ends_at_six() -> None:
    relu6 = Activation("relu6")
    channels, tell = alone(layer(10, 10, relu6), depthwise(10), layer(10, 12, relu6))
    builder = PlanBuilder()
    tell(builder)
    x = torch.rand(4, channels, 7, 7, generator=torch.Generator().manual_seed(0)) * 12
    ranges = calibrate_builder(builder, x)
    for key in ((0, 0), (0, 2)):
        assert float(ranges.results[key].scale.max()) * 255 < 6 + 1e-9
    (found,) = interpret(builder, integer_layers(builder, ranges), x)
    truth = plain(tell, x)
    assert float(truth[:, 1::2].max()) == 6
    assert error(found, truth) < 0.02


def test_changed_weights_keep_their_ranges() -> None:
    model = small()
    fused, builder = told(model)
    before = integer_layers(builder, calibrate(fused, images(8, 0)))
    assert_same(integer_layers(builder, before.ranges), before)
    with torch.no_grad():
        model.fc.weight.mul_(-2)
        model.stage3[0].branch2[1].weight.mul_(1.01)
    builder = PlanBuilder()
    fused._tell(builder)
    after = integer_layers(builder, before.ranges)
    changed = {
        key for key, layer in after.layers.items()
        if not torch.equal(layer.multiplier, before.layers[key].multiplier)
    }  # fmt: skip
    assert changed == {"fc", (1, 0)}
    with torch.no_grad():
        truth = model(images(8, 1))
    assert error(interpret(builder, after, images(8, 1))[0], truth) < 0.15


def test_pickling() -> None:
    fused, builder = told(small())
    quantization = integer_layers(builder, calibrate(fused, images(2, 0)))
    loaded = pickle.loads(pickle.dumps(quantization))
    assert_same(loaded, quantization)
    assert_same(integer_layers(builder, loaded.ranges), quantization)


def assert_same(found: Quantization, expected: Quantization) -> None:
    assert list(found.layers) == list(expected.layers)
    for key, own in expected.layers.items():
        for name in ("weight", "multiplier", "offset"):
            assert torch.equal(getattr(found.layers[key], name), getattr(own, name)), (key, name)
    assert torch.equal(found.input.scale, expected.input.scale)
