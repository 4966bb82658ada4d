"""Reads what ptxas made of the CUDA kernels: their loops, and the cycles of one warp in them.

``python benchmarks/sass.py unit "unit_kernel<half_t, 1"`` shows the innermost loops of the kernels
of unit.cu whose names contain that, in the installed CUDA library. It takes cuobjdump, of a CUDA
toolkit or of Triton's wheel, and no GPU.

The cycles are those of a model: a warp that is alone on its SM waits as long as ptxas wrote into
each instruction, and on a scoreboard as long as LATENCIES say of what sets it. Those are typical
figures from published microbenchmarks of recent GPUs; no other warp is in the way, no bank
conflicts, no branch is taken inside the loop. Ratios of two versions of a loop are worth more
than the cycles.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from snv2_kernels.libraries import library

ROOT = Path(__file__).parents[1]

# Cycles until a result is there that a scoreboard tells of. Others take DEFAULT.
LATENCIES = {
    "LDS": 30, "LDSM": 33, "STS": 20, "MUFU": 24, "I2F": 24, "F2I": 24, "SHFL": 25, "LDG": 450,
    "LDGSTS": 30, "STG": 30, "S2R": 25, "S2UR": 25, "LDC": 30, "ULDC": 15, "R2UR": 15, "HMMA": 33,
    "ST": 40, "BAR": 30,
}  # fmt: skip
DEFAULT = 20
OPERANDS_READ = 15  # cycles until an instruction has read its registers, at most
SCOREBOARDS = 6

_LINE = re.compile(r"\s*/\*([0-9a-f]{4,6})\*/\s+(.*?);\s*/\* 0x([0-9a-f]{16}) \*/")
_CONTROL = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")


@dataclass(frozen=True)
class Instruction:
    """One instruction, with what ptxas wrote about its schedule into its upper half."""

    address: int
    text: str
    stall: int  # cycles before the next one is issued
    sets: int | None  # scoreboard that is held until its result is there
    holds: int | None  # scoreboard that is held until its operands have been read
    waits: int  # mask of scoreboards

    @property
    def name(self) -> str:
        """The opcode with its modifiers: ``LDG.E.128``."""
        words = self.text.split()
        return words[1] if words[0].startswith("@") else words[0]

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    def waits_for(self, scoreboard: int) -> bool:
        return bool(self.waits >> scoreboard & 1)


def parse(listing: str) -> dict[str, list[Instruction]]:
    """Returns the instructions of each function, by mangled names, in what cuobjdump prints."""
    found: dict[str, list[Instruction]] = {}
    rows: list[Instruction] = []
    half: tuple[int, str] | None = None
    for line in listing.splitlines():
        if "Function :" in line:
            rows = found.setdefault(line.split("Function :")[1].strip(), [])
        elif first := _LINE.match(line):
            half = int(first[1], 16), first[2].strip()
        elif half and (second := _CONTROL.match(line)):
            control = int(second[1], 16) >> 41

            def field(at: int, control: int = control) -> int | None:
                value = control >> at & 7
                return value if value < SCOREBOARDS else None

            rows.append(Instruction(*half, control & 15, field(5), field(8), control >> 11 & 63))
            half = None
    return found


@dataclass(frozen=True)
class Loop:
    """The instructions from the target of a backward branch to that branch."""

    body: tuple[Instruction, ...]

    def count(self, *names: str) -> int:
        """Returns how many instructions begin with one of the names, each some whole words."""
        return sum(row.name.startswith(tuple(f"{name}." for name in names)) or row.name in names
                   for row in self.body)  # fmt: skip

    def cycles(self) -> int:
        """Returns the cycles of a turn of a warp that has been in the loop for some turns."""
        ready, now, turns = [0] * SCOREBOARDS, 0, [0, 0, 0]
        for turn in range(3):
            start = now
            for row in self.body:
                now = max([now, *(ready[k] for k in range(SCOREBOARDS) if row.waits_for(k))])
                latency = LATENCIES.get(row.opcode, DEFAULT)
                if row.sets is not None:
                    ready[row.sets] = max(ready[row.sets], now + latency)
                if row.holds is not None:
                    ready[row.holds] = max(ready[row.holds], now + min(latency, OPERANDS_READ))
                now += max(row.stall, 1)
            turns[turn] = now - start
        return turns[-1]

    def shortcuts(self) -> list[Loop]:
        """Returns the loop once for each branch forward inside it, as if that one were taken."""
        places = {row.address: i for i, row in enumerate(self.body)}
        found = []
        for i, row in enumerate(self.body):
            to = places.get(target_of(row) or -1, 0)
            if to > i:
                found.append(Loop(self.body[: i + 1] + self.body[to:]))
        return found

    def between(self, load: Instruction, opcode: str) -> int:
        """Returns how many of ``opcode`` are issued from a load to the first wait for it, at most
        those of a whole turn."""
        at = self.body.index(load)
        assert load.sets is not None
        issued = 0
        for row in (*self.body[at + 1 :], *self.body[: at + 1]):
            if row.waits_for(load.sets):
                break
            issued += row.opcode == opcode
        return issued


def target_of(row: Instruction) -> int | None:
    """Returns where a branch goes; None of what is none."""
    found = re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", row.text)
    return int(found[1], 16) if found else None


def loops_of(rows: list[Instruction], innermost: bool = True) -> list[Loop]:
    """Returns the loops of a function, by default those that contain no other."""
    places = {row.address: i for i, row in enumerate(rows)}
    spans = set()
    for i, row in enumerate(rows):
        target = target_of(row)
        if target is not None and target < row.address:
            spans.add((places[target], i + 1))
    inside = [
        (begin, end)
        for begin, end in spans
        if not innermost
        or not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans)
    ]
    return [Loop(tuple(rows[begin:end])) for begin, end in sorted(inside)]


def cuobjdump() -> Path | None:
    """Returns where cuobjdump is: PATH, a toolkit, or Triton's wheel; None if nowhere."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH")
               if os.environ.get(name)]  # fmt: skip
    folders += [Path("/usr/local/cuda/bin")]
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    on_path = shutil.which("cuobjdump")
    candidates = [Path(on_path)] if on_path else []
    candidates += [folder / "cuobjdump" for folder in folders]
    return next((path for path in candidates if path.is_file()), None)


@functools.cache
def _kernel_report() -> ModuleType:
    """The build's module that knows how kernels' names are shortened."""
    spec = importlib.util.spec_from_file_location("kernel_report", ROOT / "cmake/kernel_report.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def short_names(symbols: list[str]) -> list[str]:
    """Returns kernels' names as people write them, the same for PTX that is interpreted."""
    report = _kernel_report()
    names = [report.short_name(name) for name in report.demangle(symbols)]
    return [name.replace("interpreted::", "") for name in names]


@functools.cache
def kernels(library: Path, source: str, arch: str = "sm_90") -> dict[str, list[Instruction]]:
    """Returns the instructions of the kernels of a source, ``unit`` for ``unit.cu``, by short
    names; none if the library has no machine code for the architecture.

    Raises:
        FileNotFoundError: if there is no cuobjdump.
    """
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("no cuobjdump: it is in CUDA toolkits and in Triton's wheel")
    cubin = f"{source}.{arch}.cubin"

    def run(*options: str | Path, folder: str) -> str:
        command = [str(tool), *map(str, options)]
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        ).stdout

    with tempfile.TemporaryDirectory() as folder:
        if f" {cubin}" not in run("-lelf", library, folder=folder):
            return {}
        run("-xelf", cubin, library, folder=folder)
        listing = run("-sass", cubin, folder=folder)
    found = parse(listing)
    return dict(zip(short_names(list(found)), found.values(), strict=True))


# Loops of a library's kernels -------------------------------------------------------------------

PIXELS = 8  # results of a lane in a turn of a unit's depthwise loop, in 16 bits
TAPS = 9


@dataclass(frozen=True)
class LoopRow:
    """A turn of a kernel's loop: of a product, or of a depthwise convolution."""

    kernel: str
    loop: str  # "product" or "depthwise"
    instructions: int
    done: int  # HMMA, or results of a lane
    cycles: int  # of a warp that is alone


def products_of(rows: list[Instruction]) -> list[Loop]:
    return [loop for loop in loops_of(rows) if loop.count("HMMA") > 0]


def depthwise_of(rows: list[Instruction]) -> list[Loop]:
    """Returns the loops down the rows of a unit's depthwise convolution, as most turns take them:
    without what the first row of a column has more."""
    found = []
    for loop in loops_of(rows):
        turns = [turn for turn in (loop, *loop.shortcuts()) if turn.count("FFMA") == PIXELS * TAPS]
        if turns:
            found.append(min(turns, key=lambda turn: len(turn.body)))
    return found


def rows_of(name: str, rows: list[Instruction]) -> list[LoopRow]:
    """Returns the slowest loop of each kind of a kernel."""
    kinds = {
        "product": [(loop, loop.count("HMMA")) for loop in products_of(rows)],
        "depthwise": [(loop, PIXELS) for loop in depthwise_of(rows)],
    }
    found = []
    for kind, loops in kinds.items():
        if loops:
            loop, done = max(loops, key=lambda pair: pair[0].cycles() / pair[1])
            found.append(LoopRow(name, kind, len(loop.body), done, loop.cycles()))
    return found


def rows_of_library(library: Path) -> list[LoopRow]:
    """Returns the loops of the kernels that networks of the paper launch in float16."""
    return [
        row
        for source in ("stem", "unit", "head")
        for name, instructions in sorted(kernels(library, source).items())
        if "<half_t" in name and "AnyActivation" not in name
        for row in rows_of(name, instructions)
    ]


def main(source: str, name: str = "") -> None:
    shown = ("LDS", "LDSM", "HMMA", "FFMA", "STS", "LDG", "LDGSTS", "STG", "BAR", "MEMBAR")
    for kernel, rows in kernels(library("cuda"), source).items():
        if name not in kernel:
            continue
        print(f"{kernel}: {len(rows)} instructions")
        for loop in loops_of(rows):
            counts = [f"{loop.count(k)} {k}" for k in shown if loop.count(k)]
            print(f"  at {loop.body[0].address:x}: {len(loop.body)} instructions, "
                  f"{loop.cycles()} cycles; {', '.join(counts)}")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
