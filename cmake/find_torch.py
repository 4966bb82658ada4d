"""Prints the directory of the torch that is installed beside the Python that runs this.

CMakeLists.txt asks it. Only headers and the names of libraries are needed, so torch is not
imported: pip's isolated builds hide it from ``sys.path``, but not the place where it lies.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

HEADER = "include/torch/csrc/stable/library.h"  # of the oldest torch that will do


def find_torch() -> Path | None:
    """Returns the directory of torch 2.11 or newer; None if there is none."""
    own = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    for folder in (*own, *sys.path):
        torch = Path(folder or ".") / "torch"
        if (torch / HEADER).is_file():
            return torch.resolve()
    return None


if __name__ == "__main__":
    found = find_torch()
    if found is None:
        sys.exit(
            f"building needs PyTorch 2.11 or newer beside {sys.executable}:\n"
            "  pip install torch\n"
            "and run this again; where the build has an environment of its own (uv, build), add\n"
            "  pip install scikit-build-core nanobind   and   --no-build-isolation"
        )
    print(found)
