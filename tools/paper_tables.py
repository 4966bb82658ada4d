"""Write what was measured into docs/guidelines.md:

snv2 guidelines --json out/guidelines.json
snv2 table8 --json out/table8.json
python tools/paper_tables.py out/guidelines.json out/table8.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "guidelines.md"
MARK = "<!-- measured -->"


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _grid(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _guideline(rows: list[dict[str, Any]]) -> str:
    """A line for each setting; for each scale or stage our number, and the paper's beside it."""
    columns = list(dict.fromkeys(row["column"] for row in rows))
    paper = any(row["paper_per_s"] for row in rows)
    header, lines = ["", "by"], []
    for column in columns:
        header += [column, "paper"] if paper else [f"{column}, ms", "speed"]
    timed = [row for row in rows if row["median_ms"]]  # not all ways run all set-ups
    for setting, peer in dict.fromkeys((row["setting"], row["peer"]) for row in timed):
        line = [setting, peer]
        for column in columns:
            row = next(
                r for r in rows if (r["setting"], r["peer"], r["column"]) == (setting, peer, column)
            )
            if paper:
                line += [_number(row["ratio"]), _number(row["paper_ratio"])]
            else:
                line += [_number(row["median_ms"], ".3f"), _number(row["ratio"])]
        lines.append(line)
    return _grid(header, lines)


def _table8(rows: list[dict[str, Any]]) -> str:
    lines = [
        [row["model"], row["size"], _number((row["multiply_adds"] or 0) / 1e6, ".0f"), row["peer"],
         _number(row["median_ms"]), _number(row["ratio"]), _number(row["paper_ratio"]),
         _number(row["speedup"])]
        for row in rows
    ]  # fmt: skip
    header = ["", "", "M", "by", "ms", "ratio", "paper's ratio", "vs eager"]
    return _grid(header, lines)


def measured(guidelines: dict[str, Any], table8: dict[str, Any]) -> str:
    """The part of the page below its mark."""
    parts = []
    for result, key in ((guidelines, "guidelines"), (table8, "table8")):
        settings, versions = result["settings"], result["versions"]
        parts.append(
            f"`snv2 {key}`, {result['machine']['device']}, batch {settings['batch']}, PyTorch "
            f"{versions['torch']}, medians of {settings['repeats']} turns:\n"
        )
        first = min(row["threads"] for row in result[key])
        rows = [row for row in result[key] if row["threads"] == first]
        for name in dict.fromkeys(row.get("table", "Table 8") for row in rows):
            of_table = [row for row in rows if row.get("table", "Table 8") == name]
            make = _table8 if key == "table8" else _guideline
            parts.append(f"### {name}\n\n{make(of_table)}")
    return "\n".join(parts)


def main() -> None:
    results = [json.loads(Path(path).read_text()) for path in sys.argv[1:3]]
    text, _, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(f"{text}{MARK}\n\n{measured(*results)}")


if __name__ == "__main__":
    main()
