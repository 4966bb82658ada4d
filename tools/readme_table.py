"""Writes README's table of results and its picture, docs/results.svg.

``python tools/readme_table.py`` takes the latest of ``benchmarks/results/*.json`` that timed whole
networks. The table stands between two comments in README.md; nothing of it is written by hand.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from snv2_bench.cli import charts
from snv2_bench.cli.files import read_result
from snv2_bench.cli.page import NAMES, words_of

if TYPE_CHECKING:
    from snv2_bench.cli.schema import Result, Row

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "results.svg"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- results: written by tools/readme_table.py -->"
END = "<!-- end of results -->"
WIDTH = "x1.0"
PEERS = {
    "channels_last": "eager, channels-last",
    "jit": "TorchScript, frozen",
    "compile": "torch.compile, frozen",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "mnn": "MNN",
    "litert": "LiteRT",
    "executorch": "ExecuTorch",
} | {peer: f"`{name}`" for peer, name in NAMES.items()}
# A picture of its own does not know the colour of the page around, so it brings one.
STYLE = (
    "<style>svg { color: #1f2328; background: #ffffff } @media (prefers-color-scheme: dark) "
    "{ svg { color: #e6edf3; background: #0d1117 } }</style>"
)


def latest() -> tuple[Path, Result]:
    """The newest result of whole networks."""
    files = [(path, read_result(path)) for path in sorted(RESULTS.glob("*.json"))]
    timed = [(path, result) for path, result in files if result.get("summary", {}).get("cases")]
    if not timed:
        sys.exit(f"{RESULTS}: no result of `snv2 bench`")
    return max(timed, key=lambda file: file[1]["date"])


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _line(rows: list[Row], threads: list[int]) -> str:
    """One peer: its error, and its median and ratio for each number of threads."""
    first = rows[0]
    cells = [PEERS.get(first["peer"], first["peer"])]
    cells.append("" if first["error"] is None else f"{first['error']:.1e}")
    for count in threads:
        row = next((r for r in rows if r["threads"] == count and r["median_ms"]), None)
        cells.append(f"{row['median_ms']:.1f}" if row else "")
        cells.append(f"{row['speedup']:.2f}x" if row and row["speedup"] else "")
    return f"| {' | '.join(cells)} |"


def section(path: Path, result: Result) -> str:
    """What stands between the two comments."""
    machine, size = result["machine"], result["settings"]["size"]
    rows = [
        row
        for row in result["rows"]
        if (row["width"], row["batch"], row["dtype"]) == (WIDTH, 1, "fp32")
    ]
    threads = list(dict.fromkeys(row["threads"] for row in rows))
    samples = max(row["samples"] for row in rows)
    heads = "".join(f" ms, {_threads(count)} | beside eager |" for count in threads)
    name = path.relative_to(ROOT).as_posix()
    lines = [
        BEGIN,
        textwrap.fill(
            f"{WIDTH}, {size} x {size}, float32, batch 1 on {machine['cpu']} ({machine['isa']}), "
            f"PyTorch {result['versions']['torch'].partition('+')[0]}: medians of {samples} "
            f"interleaved rounds, from [{path.name}]({name}):",
            100,
            break_on_hyphens=False,  # in a link
        ),
        "",
        f"| | error against float64 |{heads}",
        f"|---|---|{'---|---|' * len(threads)}",
        *(
            _line([row for row in rows if row["peer"] == peer], threads)
            for peer in dict.fromkeys(row["peer"] for row in rows)
        ),
        "",
        *(textwrap.fill(f"- {said}", 100, subsequent_indent="  ") for said in words_of(result)),
        "",
        "![How many times as fast as the fastest other way snv2.fuse and snv2.Engine are, in every "
        "case](docs/results.svg)",
        END,
    ]
    return "\n".join(lines)


def readme(text: str, written: str) -> str:
    """README with the section in its place."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"README.md: expected {BEGIN} and {END}")
    return before + written + after


def picture(path: Path, result: Result) -> str:
    """The chart of all cases, which names the result that it shows."""
    drawn = charts.svg(charts.ratios_chart(result["summary"]["cases"], columns=2), "results")
    head, tail = drawn.split(">", 1)
    return f"{head}><desc>{path.name}, {result['date']}</desc>{STYLE}{tail}"


if __name__ == "__main__":
    newest = latest()
    README.write_text(readme(README.read_text(), section(*newest)))
    PICTURE.write_text(picture(*newest))
