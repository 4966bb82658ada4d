"""The file of ``snv2 bench``: one schema that is written, read, compared and reported.

A file names machine, versions, commit and settings, and has any of the sections below. Medians and
percentiles stand for samples, which are not kept. ``guidelines`` and ``table8`` come from the
commands of that name, ``gpu`` from ``benchmarks/predict.py --json``.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic asks for it before Python 3.12

__all__ = [
    "CHECK",
    "Counted",
    "Guideline",
    "Kernel",
    "Layers",
    "Result",
    "Row",
    "Startup",
    "Table8",
]


def _printable(text: str) -> str:
    """Text that terminals and pages can take: no control characters, nor half a surrogate pair."""
    text.encode()
    if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text if c not in "\t\n"):
        raise ValueError("has control characters")
    return text


def _plain(value: Any) -> Any:
    """A fact or a list of facts; not deeper, since all of it is shown."""
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, str):
            _printable(part)
        elif part is not None and not isinstance(part, bool | int | float):
            raise ValueError("expected text, a number, or a list of these")
    return value


def _naming(*names: str) -> AfterValidator:
    def check(facts: dict[str, Any]) -> dict[str, Any]:
        missing = next((name for name in names if name not in facts), None)
        if missing is not None:
            raise ValueError(f"names no {missing}")
        return facts

    return AfterValidator(check)


# Ratios of numbers within these bounds can be computed and drawn.
_LEAST, _MOST = 1e-18, 1e18
Text = Annotated[str, AfterValidator(_printable)]
Fact = Annotated[Any, AfterValidator(_plain)]
Positive = Annotated[float, Field(ge=_LEAST, le=_MOST)]
Number = Annotated[float, Field(ge=-_MOST, le=_MOST)]
Count = Annotated[int, Field(ge=0, le=int(_MOST))]
Size = Annotated[int, Field(ge=1, le=int(_MOST))]
Percentiles = dict[Text, Positive]  # "p50": milliseconds, or a ratio


class Case(TypedDict):
    """What the rows that are compared with each other share."""

    width: Text
    batch: Size
    dtype: Text
    threads: Size


class Row(Case):
    """One peer in one case. Times are of one call."""

    peer: Text
    # Against float64: the largest of the largest score, or of int8 the rms of that of the scores.
    error: float | None
    error_bound: float
    reason: Text | None  # why it was not timed
    samples: Count
    median_ms: Positive | None
    percentiles_ms: Percentiles  # p0 to p100
    images_per_s: Positive | None
    floor_share: Positive | None  # of the floor in the median
    speedup: Positive | None  # eager's median over this one
    # Of ours: the other peer's time over this one's, round by round.
    paired: dict[Text, Percentiles]


class Kernel(TypedDict):
    """One kernel of an engine in one step of the network."""

    step: Text
    kernel: Text
    multiply_adds: Count
    moved_bytes: Count  # at least: its maps and weights
    ms: Number  # of what is left may be less than nothing
    floor_ms: Number


def _taking_time(kernels: list[Kernel]) -> list[Kernel]:
    if sum(kernel["ms"] for kernel in kernels) <= 0:
        raise ValueError("expected kernels that take time")
    return kernels


class Layers(Case):
    """Where one engine's time goes."""

    kernels: Annotated[list[Kernel], AfterValidator(_taking_time)]


class Floor(TypedDict):
    """Peaks of the machine in this run."""

    threads: Size
    element: Text
    multiply_adds_per_s: Positive
    copy_bytes_per_s: Positive
    cached_copy_bytes_per_s: Positive


class Memory(TypedDict):
    """Resident bytes of a process of its own, in MB of 10^6."""

    before: Number  # with PyTorch, the model and the input, before the peer is made
    to_first_result: Number | None  # the peak above that while it is made and called once
    calls: Number | None  # the peak above that in calls from then on


class Startup(Case):
    """From ``import`` to the first result, in fresh processes."""

    peer: Text
    reason: Text | None
    samples: Count
    median_ms: Positive | None  # the sum of the phases
    percentiles_ms: Percentiles
    phases_ms: dict[Text, Number]  # of the median run
    memory_mb: Memory | None  # of the median run


class Guideline(TypedDict):
    """One setting of one of the paper's tables for G1 to G4."""

    table: Text
    setting: Text
    channels: NotRequired[list[Count] | None]
    device: Text
    batch: Size
    threads: NotRequired[Size | None]
    peer: Text
    error: NotRequired[float | None]
    samples: NotRequired[Count]
    median_ms: Positive | None
    percentiles_ms: NotRequired[Percentiles]
    ratio: Positive | None  # of its speed to that of the table's first setting, by the same peer
    speedup: NotRequired[Positive | None]  # eager's median over this one
    paper_per_s: Positive | None
    paper_ratio: Positive | None
    reason: NotRequired[Text | None]


class Table8(TypedDict):
    """One network of the paper's Table 8."""

    model: Text
    size: Text
    input: Size
    multiply_adds: Positive | None
    threads: NotRequired[Size | None]
    peer: Text
    samples: NotRequired[Count]
    median_ms: Positive | None
    percentiles_ms: NotRequired[Percentiles]
    per_s: Positive | None
    ratio: Positive | None  # of its speed to that of ShuffleNet v2 1.0x, by the same peer
    speedup: NotRequired[Positive | None]  # eager's median over this one
    paper_per_s: Positive | None
    paper_ratio: Positive | None
    reason: NotRequired[Text | None]


class Versus(Case):
    """Ours against the fastest other peer in one case."""

    fastest_peer: Text
    fastest_ms: Positive
    speedup: dict[Text, Positive]
    paired: dict[Text, Percentiles]


class Summary(TypedDict):
    """All cases in which both were timed."""

    cases: list[Versus]
    geometric_mean: dict[Text, Positive]
    minimum: dict[Text, Positive]


class Counted(TypedDict):
    """What one kernel of a stage moves on a GPU: a formula, and the emulator's count."""

    kernel: Text
    shape: Text
    dtype: Text
    batch: Size
    least_bytes: Size
    described_bytes: Count  # by the host code that launches it
    counted_bytes: Count
    multiply_adds: Count


class Result(TypedDict):
    """The whole file."""

    schema: int
    date: Text  # ISO 8601, UTC
    command: Text
    machine: Annotated[dict[Text, Fact], _naming("cpu", "usable_cores", "isa")]
    versions: Annotated[dict[Text, Text], _naming("torch")]
    commit: Text | None
    settings: dict[Text, Fact]
    interrupted: bool
    floor: NotRequired[list[Floor]]
    rows: NotRequired[list[Row]]
    layers: NotRequired[list[Layers]]
    startup: NotRequired[list[Startup]]
    summary: NotRequired[Summary]
    guidelines: NotRequired[list[Guideline]]
    table8: NotRequired[list[Table8]]
    gpu: NotRequired[list[Counted]]


CHECK = TypeAdapter(Result)
