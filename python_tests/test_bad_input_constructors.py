"""Wrong arguments of constructors and public functions: an exception that names them.

Each refusal names the argument, what came and what was expected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import snv2_kernels

snv2: Any = snv2_kernels  # wrong types on purpose
models, ops = snv2.models, snv2.ops
NO_INTEGERS = ["8", 8.0, None, True, [8]]
UNITS: list[Callable[..., nn.Module]] = [
    models.InvertedResidual, models.StarUnit, models.MegviiUnit, models.XceptionUnit,
    models.LargeUnit, snv2.nn.InvertedResidual,
]  # fmt: skip
# Each with three or four stages and how many more channels, and what comes after the two lists.
NETWORKS: dict[str, tuple[Callable[..., nn.Module], int, int]] = {
    "torchvision": (models.ShuffleNetV2, 3, 2),
    "fused": (snv2.nn.ShuffleNetV2, 3, 2),
    "megvii": (models.MegviiShuffleNetV2, 3, 2),
    "plus": (lambda r, c, *rest: models.ShuffleNetV2Plus(r, c, [0] * 4, *rest), 4, 2),
    "large": (lambda *arguments: models.ShuffleNetV2Large([8], *arguments), 4, 1),
}


def refused(make: Callable[[], object], name: str, value: object) -> None:
    error = ValueError if type(value) is int else TypeError
    with pytest.raises(error, match=rf"^{name}: expected .*got ") as caught:
        make()
    assert str(caught.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("value", [*NO_INTEGERS, 0, -2], ids=repr)
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: f"{unit.__module__}.{unit.__name__}")
def test_channels_of_units(unit: Callable[..., nn.Module], value: Any) -> None:
    refused(lambda: unit(value, 8, 2), "inp", value)
    refused(lambda: unit(8, value, 2), "oup", value)


@pytest.mark.parametrize("value", [*NO_INTEGERS, -1], ids=repr)
@pytest.mark.parametrize("network", NETWORKS)
def test_numbers_of_networks(network: str, value: Any) -> None:
    make, stages, others = NETWORKS[network]
    repeats, channels = [1] * stages, [8, 16, 24, 32, 40, 48][: stages + others]
    refused(
        lambda: make([*repeats[1:], value], channels), rf"stages_repeats\[{stages - 1}\]", value
    )
    refused(lambda: make(repeats, [8, value, *channels[2:]]), r"stages_out_channels\[1\]", value)
    refused(lambda: make(repeats, channels, value), "num_classes", value)


@pytest.mark.parametrize("value", ["888", 3, None], ids=repr)
@pytest.mark.parametrize("network", NETWORKS)
def test_lists_of_networks(network: str, value: Any) -> None:
    make, stages, others = NETWORKS[network]
    for name, arguments in (
        ("stages_repeats", (value, [8] * (stages + others))),
        ("stages_out_channels", ([1] * stages, value)),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected a list of integers, got {value!r}"):
            make(*arguments)


def net(*rest: Any, **options: Any) -> nn.Module:
    return models.ShuffleNetV2([1, 1, 1], [8] * 5, *rest, **options)


def plan(backend: str) -> Any:
    fused: Any = snv2.fuse(models.ShuffleNetV2([1, 1, 1], [8, 8, 16, 24, 32], 5).eval())
    if backend == "cpu":
        return fused._cpu_plan(torch.float32, ())
    return fused._gpu_plan(torch.float32, torch.device("cpu"), ())


X, IMAGE = torch.zeros(2, 6, 5, 7), torch.zeros(1, 3, 32, 32)
WEIGHT, SCALE = torch.zeros(6, 1, 3, 3), torch.zeros(6)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unit-stride-str": (
        lambda: models.InvertedResidual(8, 8, "2"),
        ValueError, "stride: expected 1 to 3, got '2'"
    ),
    "unit-stride-float": (
        lambda: models.LargeUnit(8, 8, 2.0),
        ValueError, "stride: expected 1 or 2, got 2.0"
    ),
    "unit-one-channel": (
        lambda: models.InvertedResidual(8, 1, 2), ValueError, "oup: expected at least 2, got 1"
    ),
    "unit-kernel": (
        lambda: models.MegviiUnit(8, 12, 2, kernel=3.0),
        TypeError, "kernel: expected an integer, got 3.0"
    ),
    "unit-activation": (
        lambda: models.MegviiUnit(8, 12, 2, activation="relu"),
        TypeError, "activation: expected a constructor of modules, got 'relu'"
    ),
    "unit-squeeze": (
        lambda: models.MegviiUnit(8, 12, 2, squeeze=True),
        TypeError, "squeeze: expected a constructor of modules, got True"
    ),
    "network-constructor": (
        lambda: net(5, 3), TypeError, "inverted_residual: expected a constructor of modules, got 3"
    ),
    "network-size": (
        lambda: models.megvii_shufflenet_v2(["1.0x"]),
        ValueError, r"model_size: expected one of 0.5x, .* got \['1.0x'\]"
    ),
    "network-dropout": (
        lambda: models.MegviiShuffleNetV2([1] * 3, [8, 12, 20, 32, 40], 5, dropout=1.5),
        ValueError, "dropout: expected a number from 0 to 1, got 1.5"
    ),
    "network-dropout-str": (
        lambda: models.MegviiShuffleNetV2(
            [1] * 3, [8, 12, 20, 32, 40], 5, dropout="0.1"
        ),
        ValueError, "dropout: expected a number from 0 to 1, got '0.1'"
    ),
    "network-stem": (
        lambda: models.ShuffleNetV2Large(8, [1] * 4, [8] * 5),
        TypeError, "stem_channels: expected a list of integers, got 8"
    ),
    "network-architecture": (
        lambda: models.ShuffleNetV2Plus(
            [1] * 4, [8, 12, 20, 32, 48, 8], [0, 1, "2", 0]
        ),
        TypeError, r"architecture\[2\]: expected an integer, got '2'"
    ),
    "split-shuffle": (
        lambda: snv2.nn.SplitDepthwiseShuffle("8"),
        ValueError, "channels: expected an even positive number, got '8'"
    ),
    "stage": (
        lambda: snv2.nn.Stage(models.InvertedResidual(8, 8, 1)),
        TypeError, r"units\[0\]: expected snv2_kernels.nn.InvertedResidual, got InvertedResidual"
    ),
    "load": (lambda: models.load(8), TypeError, "source: expected a mapping or a path, got int"),
    "fuse-type": (
        lambda: snv2.fuse(models.ShuffleNetV2),
        TypeError, "model: expected a torch.nn.Module, got type"
    ),
    "fuse-backend": (
        lambda: snv2.fuse(nn.Identity(), backend=[]),
        ValueError, r"backend: expected one of auto, .* got \[\]"
    ),
    "explain": (
        lambda: snv2.explain({}), TypeError, "model: expected a torch.nn.Module, got dict"
    ),
    "engine": (lambda: snv2.Engine(3), TypeError, "model: expected a torch.nn.Module, got int"),
    "use-backend": (
        lambda: snv2.use_backend(None).__enter__(),
        ValueError, "backend: expected one of auto, .* got None"
    ),
    "fold-layer": (
        lambda: snv2.fold_bn(nn.Conv2d(3, 3, 1)),
        TypeError, "bn: expected a BatchNorm2d, got Conv2d"
    ),
    "fold-lazy": (
        lambda: snv2.fold_bn(nn.LazyBatchNorm2d()), ValueError, "bn: running_mean is not there yet"
    ),
    "op-stride": (
        lambda: ops.dw_conv3x3(X, WEIGHT, SCALE, SCALE, stride=1.0),
        ValueError, "stride: expected 1 or 2, got 1.0"
    ),
    "op-stride-tensor": (
        lambda: ops.dw_conv3x3(X, WEIGHT, SCALE, SCALE, stride=SCALE),
        ValueError, "stride: expected 1 or 2, got tensor"
    ),
    "plan-none": (
        lambda: ops.run_plan(IMAGE, None, "cpu"),
        TypeError, "plan: expected one for cpu, got NoneType"
    ),
    "plan-of-another-backend": (
        lambda: ops.run_plan(IMAGE, plan("cpu"), "cuda-emulated"),
        TypeError, "plan: expected one for cuda-emulated, got Plan"
    ),
    "plan-backend": (
        lambda: ops.run_plan(IMAGE, plan("cuda"), "reference"),
        ValueError, "backend: expected one of cpu, cuda, cuda-emulated, triton, got 'reference'"
    ),
    "plan-input": (
        lambda: ops.run_plan([1], plan("cpu"), "cpu"),
        TypeError, "x: expected a torch.Tensor, got list"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_arguments(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=f"^{message}"):
        call()
