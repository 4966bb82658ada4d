"""The models beside an independent implementation, pytorchcv, where the two have the same form, and
its units fused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from _cases import FP32_BOUND, assert_accurate, draw, run_fused
from torch import nn

import snv2_kernels as snv2
from snv2_kernels import models
from snv2_kernels.testing import float64_reference, max_error, randomize_

pytest.importorskip("pytorchcv")
from pytorchcv.models import shufflenetv2, shufflenetv2b
from pytorchcv.models.shufflenetv2 import get_shufflenetv2
from pytorchcv.models.shufflenetv2b import get_shufflenetv2b

REPEATS = (4, 8, 4)
SCALES = {"x0_5": 12 / 29, "x1_0": 1.0}  # at larger widths pytorchcv has another conv5


def copy_layers(theirs: nn.Module, ours: nn.Module, names: dict[str, str]) -> None:
    for their_name, our_name in names.items():
        layer = theirs.get_submodule(their_name)
        layer.load_state_dict(ours.get_submodule(our_name).state_dict())


_CONV = {"conv": "0", "bn": "1"}
_UNIT = {
    "compress_conv1": "branch2.0",
    "compress_bn1": "branch2.1",
    "dw_conv2": "branch2.3",
    "dw_bn2": "branch2.4",
    "expand_conv3": "branch2.5",
    "expand_bn3": "branch2.6",
}
_PROJECTION = {
    "dw_conv4": "branch1.0",
    "dw_bn4": "branch1.1",
    "expand_conv5": "branch1.2",
    "expand_bn5": "branch1.3",
}


@pytest.mark.parametrize("width", SCALES)
def test_network(width: str) -> None:
    """Whole, but for the max pool, whose windows begin one pixel later in theirs."""
    ours = randomize_(getattr(models, f"shufflenet_v2_{width}")(num_classes=10)).eval()
    theirs = get_shufflenetv2(SCALES[width], num_classes=10).eval()
    copy_layers(theirs.features.init_block.conv, ours.conv1, _CONV)
    theirs.features.init_block.pool = nn.MaxPool2d(3, 2, 1)
    for stage, repeats in enumerate(REPEATS):
        for i in range(repeats):
            names = _UNIT | (_PROJECTION if i == 0 else {})
            unit = ours.get_submodule(f"stage{stage + 2}.{i}")
            copy_layers(theirs.features[stage + 1][i], unit, names)
    copy_layers(theirs.features.final_block, ours.conv5, _CONV)
    copy_layers(theirs, ours, {"output": "fc"})
    x = draw(1, 3, 224, 224)
    with torch.no_grad():
        assert max_error(ours(x), float64_reference(theirs)(x)) < FP32_BOUND


_UNIT_B = {
    "conv1.conv": "branch_main.0",
    "conv1.bn": "branch_main.1",
    "dconv.conv": "branch_main.3",
    "dconv.bn": "branch_main.4",
    "conv2.conv": "branch_main.5",
    "conv2.bn": "branch_main.6",
}
_PROJECTION_B = {
    "shortcut_dconv.conv": "branch_proj.0",
    "shortcut_dconv.bn": "branch_proj.1",
    "shortcut_conv.conv": "branch_proj.2",
    "shortcut_conv.bn": "branch_proj.3",
}


@pytest.mark.parametrize("width", SCALES)
def test_stages_in_the_authors_form(width: str) -> None:
    """Theirs shuffles at the end of each unit, so also at the end of each stage."""
    model = models.megvii_shufflenet_v2(width[1:].replace("_", ".") + "x")
    units = iter(randomize_(model).eval().features)
    theirs = get_shufflenetv2b(SCALES[width], shuffle_group_first=False).eval().features
    x = draw(1, 24, 28, 28)
    for stage, repeats in enumerate(REPEATS):
        ours = nn.Sequential(*(next(units) for _ in range(repeats)))
        for i in range(repeats):
            names = _UNIT_B | (_PROJECTION_B if i == 0 else {})
            copy_layers(theirs[stage + 1][i], ours[i], names)
        with torch.no_grad():
            out = ours(x)
            expected = float64_reference(theirs[stage + 1])(x)
        assert max_error(torch.cat([out[:, ::2], out[:, 1::2]], 1), expected) < FP32_BOUND
        x = out


FORMS = {
    "shufflenetv2": shufflenetv2.ShuffleUnit,
    "shufflenetv2b": functools.partial(shufflenetv2b.ShuffleUnit, shuffle_group_first=False),
    "shufflenetv2b-other-shuffle": functools.partial(
        shufflenetv2b.ShuffleUnit, shuffle_group_first=True
    ),
}


@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("use_residual", [False, True])
@pytest.mark.parametrize("use_se", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_units_fuse(form: str, use_se: bool, use_residual: bool, downsample: bool) -> None:
    make: Any = FORMS[form]
    channels = 192 if downsample else 96
    unit = make(96, channels, downsample=downsample, use_se=use_se, use_residual=use_residual)
    fused, x = snv2.fuse(randomize_(unit).eval()), draw(2, 96, 9, 7)
    assert str(snv2.explain(fused)) == "(model): unit: fused"
    with torch.no_grad():
        exact = float64_reference(unit)(x)
        assert_accurate("unit", run_fused(fused, x), unit(x), exact)
