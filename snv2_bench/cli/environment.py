"""The machine, the versions and the commit that a result belongs to."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

import snv2_kernels
from snv2_kernels import _native

__all__ = ["commit", "isa_note", "machine", "peer_versions", "versions"]

_ENGINES = (
    "onnxruntime", "onnx", "openvino", "nncf", "ncnn", "pnnx", "MNN", "ai-edge-litert",
    "litert-torch", "ai-edge-quantizer", "executorch", "torchao",
)  # fmt: skip


def _cpu_model() -> str:
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except (OSError, subprocess.CalledProcessError):
        pass  # the architecture has to do
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    # A container or taskset may leave this process fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _clock_mhz() -> float | None:
    """The clock of the cores now, None where the system does not tell."""
    try:
        clock = psutil.cpu_freq()
    except (OSError, RuntimeError, NotImplementedError):
        return None
    return clock.current if clock else None


def machine() -> dict[str, Any]:
    """The CPU, its cores, clock and memory, the operating system and the instruction sets of the
    kernels."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "usable_cores": _usable_cores(),
        "clock_mhz": _clock_mhz(),
        "memory_gb": psutil.virtual_memory().total / 1e9,
        "os": platform.platform(),
        "isa": _native.cpu_isa(),
        "available_isas": list(_native.available_cpu_isas()),
    }


def versions() -> dict[str, str]:
    """Versions of this package, PyTorch and Python."""
    return {
        "snv2_kernels": snv2_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def peer_versions() -> dict[str, str]:
    """Versions of the inference engines that are installed and of what converts for them."""
    found = {}
    for name in _ENGINES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of a checkout, "-dirty" added if tracked files differ, or of a copy that names
    it in the file COMMIT; None elsewhere."""
    root = Path(snv2_kernels.__file__).resolve().parents[1]
    if (root / "COMMIT").is_file():
        return (root / "COMMIT").read_text().strip()
    if not (root / ".git").exists():  # an installed copy may lie inside somebody else's checkout
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    command += ["--exclude=*"]  # the commit itself, never a tag
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def isa_note() -> str | None:
    """A sentence if SNV2_CPU_ISA names an instruction set this machine cannot run, else None."""
    asked = os.environ.get("SNV2_CPU_ISA")
    available = _native.available_cpu_isas()
    if asked is None or asked in available:
        return None
    return (
        f"SNV2_CPU_ISA={asked} is not available here (available: {', '.join(available)}); "
        f"{_native.cpu_isa()} is used"
    )
