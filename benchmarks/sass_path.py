"""Walks warps through a kernel's machine code, and adds up the cycles of each phase.

``python benchmarks/sass_path.py 1 6`` shows the phases of launch 6 of x1.0 on one image,
``python benchmarks/sass_path.py stages x1_0`` those of all its units in one launch. It takes
cuobjdump, the CUDA library and the emulator, and no GPU.

Which way a warp goes depends on the launch's parameters, which the emulator has, and on integer
arithmetic, of which each warp's first lane is computed here: floating-point numbers that no
integer comes from are left out, and what is loaded from memory is taken to be 0. The cycles are
those of sass.py's model, where a warp is alone. A phase ends at a barrier, and takes as long as its
slowest warp, or as long as its instructions take to issue; what cp.async and bulk copies bring is
there as late as other loads from L2. CTAs of a cluster are taken to run in step: what a neighbour
stores is there NEIGHBOUR cycles after this CTA has stored the same.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import sass
from sass import DEFAULT, LATENCIES, OPERANDS_READ, SCOREBOARDS, Instruction

WARP = 32
ISSUED = 4  # instructions of an SM in a cycle, at most
NEIGHBOUR = 250  # cycles until a store to another CTA's shared memory is seen there, assumed
RANK = 3  # of the CTA in its cluster, if it is in one: it has neighbours on both sides
PARAMETERS_AT = 0x210  # in constant memory, on sm_90
WORD = 0xFFFFFFFF
PREDICATES = 7

# Instructions that change no integer that decides where a warp goes.
NEUTRAL = {
    "ACQBULK", "BAR", "BSSY", "BSYNC", "CCTL", "CGAERRBAR", "DEPBAR", "ERRBAR", "F2FP", "FENCE",
    "FFMA", "HADD2", "HFMA2", "HMMA", "HMNMX2", "LDG", "LDGDEPBAR", "LDGSTS", "LDS", "LDSM",
    "MEMBAR", "NOP", "PREEXIT", "ST", "STAS", "STG", "STS", "UBLKCP", "UCGABAR_ARV",
    "UCGABAR_WAIT", "VOTEU", "WARPSYNC",
}  # fmt: skip
# Launches of a network whose units are in one.
STAGED = ("stem", "stages", "features", "linear")
ENDS = ("BAR", "ACQBULK", "EXIT")  # of phases; ACQBULK is griddepcontrol.wait

_PREDICATE = re.compile(r"!?U?P(\d|T)$")
_REGISTER = re.compile(r"(U?R)(\d+)$")


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def bits_of(number: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


def number_of(word: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", word))[0])


def _next(register: str) -> str:
    found = _REGISTER.match(register)
    return f"{found[1]}{int(found[2]) + 1}" if found else register


@dataclass(frozen=True)
class Parsed:
    guard: str | None
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Parsed:
        guard = None
        if text.startswith("@"):
            guard, text = text[1:].split(" ", 1)
        name, _, rest = re.sub(r"desc\[[^]]*\]|\.reuse", "", text).partition(" ")
        opcode, *modifiers = name.split(".")
        operands = [part.strip() for part in re.split(r",(?![^[]*\])", rest) if part.strip()]
        return cls(guard, opcode, tuple(modifiers), tuple(operands))


class Lane:
    """The integers of a warp's first lane."""

    def __init__(self, constants: bytes, thread: int) -> None:
        self.constants, self.thread = constants, thread
        self.registers: dict[str, int] = {}
        self.predicates: dict[str, bool] = {}
        self.barrier = 0  # the latest that counts

    def predicate(self, name: str) -> bool:
        plain = name.lstrip("!")
        value = plain in ("PT", "UPT") or self.predicates.get(plain, False)
        return value != name.startswith("!")

    def constant(self, operand: str) -> int:
        place = 0
        for part in operand.removeprefix("c[0x0][").rstrip("]").split("+"):
            place += int(part, 16) if part.startswith("0x") else self.value(part)
        return place

    def word(self, place: int) -> int:
        return int.from_bytes(self.constants[place : place + 4], "little")

    def value(self, operand: str) -> int:
        plain = operand.lstrip("-~|").rstrip("|")
        if _REGISTER.match(plain) or plain in ("RZ", "URZ", "SRZ"):
            value = self.registers.get(plain, 0)
        elif plain.startswith("c["):
            value = self.word(self.constant(plain))
        elif operand.lstrip("-").startswith("0x"):
            return int(operand, 16) & WORD
        elif plain in ("INF", "QNAN"):
            return bits_of(float("inf"))
        else:
            return bits_of(float(operand))
        if operand.startswith("-"):
            value = -value
        return (~value if operand.startswith("~") else value) & WORD

    def pair(self, operand: str) -> int:
        if operand.startswith("c["):
            place = self.constant(operand)
            return self.word(place) | self.word(place + 4) << 32
        return self.value(operand) | self.value(_next(operand)) << 32

    def number(self, operand: str) -> float:
        number = number_of(self.value(operand.lstrip("-")))
        if operand.lstrip("-").startswith("|"):
            number = abs(number)
        return -number if operand.startswith("-") and operand[1:2] in "Rc|U" else number

    def set(self, register: str, value: int) -> None:
        if register not in ("RZ", "URZ"):
            self.registers[register] = value & WORD

    def set_pair(self, register: str, value: int) -> None:
        self.set(register, value)
        self.set(_next(register), value >> 32)

    def set_predicate(self, name: str, value: bool) -> None:
        if name not in ("PT", "UPT"):
            self.predicates[name] = value

    def execute(self, row: Parsed) -> None:
        """Changes the lane as an instruction does that is no branch.

        Raises:
            NotImplementedError: at one that is not known.
        """
        opcode = row.opcode
        if opcode in NEUTRAL:
            return
        known = OPERATIONS.get(opcode) or OPERATIONS.get(opcode.removeprefix("U"))
        if known is None:
            raise NotImplementedError(f"sass_path.py does not know {opcode}")
        known(self, row)


def _split(row: Parsed) -> tuple[list[str], list[str]]:
    """Returns the operands after the first that are predicates, and the others."""
    predicates = [operand for operand in row.operands[1:] if _PREDICATE.match(operand)]
    return predicates, [o for o in row.operands[1:] if not _PREDICATE.match(o)]


def _multiply_add(lane: Lane, row: Parsed) -> None:
    to, (predicates, (a, b, c)) = row.operands[0], _split(row)
    factors = lane.value(a), lane.value(b)
    if "WIDE" in row.modifiers:
        if "U32" not in row.modifiers:
            factors = signed(factors[0]), signed(factors[1])
        lane.set_pair(to, factors[0] * factors[1] + lane.pair(c))
    elif "HI" in row.modifiers:
        lane.set(to, (factors[0] * factors[1] + lane.pair(c)) >> 32)
    else:
        carry = "X" in row.modifiers and lane.predicate(predicates[-1])
        lane.set(to, factors[0] * factors[1] + lane.value(c) + carry)


def _add(lane: Lane, row: Parsed) -> None:
    predicates, terms = _split(row)
    total = sum(lane.value(term) for term in terms)
    if "X" in row.modifiers:
        total += sum(lane.predicate(p) for p in predicates)
    elif predicates:
        lane.set_predicate(predicates[0], bool(total >> 32))
    lane.set(row.operands[0], total)


def _extreme(lane: Lane, row: Parsed) -> None:
    *terms, last, least = row.operands[1:]
    a, b = sum(lane.value(term) for term in terms) & WORD, lane.value(last)
    key: Callable[[int], int] = (lambda x: x) if "U32" in row.modifiers else signed
    lane.set(row.operands[0], (min if lane.predicate(least) else max)(a, b, key=key))


def _logic(lane: Lane, row: Parsed) -> None:
    operands = list(row.operands)
    flag = operands.pop(0) if _PREDICATE.match(operands[0]) else None
    a, b, c = (lane.value(operand) for operand in operands[1:4])
    table, result = int(operands[4], 16), 0
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    lane.set(operands[0], result)
    if flag:
        lane.set_predicate(flag, bool(result & WORD))


def _compare(lane: Lane, row: Parsed) -> None:
    to, _, left, right, other = row.operands[:5]
    a: float
    b: float
    if row.opcode == "FSETP":
        a, b = lane.number(left), lane.number(right)
    else:
        a, b = lane.value(left), lane.value(right)
        if "U32" not in row.modifiers:
            a, b = signed(int(a)), signed(int(b))
    outcome = {"GE": a >= b, "GT": a > b, "LE": a <= b, "LT": a < b, "EQ": a == b, "NE": a != b}
    result, also = outcome[row.modifiers[0].removesuffix("U")], lane.predicate(other)
    lane.set_predicate(to, (result or also) if "OR" in row.modifiers else (result and also))


def _select(lane: Lane, row: Parsed) -> None:
    to, a, b, which = row.operands
    lane.set(to, lane.value(a if lane.predicate(which) else b))


def _shift(lane: Lane, row: Parsed) -> None:
    low, count, high = (lane.value(operand) for operand in row.operands[1:4])
    if row.modifiers[0] == "L":
        lane.set(row.operands[0], (high << 32 | low) << count >> 32 if "HI" in row.modifiers
                 else low << count)  # fmt: skip
    elif "HI" in row.modifiers:
        lane.set(row.operands[0], (signed(high) if "S32" in row.modifiers else high) >> count)
    else:
        lane.set(row.operands[0], (high << 32 | low) >> count)


def _scale_add(lane: Lane, row: Parsed) -> None:
    predicates, (a, b, *rest) = _split(row)
    by = int(rest[-1], 16)
    if "HI" not in row.modifiers:
        total = (lane.value(a) << by & WORD) + lane.value(b)
        if predicates:
            lane.set_predicate(predicates[0], bool(total >> 32))
    else:
        wide = lane.value(a) | (lane.value(rest[0]) << 32 if len(rest) > 1 else 0)
        if "SX32" in row.modifiers:
            wide = signed(lane.value(a))
        total = (wide << by >> 32) + lane.value(b)
        if "X" in row.modifiers and predicates:
            total += lane.predicate(predicates[-1])
    lane.set(row.operands[0], total)


def _permute(lane: Lane, row: Parsed) -> None:
    a, selector, b = (lane.value(operand) for operand in row.operands[1:4])
    taken = (b << 32 | a).to_bytes(8, "little")
    chosen = [taken[selector >> 4 * i & 7] for i in range(4)]
    lane.set(row.operands[0], int.from_bytes(bytes(chosen), "little"))


def _pack_predicates(lane: Lane, row: Parsed) -> None:
    mask, word = int(row.operands[3], 16), lane.value(row.operands[2])
    for i in range(PREDICATES):
        if mask >> i & 1:
            word = word & ~(1 << i) | lane.predicate(f"P{i}") << i
    lane.set(row.operands[0], word)


def _unpack_predicates(lane: Lane, row: Parsed) -> None:
    mask, word = int(row.operands[2], 16), lane.value(row.operands[1])
    for i in range(PREDICATES):
        if mask >> i & 1:
            lane.set_predicate(f"P{i}", bool(word >> i & 1))


def _predicate_logic(lane: Lane, row: Parsed) -> None:
    a, b, c = (lane.predicate(operand) for operand in row.operands[2:5])
    lane.set_predicate(row.operands[0], bool(int(row.operands[5], 16) >> (4 * a + 2 * b + c) & 1))


def _to_number(lane: Lane, row: Parsed) -> None:
    word = lane.value(row.operands[1])
    lane.set(row.operands[0], bits_of(float(word if "U32" in row.modifiers else signed(word))))


def _reciprocal(lane: Lane, row: Parsed) -> None:
    number = lane.number(row.operands[1])
    lane.set(row.operands[0], bits_of(1 / number if number else float("inf")))


def _load_constant(lane: Lane, row: Parsed) -> None:
    place = lane.constant(row.operands[1])
    if "U8" in row.modifiers:
        lane.set(row.operands[0], lane.constants[place])
    elif "64" in row.modifiers:
        lane.set_pair(row.operands[0], lane.pair(row.operands[1]))
    else:
        lane.set(row.operands[0], lane.word(place))


def _special(lane: Lane, row: Parsed) -> None:
    known = {"SR_TID.X": lane.thread, "SR_CgaCtaId": RANK}
    lane.set(row.operands[0], known.get(row.operands[1], 0))


def _elect(lane: Lane, row: Parsed) -> None:
    lane.set_predicate(row.operands[0], True)


def _barrier_of(lane: Lane, row: Parsed) -> int:
    place = next(operand for operand in row.operands if operand.startswith("["))
    parts = place.strip("[]").split("+")
    return sum(int(p, 16) if p.startswith("0x") else lane.value(p) for p in parts)


def _counting_barrier(lane: Lane, row: Parsed) -> None:
    """Notes the barrier that a warp arms or waits for; a wait is never in vain."""
    lane.barrier = _barrier_of(lane, row)
    if "PHASECHK" in row.modifiers:
        lane.set_predicate(row.operands[0], True)


def _move(lane: Lane, row: Parsed) -> None:
    lane.set(row.operands[0], lane.value(row.operands[1]))


def _calculate(operation: Callable[[float, float], float]) -> Callable[[Lane, Parsed], None]:
    def calculate(lane: Lane, row: Parsed) -> None:
        a, b = lane.number(row.operands[1]), lane.number(row.operands[2])
        lane.set(row.operands[0], bits_of(operation(a, b)))

    return calculate


OPERATIONS: dict[str, Callable[[Lane, Parsed], None]] = {
    "CS2R": lambda lane, row: lane.set_pair(row.operands[0], 0),
    "ELECT": _elect,
    "F2I": lambda lane, row: lane.set(row.operands[0], int(lane.number(row.operands[1]))),
    "FADD": _calculate(lambda a, b: a + b),
    "FMUL": _calculate(lambda a, b: a * b),
    "FSEL": _select,
    "FSETP": _compare,
    "I2F": _to_number,
    "I2FP": _to_number,
    "IADD3": _add,
    "IMAD": _multiply_add,
    "ISETP": _compare,
    "LDC": _load_constant,
    "LEA": _scale_add,
    "LOP3": _logic,
    "MOV": _move,
    "MUFU": _reciprocal,
    "P2R": _pack_predicates,
    "PLOP3": _predicate_logic,
    "PRMT": _permute,
    "R2P": _unpack_predicates,
    "R2UR": _move,
    "S2R": _special,
    "S2UR": _special,
    "SEL": _select,
    "SHF": _shift,
    "SYNCS": _counting_barrier,
    "SHFL": lambda lane, row: lane.set(row.operands[1], lane.value(row.operands[2])),
    "VIADD": lambda lane, row: lane.set(row.operands[0], sum(map(lane.value, row.operands[1:]))),
    "VIADDMNMX": _extreme,
    "VIMNMX": _extreme,
}


def path_of(
    rows: list[Instruction], parsed: list[Parsed], lane: Lane
) -> Iterator[tuple[Instruction, bool]]:
    """Yields the instructions that a warp is issued, and whether their predicates are set."""
    places = {row.address: i for i, row in enumerate(rows)}
    at = 0
    while True:
        row, what = rows[at], parsed[at]
        executed = what.guard is None or lane.predicate(what.guard)
        yield row, executed
        at += 1
        if not executed:
            continue
        if what.opcode == "EXIT":
            return
        if what.opcode == "BRA":
            *conditions, to = what.operands
            if all(lane.predicate(condition) for condition in conditions):
                at = places[int(to, 16)]
        else:
            lane.execute(what)


class Clock:
    """The cycles of a warp that is alone."""

    def __init__(self) -> None:
        self.ready, self.now, self.copied = [0] * SCOREBOARDS, 0, 0
        self.arrives: dict[int, int] = {}  # when what a barrier counts is there
        self.stored = 0  # to neighbours

    def issue(self, row: Instruction, executed: bool) -> None:
        waits = [self.ready[k] for k in range(SCOREBOARDS) if row.waits_for(k)]
        self.now = max([self.now, *waits])
        if executed:
            latency = LATENCIES.get(row.opcode, DEFAULT)
            if row.opcode == "LDGSTS":
                self.copied = max(self.copied, self.now + LATENCIES["LDG"])
            elif row.opcode == "DEPBAR":
                self.now = max(self.now, self.copied)
            if row.sets is not None:
                self.ready[row.sets] = max(self.ready[row.sets], self.now + latency)
            if row.holds is not None:
                read = self.now + min(latency, OPERANDS_READ)
                self.ready[row.holds] = max(self.ready[row.holds], read)
        self.now += max(row.stall, 1)

    def count(self, what: Parsed, barrier: int) -> None:
        """Notes copies and stores that a barrier counts, and waits for them."""
        if what.opcode == "UBLKCP":
            self.arrives[barrier] = self.now + LATENCIES["LDG"]
        elif what.opcode == "STAS":
            self.stored = self.now
        elif what.opcode == "SYNCS" and "PHASECHK" in what.modifiers:
            self.now = max(self.now, self.arrives.get(barrier, self.stored + NEIGHBOUR))


@dataclass(frozen=True)
class Phase:
    """A stretch of the warps of a CTA that ends at a barrier."""

    end: str  # the instruction that ends it
    slowest: int  # cycles of a warp that is alone
    instructions: int  # of all warps

    @property
    def cycles(self) -> int:
        return max(self.slowest, -(-self.instructions // ISSUED))


def phases_of(rows: list[Instruction], parameters: bytes, threads: int) -> list[Phase]:
    """Returns the phases of a kernel's first CTA."""
    constants = bytearray(PARAMETERS_AT) + parameters
    struct.pack_into("<III", constants, 0, threads, 1, 1)
    parsed = [Parsed.of(row.text) for row in rows]
    known = {row.address: what for row, what in zip(rows, parsed, strict=True)}
    warps = []
    for warp in range(threads // WARP):
        clock, phases = Clock(), []
        start = issued = 0
        lane = Lane(bytes(constants), warp * WARP)
        for row, executed in path_of(rows, parsed, lane):
            clock.issue(row, executed)
            if executed:
                clock.count(known[row.address], lane.barrier)
            issued += 1
            if executed and row.opcode in ENDS:
                phases.append(Phase(row.opcode, clock.now - start, issued))
                start, issued = clock.now, 0
        warps.append(phases)
    return [
        Phase(
            phases[0].end,
            max(phase.slowest for phase in phases),
            sum(phase.instructions for phase in phases),
        )
        for phases in zip(*warps, strict=True)
    ]


def phases_of_launch(batch: int, launch: int) -> list[Phase]:
    """Returns the phases of a launch of x1.0 in float16, on the H200."""
    import arithmetic
    import torch

    from snv2_kernels import emulator
    from snv2_kernels.libraries import library
    from snv2_kernels.ops import run_plan

    device = emulator.device()
    emulator.set_device(**arithmetic.GPUS[0].device)
    try:
        plan = arithmetic.plan_of("x1_0")
        x = torch.zeros(batch, 3, arithmetic.SIZE, arithmetic.SIZE, dtype=torch.float16)
        run_plan(x, plan, "cuda-emulated")
    finally:
        emulator.set_device(**device)
    row = arithmetic.counted("x1_0", batch, arithmetic.GPUS[0])
    threads, parameters = emulator.latest_parameters()[launch - len(row["kernels"])]
    kernel = row["kernels"][launch]
    source = kernel.split("_kernel")[0]
    found = sass.kernels(library("cuda"), source if source in ("stem", "unit") else "head")
    return phases_of(found[kernel], parameters, threads)


def phases_of_stages(width: str) -> list[Phase]:
    """Returns the phases of a network's units in one launch, on an image, in float16: what comes
    before the first unit, three of each unit, and what comes after the last."""
    import arithmetic
    import torch

    from snv2_kernels import emulator
    from snv2_kernels.libraries import library
    from snv2_kernels.ops import run_plan

    torch.ops.snv2_emulated.gpu_tune(stages=2)
    try:
        x = torch.zeros(1, 3, arithmetic.SIZE, arithmetic.SIZE, dtype=torch.float16)
        run_plan(x, arithmetic.plan_of(width), "cuda-emulated")
    finally:
        torch.ops.snv2_emulated.gpu_tune()
    _, (threads, parameters), *_ = emulator.latest_parameters()[-len(STAGED) :]
    return phases_of(
        sass.kernels(library("cuda"), "stages")["stages_kernel<half_t>"], parameters, threads
    )


def main(batch: str, launch: str) -> None:
    stages = batch == "stages"
    for phase in phases_of_stages(launch) if stages else phases_of_launch(int(batch), int(launch)):
        print(f"{phase.cycles:6d} cycles to {phase.end}: the slowest warp {phase.slowest}, "
              f"{phase.instructions} instructions")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
