"""The ops' launches on Triton, compiled for a GPU that is not there with all that a launch finds
out of its arguments, and the instructions of their threads. Run by test_triton_instructions.py,
since a process decides once whether Triton interprets; prints a line of JSON for each argument.

    <op>[:2][:relu] <contiguous or channels_last> <stage>, joined by commas; :2 is stride 2
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

Shape = tuple[int, int, int, int]

# Maps of x1.0.
STAGES: dict[int, Shape] = {2: (8, 116, 28, 28), 3: (8, 232, 14, 14), 4: (16, 464, 7, 7)}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class NoGpu:
    """As much of a driver as the compiler and torch ask, of a device for each target."""

    def __init__(self, target: str = "sm_90") -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@dataclass
class Launch:
    """A kernel's binary, what its compiler printed, and how its programs run."""

    kernel: str
    binary: Any
    log: str
    programs: int
    arguments: dict[str, Any]

    @property
    def threads(self) -> int:
        count: int = self.programs * 32 * self.binary.metadata.num_warps
        return count

    @property
    def loops(self) -> int:
        """Returns how often its loops run; each kernel has at most one."""
        if "parts" in self.arguments:
            return -(-self.arguments["parts"] // self.arguments["BP"])
        return int(self.arguments.get("steps", 1))


_logs: dict[str, str] = {}  # by binary; one that is there is not compiled again


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            log = io.StringIO()
            with contextlib.redirect_stdout(log):
                binary = self.kernel.warmup(*args, grid=grid, **constants)
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
            name = self.kernel.fn.__name__
            self.launches.append(
                Launch(
                    name,
                    binary,
                    _logs.setdefault(binary.hash, log.getvalue()),
                    math.prod(grid),
                    arguments,
                )
            )

        return launch


def launches_of(
    name: str, stride: int, shape: Shape, order: torch.memory_format, dtype: torch.dtype,
    target: str = "sm_90", relu: bool = False,
) -> list[Launch]:  # fmt: skip
    """Returns those of an op on maps of a shape: that of its result without a stride, or of the
    gradient of its input."""
    from snv2_kernels.triton import backward, launches, ops

    triton.runtime.driver.set_active(NoGpu(target))
    recorded: list[Launch] = []
    for module in (launches, backward):
        vars(module)["wrapped"] = lambda kernel: _Recorder(kernel, recorded)
    n, c, h, w = shape

    def channels(count: int, stride: int = 1) -> torch.Tensor:
        extents = (h + stride - 1) // stride, (w + stride - 1) // stride
        return torch.empty(n, count, *extents, dtype=dtype, memory_format=order)

    if name == "cat_shuffle":
        ops.cat_shuffle(channels(c // 2), channels(c // 2))
    elif name == "cat_shuffle_backward":
        backward.cat_shuffle_backward(channels(c))
    else:
        k = c // 2 if name.startswith("split") else c
        parameters = torch.empty(k, 1, 3, 3), torch.empty(k), torch.empty(k)
        options = [stride, relu] if name.startswith("dw") else []
        maps = [channels(c, stride)] if name.endswith("backward") else []
        module = backward if maps else ops
        getattr(module, name)(*maps, channels(c), *parameters, *options)
    return recorded


# Instructions ---------------------------------------------------------------------------------


def _weighted(lines: list[tuple[str, str | None]], loops: int) -> int:
    """Returns the instructions, those from a label to a later jump to it as often as loops run.

    Args:
        lines: labels, each with None, and instructions, each with the label that it jumps to or "".
        loops: how often.
    """
    places = {label: i for i, (label, jump) in enumerate(lines) if jump is None}
    weights = [0 if jump is None else 1 for _, jump in lines]
    for i, (_, jump) in enumerate(lines):
        if jump and places.get(jump, i) < i:
            for k in range(places[jump], i + 1):
                weights[k] *= loops
    return sum(weights)


def ptx_instructions(launch: Launch) -> int:
    """Returns how many a thread executes that takes no branch but those of loops."""
    text = launch.binary.asm["ptx"]
    lines: list[tuple[str, str | None]] = []
    for line in text[text.index("{", text.index(".entry")) :].splitlines():
        if label := re.match(r"\s*(\$\w+):", line):
            lines.append((label[1], None))
        elif re.match(r"\s+(@!?%p\d+ )?[a-z][\w.:]*(\s.*)?;", line):
            jump = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)
            lines.append((line, jump[1] if jump else ""))
    return _weighted(lines, launch.loops)


def sass_instructions(launch: Launch) -> int:
    """Returns as many of the machine."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(launch.binary.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(.*?);", text, re.MULTILINE)
    # Behind the end is a jump to itself, and nothing to a whole line of the cache.
    while re.match(r"NOP|BRA 0x0*" + found[-1][0].lstrip("0"), found[-1][1]):
        found.pop()
    lines: list[tuple[str, str | None]] = []
    for at, instruction in found:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        lines += [(at.lstrip("0"), None), (instruction, jump[1].lstrip("0") if jump else "")]
    return _weighted(lines, launch.loops)


def counted(op: str, order: str, stage: int) -> dict[str, Any]:
    """Returns instructions of threads for each element of the result, and each access's width."""
    name, *options = op.split(":")
    stride = 2 if "2" in options else 1
    n, c, h, w = STAGES[stage]
    format_ = getattr(torch, f"{order}_format" if order == "contiguous" else order)
    launches = launches_of(
        name, stride, STAGES[stage], format_, torch.float16, relu="relu" in options
    )
    if not name.endswith("backward"):
        h, w = (h - 1) // stride + 1, (w - 1) // stride + 1
    elements = n * c * h * w
    accesses = [
        {kind: sorted(set(re.findall(rf"\b{kind}\.global\.(\S+)", each.binary.asm["ptx"])))
         for kind in ("ld", "st")}
        for each in launches
    ]  # fmt: skip
    return {
        "name": f"{op} {order} {stage}",
        "kernels": [each.kernel for each in launches],
        "ptx": sum(ptx_instructions(each) * each.threads for each in launches) / elements,
        "sass": sum(sass_instructions(each) * each.threads for each in launches) / elements,
        "accesses": accesses,
        "shared": [each.binary.metadata.shared for each in launches],
    }


def _lines(names: list[str]) -> Iterator[dict[str, Any]]:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache
        for name in names:
            op, order, stage = name.split(",")
            yield counted(op, order, int(stage))


if __name__ == "__main__":
    for line in _lines(sys.argv[1:]):
        print(json.dumps(line), flush=True)
