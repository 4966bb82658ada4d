"""Engines and programs of models whose units stand among other layers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from _mixed_networks import PARTITIONED
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels.testing import randomize_

SHAPE = (3, 3, 65, 49)


def made(name: str) -> nn.Module:
    return randomize_(PARTITIONED[name][1]()).eval()


def maps(out: Any) -> list[Tensor]:
    if out is None or isinstance(out, Tensor):
        return [] if out is None else [out]
    parts = out.values() if isinstance(out, dict) else out
    return [t for part in parts for t in maps(part)]


def agree(actual: Any, expected: Any) -> None:
    """To the bit, in the same containers."""
    assert type(actual) is type(expected)
    for a, b in zip(maps(actual), maps(expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", PARTITIONED)
def test_is_the_fused_model_to_the_bit(name: str) -> None:
    model = made(name)
    fused, engine = snv2.fuse(model), snv2.Engine(model, SHAPE)
    copies = [engine, engine.clone(), pickle.loads(pickle.dumps(engine))]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for images in (3, 1, 2):  # fewer, then more again, on the same memory
            x = torch.randn(images, *SHAPE[1:], generator=generator)
            expected = fused(x.clone())
            for each in copies:
                agree(each(x), expected)
            agree(engine(x.contiguous(memory_format=torch.channels_last)), expected)


def test_later_changes_do_not_show() -> None:
    model = made("detector")
    engine, x = snv2.Engine(model, SHAPE), torch.randn(SHAPE)
    before = [t.clone() for t in maps(engine(x))]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        randomize_(model)
        agree(maps(engine(x)), before)


def test_regions_run_on_memory_that_was_planned() -> None:
    engine = snv2.Engine(made("se behind"), SHAPE)
    report = engine.report()
    assert (report.op_calls, report.units, report.backend) == (6, 6, "cpu")
    assert report.workspace_bytes > 0
    regions: Any = engine._runner._regions
    memory = [[t.data_ptr() for t in region.runner.results] for region in regions]
    engine(torch.randn(SHAPE))
    assert memory == [[t.data_ptr() for t in region.runner.results] for region in regions]


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"input_shape": (1, 3, 5, 5)}, ValueError, "of maps of at least"),
        ({"dtype": torch.float16}, ValueError, "so convert the model first"),
        ({"input_shape": (1, 4, 65, 49)}, ValueError, r"input_shape: expected \[N"),
        ({"taps": ("stage2",)}, ValueError, "taps: expected none"),
        ({"normalize": ((0,) * 3, (1,) * 3)}, ValueError, "normalize: only a whole network"),
        ({"device": "meta"}, RuntimeError, "no kernel backend is available for meta"),
    ],
    ids=["size", "dtype", "channels", "taps", "normalize", "device"],
)
def test_what_does_not_fit_is_named(given: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        snv2.Engine(made("cbam inside"), **{"input_shape": SHAPE, **given})


def test_inputs_that_do_not_fit_are_named() -> None:
    engine = snv2.Engine(made("cifar stem"), SHAPE)
    with pytest.raises(ValueError, match="x: expected shape"):
        engine(torch.randn(1, 3, 64, 49))
    with pytest.raises(TypeError, match=r"x: expected torch\.float32"):
        engine(torch.randn(SHAPE).double())


def test_no_program_names_the_first_layer_outside(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: conv2d \(conv1.0\) is in no plan"):
        snv2.save_program(made("cifar stem"), tmp_path / "net.snv2", (1, 3, 64, 64))
