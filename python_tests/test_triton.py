"""The Triton kernels: tiles, the compiler without a GPU, whether the backend is there."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _cases import DTYPES, FP32_BOUND, VIEWS, draw, drop_in, ops_called, unit_pair
from _cases import FORMATS as CASE_FORMATS
from conftest import running_on
from test_backends import CPU, FakeGpu
from test_ops import OPS, Op, check
from test_unit import check as check_unit

import snv2_kernels as snv2
from snv2_kernels.backends import resolve
from snv2_kernels.packing.gpu import pack_tiles, unpack_tiles
from snv2_kernels.testing import max_error

backends = importlib.import_module("snv2_kernels.backends")
COMPILER = Path(__file__).with_name("_triton_compiler.py")
SHARED_BYTES = 48 * 1024  # of a CTA that asks for no more than any GPU has
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def triton() -> Iterator[Any]:
    """The kernels, where they run; new tensors lie there."""
    with running_on("triton"):
        yield importlib.import_module("snv2_kernels.triton")


# Tiles ----------------------------------------------------------------------------------------


def _map_for(shapes: Any) -> tuple[int, int, int, int]:
    """One that is run in the tile of ``shapes``."""
    extent = 7 if shapes.short and not shapes.channels_last else 15
    channels = 29 if shapes.short and shapes.channels_last else 67
    return (1 if shapes.small else 64, channels, extent, extent)


@pytest.mark.parametrize("op", OPS[::2] + OPS[-1:], ids=str)
def test_every_tile(triton: Any, op: Op) -> None:
    """With rests in both directions."""
    for shapes, tile in triton.TILES.items():
        memory_format = FORMATS[shapes.channels_last]
        shape = (1, tile.channels + 3, 5, tile.pixels // 5 + 2)
        with triton.use_tile(tile):
            dtype = torch.float32 if shapes.small else torch.bfloat16
            check(op, "triton", op.arguments(shape, dtype, draw, memory_format=memory_format))


def test_choice_of_tiles() -> None:
    pytest.importorskip("triton")
    from snv2_kernels.triton import TILES, Tile, choose_tile, use_tile

    for shapes, tile in TILES.items():
        n, c, h, w = _map_for(shapes)
        assert choose_tile(n, c, h * w, shapes.channels_last) == tile
        assert 32 * tile.warps * 4 <= tile.pixels * tile.channels <= 32 * tile.warps * 8
    mine = Tile(16, 16, 1)
    with use_tile(mine):
        assert choose_tile(1, 1, 1, False) == mine
    assert choose_tile(1, 1, 1, False) != mine


def test_results_do_not_depend_on_the_tile(triton: Any) -> None:
    for op in OPS:
        args = op.arguments((1, 11, 5, 9), torch.float32, draw)
        with triton.use_tile(triton.Tile(32, 16, 1)):
            first = op(*args, backend="triton")
        assert torch.equal(op(*args, backend="triton"), first)


# Modules --------------------------------------------------------------------------------------


UNITS = {
    "s1": (1, 34, (2, 34, 9, 11)),
    "s1-x1_0": (1, 116, (1, 116, 7, 7)),
    "s1-one-pixel": (1, 2, (3, 2, 1, 1)),
    "s2": (2, 34, (2, 21, 9, 11)),
    "s2-even": (2, 70, (1, 24, 8, 4)),
    "s2-one-pixel": (2, 4, (2, 1, 1, 1)),
    "batch0": (1, 34, (0, 34, 7, 7)),
}


@pytest.mark.parametrize("memory_format", CASE_FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", UNITS)
def test_unit(
    triton: Any, case: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    stride, oup, shape = UNITS[case]
    plain, unit = (m.to(torch.get_default_device()) for m in unit_pair(stride, shape[1], oup))
    x = draw(*shape, dtype=dtype, memory_format=memory_format)
    check_unit("unit", unit.to(dtype), plain.to(dtype), x, "triton")


@pytest.mark.parametrize("stride", [1, 2])
def test_unit_of_views_and_its_gradient(triton: Any, stride: int) -> None:
    plain, unit = (m.to(torch.get_default_device()) for m in unit_pair(stride, 34, 34))
    for view in ("channel_slice", "width_slice", "transposed_pixels", "expanded_pixels"):
        check_unit("unit", unit, plain, VIEWS[view](1, 34, 5, 7), "triton")
    grads = []
    for module in (plain, unit):
        x = draw(1, 34, 5, 7).requires_grad_()
        with snv2.use_backend("triton"):
            module(x).square().mean().backward()
        grads.append(x.grad)
    assert max_error(grads[1], grads[0]) < FP32_BOUND


@pytest.mark.parametrize("stride", [1, 2])
def test_unit_keeps_nan_in_its_image(triton: Any, stride: int) -> None:
    _, unit = unit_pair(stride, 34, 34)
    unit.to(torch.get_default_device())
    clean = draw(3, 34, 5, 7)
    dirty = clean.clone()
    dirty[1] = float("nan")
    with torch.no_grad(), snv2.use_backend("triton"):
        out, expected = unit(dirty), unit(clean)
    assert out[1].isnan().all()
    assert torch.equal(out[0::2], expected[0::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 16), (58, 58), (29, 13), (1, 1), (244, 122)], ids=str)
def test_unpacking_of_tiles(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = draw(*shape, dtype=dtype)
    tiles = torch.cat([pack_tiles(matrix, dtype), matrix.flatten()])
    assert torch.equal(unpack_tiles(tiles, *shape), matrix)


def test_modules(triton: Any) -> None:
    """Stages run plain, and say so; the units inside them do not."""
    for kind in ("split", "unit-s1", "stage"):
        plain, module, x = drop_in(kind)
        plain, module = (m.to(torch.get_default_device()) for m in (plain, module))
        with torch.no_grad(), snv2.use_backend("triton"):
            assert max_error(module(x), plain(x)) < FP32_BOUND
            assert module.reason() == (
                "backend 'triton' runs it plain" if kind == "stage" else None
            )
            called = ops_called(module, x)
        op = "split_dw_cat_shuffle" if kind == "split" else "unit"
        assert called.count(f"snv2_triton::{op}") == (3 if kind == "stage" else 1)


# The compiler ---------------------------------------------------------------------------------


def _compiler(*arguments: str) -> list[Any]:
    pytest.importorskip("triton")
    out = subprocess.run(
        [sys.executable, COMPILER, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True, text=True, check=False, timeout=570,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    return [json.loads(line) for line in out.stdout.splitlines()]


@pytest.mark.parametrize("which", ["quick", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kernel", ["cat_shuffle", "dw_conv3x3", "split_dw_cat_shuffle", "unit"])
def test_kernels_compile_and_do_not_spill(kernel: str, which: str) -> None:
    """For sm_80 and sm_90, by Triton's own ptxas."""
    configurations = _compiler(which, kernel)
    for c in configurations:
        assert c["shared"] <= SHARED_BYTES, c
        assert len(c["registers"]) == 1, c
        assert c["spill stores"] == c["spill loads"] == c["stack frame"] == [0], c
        assert c["stored"], c
    for arch in ("sm_80", "sm_90"):
        assert sum(arch in c["name"] for c in configurations) >= 6


def test_torch_compile_sees_the_kernels() -> None:
    """Each op is its memory and its kernels, which write nothing else."""
    graphs = _compiler("trace")
    for names, kernels in zip(graphs, (1, 1, 1, 2), strict=True):
        assert names.count("triton_kernel_wrapper_functional") == kernels
        assert not any("copy" in name for name in names)


# Availability ---------------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with or without Triton, a PyTorch with CUDA, a GPU, CUDA kernels."""

    def pretend(
        version: str | None,
        gpu: FakeGpu | None = None,
        cuda: str | None = "13.0",
        ours: bool = False,
    ) -> None:
        monkeypatch.setattr(backends, "_triton_version", version)
        monkeypatch.setattr(backends, "_triton_interpreted", False)
        monkeypatch.setitem(backends.DEVICES, "triton", "cuda")
        monkeypatch.setattr(backends, "_cuda_targets", ("sm_90",))
        monkeypatch.setattr(backends, "_cuda_failure", None if ours else "not built: so it is")
        monkeypatch.setattr(backends, "_known_gpu_state", backends._gpu_state)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)

    return pretend


GPU = torch.device("cuda", 0)
H100 = FakeGpu("H100", 9, 0)


def test_state_and_choice_on_a_gpu(pretend: Callable[..., None]) -> None:
    pretend("3.7.0", H100)
    assert snv2.backends()["triton"] == "ok (triton 3.7.0)"
    assert resolve(GPU) == resolve(GPU, "triton") == "triton"
    assert resolve(CPU) == "cpu"
    with pytest.raises(ValueError, match="backend: 'triton' cannot run a tensor on device cpu"):
        resolve(CPU, "triton")
    pretend("3.7.0", H100, ours=True)
    assert resolve(GPU) == "cuda"
    assert resolve(GPU, "triton") == "triton"


@pytest.mark.parametrize(
    ("machine", "state"),
    [
        ({"version": None, "gpu": H100}, "not installed: pip install triton"),
        ({"version": "3.7.0"}, "triton 3.7.0, but there is no GPU"),
        (
            {"version": "3.7.0", "gpu": H100, "cuda": None},
            "triton 3.7.0, but this PyTorch has no C",
        ),
        (
            {"version": "3.7.0", "gpu": FakeGpu("T4", 7, 5)},
            "triton 3.7.0, but the GPU is T4, sm_75",
        ),
    ],
    ids=["no-triton", "no-gpu", "no-cuda", "old-gpu"],
)
def test_state_says_what_is_missing(
    pretend: Callable[..., None], machine: dict[str, Any], state: str
) -> None:
    pretend(**machine)
    assert snv2.backends()["triton"].startswith(state)
    gpu = torch.device("cuda")  # the current one, if there is one
    assert resolve(gpu) == "reference"
    for ask in (
        lambda: resolve(gpu, "triton"),
        lambda: snv2.use_backend("triton").__enter__(),
        lambda: snv2.fuse(torch.nn.Identity(), "triton"),
    ):
        with pytest.raises(RuntimeError, match=f"backend: 'triton' is not available: {state}"):
            ask()


PROGRAMS = {
    "import is lazy": """
        import sys, torch, snv2_kernels as snv2
        snv2.backends()
        snv2.ops.cat_shuffle(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
        assert not {"triton", "torch._dynamo"} & set(sys.modules)
    """,
    "without Triton": """
        import sys
        sys.modules["triton"] = None
        import torch, snv2_kernels as snv2
        assert snv2.backends()["triton"].startswith("not installed"), snv2.backends()
        x = torch.ones(1, 1, 2, 2)
        assert snv2.ops.cat_shuffle(x, x).shape == (1, 2, 2, 2)
        assert snv2.nn.SplitDepthwiseShuffle(2).eval()(x.repeat(1, 2, 1, 1)).shape == (1, 2, 2, 2)
    """,
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_import(program: str) -> None:
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAMS[program])],
        check=True, timeout=120,
    )  # fmt: skip
