"""The file of ``snv2 bench``: one schema that is written, read, compared and reported.

A file names machine, versions, commit and settings, and has any of the sections below. Medians and
percentiles stand for samples, which are not kept. ``guidelines`` and ``table8`` come from the
commands of that name, ``gpu`` from ``benchmarks/predict.py --json``.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, cast

from typing_extensions import TypedDict  # pydantic asks for it before Python 3.12

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "SCHEMA",
    "Counted",
    "Guideline",
    "Kernel",
    "Layers",
    "Result",
    "ResultError",
    "Row",
    "Startup",
    "Table8",
    "read_result",
    "write_result",
]

SCHEMA = 3
_DIGITS = 5  # significant ones; timings repeat to two or three

Percentiles = dict[str, float]  # "p50": milliseconds, or a ratio


class ResultError(Exception):
    """A file is no result of this version; the message says which and why."""


class Case(TypedDict):
    """What the rows that are compared with each other share."""

    width: str
    batch: int
    dtype: str
    threads: int


class Row(Case):
    """One peer in one case. Times are of one call."""

    peer: str
    error: float | None  # against float64, of the largest score
    error_bound: float
    reason: str | None  # why it was not timed
    samples: int
    median_ms: float | None
    percentiles_ms: Percentiles  # p0 to p100
    images_per_s: float | None
    floor_share: float | None  # of the floor in the median
    speedup: float | None  # eager's median over this one
    # Of ours: the other peer's time over this one's, round by round.
    paired: dict[str, Percentiles]


class Kernel(TypedDict):
    """One kernel of an engine in one step of the network."""

    step: str
    kernel: str
    multiply_adds: int
    moved_bytes: int  # at least: its maps and weights
    ms: float
    floor_ms: float


class Layers(Case):
    """Where one engine's time goes."""

    kernels: list[Kernel]


class Floor(TypedDict):
    """Peaks of the machine in this run."""

    threads: int
    element: str
    multiply_adds_per_s: float
    copy_bytes_per_s: float
    cached_copy_bytes_per_s: float


class Memory(TypedDict):
    """Resident bytes of a process of its own, in MB of 10^6."""

    before: float  # with PyTorch, the model and the input, before the peer is made
    to_first_result: float | None  # the peak above that while it is made and called once
    calls: float | None  # the peak above that in calls from then on


class Startup(Case):
    """From ``import`` to the first result, in fresh processes."""

    peer: str
    reason: str | None
    samples: int
    median_ms: float | None  # the sum of the phases
    percentiles_ms: Percentiles
    phases_ms: dict[str, float]  # of the median run
    memory_mb: Memory | None  # of the median run


class Guideline(TypedDict):
    """One setting of one of the paper's tables for G1 to G4."""

    table: str
    setting: str
    channels: NotRequired[list[int] | None]
    device: str
    batch: int
    threads: NotRequired[int | None]
    peer: str
    error: NotRequired[float | None]
    median_ms: float | None
    percentiles_ms: NotRequired[Percentiles]
    ratio: float | None  # of its speed to that of the table's first setting, by the same peer
    speedup: NotRequired[float | None]  # eager's median over this one
    paper_per_s: float | None
    paper_ratio: float | None
    reason: NotRequired[str | None]


class Table8(TypedDict):
    """One network of the paper's Table 8."""

    model: str
    size: str
    input: int
    multiply_adds: float | None
    threads: NotRequired[int | None]
    peer: str
    median_ms: float | None
    percentiles_ms: NotRequired[Percentiles]
    per_s: float | None
    ratio: float | None  # of its speed to that of ShuffleNet v2 1.0x, by the same peer
    speedup: NotRequired[float | None]  # eager's median over this one
    paper_per_s: float | None
    paper_ratio: float | None
    reason: NotRequired[str | None]


class Counted(TypedDict):
    """What one kernel of a stage moves on a GPU: a formula, and the emulator's count."""

    kernel: str
    shape: str
    dtype: str
    batch: int
    least_bytes: int
    described_bytes: int  # by the host code that launches it
    counted_bytes: int
    multiply_adds: int


class Result(TypedDict):
    """The whole file."""

    schema: int
    date: str  # ISO 8601, UTC
    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    settings: dict[str, Any]
    interrupted: bool
    floor: NotRequired[list[Floor]]
    rows: NotRequired[list[Row]]
    layers: NotRequired[list[Layers]]
    startup: NotRequired[list[Startup]]
    summary: NotRequired[dict[str, Any]]
    guidelines: NotRequired[list[Guideline]]
    table8: NotRequired[list[Table8]]
    gpu: NotRequired[list[Counted]]


@functools.cache
def _schema() -> TypeAdapter[Result]:
    """Only what reads results needs pydantic: they are written on machines without it, too."""
    from pydantic import TypeAdapter

    return TypeAdapter(Result)


def read_result(path: str | Path) -> Result:
    """Read a result.

    Raises:
        ResultError: if the file cannot be read, or is no result of this schema.
    """
    try:
        data = json.loads(Path(path).read_text())
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise ResultError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict) or "schema" not in data:
        raise ResultError(f"{path}: not a result of `snv2 bench` (it names no schema)")
    if data["schema"] != SCHEMA:
        raise ResultError(
            f"{path}: written in schema {data['schema']!r}; this version reads {SCHEMA}"
        )
    try:
        from pydantic import ValidationError
    except ImportError:
        message = f'{path}: reading results needs pydantic: pip install "snv2_kernels[cli]"'
        raise ResultError(message) from None
    try:
        _schema().validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ResultError(f"{path}: {where}: {first['msg']}") from None
    return cast("Result", data)


def _compact(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _compact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_compact(item) for item in value]
    return value


def _lines(value: Any, depth: int) -> str:
    """JSON with a line for each item of the outer ``depth`` levels."""
    if depth == 0 or not value or not isinstance(value, dict | list):
        return json.dumps(value)
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_lines(item, depth - 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + "\n}"
    return "[\n" + ",\n".join(_lines(item, depth - 1) for item in value) + "\n]"


def write_result(result: Result, path: str | Path) -> None:
    """Write a result, compactly and all at once, so that no reader meets half a file."""
    target = Path(path)
    part = target.with_name(target.name + ".part")
    part.write_text(_lines(_compact(dict(result)), 2) + "\n")
    os.replace(part, target)
