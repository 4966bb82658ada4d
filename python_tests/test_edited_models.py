"""fuse() on torchvision's network after it was edited: its class is a short cut, never a limit."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _cases import FP32_BOUND, assert_close, draw, ops_called, run_fused, same_state
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import snv2_kernels as snv2
from snv2_kernels.nn import FusedModule
from snv2_kernels.nn.known import KnownModule
from snv2_kernels.testing import max_error, randomize_

SIZE = (2, 3, 65, 49)


def network(torchvision: types.ModuleType) -> Any:
    model = torchvision.models.ShuffleNetV2([1, 2, 1], [24, 20, 36, 58, 40], num_classes=10)
    return randomize_(model).eval()


def _swap(model: nn.Module, old: type[nn.Module], make: Callable[[Any], nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is old:
                setattr(parent, name, make(child))


def _activation(make: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    return lambda model: _swap(model, nn.ReLU, lambda _: make())


def _frozen_norms(model: nn.Module) -> None:
    from torchvision.ops.misc import FrozenBatchNorm2d

    def frozen(norm: nn.BatchNorm2d) -> nn.Module:
        state = {k: v for k, v in norm.state_dict().items() if k != "num_batches_tracked"}
        made = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
        made.load_state_dict(state)
        return made

    _swap(model, nn.BatchNorm2d, frozen)


def _folded_norms(model: nn.Module) -> None:
    for layers in (m for m in model.modules() if type(m) is nn.Sequential):
        for i, norm in enumerate(layers):
            if isinstance(norm, nn.BatchNorm2d):
                layers[i - 1], layers[i] = fuse_conv_bn_eval(layers[i - 1], norm), nn.Identity()


class _Gate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(torch.relu(self.reduce(means))))


def _branches(model: Any) -> list[nn.Sequential]:
    return [unit.branch2 for stage in (model.stage2, model.stage3, model.stage4) for unit in stage]


def _gates(model: nn.Module) -> None:
    for branch in _branches(model):
        branch.append(_Gate(branch[5].out_channels))


def _dropouts(model: nn.Module) -> None:
    for branch in _branches(model)[1:]:
        branch.append(nn.Dropout2d(0.1))


def _window(conv: nn.Conv2d) -> nn.Module:
    if conv.groups == 1:
        return conv
    return nn.Conv2d(
        conv.in_channels, conv.out_channels, 5, conv.stride, 2, groups=conv.groups, bias=False
    )


def _dilated(model: Any) -> None:
    for conv in (m for m in model.stage4.modules() if isinstance(m, nn.Conv2d)):
        conv.stride = (1, 1)
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (2, 2)


def _fc(*layers: nn.Module) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        model.fc = nn.Sequential(*layers) if len(layers) > 1 else layers[0]

    return edit


def _cifar_stem(model: Any) -> None:
    model.conv1[0], model.maxpool = nn.Conv2d(3, 24, 3, 1, 1, bias=False), nn.Identity()


def _no_conv5(model: Any) -> None:
    model.conv5, model.fc = nn.Identity(), nn.Linear(58, 10)


WHOLE, STAGES = [""], ["stage2", "stage3", "stage4"]
EDITS: dict[str, tuple[Callable[[Any], None], list[str]]] = {  # and the outermost fused parts
    "frozen-norms": (_frozen_norms, WHOLE),
    "folded-norms": (_folded_norms, WHOLE),
    "silu": (_activation(nn.SiLU), WHOLE),
    "squeeze-and-excite": (_gates, WHOLE),
    "dropout2d": (_dropouts, WHOLE),
    "5x5": (lambda model: _swap(model, nn.Conv2d, _window), WHOLE),
    "dilated-stage4": (_dilated, WHOLE),
    "fc-dropout": (_fc(nn.Dropout(0.2), nn.Linear(40, 3)), WHOLE),
    "fc-identity": (_fc(nn.Identity()), WHOLE),
    "fc-of-two-layers": (_fc(nn.Linear(40, 8), nn.ReLU(True), nn.Linear(8, 3)), WHOLE),
    "cifar-stem": (_cifar_stem, WHOLE),
    "no-conv5": (_no_conv5, WHOLE),
    "gelu": (_activation(nn.GELU), []),
}


def _outermost(fused: nn.Module) -> list[str]:
    names = [name for name, m in fused.named_modules() if isinstance(m, FusedModule)]
    return [n for n in names if not any(n != o and n.startswith(o and f"{o}.") for o in names)]


@pytest.mark.parametrize("edit", EDITS)
def test_edited_network(torchvision: types.ModuleType, edit: str) -> None:
    model = network(torchvision)
    change, parts = EDITS[edit]
    change(model)
    randomize_(model).eval()
    fused, x = snv2.fuse(model), draw(*SIZE)
    assert _outermost(fused) == parts
    assert_close(fused, model, x)
    with torch.no_grad():
        names = ops_called(fused, x)
    assert names.count("snv2::network") == len(parts)
    pairs = zip(fused.modules(), model.modules(), strict=True)
    assert all(isinstance(a, type(b)) for a, b in pairs)
    assert same_state(fused, model)


def test_copies_of_an_edited_network(torchvision: types.ModuleType) -> None:
    model = network(torchvision)
    _activation(nn.SiLU)(model)
    fused, x = snv2.fuse(model.eval()), draw(*SIZE)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(other) is type(fused)
        assert max_error(other(x).detach(), fused(x).detach()) < FP32_BOUND


def test_images_into_an_edited_network(torchvision: types.ModuleType) -> None:
    model = network(torchvision)
    _activation(nn.SiLU)(model)
    image = torch.randint(0, 256, (1, 33, 49, 3), dtype=torch.uint8)
    x = (image.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    engine = snv2.Engine(model, tuple(x.shape), normalize=([0.5] * 3, [0.25] * 3))
    with torch.no_grad():
        assert max_error(engine(image), model(x)) < FP32_BOUND
    model.conv1 = model.maxpool = nn.Identity()  # nothing that images could go into
    model.stage2[0].branch1[0] = nn.Conv2d(3, 3, 3, 2, 1, groups=3)
    model.stage2[0].branch1[1] = nn.BatchNorm2d(3)
    model.stage2[0].branch1[2] = nn.Conv2d(3, 10, 1)
    model.stage2[0].branch2[0] = nn.Conv2d(3, 10, 1)
    with pytest.raises(ValueError, match="only a whole network takes images"):
        snv2.Engine(model.eval(), tuple(x.shape), normalize=([0.5] * 3, [0.25] * 3))


def test_edit_after_fuse(torchvision: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(torchvision)
    fused, x = snv2.fuse(model), draw(*SIZE)

    def edit(old: type[nn.Module], new: type[nn.Module]) -> None:
        for m in (fused, model):
            _swap(m, old, lambda _: new().eval())
        assert_close(fused, model, x)

    edit(nn.ReLU, nn.SiLU)
    run_fused(fused, x)
    edit(nn.SiLU, nn.GELU)
    assert fused.reason() == fused.stage3[1].reason() == "activation GELU"
    monkeypatch.setattr("snv2_kernels.recognition.record", lambda *_: pytest.fail("recorded"))
    fused.train().eval()
    assert fused.reason() == "activation GELU"  # which is remembered
    edit(nn.GELU, nn.ReLU)
    run_fused(fused, x)


def test_plain_parts_are_the_models_own(torchvision: types.ModuleType) -> None:
    """They look for no changes before each forward."""
    model = network(torchvision)
    for branch in _branches(model)[1:]:
        branch[3].padding_mode = "reflect"  # which small maps are too small for
    fused = snv2.fuse(model.eval())
    changed = [m for m in fused.modules() if isinstance(m, KnownModule)]
    assert changed == [fused.stage2, fused.stage2[0]]
    assert [type(m) for m in (fused, *fused.stage3)] == [type(m) for m in (model, *model.stage3)]


def _own_forward_impl(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model._forward_impl = types.MethodType(lambda self, x: self.stage2(self.conv1(x)), model)


def _forward_of_the_class(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return 2 * self._forward_impl(x)

    monkeypatch.setattr(type(model), "forward", forward)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("edit", [_own_forward_impl, _forward_of_the_class])
def test_code_that_is_not_of_the_class(
    torchvision: types.ModuleType, monkeypatch: pytest.MonkeyPatch, edit: Any, when: str
) -> None:
    model, x = network(torchvision), draw(*SIZE)
    if when == "before":
        edit(model, monkeypatch)
    fused = snv2.fuse(model)
    if when == "after":
        for m in (fused, model):
            edit(m if edit is _own_forward_impl else model, monkeypatch)
    assert_close(fused, model, x)


def test_unit_of_a_subclass_in_a_stage() -> None:
    class Doubled(snv2.nn.InvertedResidual):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    stage = randomize_(snv2.nn.Stage(snv2.nn.InvertedResidual(8, 8, 1), Doubled(8, 8, 1))).eval()
    x = draw(2, 8, 9, 11)
    with torch.no_grad():
        assert max_error(stage(x), 2 * stage[1]._plain(stage[0]._plain(x))) < FP32_BOUND
