"""Makes the folder that ``gpu_batch.py`` runs in where there is a GPU and nothing can be fetched.

    python benchmarks/gpu_folder.py --out out/gpu-folder

It holds this checkout, the libraries built for one architecture of GPUs, Python 3.12 and the
oldest PyTorch that they run with, and in ``site`` the pure Python packages and the few others that
tests and measurements need: the machine brings Python, PyTorch, numpy and the driver. Nothing is
installed there:

    cd gpu-folder && python3 benchmarks/gpu_batch.py
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nanobind

import snv2_kernels

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "cmake"), str(ROOT / "tools")]
import cuda_toolkit  # noqa: E402
import oldest_torch  # noqa: E402

BUILD = ROOT / "build" / "gpu-folder"
LARGEST = 60 << 20  # bytes
PACKAGES = ("click", "rich", "psutil")
PACKAGES += ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "expecttest")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def _pip(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", *map(str, arguments), "-qq"], check=True)


def _tool(name: str) -> str:
    """Path of a program of this environment, or of PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        sys.exit(f"{name} is not installed")
    return found


def build(out: Path, architecture: str) -> None:
    """Builds all libraries into a copy of the checkout."""
    torch = BUILD / "torch"
    if not torch.is_dir():
        # Only the names of torch's libraries matter to the linker.
        spec = importlib.util.find_spec("torch")
        assert spec
        assert spec.submodule_search_locations
        torch.mkdir(parents=True)
        (torch / "include").symlink_to(oldest_torch.torch_headers() / "include")
        (torch / "lib").symlink_to(Path(spec.submodule_search_locations[0]) / "lib")
    configure = [
        _tool("cmake"), "-S", ROOT, "-B", BUILD / "cmake", "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        "-DSNV2_PYTHON=ON", "-DSNV2_EMULATOR=ON", "-DSNV2_TESTS=OFF", "-DSNV2_CUDA=ON",
        f"-DSNV2_CUDA_ARCHITECTURES={architecture}",
        f"-DSNV2_NVCC={cuda_toolkit.find_toolkit().nvcc}",
        f"-DSNV2_TORCH_DIR={torch}",
        f"-DPython_EXECUTABLE={oldest_torch.python()}",
        f"-Dnanobind_DIR={nanobind.cmake_dir()}",
        f"-DCMAKE_INSTALL_PREFIX={out}",
    ]  # fmt: skip
    subprocess.run([*map(str, configure)], check=True)
    # By itself nvcc leaves most machine code as it is, some 30 MiB more.
    small = os.environ | {"NVCC_APPEND_FLAGS": "--compress-mode=size"}
    subprocess.run([_tool("cmake"), "--build", BUILD / "cmake"], check=True, env=small)
    subprocess.run([_tool("cmake"), "--install", BUILD / "cmake", "--strip"], check=True)


def copy_checkout(out: Path) -> None:
    """Copies what git knows or would add; COMMIT says which commit that is."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, out / name
        if source.is_file():  # it may be deleted and not yet committed
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    described = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (out / "COMMIT").write_text(described.stdout)


def write_entry_points(out: Path) -> None:
    """Names the package and its entry points as an installation would."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = out / f"{project['name']}-{snv2_kernels.__version__}.dist-info"
    info.mkdir()
    header = (
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {snv2_kernels.__version__}\n"
    )
    (info / "METADATA").write_text(header)
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def unpack_packages(site: Path) -> None:
    """Unpacks each package and what it needs into a folder of its name."""
    wheels = BUILD / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    abis = ("cp312", "abi3", "none")
    _pip(
        "download", "--dest", wheels, "--only-binary=:all:", "--implementation", "cp",
        "--python-version", oldest_torch.PYTHON, *(f"--platform={name}" for name in PLATFORMS),
        *(f"--abi={name}" for name in abis), *PACKAGES,
    )  # fmt: skip
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(site / wheel.name.partition("-")[0].replace("_", "-").lower())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="out/gpu-folder", type=Path)
    parser.add_argument("--architecture", default="90", help="compute capability, e.g. 90")
    asked = parser.parse_args()
    out: Path = asked.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    try:
        copy_checkout(out)
        build(out, asked.architecture)
    except (cuda_toolkit.ToolkitError, oldest_torch.Missing) as missing:
        sys.exit(f"gpu-folder: {missing}")
    write_entry_points(out)
    unpack_packages(out / "site")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{os.path.relpath(out)}: {size / (1 << 20):.1f} MiB")
    if size > LARGEST:
        sys.exit(f"gpu-folder: larger than {LARGEST >> 20} MiB")


if __name__ == "__main__":
    main()
