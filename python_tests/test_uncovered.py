"""What the kernels do not cover runs plain and is right, whenever it came about."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from _cases import FP32_BOUND, convs, draw, drop_in, each_drop_in, norms, runs_fused, unit_pair
from torch import Tensor, nn
from torch.nn.utils import prune

from snv2_kernels.testing import max_error

# Replaced submodules --------------------------------------------------------------------------


def _middle_width(unit: nn.Module) -> None:
    width = unit.branch2[0].in_channels
    unit.branch2[0] = nn.Conv2d(width, 24, 1, bias=False)
    unit.branch2[1] = nn.BatchNorm2d(24)
    unit.branch2[3] = nn.Conv2d(24, 24, 3, unit.stride, 1, groups=24, bias=False)
    unit.branch2[4] = nn.BatchNorm2d(24)
    unit.branch2[5] = nn.Conv2d(24, unit.branch2[5].out_channels, 1, bias=False)


def _main_width(unit: nn.Module) -> None:
    unit.branch2[5] = nn.Conv2d(unit.branch2[5].in_channels, 25, 1, bias=False)
    unit.branch2[6] = nn.BatchNorm2d(25)


def _biases(unit: nn.Module) -> None:
    for i, conv in enumerate(unit.branch2):
        if isinstance(conv, nn.Conv2d):
            unit.branch2[i] = nn.Conv2d(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                conv.padding,
                groups=conv.groups,
            )


def _norms_without_affine(unit: nn.Module) -> None:
    for i, bn in enumerate(unit.branch2):
        if isinstance(bn, nn.BatchNorm2d):
            unit.branch2[i] = nn.BatchNorm2d(bn.num_features, affine=False)


def _norms_without_statistics(unit: nn.Module) -> None:
    unit.branch2[1] = nn.BatchNorm2d(unit.branch2[1].num_features, track_running_stats=False)


def _dilated(unit: nn.Module) -> None:
    conv = unit.branch2[3]
    conv.dilation = conv.padding = (2, 2)


def _circular(unit: nn.Module) -> None:
    conv = unit.branch2[3]
    unit.branch2[3] = nn.Conv2d(
        conv.in_channels, conv.out_channels, 3, conv.stride, 1,
        groups=conv.groups, padding_mode="circular",
    )  # fmt: skip


def _dense_depthwise(unit: nn.Module) -> None:
    width = unit.branch2[3].in_channels
    unit.branch2[3] = nn.Conv2d(width, width, 3, unit.stride, 1, bias=False)


def _wider_window(unit: nn.Module) -> None:
    width = unit.branch2[3].in_channels
    unit.branch2[3] = nn.Conv2d(width, width, 5, unit.stride, 2, groups=width, bias=False)


def _relu6(unit: nn.Module) -> None:
    unit.branch2[2] = nn.ReLU6()


def _silu(unit: nn.Module) -> None:
    unit.branch2[7] = nn.SiLU()


def _shorter(unit: nn.Module) -> None:
    unit.branch2 = nn.Sequential(*list(unit.branch2)[:7])


def _longer(unit: nn.Module) -> None:
    unit.branch2 = nn.Sequential(nn.Hardtanh(), *unit.branch2)


def _group_norm(unit: nn.Module) -> None:
    unit.branch2[1] = nn.GroupNorm(1, unit.branch2[1].num_features)


def _wrapped_first(unit: nn.Module) -> None:
    unit.branch2[0] = nn.Sequential(unit.branch2[0])


def _first_conv_of_another_class(unit: nn.Module) -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    conv = unit.branch2[0]
    unit.branch2[0] = Scaled(conv.in_channels, conv.out_channels, 1)


def _no_branch(unit: nn.Module) -> None:
    unit.branch2 = nn.AvgPool2d(1, unit.stride)
    unit.branch1 = nn.AvgPool2d(1, unit.stride)


def _refill(unit: nn.Module) -> None:
    """Random state for whatever modules are left."""
    generator = torch.Generator().manual_seed(3)
    for name, t in unit.state_dict().items():
        if name.endswith("running_var"):
            t.copy_(torch.empty(t.shape).uniform_(0.5, 2, generator=generator))
        elif t.is_floating_point():
            t.copy_(torch.empty(t.shape).normal_(0, 0.3, generator=generator))


# Whether the kernels cover it.
SWAPS: dict[str, tuple[Callable[[nn.Module], None], bool]] = {
    "middle-width": (_middle_width, True),
    "biases": (_biases, True),
    "norms-without-affine": (_norms_without_affine, True),
    "main-width": (_main_width, True),
    "norms-without-statistics": (_norms_without_statistics, False),
    "dilated": (_dilated, True),
    "circular": (_circular, False),
    "dense-depthwise": (_dense_depthwise, False),
    "5x5": (_wider_window, True),
    "relu6": (_relu6, True),
    "silu": (_silu, True),
    "shorter": (_shorter, True),
    "longer": (_longer, False),
    "group-norm": (_group_norm, False),
    "wrapped-first": (_wrapped_first, True),
    "first-of-another-class": (_first_conv_of_another_class, False),
    "no-branch": (_no_branch, False),
}


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize(
    ("stride", "when"), [(1, "after-first-call"), (2, "before-first-call")], ids=str
)
def test_replaced_submodules(stride: int, swap: str, when: str) -> None:
    change, covered = SWAPS[swap]
    plain, unit = unit_pair(stride, 34, 34)
    x = draw(2, 34, 9, 11)
    if when == "after-first-call":
        unit(x)
    for module in (plain, unit):
        change(module)
        _refill(module.eval())
    assert (unit.reason() is None) == covered
    assert runs_fused(unit, x) == covered
    with torch.no_grad():
        assert max_error(unit(x), plain(x)) < 1e-6


# Attributes and classes that the weights do not tell -------------------------------------------


def relu_to_silu(model: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.SiLU())


def weight_norm(model: nn.Module) -> None:
    for conv in convs(model):
        nn.utils.parametrizations.weight_norm(conv)
        with torch.no_grad():
            conv.parametrizations.weight.original0.mul_(2)


def spectral_norm(model: nn.Module) -> None:
    torch.manual_seed(3)
    for conv in convs(model):
        nn.utils.spectral_norm(conv).eval()


def pruned(model: nn.Module) -> None:
    for conv in convs(model):
        prune.l1_unstructured(conv, "weight", amount=0.5)


def _depthwise(model: nn.Module) -> nn.Conv2d:
    return next(c for c in convs(model) if c.groups > 1)


def dilation(model: nn.Module) -> None:
    conv = _depthwise(model)
    conv.dilation = (2, 2)
    conv.padding = (2 * conv.padding[0], 2 * conv.padding[1])


def padding_mode(model: nn.Module) -> None:
    conv = _depthwise(model)
    conv.padding_mode = "circular"
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def forward_of_an_instance(model: nn.Module) -> None:
    conv = _depthwise(model)
    conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)  # type: ignore[method-assign]


def class_of_an_instance(model: nn.Module) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    _depthwise(model).__class__ = Doubled


def statistics_taken_away(model: nn.Module) -> None:
    for bn in norms(model):
        bn.running_mean = bn.running_var = None


UNCOVERED = [
    relu_to_silu,
    weight_norm,
    spectral_norm,
    pruned,
    dilation,
    padding_mode,
    forward_of_an_instance,
    class_of_an_instance,
    statistics_taken_away,
]


@pytest.mark.parametrize("when", ["before-first-call", "after-first-call"])
@pytest.mark.parametrize("edit", UNCOVERED, ids=lambda f: f.__name__.replace("_", "-"))
@each_drop_in
def test_edit_that_the_kernels_do_not_cover(
    kind: str, edit: Callable[[nn.Module], None], when: str
) -> None:
    plain, module, x = drop_in(kind)
    with torch.no_grad():
        before = plain(x)
        if when == "after-first-call":
            module(x)
        for m in (plain, module):
            edit(m)
        expected = plain(x)
        if kind == "split" and edit is relu_to_silu:
            return  # it has no ReLU module
        assert max_error(expected, before) > 1e-3
        assert max_error(module(x), expected) < FP32_BOUND


def test_pooling_of_an_instance() -> None:
    for change in ({"ceil_mode": True}, {"stride": 1}, {"kernel_size": 2, "padding": 0}):
        plain, module, x = drop_in("network")
        with torch.no_grad():
            module(x)
            for m in (plain, module):
                for name, value in change.items():
                    setattr(m.maxpool, name, value)
            assert max_error(module(x), plain(x)) < FP32_BOUND


def test_stride_of_an_instance() -> None:
    """Dilated backbones take the stride out of the last stage."""
    plain, module, x = drop_in("stage")
    with torch.no_grad():
        module(x)
        for m in (plain, module):
            for conv in convs(m[0]):
                conv.stride = (1, 1)
        assert plain(x).shape[2:] == x.shape[2:]
        assert max_error(module(x), plain(x)) < FP32_BOUND
