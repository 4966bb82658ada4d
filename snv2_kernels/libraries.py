"""The compiled libraries of this package, which lie beside its extension module."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from snv2_kernels import _native

__all__ = ["FOLDER", "has_library", "library", "load_library"]

# An editable installation has them in site-packages, and Python's sources elsewhere.
FOLDER = Path(_native.__file__).parent

_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"


def library(name: str) -> Path:
    """Returns where the library of a short name ("torch") is, or would be."""
    return FOLDER / f"libsnv2_{name}{_SUFFIX}"


def has_library(name: str) -> bool:
    """Whether this package was built with a library."""
    return library(name).is_file()


def load_library(name: str) -> None:
    """Loads a library, which registers its PyTorch operators.

    Raises:
        OSError: if it does not load.
    """
    torch.ops.load_library(str(library(name)))
