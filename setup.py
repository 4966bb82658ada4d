"""Drives CMake: all sources and flags are in CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "cmake"))
import cuda_toolkit  # noqa: E402

TORCH_REQUIREMENT = "torch==2.13.0"


def find_torch() -> Path:
    """Directory of the installed torch. Only its headers are needed, so it is not imported:
    pip's isolated build environment hides it, but not the place where it lies."""
    for name in ("purelib", "platlib"):
        torch = Path(sysconfig.get_paths()[name]) / "torch"
        if (torch / "include/torch/csrc/stable/library.h").is_file():
            return torch
    for entry in sys.path:
        torch = Path(entry or ".") / "torch"
        if (torch / "include/torch/csrc/stable/library.h").is_file():
            return torch
    raise SystemExit(
        "snv2_kernels: building needs PyTorch 2.11 or newer in the same environment.\n"
        f"  pip install '{TORCH_REQUIREMENT}'\n"
        "and run this again; with a build tool that uses an environment of its own, add\n"
        "  --no-build-isolation"
    )


def architecture_options() -> list[str]:
    wanted = os.environ.get("SNV2_CUDA_ARCHITECTURES")
    if not wanted:
        return ["-USNV2_CUDA_ARCHITECTURES"]  # the default, not what CMake remembers
    return [f"-DSNV2_CUDA_ARCHITECTURES={';'.join(cuda_toolkit.architectures(wanted))}"]


class CMakeBuild(build_ext):
    def run(self) -> None:
        torch = find_torch()
        toolkit, reason = cuda_toolkit.decide(os.environ.get("SNV2_CUDA", "auto"), torch)
        print(f"snv2_kernels: {'with' if toolkit else 'without'} CUDA kernels: {reason}")
        root = ROOT if self.editable_mode else Path(self.build_lib).resolve()
        package = root / "snv2_kernels"
        build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        import pybind11

        configure = [
            "cmake", "-S", ROOT, "-B", build, "-G", "Ninja",
            "-DSNV2_PYTHON=ON", "-DSNV2_EMULATOR=ON", "-DSNV2_TESTS=OFF",
            f"-DSNV2_TORCH_DIR={torch}",
            f"-DSNV2_CUDA={'ON' if toolkit else 'OFF'}",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={package}",
        ]  # fmt: skip
        if toolkit:
            configure += [f"-DSNV2_NVCC={toolkit.nvcc}", *architecture_options()]
        else:
            # What an earlier build left in a checkout belongs to other sources.
            for name in ("libsnv2_cuda.so", "cuda_kernels.json"):
                (package / name).unlink(missing_ok=True)
        subprocess.run([*map(str, configure)], check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True)

    def get_outputs(self) -> list[str]:
        return []


setup(
    ext_modules=[Extension("snv2_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
