"""fuse() on models that contain units, on changed networks and on subclasses."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from _cases import (
    FP32_BOUND,
    assert_close,
    draw,
    in_turn,
    network,
    ops_called,
    plain_stage,
    runs_fused,
)
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.testing import max_error, randomize_


class Detector(nn.Module):
    """As detectors use the backbone: stages called one by one, their maps tapped."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(backbone.conv1, backbone.maxpool)
        self.stages = nn.ModuleList([backbone.stage2, backbone.stage3, backbone.stage4])
        self.heads = nn.ModuleList([nn.Conv2d(c, 5, 1) for c in (48, 96, 192)])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = stage(x)
            maps.append(head(x))
        return maps


def test_detector(torchvision: types.ModuleType) -> None:
    model = Detector(randomize_(torchvision.models.shufflenet_v2_x0_5())).eval()
    fused = snv2.fuse(model)
    assert isinstance(fused, Detector)
    x = draw(2, 3, 97, 65)
    with torch.no_grad():
        for out, expected in zip(fused(x), model(x), strict=True):
            assert max_error(out, expected) < FP32_BOUND
        names = ops_called(fused, x)
    assert [name for name in names if name.startswith("snv2::")] == ["snv2::network_results"]
    assert names.count("aten::convolution") == 3  # the heads
    lines = str(snv2.explain(model)).splitlines()
    beside = ", ".join(f"conv2d (heads.{i})" for i in range(3))
    assert lines[0] == f"(model): partition of a stage: fused, but for {beside}"
    assert "stages.0.0: unit: fused" in lines
    assert len(lines) == 1 + 3 + 16


def test_intermediate_layer_getter(torchvision: types.ModuleType) -> None:
    layers = {"conv1": "a", "stage2": "b", "stage4": "c"}
    model = torchvision.models._utils.IntermediateLayerGetter(
        randomize_(torchvision.models.shufflenet_v2_x0_5()), layers
    ).eval()
    fused = snv2.fuse(model)
    x = draw(2, 3, 65, 65)
    with torch.no_grad():
        out, expected = fused(x), model(x)
        assert ops_called(fused, x).count("snv2::network") == 3
    assert list(out) == ["a", "b", "c"]
    for key in out:
        assert max_error(out[key], expected[key]) < FP32_BOUND


@pytest.mark.parametrize("fused_first", [True, False], ids=["of-fused", "then-fused"])
def test_feature_extractor(torchvision: types.ModuleType, fused_first: bool) -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    nodes = ["stage2", "stage3.1", "stage4.3.branch2.0", "fc"]
    model = randomize_(torchvision.models.shufflenet_v2_x0_5()).eval()
    expected = create_feature_extractor(model, nodes)
    if fused_first:
        extractor = create_feature_extractor(snv2.fuse(model), nodes)
    else:
        extractor = snv2.fuse(expected)
    x = draw(2, 3, 65, 65)
    with torch.no_grad():
        out, values = extractor(x), expected(x)
    assert list(out) == nodes
    for key in nodes:
        assert max_error(out[key], values[key]) < FP32_BOUND


def test_unit_in_two_places() -> None:
    unit = plain_stage([1], 34, 34)[0]
    model = nn.ModuleDict({"a": nn.Sequential(unit, unit), "b": unit}).eval()
    fused = snv2.fuse(model)
    assert fused["a"][0] is fused["a"][1] is fused["b"]
    x = draw(2, 34, 9, 11)
    for key in model:
        assert runs_fused(fused[key], x)
        assert_close(fused[key], model[key], x)
    assert list(fused.state_dict()) == list(model.state_dict())


# Changed networks -----------------------------------------------------------------------------


def _one_input_channel(model: nn.Module) -> None:
    model.conv1[0] = nn.Conv2d(1, 24, 3, 2, 1, bias=False)


def _ten_classes(model: nn.Module) -> None:
    model.fc = nn.Linear(model.fc.in_features, 10)


def _no_bias(model: nn.Module) -> None:
    model.fc = nn.Linear(model.fc.in_features, 10, bias=False)


def _no_classifier(model: nn.Module) -> None:
    model.fc = nn.Identity()


def _dropout(model: nn.Module) -> None:
    model.fc = nn.Sequential(nn.Dropout(0.2), nn.Linear(model.fc.in_features, 10))


def _no_pooling(model: nn.Module) -> None:
    model.maxpool = nn.Identity()


def _other_activation(model: nn.Module) -> None:
    model.conv1[2] = nn.Hardswish()


def _two_stages(model: nn.Module) -> None:
    model.stage4 = nn.Identity()
    model.conv5[0] = nn.Conv2d(96, 1024, 1, bias=False)


def _shorter_stage(model: nn.Module) -> None:
    del model.stage3[4:]


def _attention(model: nn.Module) -> None:
    model.stage3.append(nn.Conv2d(96, 96, 1))


# Calls of the fused op in a forward, one for each run of units, and what is beside these.
CHANGES = {
    "one-input-channel": (_one_input_channel, 1, None),
    "ten-classes": (_ten_classes, 1, None),
    "no-bias": (_no_bias, 1, None),
    "shorter-stage": (_shorter_stage, 1, None),
    "no-classifier": (_no_classifier, 1, None),
    "dropout": (_dropout, 1, None),
    "no-pooling": (_no_pooling, 1, "conv2d (conv1.0)"),
    "other-activation": (_other_activation, 1, None),
    "two-stages": (_two_stages, 1, None),
    "attention": (_attention, 2, "conv2d (stage3.8)"),
}


@pytest.mark.parametrize(("change", "library"), in_turn(list(CHANGES), ["torchvision", "snv2"]))
def test_changed_network(torchvision: types.ModuleType, library: str, change: str) -> None:
    edit, calls, reason = CHANGES[change]
    model = copy.deepcopy(network(library, "x0_5"))
    edit(model)
    randomize_(model).eval()
    fused = snv2.fuse(model)
    x = draw(2, model.conv1[0].in_channels, 65, 49)
    assert_close(fused, model, x)
    with torch.no_grad():
        assert ops_called(fused, x).count("snv2::network") == calls
    lines = str(snv2.explain(model)).splitlines()
    if reason is None:
        assert lines[0] == "(model): network: fused"
    else:
        assert lines[0].startswith("(model): partition of ")
        assert f": fused, but for {reason}" in lines[0]


def test_subclass_with_its_own_forward(torchvision: types.ModuleType) -> None:
    class Doubled(torchvision.models.ShuffleNetV2):  # type: ignore[name-defined,misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Other(torchvision.models.ShuffleNetV2):  # type: ignore[name-defined,misc]
        def _forward_impl(self, x: Tensor) -> Tensor:
            return self.conv1(x).mean()

    for cls in (Doubled, Other):
        model = randomize_(cls([4, 8, 4], [24, 48, 96, 192, 1024])).eval()
        fused = snv2.fuse(model)
        assert (type(fused) is cls) == (cls is Other)
        assert_close(fused, model, draw(2, 3, 65, 49))


def test_unit_subclass_with_its_own_forward() -> None:
    class Residual(snv2.models.InvertedResidual):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    model = nn.Sequential(
        plain_stage([1], 34, 34)[0], randomize_(Residual(34, 34, 1)), nn.ReLU()
    ).eval()
    fused = snv2.fuse(model)
    assert [type(m) for m in (fused[0], fused[2])] == [snv2.nn.InvertedResidual, nn.ReLU]
    assert isinstance(fused[1], Residual)
    assert_close(fused, model, draw(2, 34, 9, 11))
    assert str(snv2.explain(model)) == (
        "0: unit: fused\n1: partition of a unit: fused, but for add"
    )


def test_subclass_keeps_what_it_adds() -> None:
    class Classifier(snv2.models.ShuffleNetV2):
        def predict(self, x: Tensor) -> Tensor:
            return self(x).argmax(1)

    model = randomize_(Classifier([1, 1, 1], [8, 20, 36, 58, 40], 10)).eval()
    x = draw(5, 3, 65, 49)
    assert torch.equal(snv2.fuse(model).predict(x), model.predict(x))


def test_subclass_keeps_its_train_mode() -> None:
    """Backbones override train() to keep their batch norms as they are."""

    class Frozen(snv2.models.ShuffleNetV2):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.training = False
            return self

    model = randomize_(Frozen([1, 1, 1], [8, 20, 36, 58, 40], 10)).eval()
    fused = snv2.fuse(model)
    assert_close(fused.train(), model.train(), draw(5, 3, 65, 49))


def test_quantizable_model(torchvision: types.ModuleType) -> None:
    """Its classes are others, but what it computes is the network."""
    from torchvision.models import quantization

    model = randomize_(quantization.shufflenet_v2_x0_5(quantize=False)).eval()
    fused = snv2.fuse(model)
    assert isinstance(fused, type(model))
    x = draw(1, 3, 65, 49)
    assert_close(fused, model, x)
    assert runs_fused(fused, x)
