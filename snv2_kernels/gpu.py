"""Planning of the CUDA kernels: what a device is, which memory and which launches a network takes.

The library of the kernels knows, that of a GPU or of the emulator, and no GPU is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from snv2_kernels.backends import EMULATED

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DEVICE_FIELDS", "current_device", "launches", "workspace_bytes"]

# snv2::Device, and its Tuning. clusters_4x2 are the clusters of 4 CTAs that run at once with two
# CTAs on an SM; 0 is not known.
DEVICE_FIELDS = (
    "sms",
    "shared_per_sm",
    "shared_per_cta",
    "reserved_per_cta",
    "l2_bytes",
    "cluster",
    "clusters_4x1",
    "clusters_4x2",
    "clusters_8x1",
    "clusters_8x2",
    "columns",
    "rows_per_cta",
    "weights",
    "images",
    "stages",
)
_SIZES = frozenset(DEVICE_FIELDS[:6])
_AT_ONCE = DEVICE_FIELDS[6:10]

# snv2::LaunchInfo, but for the kernel's name.
LAUNCH_NUMBERS = (
    "step",
    "ctas",
    "threads",
    "shared_bytes",
    "columns",
    "resident",
    "cluster",
    "launches",
    "read_bytes",
    "written_bytes",
    "weight_bytes",
    "multiply_adds",
    "instructions",
    "cycles",
)

Device = dict[str, int]


def current_device(device: torch.device) -> Device:
    """Returns what the CUDA kernels are cut to on a GPU; on the CPU, the emulator's device."""
    if device.type != "cuda":
        return _fields(torch.ops.snv2_emulated.gpu_device())
    with torch.cuda.device(device):
        return _fields(torch.ops.snv2.gpu_device())


def _fields(values: list[int]) -> Device:
    return dict(zip(DEVICE_FIELDS, values, strict=True))


def _planner() -> Any:
    return torch.ops.snv2_emulated if EMULATED else torch.ops.snv2


def device_values(device: Device | None) -> list[int]:
    """Returns a device as its operators take it. Fields that are not there are the current one's,
    but for how many clusters run at once, which only goes with the rest of a GPU.

    Raises:
        ValueError: naming a field that no device has.
    """
    if device is None:
        return []
    for name in device:
        if name not in DEVICE_FIELDS:
            raise ValueError(f"device: it has no {name!r}")
    if len(device) == len(DEVICE_FIELDS):
        return [device[name] for name in DEVICE_FIELDS]
    unknown = dict.fromkeys(_AT_ONCE, 0) if device.keys() & _SIZES else {}
    whole = _fields(_planner().gpu_device()) | unknown | device
    return [whole[name] for name in DEVICE_FIELDS]


def workspace_bytes(
    plan: Tensor, batch: int, height: int, width: int, device: Device | None = None
) -> int:
    """Returns the bytes of workspace that a plan takes on a device, by default the current one.

    Raises:
        ValueError: if ``plan`` is none, or the device cannot run it.
    """
    size: int = _planner().gpu_workspace_bytes(plan, batch, height, width, device_values(device))
    return size


def launches(
    plan: Tensor, batch: int, height: int, width: int, device: Device | None = None
) -> list[dict[str, Any]]:
    """Returns the launches that run a plan on a device: ``kernel``, and :data:`LAUNCH_NUMBERS`.

    Raises:
        ValueError: if ``plan`` is none, or the device cannot run it.
    """
    names, numbers = _planner().gpu_launches(plan, batch, height, width, device_values(device))
    rows = zip(*[iter(numbers)] * len(LAUNCH_NUMBERS), strict=True)
    found = [
        {"kernel": name, **dict(zip(LAUNCH_NUMBERS, row, strict=True))}
        for name, row in zip(names.splitlines(), rows, strict=True)
    ]
    for launch in found:
        launch["resident"] = bool(launch["resident"])
    return found
