"""Compiles the bindings against the oldest PyTorch that they are promised to run with.

``python tools/oldest_torch.py`` fetches that release's headers, once, and compiles each file of
``csrc/torch`` against them, and against the headers of Python 3.12 where one is installed. The
built libraries may take no other functions from PyTorch than those headers declare. What cannot
be had here is left out, in a line.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nanobind

from snv2_kernels.libraries import FOLDER

ROOT = Path(__file__).resolve().parents[1]
BINDINGS = ROOT / "csrc" / "torch"
CACHE = ROOT / "build" / "oldest-torch"
PYTHON = "3.12"
HEADERS = (
    "torch/csrc/stable/",
    "torch/csrc/inductor/aoti_torch/",
    "torch/headeronly/",
)
# Mangled names of the C++ library: where libtorch has copies of some, the linker takes those.
STD = re.compile(r"_Z[A-Z]{0,3}?S[tabsiod]")
# Files of the stable ABI; all others bind Python and see nothing of torch.
STABLE = ("ops.cpp", "emulated_ops.cpp", "ptx_ops.cpp", "cuda_ops.cpp")


class Missing(Exception):
    """Raised for what this machine lacks; the message says what and why."""


@functools.cache
def target() -> tuple[str, str]:
    """Returns TORCH_TARGET_VERSION of the build, and the release that it stands for, "2.11"."""
    found = re.search(r"TORCH_TARGET_VERSION=(0x\w+)", (BINDINGS / "CMakeLists.txt").read_text())
    assert found
    number = int(found[1], 16)
    return found[1], f"{number >> 56}.{number >> 48 & 0xFF}"


def torch_headers() -> Path:
    """Fetches the oldest torch's headers; returns a folder with ``include``, as an installed one.

    Raises:
        Missing: if pip cannot download it.
    """
    release = target()[1]
    folder = CACHE / release
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        # The same headers are in all wheels; the one for macOS brings no CUDA and is the smallest.
        command = [
            sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
            "--platform", "macosx_11_0_arm64", "--python-version", PYTHON, "--dest", scratch,
            f"torch=={release}.*",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or "pip download failed").splitlines()[-1]
            raise Missing(f"the headers of torch {release}: {reason}")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as file:
            wanted = tuple(f"torch/include/{part}" for part in HEADERS)
            file.extractall(scratch, [n for n in file.namelist() if n.startswith(wanted)])
        (Path(scratch) / "torch").rename(folder)
    return folder


def python() -> Path:
    """Finds a Python 3.12 with headers, on PATH or pyenv's.

    Raises:
        Missing: if there is none.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [
        shutil.which(f"python{PYTHON}"),
        *pyenv.glob(f"versions/{PYTHON}.*/bin/python{PYTHON}"),
    ]
    for program in filter(None, found):
        try:
            if (python_include(Path(program)) / "Python.h").is_file():
                return Path(program)
        except (OSError, subprocess.CalledProcessError):
            continue  # a stand-in of pyenv for a version that is not chosen
    raise Missing(f"Python {PYTHON} with its headers is not installed")


def python_include(program: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_paths()['include'])"
    done = subprocess.run([program, "-c", code], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def check_compile(source: Path, includes: list[Path]) -> str:
    """Complaints of the compiler about one file; empty if it compiles."""
    defines = [f"-DTORCH_TARGET_VERSION={target()[0]}", "-DUSE_CUDA"]
    limited = ["-DPy_LIMITED_API=0x030C0000"]  # as nanobind_add_module(STABLE_ABI) compiles it
    command = [
        os.environ.get("CXX", "c++"), "-std=c++17", "-fsyntax-only",
        *(defines if source.name in STABLE else limited), f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'csrc/include'}", *(f"-isystem{path}" for path in includes), str(source),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def declared_functions(headers: Path) -> set[str]:
    """Names of the stable C interface's functions, with and without CUDA."""
    include = headers / "include/torch/csrc"
    files = [include / "stable/c/shim.h", *include.glob("inductor/aoti_torch/**/shim*.h")]
    text = "".join(file.read_text() for file in files)
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))


def _symbols(library: Path, which: str) -> Iterator[str]:
    command = ["nm", "--dynamic", which, "--format=posix", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        name, kind, *_ = line.split()
        if kind not in "wv" and "@" not in name:  # libc and the like version theirs
            yield name


def undeclared(library: Path, headers: Path) -> set[str]:
    """Symbols of a library that neither our others, libstdc++ nor the headers declare."""
    ours = [path for path in library.parent.glob("libsnv2_*.so") if path != library]
    known = {name for other in ours for name in _symbols(other, "--defined-only")}
    taken = {*_symbols(library, "--undefined-only")} - known - declared_functions(headers)
    return {name for name in taken if not STD.match(name)}


def main() -> int:
    try:
        headers = torch_headers()
    except Missing as reason:
        print(f"left out: {reason}")
        return 0
    release = f"torch {headers.name}"
    includes = [headers / "include"]
    sources = [BINDINGS / name for name in STABLE]
    try:
        includes += [python_include(python()), Path(nanobind.include_dir())]
        sources = sorted(BINDINGS.glob("*.cpp"))
        release += f", Python {PYTHON}"
    except Missing as reason:
        print(f"left out: bindings of Python: {reason}")
    failed = False
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda source: check_compile(source, includes), sources)
        for source, complaint in zip(sources, compiled, strict=True):
            failed |= bool(complaint)
            print(f"{source.relative_to(ROOT)}: {complaint or f'compiles with {release}'}")
    for name in ("libsnv2_torch.so", "libsnv2_cuda.so"):
        library = FOLDER / name
        if not library.is_file():
            print(f"left out: {name}: not built")
            continue
        unknown = sorted(undeclared(library, headers))
        failed |= bool(unknown)
        print(f"{name}: {f'not in torch {headers.name}: {unknown}' if unknown else 'stable ABI'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
