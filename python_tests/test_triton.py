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
from _cases import FP32_BOUND, draw, drop_in, ops_called
from conftest import running_on
from test_backends import CPU, FakeGpu
from test_ops import OPS, Op, check

import snv2_kernels as snv2
from snv2_kernels.backends import resolve
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


def test_modules(triton: Any) -> None:
    """The literal sequence has a kernel; units and networks run plain, and say so."""
    for kind in ("split", "unit-s1", "network"):
        plain, module, x = drop_in(kind)
        plain, module = (m.to(torch.get_default_device()) for m in (plain, module))
        with torch.no_grad(), snv2.use_backend("triton"):
            assert max_error(module(x), plain(x)) < FP32_BOUND
            assert module.reason() == (
                None if kind == "split" else "backend 'triton' runs it plain"
            )
            called = ops_called(module, x)
        assert ("snv2_triton::split_dw_cat_shuffle" in called) == (kind == "split")


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
@pytest.mark.parametrize("kernel", ["cat_shuffle", "dw_conv3x3", "split_dw_cat_shuffle"])
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
    """Each op is its memory and its kernel, which reads its inputs and writes nothing else."""
    graphs = _compiler("trace")
    assert len(graphs) == 3
    for names in graphs:
        assert names.count("triton_kernel_wrapper_functional") == 1
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
        assert "triton" not in sys.modules
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
