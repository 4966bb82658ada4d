"""Networks as files: what Program, C and the command line make of them is what Engine does."""

from __future__ import annotations

import ctypes
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _cases import DTYPES, draw, plain_and_input, small_network
from conftest import instruction_set, needs_emulator
from torch import Tensor, nn

import snv2_kernels as snv2
from snv2_kernels import _native, models
from snv2_kernels.ops import KERNEL_DTYPES
from snv2_kernels.program import TARGETS
from snv2_kernels.testing import randomize_

SHAPE = (2, 3, 37, 45)
NORMALIZATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = [f"bär {i}" for i in range(10)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network with everything that a file can have."""
    path = tmp_path_factory.mktemp("programs") / "net.snv2"
    snv2.save_program(
        small_network(), path, SHAPE, targets=TARGETS, dtypes=KERNEL_DTYPES,
        normalize=NORMALIZATION, classes=CLASSES, about={"by": "tests"},
    )  # fmt: skip
    return path


def photograph(n: int, h: int, w: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, h, w, 3), generator=generator).to(torch.uint8)


# What it computes -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "backend", ["cpu", "cpu-portable", pytest.param("cuda-emulated", marks=needs_emulator)]
)
def test_equals_the_engine(path: Path, backend: str, dtype: torch.dtype) -> None:
    name, _, isa = backend.partition("-p")
    with instruction_set("portable" if isa else _native.cpu_isa()), snv2.use_backend(name):
        program = snv2.Program(path, dtype=dtype)
        for shape in (SHAPE, (1, 3, 64, 33), (0, 3, 9, 9)):
            x = draw(*shape, dtype=dtype)
            expected = snv2.Engine(small_network(), shape, dtype=dtype)(x)
            assert torch.equal(program(x), expected)
            assert torch.equal(program(x.to(memory_format=torch.channels_last)), expected)
        image = photograph(2, 37, 45)
        engine = snv2.Engine(small_network(), SHAPE, dtype=dtype, normalize=NORMALIZATION)
        assert torch.equal(program(image), engine(image))


class Maps(nn.Module):
    """A backbone of two units that returns the maps of both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = models.InvertedResidual(12, 20, 2)
        self.second = models.InvertedResidual(20, 20, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        return x, self.second(x)


def test_backbone_and_unit(tmp_path: Path) -> None:
    backbone = randomize_(Maps()).eval(), draw(2, 12, 9, 11)
    for plain, x in (backbone, plain_and_input("unit-s2")):
        model = snv2.fuse(plain)
        snv2.save_program(model, tmp_path / "net.snv2", tuple(x.shape))
        out, expected = snv2.Program(tmp_path / "net.snv2")(x), snv2.Engine(model, x.shape)(x)
        for a, b in zip(
            *(y if isinstance(y, tuple) else (y,) for y in (out, expected)), strict=True
        ):
            assert torch.equal(a, b)


def test_what_it_says_about_itself(path: Path) -> None:
    program = snv2.Program(path)
    assert program.input_shape == SHAPE
    assert program.classes == tuple(CLASSES)
    assert program.normalization == NORMALIZATION
    assert program.about["by"] == "tests"
    report = snv2.Engine(small_network(), (1, *SHAPE[1:])).report()
    assert program.about["units"] == report.units
    assert program.about["multiply_adds"] == report.multiply_adds
    assert set(program.plans) == {
        ("cpu", torch.float32), ("cpu", torch.bfloat16), *(("cuda", d) for d in KERNEL_DTYPES)
    }  # fmt: skip
    for words in ("ShuffleNetV2, ", "2 x 3 x 37 x 45", "cuda float16", "10, named"):
        assert words in str(program)


# In C -----------------------------------------------------------------------------------------


def test_c_interface(path: Path) -> None:
    library = ctypes.CDLL(str(next(Path(_native.__file__).parent.glob("libsnv2_cpu.*"))))
    i64, pointer = ctypes.c_int64, ctypes.c_void_p
    library.snv2_load.restype = pointer
    library.snv2_load.argtypes = [ctypes.c_char_p, ctypes.c_int]
    for name in ("snv2_run", "snv2_run_images"):
        getattr(library, name).argtypes = [pointer, pointer, i64, i64, i64, pointer]
    library.snv2_class_name.restype = library.snv2_error.restype = ctypes.c_char_p
    library.snv2_class_name.argtypes = [pointer, ctypes.c_size_t]
    library.snv2_destroy.argtypes = [pointer]

    network = library.snv2_load(bytes(path), 2)
    assert network, library.snv2_error()
    program = snv2.Program(path)
    x, image = draw(*SHAPE), photograph(2, 37, 45)
    for run, given in ((library.snv2_run, x), (library.snv2_run_images, image)):
        scores = torch.full((2, 10), torch.nan)
        assert run(network, given.data_ptr(), 2, 37, 45, scores.data_ptr()) == 0
        assert torch.equal(scores, program(given))
    assert library.snv2_class_name(network, 3).decode() == CLASSES[3]
    assert library.snv2_run(network, x.data_ptr(), 2, 37, 0, scores.data_ptr()) == 1
    assert library.snv2_error().startswith(b"x: expected [N, 3, H, W]")
    library.snv2_destroy(network)
    assert library.snv2_load(b"no such file", 1) is None
    assert library.snv2_error() == b"no such file: No such file or directory"


# Refused --------------------------------------------------------------------------------------


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    tail: Any = small_network()
    tail.fc = nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 3))
    other = nn.Sequential(nn.Conv2d(3, 3, 1))
    for model, error, message in (
        (tail.eval(), ValueError, "model: cannot run fused: fc follows the network"),
        (other.eval(), TypeError, "model: Sequential is not a network, stage or unit as a whole"),
        (small_network().train(), ValueError, r"model: expected eval\(\) mode"),
    ):
        with pytest.raises(error, match=message):
            snv2.save_program(model, tmp_path / "net.snv2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ("cpu", "tpu")}, "targets: expected names among cpu, cuda, got"),
        ({"dtypes": (torch.float64,)}, "dtypes: expected float32, float16 or bfloat16, got"),
        ({"input_shape": (1, 4, 9, 9)}, "input_shape: expected"),
        ({"input_shape": (1, 3, 9, 1 << 25)}, "model: no program can hold it: shape of its input"),
        ({"normalize": ((0, 0), (1, 1))}, "normalize: expected"),
        ({"normalize": ((0, 0, 0), (1, 1, 1e-310))}, "normalization: expected finite"),
        ({"classes": ["one"]}, "classes: expected a name for each of 10, got 1"),
        ({"classes": ["two\nlines"] * 10}, "classes: expected names of one line"),
        ({"about": {"x": float("nan")}}, "about: expected a mapping that JSON can hold"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    """The file that was there stays, and nothing lies beside it."""
    path = tmp_path / "net.snv2"
    path.write_text("before")
    with pytest.raises((TypeError, ValueError), match=message):
        snv2.save_program(small_network(), path, **{"input_shape": SHAPE, **arguments})
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (draw(1, 4, 9, 9), "x: expected 3 channels"),
        (torch.zeros(1, 3, 9, 9, dtype=torch.uint8), r"x: expected bytes \[N, H, W, 3\]"),
        (np.zeros(3), r"x: expected a torch.Tensor, got ndarray"),
        (draw(1, 3, 9, 9).double(), "x: expected dense float32, float16 or bfloat16, got"),
        (draw(1, 3, 9, 9).requires_grad_(), "x: requires a gradient"),
    ],
    ids=["channels", "bytes", "type", "dtype", "gradient"],
)
def test_inputs_that_do_not_fit(path: Path, x: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        snv2.Program(path)(x)


@needs_emulator
def test_plans_that_are_missing(tmp_path: Path) -> None:
    snv2.save_program(small_network(), tmp_path / "net.snv2", SHAPE)
    program = snv2.Program(tmp_path / "net.snv2")
    with (
        snv2.use_backend("cuda-emulated"),
        pytest.raises(RuntimeError, match="no plan for float32"),
    ):
        program(draw(*SHAPE))
    with pytest.raises(TypeError, match="no normalization, so it takes no bytes"):
        program(photograph(1, 9, 9))


def test_damaged_files(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()

    def complaint(data: bytes) -> str:
        (tmp_path / "net.snv2").write_bytes(data)
        with pytest.raises(ValueError, match="path: ") as error:
            snv2.Program(tmp_path / "net.snv2")
        return str(error.value)

    assert f"truncated: {len(whole) - 9} bytes of {len(whole)}" in complaint(whole[:-9])
    assert "not a program of snv2_kernels" in complaint(b"PK" + whole)
    assert "checksum" in complaint(whole[:-1] + bytes([whole[-1] ^ 1]))
    newer = whole[:12] + struct.pack("<I", 2) + whole[16:]
    assert "of format 2; this library reads format 1: update it" in complaint(newer)

    # The first section is the JSON.
    offset, size = struct.unpack_from("<QQ", whole, 64 + 8)
    other = b"[" * size
    entry = struct.pack("<I", zlib.crc32(other))
    data = whole[: 64 + 24] + entry + whole[64 + 28 : offset] + other + whole[offset + size :]
    (sections,) = struct.unpack_from("<I", data, 24)
    head = data[:28] + bytes(4) + data[32 : 64 + 32 * sections]
    data = data[:28] + struct.pack("<I", zlib.crc32(head)) + data[32:]
    assert "not JSON" in complaint(data)
    with pytest.raises(FileNotFoundError):
        snv2.Program(tmp_path / "none")


class ScoresFirst(nn.Module):
    """Returns what its network makes last before the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_network()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        net = self.network
        x = net.stage4(net.stage3(net.stage2(net.maxpool(net.conv1(x)))))
        return net.fc(net.conv5(x).mean([2, 3])), x


def test_results_in_another_order_are_refused(tmp_path: Path) -> None:
    """Whoever unpacks them would take one for the other."""
    with pytest.raises(ValueError, match=r"model: it returns .* in another order"):
        snv2.save_program(ScoresFirst().eval(), tmp_path / "net.snv2")


def test_files_are_left_as_they_are(path: Path, tmp_path: Path) -> None:
    """A private file stays private, a descriptor open, and a copy of a program runs."""
    net = tmp_path / "net.snv2"
    snv2.save_program(small_network(), net)
    net.chmod(0o600)
    snv2.save_program(small_network(), net)
    assert net.stat().st_mode & 0o777 == 0o600
    with open(path, "rb") as file:
        with pytest.raises(TypeError):
            snv2.Program(file.fileno())  # type: ignore[arg-type]
        assert file.read(4) == b"\x89SNV"
    program = snv2.Program(net)
    x = draw(1, 3, 64, 64)
    assert torch.equal(pickle.loads(pickle.dumps(program))(x), program(x))
    with pytest.raises(FileNotFoundError, match=r"missing/net\.snv2'"):
        snv2.save_program(small_network(), tmp_path / "missing" / "net.snv2")
