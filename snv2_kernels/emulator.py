"""The GPU of the backend ``cuda-emulated``: its size, and the counts of what launches did.

A checkout builds it, for tests; wheels are without (``docs/emulator.md``).
"""

from __future__ import annotations

import torch

from snv2_kernels.gpu import current_device, device_values

__all__ = [
    "COUNTERS",
    "conformance_cases",
    "counters",
    "device",
    "latest_parameters",
    "reset_counters",
    "set_device",
]

# snv2::emulator::Counters.
COUNTERS = (
    "launches",
    "ctas",
    "global_load_bytes",
    "global_store_bytes",
    "global_load_sectors",
    "global_store_sectors",
    "minimum_load_bytes",
    "minimum_store_bytes",
    "shared_accesses",
    "shared_wavefronts",
    "bank_conflicts",
    "mma",
    "barriers",
    "shared_bytes",
)

_operators = torch.ops.snv2_emulated


def device() -> dict[str, int]:
    """Returns what the kernels of networks are cut to."""
    return current_device(torch.device("cpu"))


def set_device(**fields: int) -> None:
    """Changes some fields of the device.

    Raises:
        ValueError: naming a field that no device has, or a device that cannot be.
    """
    _operators.set_device(device_values(fields))


def counters() -> dict[str, int]:
    """Returns what launches of this thread did since they were reset."""
    return dict(zip(COUNTERS, _operators.counters(), strict=True))


def reset_counters() -> None:
    """Sets the counts of this thread to zero."""
    _operators.reset_counters()


def latest_parameters() -> list[tuple[int, bytes]]:
    """Returns threads of a CTA and kernel parameters of this thread's latest launches, in order."""
    lines = [line.split(" ") for line in _operators.latest_parameters().splitlines()]
    return [(int(threads), bytes.fromhex(parameters)) for threads, parameters in lines]


def conformance_cases() -> list[tuple[str, int, int]]:
    """Returns name, 32-bit words in and 32-bit words out of each case of the op ``conformance``."""
    names, words = _operators.conformance_cases()
    return list(zip(names.splitlines(), words[::2], words[1::2], strict=True))
