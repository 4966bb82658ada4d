"""models.load: every published layout, found by its keys, and what fits none."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases import FP32_BOUND, draw
from _styles import MegviiUnit as RestatedUnit
from _styles import shuffle
from torch import Tensor, nn

from snv2_kernels import models
from snv2_kernels.testing import max_error, randomize_

State = dict[str, Tensor]
REPEATS, CHANNELS, CLASSES = [2, 3, 1], [8, 12, 20, 32, 40], 7

# The layouts, written once more from what their projects publish -------------------------------


class ConvModule(nn.Module):
    def __init__(self, i: int, o: int, k: int, s: int = 1, g: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(o)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) if self.act else x


class OpenMMLabUnit(nn.Module):
    def __init__(self, i: int, o: int, s: int) -> None:
        super().__init__()
        if s > 1:
            self.branch1 = nn.Sequential(
                ConvModule(i, i, 3, s, i, act=False), ConvModule(i, o // 2, 1)
            )
        self.branch2 = nn.Sequential(
            ConvModule(i if s > 1 else o // 2, o // 2, 1),
            ConvModule(o // 2, o // 2, 3, s, o // 2, act=False),
            ConvModule(o // 2, o // 2, 1),
        )
        self.s = s

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1) if self.s == 1 else (self.branch1(x), x)
        return shuffle(torch.cat((a, self.branch2(b)), 1), 2)


class OpenMMLab(nn.Module):
    """An ImageClassifier of mmpretrain: backbone, pooling without weights, head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.conv1 = ConvModule(3, CHANNELS[0], 3, 2)
        self.backbone.layers = nn.ModuleList()
        for i, o, repeats in zip(CHANNELS, CHANNELS[1:], REPEATS, strict=False):
            units = [OpenMMLabUnit(o if u else i, o, 1 if u else 2) for u in range(repeats)]
            self.backbone.layers.append(nn.Sequential(*units))
        self.backbone.layers.append(ConvModule(CHANNELS[3], CHANNELS[4], 1))
        self.head = nn.Module()
        self.head.fc = nn.Linear(CHANNELS[4], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.backbone.conv1(x), 3, 2, 1)
        for layer in self.backbone.layers:
            x = layer(x)
        return self.head.fc(x.mean((2, 3)))


class Authors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first, last = CHANNELS[0], CHANNELS[4]
        self.first_conv = nn.Sequential(
            nn.Conv2d(3, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU()
        )
        self.features = nn.Sequential()
        for i, o, repeats in zip(CHANNELS, CHANNELS[1:], REPEATS, strict=False):
            self.features.append(RestatedUnit(i, o, o // 2, stride=2))
            for _ in range(repeats - 1):
                self.features.append(RestatedUnit(o // 2, o, o // 2, stride=1))
        self.conv_last = nn.Sequential(
            nn.Conv2d(CHANNELS[3], last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU()
        )
        self.classifier = nn.Sequential(nn.Linear(last, CLASSES, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(F.max_pool2d(self.first_conv(x), 3, 2, 1))
        return self.classifier(F.avg_pool2d(self.conv_last(x), 7).flatten(1))


def torchvision_form() -> nn.Module:
    return models.ShuffleNetV2(REPEATS, CHANNELS, CLASSES)


def plus() -> nn.Module:
    channels = [8, 12, 20, 32, 48, 40]
    return models.ShuffleNetV2Plus([2, 1, 2, 2], channels, [0, 3, 1, 2, 3, 3, 1], CLASSES)


MODELS: dict[str, tuple[Callable[[], nn.Module], type[nn.Module]]] = {
    "torchvision": (torchvision_form, models.ShuffleNetV2),
    "openmmlab": (OpenMMLab, models.ShuffleNetV2),
    "authors": (Authors, models.MegviiShuffleNetV2),
    "plus": (plus, models.ShuffleNetV2Plus),
    "star": (
        lambda: models.ShuffleNetV2(REPEATS, CHANNELS, CLASSES, models.StarUnit),
        models.ShuffleNetV2,
    ),
    "v2-50": (
        lambda: models.ShuffleNetV2Large([6], [1, 2, 1, 3], [8, 12, 16, 20, 24], CLASSES),
        models.ShuffleNetV2Large,
    ),
    "SE-v2-164": (
        lambda: models.ShuffleNetV2Large(
            [4, 6, 8], [2, 1, 1, 3], [12, 16, 20, 24, 32], CLASSES, squeeze=True, residual=True
        ),
        models.ShuffleNetV2Large,
    ),
}
each_model = pytest.mark.parametrize("name", MODELS)


def built(name: str) -> nn.Module:
    return randomize_(MODELS[name][0]()).eval()


def without_backbone(state: State) -> State:
    return {name.removeprefix("backbone."): tensor for name, tensor in state.items()}


def check(loaded: nn.Module, original: nn.Module) -> None:
    assert not any(module.training for module in loaded.modules())
    assert all(t.device.type == "cpu" for t in loaded.state_dict().values())
    x = draw(2, 3, 224, 224)
    with torch.no_grad():
        assert max_error(loaded(x), original(x)) < FP32_BOUND


@each_model
def test_outputs_agree(name: str) -> None:
    original = built(name)
    loaded = models.load(original.state_dict())
    assert type(loaded) is MODELS[name][1]
    check(loaded, original)


def test_openmmlab_backbone_keys() -> None:
    original = built("openmmlab")
    check(models.load(without_backbone(original.state_dict())), original)


@each_model
def test_loaded_is_itself_loaded(name: str) -> None:
    first = models.load(built(name).state_dict())
    second = models.load(first.state_dict())
    assert str(first) == str(second)
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key]), key


@pytest.mark.parametrize("width", ["x0_5", "x1_0", "x1_5", "x2_0"])
def test_torchvisions_networks(torchvision: types.ModuleType, width: str) -> None:
    theirs = getattr(torchvision.models, f"shufflenet_v2_{width}")().state_dict()
    ours = models.load(theirs)
    assert str(ours) == str(getattr(models, f"shufflenet_v2_{width}")().eval())
    assert list(ours.state_dict()) == list(theirs)
    assert all(torch.equal(t, theirs[key]) for key, t in ours.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [lambda: models.megvii_shufflenet_v2("2.0x"), lambda: models.megvii_shufflenet_v2("0.5x"),
     lambda: models.shufflenet_v2_plus("Small"), lambda: models.shufflenet_v2_star("0.5x")],
    ids=["megvii-2.0x", "megvii-0.5x", "plus", "star"],
)  # fmt: skip
def test_published_sizes(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert str(models.load(model.state_dict())) == str(model)


# Wrappings ------------------------------------------------------------------------------------


def parallel(state: State) -> State:
    return OrderedDict((f"module.{name}", tensor) for name, tensor in state.items())


def without_counters(state: State) -> State:
    return {k: t for k, t in state.items() if not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    "wrap",
    [parallel, lambda s: {"state_dict": s}, lambda s: {"state_dict": parallel(s), "epoch": 3},
     lambda s: {"model": s, "optimizer": {"lr": 0.1}}, without_counters,
     types.MappingProxyType],
    ids=["module.", "state_dict", "both", "model", "no-counters", "mapping"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["torchvision", "openmmlab", "authors"])
def test_wrapped(name: str, wrap: Callable[[State], Any]) -> None:
    state = built(name).state_dict()
    expected = models.load(state).state_dict()
    loaded = models.load(wrap(state)).state_dict()
    assert list(loaded) == list(expected)
    for key, tensor in loaded.items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", [str, Path])
def test_files(tmp_path: Path, kind: type, zipped: bool) -> None:
    original = built("authors")
    path = tmp_path / "weights.pth.tar"
    checkpoint = {"state_dict": parallel(original.state_dict())}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    loaded = models.load(kind(path))
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, original.state_dict()[key]), key


def test_parameters_are_its_own_and_random_numbers_are_left() -> None:
    state = built("torchvision").state_dict()
    before = {key: tensor.clone() for key, tensor in state.items()}
    random = torch.get_rng_state()
    loaded = models.load(state)
    assert torch.equal(torch.get_rng_state(), random)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in state.items())


def test_dtype_is_the_default() -> None:
    state = {
        k: t.half() if t.is_floating_point() else t for k, t in built("plus").state_dict().items()
    }
    loaded = models.load(state).state_dict()
    assert {t.dtype for t in loaded.values()} == {torch.float32, torch.int64}
    assert all(torch.equal(t, state[key].to(t.dtype)) for key, t in loaded.items())


# Bad input --------------------------------------------------------------------------------------


def without(*prefixes: str) -> Callable[[State], State]:
    return lambda state: {k: t for k, t in state.items() if not k.startswith(prefixes)}


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[State], State]:
    return lambda state: {**state, name: torch.ones(shape, dtype=dtype)}


MISFITS: list[tuple[str, Callable[[State], Any], str]] = [
    ("torchvision", without("stage3"), "stage3.0.branch2.5.weight is missing"),
    ("torchvision", without("stage3.1."), "stage3.1 is missing"),
    ("torchvision", without("stage2.0.branch1.2"), "stage2.0.branch1.2.weight is missing"),
    ("torchvision", without("fc"), "fc.weight is missing"),
    ("torchvision", without("fc.bias"), "fc.bias is missing"),
    ("torchvision", without("conv1"), "conv1.0.weight is missing"),
    ("torchvision", put("stage2.9.branch2.0.weight", 6, 6, 1, 1), "stage2.2 is missing"),
    ("torchvision", put("more", 1), "more is not a name of this network"),
    ("torchvision", put("fc.bias", 9), r"fc.bias has shape \(9,\), expected \(7,\)"),
    ("torchvision", put("fc.weight", 7), r"fc.weight has shape \(7,\), expected 2 positive sizes"),
    ("torchvision", put("conv1.0.weight", 0, 3, 3, 3), r"conv1.0.weight has shape \(0, 3, 3, 3\)"),
    ("torchvision", put("conv1.0.weight", 8, 1, 3, 3),
     r"conv1.0.weight has shape \(8, 1, 3, 3\), expected \(8, 3, 3, 3\)"),
    ("torchvision", put("stage4.0.branch2.5.weight", 15, 16, 1, 1),
     r"stage4.0.branch1.2.weight has shape \(16, 20, 1, 1\), expected \(15, 20, 1, 1\)"),
    ("torchvision", put("fc.weight", 7, 40, dtype=torch.int8),
     "fc.weight has dtype torch.int8, expected floating point"),
    ("openmmlab", without("head"), "head.fc.weight is missing"),
    ("openmmlab", without("backbone.layers.3"), "backbone.layers.3.conv.weight is missing"),
    ("openmmlab", without("backbone.layers.1.2.branch2.1.bn"),
     "backbone.layers.1.2.branch2.1.bn.weight is missing"),
    ("openmmlab", put("backbone.layers.0.0.branch1.1.bn.bias", 5),
     r"backbone.layers.0.0.branch1.1.bn.bias has shape \(5,\), expected \(6,\)"),
    ("openmmlab", lambda s: without_backbone(without("backbone.conv1.bn")(s)),
     r"(?<!backbone.)conv1.bn.weight is missing"),
    ("openmmlab", without("backbone.layers.1.1"), "backbone.layers.1.1 is missing"),
    ("authors", without("features.0.branch_proj"), "features.0.branch_proj.2.weight is missing"),
    ("authors", without("features.2.branch_proj"),
     "branch_proj is in 2 units of features, expected 3"),
    ("authors", without("features.3."), "features.3 is missing"),
    ("authors", without("first_conv"), "first_conv.0.weight is missing"),
    ("authors", put("classifier.0.bias", 7), "classifier.0.bias is not a name of this network"),
    ("authors", put("features.1.branch_main.3.weight", 6, 1, 5, 5),
     r"features.1.branch_main.3.weight has shape \(6, 1, 5, 5\), expected \(6, 1, 3, 3\)"),
    ("plus", without("LastSE"), "LastSE.SE_opr.1.weight is missing"),
    ("plus", put("features.3.branch_main.3.weight", 16, 1, 9, 9),
     r"features.3.branch_main.3.weight has 9 rows, expected one of \(3, 5, 7\)"),
    ("plus", without("features.5.branch_proj", "features.5.branch_main.15"),
     "branch_proj is in 3 units of features, expected 4"),
    ("star", without("stage4.0.branch2.7"), "stage4.0.branch2.7.weight is missing"),
    ("v2-50", without("stage5"), "stage5.0.branch2.5.weight is missing"),
    ("SE-v2-164", without("stage3.0.se"), "stage3.0.se.fc1.weight is missing"),
    ("torchvision", lambda s: {}, "not a state_dict"),
    ("torchvision", lambda s: {"state_dict": {}}, "not a state_dict"),
    ("torchvision", lambda s: {"weights": s}, "not a state_dict"),
    ("torchvision", lambda s: {**s, 3: torch.ones(1)}, "not a state_dict"),
    ("torchvision", lambda s: {**s, "fc.bias": [0.0]}, "not a state_dict"),
    ("torchvision", put("module.fc.bias", 7), "module.fc.bias is not a name of this network"),
    ("torchvision", lambda s: {"conv1.weight": torch.ones(64, 3, 7, 7), "fc.bias": torch.ones(7)},
     "no known layout of ShuffleNet V2: has conv1.weight, expected names like stage2.0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), MISFITS)
def test_weights_that_do_not_fit(
    tmp_path: Path, name: str, change: Callable[[State], Any], message: str
) -> None:
    checkpoint = change(built(name).state_dict())
    with pytest.raises(ValueError, match=f"^source: .*{message}"):
        models.load(checkpoint)
    path = tmp_path / "weights.pth"
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=message) as caught:
        models.load(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("source", [None, 3, b"weights.pth", torch.ones(1), [("fc.bias", 1)]])
def test_sources_of_other_types(source: Any) -> None:
    with pytest.raises(TypeError, match="source: expected a mapping or a path, got "):
        models.load(source)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        models.load(tmp_path / "missing.pth")
    with pytest.raises(OSError):
        models.load(tmp_path)
    for content in (b"", b"not weights", b"PK\x03\x04"):
        path = tmp_path / "other.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"other\.pth: not a state_dict saved by torch\.save"):
            models.load(path)


class Ran(Exception):
    pass


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise Ran",)


def test_no_code_is_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    contents = {"ShuffleNetV2": torchvision_form(), "exec": {"state_dict": {}, "extra": Evil()}}
    for name, content in contents.items():
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"not a state_dict .*has \S*{name}, expected"):
            models.load(path)
