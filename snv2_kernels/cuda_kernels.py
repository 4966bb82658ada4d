"""What the compiled CUDA kernels use, and how many of their CTAs a GPU keeps in flight.

The build writes ``cuda_kernels.json`` beside the library: what ptxas reported of each kernel on
each architecture. Nothing here needs a GPU, or PyTorch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from snv2_kernels.libraries import FOLDER

__all__ = ["LIMITS", "Build", "Kernel", "Limits", "Occupancy", "occupancy", "read_build", "targets"]

TABLE = FOLDER / "cuda_kernels.json"

_WARP = 32
_MAX_THREADS = 1024  # of a CTA
_MAX_REGISTERS = 255  # of a thread
_REGISTERS = 64 * 1024  # of an SM, and what one CTA may have of them
_REGISTER_UNIT = 256  # registers are given to a warp in units of this
_PARTITIONS = 4  # of an SM, each with its share of the registers
_KIB = 1024


@dataclass(frozen=True)
class Kernel:
    """What one kernel uses on one architecture. Memory is in bytes; stack and spills are of each
    thread, and include those of functions that were not inlined."""

    kernel: str
    source: str
    arch: str
    registers: int
    shared: int  # static only
    stack: int
    spill_stores: int
    spill_loads: int
    barriers: int
    constant: int
    max_threads: int | None  # of a CTA, from the kernel's launch bounds
    min_ctas: int | None  # of an SM, likewise


@dataclass(frozen=True)
class Build:
    """How the library was built. ``targets`` has ``sm_80`` for machine code of that architecture
    and ``compute_80`` for PTX."""

    nvcc: str
    targets: tuple[str, ...]
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class Limits:
    """What an SM has; shared memory in bytes. From "Compute Capabilities" in NVIDIA's CUDA
    programming guide, the units of allocation from the toolkit's ``cuda_occupancy.h``."""

    warps: int
    ctas: int
    barriers: int | None  # None where only the number of CTAs limits them
    shared: int
    shared_per_cta: int  # the most that a CTA can ask for
    shared_reserved: int  # taken by the system for each CTA
    shared_unit: int


LIMITS = {
    "75": Limits(32, 16, None, 64 * _KIB, 64 * _KIB, 0, 256),
    "80": Limits(64, 32, None, 164 * _KIB, 163 * _KIB, _KIB, 128),
    "86": Limits(48, 16, None, 100 * _KIB, 99 * _KIB, _KIB, 128),
    "89": Limits(48, 24, None, 100 * _KIB, 99 * _KIB, _KIB, 128),
    "90": Limits(64, 32, 64, 228 * _KIB, 227 * _KIB, _KIB, 128),
    "100": Limits(64, 32, 64, 228 * _KIB, 227 * _KIB, _KIB, 128),
    "120": Limits(48, 24, 24, 100 * _KIB, 99 * _KIB, _KIB, 128),
}


@dataclass(frozen=True)
class Occupancy:
    """CTAs that run on one SM at once, their warps, and the warps that an SM has room for."""

    ctas: int
    warps: int
    max_warps: int


def read_build(table: Path = TABLE) -> Build | None:
    """The build of the installed CUDA library; None if it was not built."""
    if not table.is_file():
        return None
    content = json.loads(table.read_text())
    kernels = tuple(Kernel(**kernel) for kernel in content["kernels"])
    return Build(content["nvcc"], tuple(content["targets"]), kernels)


def targets() -> tuple[str, ...]:
    """What the installed CUDA library was built for, e.g. ``("sm_80", "sm_90", "compute_90")``;
    empty if it was not built."""
    build = read_build()
    return build.targets if build else ()


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def occupancy(
    arch: str, *, registers: int, threads: int, shared: int, barriers: int = 1
) -> Occupancy:
    """Occupancy of an SM by one kernel.

    Args:
        arch: e.g. ``"sm_90"`` or ``"sm_90a"``.
        registers: of a thread.
        threads: of a CTA.
        shared: bytes of shared memory of a CTA, static and dynamic. The SM is taken to give shared
            memory all that it can.
        barriers: of a CTA, for all of its threads or some.

    Raises:
        ValueError: if the limits of ``arch`` are not known, or ``threads`` is not positive.
    """
    limits = LIMITS.get(arch.removeprefix("sm_").rstrip("af"))
    if limits is None:
        known = ", ".join(f"sm_{name}" for name in LIMITS)
        raise ValueError(f"arch: expected one of {known}, got {arch!r}")
    if threads < 1:
        raise ValueError(f"threads: expected a positive number, got {threads}")
    warps = -(-threads // _WARP)
    bounds = [limits.ctas, limits.warps // warps]
    if barriers and limits.barriers is not None:
        bounds.append(limits.barriers // barriers)
    per_warp = _round_up(registers * _WARP, _REGISTER_UNIT)
    if per_warp:
        bounds.append(_REGISTERS // _PARTITIONS // per_warp * _PARTITIONS // warps)
    allocated = _round_up(shared + limits.shared_reserved, limits.shared_unit)
    if allocated:
        bounds.append(limits.shared // allocated)

    # A launch is refused as if each of its warps took registers in all partitions.
    refused = (
        threads > _MAX_THREADS
        or registers > _MAX_REGISTERS
        or per_warp * _round_up(warps, _PARTITIONS) > _REGISTERS
        or shared > limits.shared_per_cta
    )
    ctas = 0 if refused else min(bounds)
    return Occupancy(ctas, ctas * warps, limits.warps)
