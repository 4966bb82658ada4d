"""Result files: read and checked, written compactly and whole."""

from __future__ import annotations

import json
import os
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from snv2_bench.cli.errors import InputError, is_special

if TYPE_CHECKING:
    from snv2_bench.cli.schema import Result

__all__ = ["SCHEMA", "ResultError", "read_result", "write_result"]

SCHEMA = 3
_DIGITS = 5  # significant ones; timings repeat to two or three


class ResultError(InputError):
    """A file is no result of this version."""


def read_result(path: str | Path) -> Result:
    """Read a result.

    Raises:
        ResultError: if the file cannot be read, or is no result of this schema.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested absurdly
        raise ResultError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict) or "schema" not in data:
        raise ResultError(f"{path}: not a result of `snv2 bench` (it names no schema)")
    if data["schema"] != SCHEMA:
        raise ResultError(
            f"{path}: written in schema {reprlib.repr(data['schema'])}; this version reads {SCHEMA}"
        )
    try:  # here, since results are also written on machines without pydantic
        from pydantic import ValidationError

        from snv2_bench.cli.schema import CHECK
    except ImportError:
        message = f'{path}: reading results needs pydantic: pip install "snv2_kernels[cli]"'
        raise ResultError(message) from None
    try:
        CHECK.validate_python(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise ResultError(f"{path}: {where}: {what}") from None
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
    text = _lines(_compact(dict(result)), 2) + "\n"
    if is_special(path):
        Path(path).write_text(text, encoding="utf-8")
        return
    target = Path(path).resolve()  # a link stays one
    part = target.with_name(target.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, target)
