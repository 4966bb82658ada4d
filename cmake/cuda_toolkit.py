"""Finds nvcc and the CUDA runtime beside it.

As a program it prints nvcc and cudart's static library, a line each, or says on standard error
what is missing and exits with 1. CMakeLists.txt and the Makefile ask it too, so that there is one
rule for where a toolkit is looked for.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

WHEELS = "nvidia/cu13"  # where NVIDIA's wheels unpack the toolkit in site-packages
# A file of each wheel that a compilation needs, beside nvcc's own.
WHEEL_FILES = {
    "include/cccl/nv/target": "nvidia-cuda-cccl",
    "include/crt/host_config.h": "nvidia-cuda-crt",
    "include/cuda_runtime.h": "nvidia-cuda-runtime",
    "nvvm/bin/cicc": "nvidia-nvvm",
}
USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")
HOW_TO_GET_NVCC = (
    "Install a CUDA toolkit and set CUDA_HOME or put its nvcc on PATH, or install NVIDIA's\n"
    "wheels of the compiler in the same environment:\n"
    "  pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' \\\n"
    "    'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-cccl==13.0.*'"
)


class ToolkitError(Exception):
    """There is no usable CUDA toolkit; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    cudart: Path  # libcudart_static.a


def site_packages() -> list[Path]:
    """The environment's own first: pip's isolated builds hide it from sys.path."""
    paths = sysconfig.get_paths()
    return list(
        dict.fromkeys(Path(p or ".") for p in (paths["purelib"], paths["platlib"], *sys.path))
    )


def find_nvcc() -> Path:
    """What the caller named in the environment, PATH, NVIDIA's wheels, the usual place."""
    candidates = []
    for name, below in (("CUDACXX", ""), ("CUDA_HOME", "bin/nvcc"), ("CUDA_PATH", "bin/nvcc")):
        if os.environ.get(name):
            candidates.append(Path(os.environ[name], below))
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    candidates += [site / WHEELS / "bin/nvcc" for site in site_packages()]
    candidates.append(USUAL_NVCC)
    for nvcc in candidates:
        if nvcc.is_file():
            return nvcc
    raise ToolkitError(f"no nvcc was found.\n{HOW_TO_GET_NVCC}")


def find_toolkit(nvcc: Path | None = None) -> Toolkit:
    """nvcc with the static runtime that belongs to it.

    Raises:
        ToolkitError: if there is no nvcc, or parts of its toolkit are missing.
    """
    if sys.platform != "linux":
        raise ToolkitError(f"CUDA kernels are built on Linux only, this is {sys.platform}")
    nvcc = nvcc or find_nvcc()
    # nvcc may be a link or a script; it says itself where its toolkit is.
    command = [str(nvcc), "--dryrun", "-E", "-x", "cu", "/dev/null"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    except (OSError, subprocess.CalledProcessError) as error:
        raise ToolkitError(f"{nvcc} does not run: {error}") from error
    found = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    if not found:
        raise ToolkitError(f"{nvcc} --dryrun: expected a line with TOP=, got {said!r}")
    top = Path(os.path.normpath(found[1]))
    if top.parts[-2:] == Path(WHEELS).parts:
        missing = [wheel for file, wheel in WHEEL_FILES.items() if not (top / file).is_file()]
        if missing:
            raise ToolkitError(f"{nvcc} lacks {', '.join(missing)}.\n{HOW_TO_GET_NVCC}")
    # nvcc from the wheels looks for libraries in lib64, but they are in lib.
    folders = [Path(f) for f in re.findall(r'"-L([^"]+)"', said)] + [top / "lib", top / "lib64"]
    folders.append(Path(f"/usr/lib/{platform.machine()}-linux-gnu"))  # Debian's packages
    for folder in folders:
        cudart = folder / "libcudart_static.a"
        if cudart.is_file():
            return Toolkit(nvcc.absolute(), Path(os.path.normpath(cudart)))
    searched = ", ".join(str(Path(os.path.normpath(f))) for f in folders)
    raise ToolkitError(
        f"the toolkit of {nvcc} has no libcudart_static.a (searched {searched}); "
        "the wheel that has it is nvidia-cuda-runtime"
    )


if __name__ == "__main__":
    try:
        usable = find_toolkit(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    except ToolkitError as error:
        sys.exit(str(error))
    print(usable.nvcc, usable.cudart, sep="\n")
