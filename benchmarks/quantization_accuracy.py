"""How far int8 scores are from float ones, beside those of other engines' own quantizers.

``python benchmarks/quantization_accuracy.py`` prints a table; it takes some minutes on a core.
Widths are networks with random weights on crops of scikit-learn's two sample photographs; "digits"
is a small network trained on its digits. Each is calibrated on 16 images (64 of digits) and tested
on others. *error* is the root mean square of the errors of scores, over that of the differences of
scores between images; *top-1* is how often the best class is that of float. onnxruntime's networks
are QDQ with uint8 maps and int8 weights per channel; those of other engines, if they are there, are
made as for ``snv2 bench --dtype int8`` (docs/cpu.md).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_bench.peers import quantized, xnnpack
from snv2_bench.peers.engines import Unavailable
from snv2_kernels.packing import PlanBuilder
from snv2_kernels.quantization import calibrate, integer_layers, interpret

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 224


def photographs(count: int, seed: int) -> Tensor:
    """Returns normalized square crops of scikit-learn's photographs, [count, 3, 224, 224]."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    rng = np.random.default_rng(seed)
    crops = []
    for _ in range(count):
        photo = photos[rng.integers(len(photos))]
        side = int(rng.integers(SIZE, min(photo.shape[:2]) + 1))
        top, left = (int(rng.integers(extent - side + 1)) for extent in photo.shape[:2])
        crop = torch.from_numpy(photo[top : top + side, left : left + side].copy())
        crop = crop.permute(2, 0, 1)[None].float()
        crops.append(F.interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True).round())
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (MEAN, STD))
    return (torch.cat(crops) / 255 - mean) / std


def lively(width: str, seed: int) -> nn.Module:
    """Returns a network with random weights whose scores depend on the image: He's initialization
    and moderate batch norms. Of a fresh one they hardly do."""
    model: nn.Module = getattr(snv2.models, f"shufflenet_v2_{width}")()
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * std

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = normal(module.weight, (2 / module.weight[0].numel()) ** 0.5)
        elif isinstance(module, nn.Linear):
            module.weight.data = normal(module.weight, 2 / module.in_features**0.5)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean = normal(module.weight, 0.2)
            module.running_var = uniform(module.weight, 0.5, 1.5)
            module.weight.data = uniform(module.weight, 0.6, 1.2)
            module.bias.data = normal(module.bias, 0.2)
    return model.eval()


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns images [N, 3, 64, 64] and classes to train with, then those to test with."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    images = F.interpolate(images, (64, 64), mode="bilinear").repeat(1, 3, 1, 1)
    classes = torch.from_numpy(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return images[train], classes[train], images[test], classes[test]


def trained(images: Tensor, classes: Tensor, epochs: int) -> nn.Module:
    """Returns a small network trained on images."""
    torch.manual_seed(0)
    model = snv2.models.ShuffleNetV2([2, 4, 2], [24, 32, 64, 128, 256], num_classes=10)
    batch = 50
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(batch):
            loss = F.cross_entropy(model(images[part]), classes[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def ours(model: nn.Module, calibration: Tensor, test: Tensor, method: Any) -> Tensor:
    """Returns scores of the integer network."""
    fused: Any = snv2.fuse(model)
    builder = PlanBuilder()
    fused._tell(builder)
    quantization = integer_layers(builder, calibrate(fused, calibration.split(8), method=method))
    return torch.cat([interpret(builder, quantization, x)[-1] for x in test.split(8)])


class Theirs:
    """Scores of onnxruntime's quantized networks, made of one exported model."""

    def __init__(self, model: nn.Module, example: Tensor, folder: Path) -> None:
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self.exported, self.quantized = (str(folder / f"{n}.onnx") for n in ("float", "int8"))
        plain = str(folder / "plain.onnx")
        torch.onnx.export(
            model, (example,), plain, dynamo=False, opset_version=17, input_names=["image"]
        )
        quant_pre_process(plain, self.exported, skip_symbolic_shape=True)

    def scores(self, calibration: Tensor, test: Tensor, method: str) -> Tensor:
        from onnxruntime import InferenceSession
        from onnxruntime.quantization import (
            CalibrationDataReader,
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.images: Iterator[Tensor] = iter(calibration.split(1))

            def get_next(self) -> Any:
                image = next(self.images, None)
                return None if image is None else {"image": image.numpy()}

        with contextlib.redirect_stdout(io.StringIO()):
            quantize_static(
                self.exported, self.quantized, Reader(), quant_format=QuantFormat.QDQ,
                per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod[method],
            )  # fmt: skip
        session = InferenceSession(self.quantized, providers=["CPUExecutionProvider"])
        scores = [session.run(None, {"image": x.numpy()})[0] for x in test.split(1)]
        return torch.from_numpy(np.concatenate(scores))


def of_peer(make: Any, model: nn.Module, calibration: Tensor, test: Tensor) -> Tensor:
    """Returns scores of another engine's quantized network, which ``make`` makes."""
    x = test[:1].clone()
    run = make(model, x, calibration.split(1))
    scores = []
    for image in test.split(1):
        x.copy_(image)
        getattr(run, "feed", lambda: None)()
        scores.append(run().clone())
    return torch.cat(scores)


def report(
    name: str, model: nn.Module, calibration: Tensor, test: Tensor, classes: Tensor | None
) -> None:
    """Prints the rows of one network."""
    with torch.no_grad():
        truth = torch.cat([model(x) for x in test.split(8)]).double()
    spread = (truth - truth.mean(0)).square().mean().sqrt()

    def row(engine: str, method: str, scores: Callable[[], Tensor]) -> None:
        begin = time.perf_counter()
        found = scores().double()
        seconds = time.perf_counter() - begin
        error = float((found - truth).square().mean().sqrt() / spread)
        agreement = float((found.argmax(1) == truth.argmax(1)).double().mean())
        line = f"{name:7} {engine:12} {method:11} {error:8.4f} {agreement:7.3f}"
        if classes is not None:
            line += f"  accuracy {float((found.argmax(1) == classes).double().mean()):.4f}"
        print(f"{line}  ({seconds:.0f} s)", flush=True)

    if classes is not None:
        row("float", "", lambda: truth)
    for method in ("mse", "percentile", "minmax"):
        row("snv2", method, lambda m=method: ours(model, calibration, test, m))
    with tempfile.TemporaryDirectory() as folder:
        theirs = Theirs(model, test[:1], Path(folder))
        for method in ("MinMax", "Entropy", "Percentile"):
            row("onnxruntime", method, lambda m=method: theirs.scores(calibration, test, m))
    for make in (quantized.openvino, xnnpack.quantized_litert, xnnpack.quantized_executorch):
        engine = make.__name__.removeprefix("quantized_")
        try:
            row(engine, "", lambda m=make: of_peer(m, model, calibration, test))
        except Unavailable as reason:
            print(f"{name:7} {engine:12} {reason}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", action="append", help="x0_5, x1_0, x1_5, x2_0 or digits")
    parser.add_argument("--images", type=int, default=16, help="photographs to calibrate on")
    parser.add_argument("--test-images", type=int, default=64, help="photographs to test on")
    parser.add_argument("--seed", type=int, default=0, help="of weights and crops")
    parser.add_argument("--epochs", type=int, default=20, help="of training on digits")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print("network engine       method         error   top-1")
    for name in arguments.network or ["x0_5", "x1_0", "x2_0", "digits"]:
        if name == "digits":
            images, classes, test, test_classes = digits()
            model = trained(images, classes, arguments.epochs)
            report(name, model, images[:64], test, test_classes)
        else:
            seed = arguments.seed
            calibration = photographs(arguments.images, 2 * seed)
            test = photographs(arguments.test_images, 2 * seed + 1)
            report(name, lively(name, seed), calibration, test, None)


if __name__ == "__main__":
    main()
