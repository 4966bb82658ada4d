"""The build of the CUDA library: whether to, with what, and what came of it."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from _cli import run

from snv2_kernels import cuda_kernels
from snv2_kernels.cuda_kernels import Build, Kernel, Occupancy, occupancy
from snv2_kernels.libraries import library

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = library("cuda")


def _load(name: str) -> types.ModuleType:
    path = ROOT / "cmake" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


cuda_toolkit = _load("cuda_toolkit")
kernel_report = _load("kernel_report")

# The library ----------------------------------------------------------------------------------


@pytest.fixture
def build() -> Build:
    found = cuda_kernels.read_build()
    if found is None or not LIBRARY.is_file():
        pytest.skip("the CUDA library was not built: make cuda")
    return found


def test_every_source_has_its_kernels_on_every_architecture(build: Build) -> None:
    machine_code = {target for target in build.targets if target.startswith("sm_")}
    assert "sm_90" in machine_code
    assert sum(target.startswith("compute_") for target in build.targets) == 1
    assert re.fullmatch(r"\d+\.\d+\.\d+", build.nvcc)
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert {kernel.source for kernel in build.kernels} == sources
    for source in sources:
        names = [
            sorted(k.kernel for k in build.kernels if k.source == source and k.arch == arch)
            for arch in machine_code
        ]
        assert names[0]
        assert all(other == names[0] for other in names)
    for kernel in build.kernels:
        assert 0 < kernel.registers <= 255


def test_how_many_kernels_a_unit_has(build: Build) -> None:
    """Each takes nvcc seconds: three dtypes, two strides, three places of weights, and two ends of
    whole units or the two products that pieces may lack; gates have clusters or not."""
    expected = {"unit.cu": 36, "unit_any.cu": 36, "unit_piece.cu": 36, "gate.cu": 6, "copy.cu": 3}
    counts = {
        name: sum(k.source == f"csrc/cuda/{name}" and k.arch == "sm_90" for k in build.kernels)
        for name in expected
    }
    assert counts == expected


def test_no_kernel_spills(build: Build) -> None:
    spilled = [
        f"{k.kernel} on {k.arch}: {k.spill_stores} bytes stored, {k.spill_loads} loaded"
        for k in build.kernels
        if k.arch in ("sm_80", "sm_90") and (k.spill_stores or k.spill_loads)
    ]
    assert not spilled


def _stable_functions() -> set[str]:
    """What torch's stable C headers declare, whether or not this torch has CUDA."""
    include = Path(torch.__file__).parent / "include/torch/csrc"
    headers = [include / "stable/c/shim.h", *include.glob("inductor/aoti_torch/c/shim*.h")]
    text = "".join(header.read_text() for header in headers)
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))


def test_library_takes_nothing_from_torch_but_its_stable_functions(build: Build) -> None:
    elffile = pytest.importorskip("elftools.elf.elffile")
    declared = _stable_functions()
    assert "aoti_torch_get_current_cuda_stream" in declared
    with LIBRARY.open("rb") as file:
        elf = elffile.ELFFile(file)
        symbols = elf.get_section_by_name(".dynsym")
        versions = elf.get_section_by_name(".gnu.version")
        needed = elf.get_section_by_name(".gnu.version_r")
        taken = set()
        for i, symbol in enumerate(symbols.iter_symbols()):
            if symbol["st_shndx"] != "SHN_UNDEF" or symbol["st_info"]["bind"] == "STB_WEAK":
                continue
            version = versions.get_symbol(i)["ndx"]
            if isinstance(version, int):  # libc, libstdc++ and the like version their symbols
                assert needed.get_version(version) is not None
            elif symbol.name:
                taken.add(symbol.name)
        libraries = {
            tag.needed
            for tag in elf.get_section_by_name(".dynamic").iter_tags()
            if tag.entry.d_tag == "DT_NEEDED"
        }
        exported = {
            symbol.name
            for symbol in symbols.iter_symbols()
            if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["type"] == "STT_FUNC"
        }
    assert taken
    assert not taken - declared
    # A torch with CUDA loads libtorch_cuda with libtorch. CUDA's own runtime is inside.
    assert "libtorch.so" in libraries
    assert not {name for name in libraries if "cud" in name or "c10" in name}
    assert not {name for name in exported if name.startswith("cuda")}


# The report -----------------------------------------------------------------------------------

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN4snv24cuda3addEPf' for 'sm_80'
ptxas info    : Function properties for _ZN4snv24cuda3addEPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 256 bytes smem, 368 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 1.2 ms
ptxas warning : Registers are spilled to local memory in function '_Z5spillPf'
ptxas info    : Compiling entry function '_Z5spillPf' for 'sm_90a'
ptxas info    : Function properties for _Z6helperPf
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for _Z5spillPf
    320 bytes stack frame, 532 bytes spill stores, 560 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 336 bytes cumulative stack size
"""  # noqa: E501

PTX = """\
.target sm_90a
.visible .entry _ZN4snv24cuda3addEPf(
\t.param .u64 _ZN4snv24cuda3addEPf_param_0
)
.maxntid 32, 4, 1
.minnctapersm 2
{ .maxntid 7 }
.entry _Z5spillPf() { }
"""


def test_report_of_ptxas() -> None:
    (add, spill), rest = kernel_report.parse_ptxas(PTXAS)
    assert rest.splitlines() == [
        "ptxas warning : Registers are spilled to local memory in function '_Z5spillPf'"
    ]
    assert add == {
        "symbol": "_ZN4snv24cuda3addEPf", "arch": "sm_80", "registers": 10, "shared": 256,
        "stack": 0, "spill_stores": 0, "spill_loads": 0, "barriers": 1, "constant": 376,
    }  # fmt: skip
    assert spill == {
        "symbol": "_Z5spillPf", "arch": "sm_90a", "registers": 32, "shared": 0, "stack": 336,
        "spill_stores": 536, "spill_loads": 568, "barriers": 0, "constant": 0,
    }  # fmt: skip


def test_launch_bounds() -> None:
    assert kernel_report.parse_bounds(PTX) == {
        ("_ZN4snv24cuda3addEPf", "sm_90a"): (128, 2),
        ("_Z5spillPf", "sm_90a"): (None, None),
    }


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("add(float*)", "add"),
        ("void snv2::cuda::(anonymous namespace)::dw<__half, 2>(void (*)(int))", "dw<__half, 2>"),
        ("void f<(snv2::DType)1, true>(float (&) [3])", "f<(DType)1, true>"),
        ("extern_c_kernel", "extern_c_kernel"),
    ],
)
def test_short_name(demangled: str, short: str) -> None:
    assert kernel_report.short_name(demangled) == short


# Occupancy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_90a", "sm_100f"])
@pytest.mark.parametrize(
    ("threads", "ctas", "percent"), [(128, 12, 75), (320, 4, 62.5)]
)  # the example of the CUDA best practices guide, "Calculating Occupancy"
def test_occupancy_by_registers(arch: str, threads: int, ctas: int, percent: float) -> None:
    found = occupancy(arch, registers=37, threads=threads, shared=0)
    assert found.ctas == ctas
    assert 100 * found.warps / found.max_warps == percent


@pytest.mark.parametrize(
    ("arch", "warps", "ctas", "shared"),
    [
        ("sm_75", 32, 16, 64), ("sm_80", 64, 32, 163), ("sm_86", 48, 16, 99), ("sm_89", 48, 24, 99),
        ("sm_90", 64, 32, 227), ("sm_100", 64, 32, 227), ("sm_120", 48, 24, 99),
    ],
)  # fmt: skip
def test_occupancy_limits(arch: str, warps: int, ctas: int, shared: int) -> None:
    """Against the table of the CUDA programming guide."""
    assert occupancy(arch, registers=16, threads=32, shared=0).ctas == ctas
    full = Occupancy(warps // 8, warps, warps)
    assert occupancy(arch, registers=32, threads=256, shared=0) == full
    assert occupancy(arch, registers=32, threads=32, shared=shared * 1024).ctas == 1
    assert occupancy(arch, registers=32, threads=32, shared=shared * 1024 + 1).ctas == 0
    # What the system takes of shared memory counts once for each CTA.
    half = (shared - 1) // 2 * 1024
    assert occupancy(arch, registers=32, threads=32, shared=half).ctas == 2


@pytest.mark.parametrize(
    ("registers", "threads", "barriers", "ctas"),
    [
        (64, 1024, 1, 1), (65, 1024, 1, 0), (256, 32, 1, 0), (255, 256, 1, 1), (16, 1025, 1, 0),
        (32, 33, 1, 32), (32, 32, 16, 4), (0, 64, 0, 32),
    ],
)  # fmt: skip
def test_occupancy_at_the_edges(registers: int, threads: int, barriers: int, ctas: int) -> None:
    found = occupancy("sm_90", registers=registers, threads=threads, shared=0, barriers=barriers)
    assert found.ctas == ctas


def test_occupancy_of_what_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"arch: expected one of sm_75, .*, got 'sm_60'"):
        occupancy("sm_60", registers=1, threads=1, shared=0)
    with pytest.raises(ValueError, match="threads: expected a positive number, got 0"):
        occupancy("sm_80", registers=1, threads=0, shared=0)


# snv2 info --kernels --------------------------------------------------------------------------


def _kernel(name: str, arch: str, spills: int = 0, threads: int | None = 128) -> Kernel:
    return Kernel(name, "csrc/cuda/k.cu", arch, 37, 1024, 0, spills, spills, 1, 0, threads, None)


def test_info_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = (
        _kernel("clean<__half>", "sm_90"),
        _kernel("spilling", "sm_80", spills=8),
        _kernel("unbounded", "sm_80", threads=None),
        _kernel("tomorrow", "sm_999"),
    )
    build = Build("13.0.88", ("sm_80", "sm_90", "compute_90"), kernels)
    monkeypatch.setattr(cuda_kernels, "read_build", lambda: build)
    result = run("info", "--kernels")
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert "CUDA kernels for sm_80, sm_90, compute_90, compiled by nvcc 13.0.88" in text
    assert "with no dynamic shared memory" in text
    rows = {}
    for line in result.output.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells:
            rows[cells[0]] = cells[1:]
    assert rows == {
        "clean<__half>": ["sm_90", "37", "1024", "0", "128", "12", "48 of 64"],
        "spilling": ["sm_80", "37", "1024", "16", "128", "12", "48 of 64"],
        "unbounded": ["sm_80", "37", "1024", "0", "unknown", "unknown", "unknown"],
        "tomorrow": ["sm_999", "37", "1024", "0", "128", "unknown", "unknown"],
    }


def test_info_kernels_where_none_were_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cuda_kernels.read_build(tmp_path / "cuda_kernels.json") is None
    monkeypatch.setattr(cuda_kernels, "read_build", lambda: None)
    assert cuda_kernels.targets() == ()
    result = run("info", "--kernels")
    assert result.exit_code == 0
    assert result.output == "The CUDA kernels were not built: install again with SNV2_CUDA=1.\n"


# SNV2_CUDA ------------------------------------------------------------------------------------

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="CUDA is built on Linux only")


def _fake_torch(folder: Path, cuda: str | None) -> Path:
    torch_dir = folder / "torch"
    torch_dir.mkdir()
    (torch_dir / "version.py").write_text(
        f"from typing import Optional\n__all__ = ['cuda']\ncuda: Optional[str] = {cuda!r}\n"
    )
    return torch_dir


def _fake_toolkit(top: Path, *wheels: str) -> Path:
    """An nvcc that says where it is, a runtime, and of each of ``wheels`` the file looked for."""
    nvcc = top / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={top}/bin/..' >&2\n")
    nvcc.chmod(0o755)
    (top / "lib").mkdir()
    (top / "lib/libcudart_static.a").touch()
    for file, wheel in cuda_toolkit.WHEEL_FILES.items():
        if wheel in wheels:
            (top / file).parent.mkdir(parents=True, exist_ok=True)
            (top / file).touch()
    return nvcc


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for fakes, and no nvcc anywhere. Site-packages is ``site`` inside."""
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path/bin"))
    monkeypatch.setattr(cuda_toolkit, "site_packages", lambda: [tmp_path / "site"])
    monkeypatch.setattr(cuda_toolkit, "USUAL_NVCC", tmp_path / "usual/bin/nvcc")
    return tmp_path


@needs_linux
def test_no_nvcc(bare: Path) -> None:
    with pytest.raises(
        cuda_toolkit.ToolkitError, match=r"no nvcc(.|\n)*CUDA_HOME(.|\n)*pip install"
    ):
        cuda_toolkit.find_toolkit()
    nvcc = _fake_toolkit(bare / "path")
    toolkit = cuda_toolkit.find_toolkit()
    assert toolkit.nvcc == nvcc
    assert toolkit.cudart == bare / "path/lib/libcudart_static.a"


def test_where_there_is_no_linux(monkeypatch: pytest.MonkeyPatch, bare: Path) -> None:
    _fake_toolkit(bare / "path")
    monkeypatch.setattr(cuda_toolkit.sys, "platform", "darwin")
    with pytest.raises(cuda_toolkit.ToolkitError, match=r"on Linux only, this is darwin"):
        cuda_toolkit.find_toolkit()


@needs_linux
def test_which_nvcc_wins(monkeypatch: pytest.MonkeyPatch, bare: Path) -> None:
    def found() -> Path:
        return Path(cuda_toolkit.find_toolkit().nvcc)

    usual = _fake_toolkit(bare / "usual")
    assert found() == usual
    wheels = _fake_toolkit(bare / "site/nvidia/cu13", *cuda_toolkit.WHEEL_FILES.values())
    assert found() == wheels
    path = _fake_toolkit(bare / "path")
    assert found() == path
    monkeypatch.setenv("CUDA_HOME", str(bare / "no toolkit here"))
    assert found() == path
    home = _fake_toolkit(bare / "home")
    monkeypatch.setenv("CUDA_HOME", str(bare / "home"))
    assert found() == home
    monkeypatch.setenv("CUDACXX", str(usual))
    assert found() == usual


@needs_linux
def test_parts_that_are_missing(bare: Path) -> None:
    nvcc = _fake_toolkit(bare / "site/nvidia/cu13", "nvidia-nvvm", "nvidia-cuda-crt")
    with pytest.raises(cuda_toolkit.ToolkitError) as error:
        cuda_toolkit.find_toolkit()
    first, *rest = str(error.value).splitlines()
    assert first == f"{nvcc} lacks nvidia-cuda-cccl, nvidia-cuda-runtime."
    assert any("pip install" in line for line in rest)

    other = _fake_toolkit(bare / "path")
    (bare / "path/lib/libcudart_static.a").unlink()
    with pytest.raises(cuda_toolkit.ToolkitError, match=f"toolkit of {other} has no libcudart_st"):
        cuda_toolkit.find_toolkit()
    other.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(cuda_toolkit.ToolkitError, match=f"{other} does not run: .*status 3"):
        cuda_toolkit.find_toolkit()
    other.write_text("#!/bin/sh\necho hello >&2\n")
    with pytest.raises(cuda_toolkit.ToolkitError, match="expected a line with TOP=, got 'hello"):
        cuda_toolkit.find_toolkit()
