"""Makes wheels fit for other machines: tagged for the oldest glibc that they run with, checked.

``python tools/finish_wheels.py BUILT DIST`` takes the wheels in ``BUILT``. On Linux auditwheel
reads which symbols they need and names them manylinux; elsewhere they are taken as they are.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

# PyTorch's are beside it, and its wheel says which glibc they need.
TORCH = ("libc10.so", "libtorch.so", "libtorch_cpu.so")
# Of tests, and for them.
UNWANTED = ("python_tests/", "csrc/", "emulated")
LARGEST = 8 << 20  # bytes, without CUDA kernels


def repair(wheel: Path, out: Path) -> None:
    """Writes a wheel, named for what it needs of a system, into ``out``."""
    if sys.platform != "linux":
        shutil.copy2(wheel, out)
        return
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, wheel]
    for name in TORCH:
        command += ["--exclude", name]
    subprocess.run([*map(str, command)], check=True)


def complaints(wheel: Path) -> list[str]:
    """Returns what is wrong with the contents of a wheel."""
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        unpacked = sum(info.file_size for info in file.infolist())
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 1e6:.2f} MB, unpacked {unpacked / 1e6:.1f} MB")
    wrong = [f"{name} is in it" for name in names for part in UNWANTED if part in name]
    wanted = ("snv2_kernels/py.typed", "snv2_bench/cli/report.html.j2", "snv2_kernels/libsnv2_cpu")
    wrong += [f"it has no {name}" for name in wanted if not any(n.startswith(name) for n in names)]
    if not any("cuda" in name and "libsnv2" in name for name in names) and size > LARGEST:
        wrong.append(f"it is larger than {LARGEST >> 20} MiB")
    return wrong


def main() -> int:
    built, out = map(Path, sys.argv[1:3])
    for wheel in built.glob("*.whl"):
        repair(wheel, out)
    wrong = [
        f"{wheel.name}: {complaint}"
        for wheel in sorted(out.glob("*.whl"))
        for complaint in complaints(wheel)
    ]
    for line in wrong:
        print(line)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
