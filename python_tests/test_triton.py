"""The Triton kernels: tiles, the compiler without a GPU, whether the backend is there."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _cases import case_id, draw, in_turn, unit_pair
from test_backends import CPU, FakeGpu
from test_backward import gradients
from test_ops import OPS, Op, check

import snv2_kernels as snv2
from snv2_kernels.backends import resolve
from snv2_kernels.testing import max_error

backends = importlib.import_module("snv2_kernels.backends")
COMPILER = Path(__file__).with_name("_triton_compiler.py")
SHARED_BYTES = 48 * 1024  # of a CTA that asks for no more than any GPU has
FORMATS = [torch.contiguous_format, torch.channels_last]
KERNELS = ["cat_shuffle", "convolve", "cat_shuffle_backward"]
KERNELS += ["depthwise_gradient", "depthwise_gradient:1", "depthwise_gradient:2", "depthwise_sums"]
KERNELS += [
    "stem",
    "stem_each",
    "pw1",
    "dw_pw2",
    "pointwise",
    "depthwise",
    "average",
    "means",
    "gates",
    "scale",
]
KERNELS += ["features", "linear"]


def tiles() -> Any:
    return importlib.import_module("snv2_kernels.triton.tiles")


# Tiles ----------------------------------------------------------------------------------------


# Shapes: rests in all directions, small planes, rows that are vectors.
SHAPES = [(1, 21, 5, 9), (3, 3, 7, 7), (1, 5, 14, 8)]


@pytest.mark.parametrize("op", OPS[::2] + OPS[-1:], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_every_tile_of_maps(triton: Any, op: Op, memory_format: torch.memory_format) -> None:
    """Those that shapes and tuning choose."""
    last, seen = memory_format == torch.channels_last, set()
    for n, c, h, w in SHAPES:
        outer, inner = (h * w, c) if last else (n * c, h * w)
        for unit, element in ((1, 4), (4, 4), (8, 2)):
            for tile in tiles().map_tiles(outer, inner, unit, element, last):
                seen.add(tile)
        args = op.arguments((n, c, h, w), torch.float16, draw, memory_format=memory_format)
        if op.name == "cat_shuffle":
            each = seen
        else:
            stride = int(op.options.get("stride", 1))
            sizes = n, c, (h - 1) // stride + 1, (w - 1) // stride + 1
            each = {*tiles().strip_tiles(*sizes, stride, 1 if last else w % 2 * -1 + 2, 2, last)}
        for tile in sorted(each, key=str):
            with triton.use_tile(tile):
                check(op, "triton", args)


# Rows, columns and images of a strip: one pixel, one with all its neighbours, whole maps.
STRIPS = [(1, 1, 1), (3, 3, 1), (9, 9, 2)]


@pytest.mark.parametrize(
    ("op", "strip", "memory_format"), in_turn(OPS[1:], STRIPS, FORMATS), ids=case_id
)
def test_every_kind_of_strip_of_gradients(
    triton: Any, op: Op, strip: tuple[int, int, int], memory_format: torch.memory_format
) -> None:
    """Strips beside infinities: zeros from outside the map times these would be NaN."""
    args = op.arguments((2, 6, 6, 9), torch.float32, draw, memory_format=memory_format)
    grad = draw(*op.formula(*args).shape, memory_format=memory_format, seed=7)
    for target in (args[0], grad):
        target[0, -1, 0, 0] = target[0, -2, -1, -1] = target[1, -3, -1, 0] = float("inf")
    eager = gradients(op.formula, args, grad)
    with triton.use_tile(triton.GradientTile(*strip, 16, 4, 1)):
        ours = gradients(partial(op, backend="triton"), args, grad)
    for actual, expected in zip(ours, eager, strict=True):
        assert torch.equal(actual.isfinite(), expected.isfinite())
        keep = expected.isfinite()
        assert max_error(actual[keep], expected[keep]) < 1e-5


def test_choice_of_tiles_of_maps() -> None:
    pytest.importorskip("triton")
    from snv2_kernels.triton.tiles import map_tiles, strip_tiles

    for unit, element, last in ((1, 2, False), (4, 2, False), (8, 2, False), (4, 2, True)):
        many, few = (map_tiles(1 << k, 49 * unit, unit, element, last)[0] for k in (20, 4))
        assert many.rounds > few.rounds or last
        assert many.pixels * many.channels >= 32 * many.warps
    for last in (False, True):
        for stride in (1, 2):
            many, few = (strip_tiles(n, 58, 28, 28, stride, 2, 2, last)[0] for n in (64, 1))
            assert many.rows > few.rows or (last and stride == 2)
            assert 28 % many.rows == 0 == 28 % many.columns
            assert 32 * many.warps <= many.channels * many.strips <= 64 * many.warps


def test_grids_that_are_longer_than_axes(triton: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("snv2_kernels.triton.launches"), "_AXIS", 2)
    for op in (OPS[0], OPS[-1]):
        for memory_format in FORMATS:
            args = op.arguments((2, 34, 3, 5), torch.float32, draw, memory_format=memory_format)
            with triton.use_tile(triton.Tile(16, 16, 4), triton.StripTile(2, 4, 16, 8, 4)):
                check(op, "triton", args)


def test_choice_of_tiles_of_products() -> None:
    pytest.importorskip("triton")
    from snv2_kernels.triton.tiles import PRODUCT_TILES, choose_product_tile, programs

    for (kernel, narrow), each in PRODUCT_TILES.items():
        assert each[0] == choose_product_tile(kernel, narrow, (512,), 1 << 20)
        assert each[-1] == choose_product_tile(kernel, narrow, (512,), 1)
        counts = [programs(tile, (512, 0), 1 << 12) for tile in each]
        assert counts == sorted(counts)
        # Rows that would be empty are not computed where a smaller tile will do.
        tile = choose_product_tile(kernel, narrow, (24, 24), 1 << 20)
        assert tile.rows <= 32 or tile == each[-1]
    assert programs(PRODUCT_TILES["dw_pw2", True][0], (129, 1), 33) == 3 * 2


def test_results_do_not_depend_on_the_tile(triton: Any) -> None:
    for op in OPS:
        args = op.arguments((1, 11, 5, 9), torch.float32, draw)
        with triton.use_tile(triton.Tile(32, 16, 1), triton.StripTile(3, 2, 16, 4, 1)):
            first = op(*args, backend="triton")
        assert torch.equal(op(*args, backend="triton"), first)


# Measured tiles -------------------------------------------------------------------------------


@pytest.fixture
def tuning(triton: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nothing was measured yet, and no tile is in place of all others."""
    module, table = importlib.import_module("snv2_kernels.triton.tuning"), tiles()
    monkeypatch.setattr(module, "_measured", {})
    monkeypatch.setattr(module, "_timer", None)
    token = table._override.set({})
    yield module
    table._override.reset(token)


class Clock:
    """Launches once and says that it took as long as the tile before, or for the ``fastest``
    launch no time."""

    def __init__(self, fastest: int) -> None:
        self.fastest, self.launches = fastest, 0

    def __call__(self, launch: Callable[[], None]) -> float:
        launch()
        self.launches += 1
        return 0.0 if self.launches == self.fastest else 1.0


def _unit_output(x: torch.Tensor) -> torch.Tensor:
    _, unit = unit_pair(1, 34, 34)
    with torch.no_grad(), snv2.use_backend("triton"):
        out: torch.Tensor = unit.to(x.device)(x)
    return out


def test_measured_tiles(tuning: Any, tmp_path: Path) -> None:
    x = draw(1, 34, 7, 7)
    expected = _unit_output(x)
    assert tuning._measured == {}
    count = sum(len(tiles().PRODUCT_TILES[name, False]) for name in ("pw1", "dw_pw2"))
    clock = Clock(fastest=1)
    tuning.autotune(timer=clock)
    assert max_error(_unit_output(x), expected) < 1e-6
    assert clock.launches == count
    _unit_output(x)
    assert clock.launches == count  # remembered
    _unit_output(draw(2, 34, 7, 7))
    assert clock.launches == 2 * count  # another shape

    (found,) = tuning._measured.values()
    assert len(found) == 4
    first = next(key for key in found if key.startswith("pw1"))
    assert found[first] == tiles().PRODUCT_TILES["pw1", False][0]
    tuning.autotune(False)
    _unit_output(draw(3, 34, 7, 7))
    assert clock.launches == 2 * count

    before = dict(found)
    tuning.save_tiles(tmp_path / "tiles.json")
    found.clear()
    tuning.load_tiles(tmp_path / "tiles.json")
    assert tuning._measured == {x.device.type: before} or x.is_cuda
    tuning.autotune(timer=clock)
    _unit_output(x)
    assert clock.launches == 2 * count  # what was loaded is not measured again


def test_measured_tiles_of_maps(tuning: Any) -> None:
    a, b = draw(2, 64, 5, 7), draw(2, 64, 5, 7, seed=1)
    expected = snv2.ops.cat_shuffle(a, b, backend="reference")
    tuning.autotune(timer=Clock(fastest=2))
    assert torch.equal(snv2.ops.cat_shuffle(a, b, backend="triton"), expected)
    ((key, tile),) = next(iter(tuning._measured.values())).items()
    assert key.startswith("cat_shuffle_kernel ")
    assert tile == tiles().map_tiles(128, 35, 1, 4, False)[1]


def test_use_tile_goes_before_what_was_measured(tuning: Any, triton: Any) -> None:
    clock = Clock(fastest=1)
    tuning.autotune(timer=clock)
    with triton.use_tile(triton.ProductTile(32, 64, 32, 4)):
        _unit_output(draw(1, 34, 7, 7))
    assert clock.launches == 0


@pytest.mark.parametrize(
    "content",
    [
        "tiles", "[]", '{"cpu": 3}', '{"cpu": {"pw1 x": {"rows": 64}}}',
        '{"cpu": {"pw1 x": {"rows": 48, "pixels": 64, "depth": 16, "warps": 4}}}',
        '{"cpu": {"pw1 x": {"rows": 8, "pixels": 64, "depth": 16, "warps": 4}}}',
        '{"cpu": {"pw1 x": {"pixels": 64, "channels": 16, "warps": 4}}}',
        '{"cpu": {"cat_shuffle_kernel x": {"pixels": 64, "channels": 16, "warps": "4"}}}',
    ],
)  # fmt: skip
def test_file_that_has_no_tiles(tuning: Any, tmp_path: Path, content: str) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"path: .*tiles\.json is not a file of tiles: "):
        tuning.load_tiles(path)
    assert tuning._measured == {}
    with pytest.raises(FileNotFoundError):
        tuning.load_tiles(tmp_path / "absent.json")


def test_variables_of_the_environment(
    tuning: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiles.json"
    path.write_text('{"cpu": {"pw1 x": {"rows": 64, "pixels": 64, "depth": 16, "warps": 4}}}')
    tuning._obey_environment()
    assert tuning._timer is None
    assert tuning._measured == {}
    monkeypatch.setenv("SNV2_TRITON_AUTOTUNE", "1")
    monkeypatch.setenv("SNV2_TRITON_TILES", str(path))
    tuning._obey_environment()
    assert tuning._timer is tuning._milliseconds
    assert tuning._measured == {"cpu": {"pw1 x": tiles().ProductTile(64, 64, 16, 4)}}


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


def _check_usage(configurations: list[Any]) -> None:
    for c in configurations:
        assert c["shared"] <= SHARED_BYTES, c
        assert set(c["spilled"].values()) == {0}, c
        assert c["stored"], c


@pytest.mark.slow
@pytest.mark.ci
def test_kernels_compile_and_do_not_spill() -> None:
    """For sm_80 and sm_90 by Triton's own ptxas, and for AMD's gfx942."""
    configurations = _compiler("quick")
    _check_usage(configurations)
    for target, count in (("sm_90", len(KERNELS)), ("sm_80", 5), ("gfx942", 5)):
        names = {c["kernel"] for c in configurations if c["target"] == target}
        assert len(names) == count


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_configuration_compiles_and_does_not_spill(kernel: str) -> None:
    configurations = _compiler("all", kernel)
    _check_usage(configurations)
    assert len(configurations) >= 3 * 3  # targets, dtypes


def test_torch_compile_sees_the_kernels() -> None:
    """Each op is its memory and its kernels, which write nothing else."""
    graphs = _compiler("trace")
    for names, kernels in zip(graphs, (1, 1, 1, 1, 2, 2, 2 * 4 + 3), strict=True):
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
