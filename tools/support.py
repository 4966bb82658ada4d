"""Writes docs/support.md: what is tested is what is supported.

``python tools/support.py`` collects the tests and reads the cases of those marked
``@pytest.mark.supports(mode, what)``; nothing is run. ``mode`` is a key of MODES, a table of the
page; ``what`` names the op or module where no parameter ``op`` or ``kind`` of the test does.
Backend, dtype and memory format are the test's parameters too; a test without one of them says
nothing of it beyond the default, float32 in contiguous memory.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "python_tests"
PAGE = ROOT / "docs" / "support.md"
MARK = "supports"

MODES = {
    "eval": "`eval()`, fused, without gradients",
    "grad": "Gradients: ops, and modules in `eval()` mode",
    "autocast": "Autocast, to the dtypes named",
    "compile": "`torch.compile`",
    "export": "`torch.export`",
}
BACKENDS = ("reference", "cpu", "cuda", "triton")
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
KINDS = {"split": "SplitDepthwiseShuffle", "network": "ShuffleNetV2", "stage": "Stage"}
ROWS = ("cat_shuffle", "dw_conv3x3", "split_dw_cat_shuffle", "SplitDepthwiseShuffle", "unit",
        "Stage", "ShuffleNetV2", "Engine")  # fmt: skip
Cases = dict[
    tuple[str, str, str], set[tuple[str, bool]]
]  # mode, row, backend: dtype, channels-last


class _Collector:
    def __init__(self) -> None:
        self.cases: Cases = defaultdict(set)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for mark in item.iter_markers(MARK):
                self._add(item.callspec.params, *mark.args)  # type: ignore[attr-defined]

    def _add(self, params: dict[str, Any], mode: str, what: str | None = None) -> None:
        if what is None:
            what = params["op"].name if "op" in params else params["kind"]
        row = KINDS.get(what, "unit" if what.startswith("unit") else what)
        backend = params.get("backend") or params.get("kernels") or "reference"
        dtype = DTYPES[params.get("dtype", torch.float32)]
        channels_last = params.get("memory_format") == torch.channels_last
        self.cases[mode, row, backend.partition("-")[0]].add((dtype, channels_last))


def collect() -> Cases:
    """The cases of all marked tests, slow ones too."""
    files = [str(f) for f in sorted(TESTS.glob("test_*.py")) if f"mark.{MARK}(" in f.read_text()]
    collector = _Collector()
    options = ["--collect-only", "-qqq", "-p", "no:cacheprovider", "-p", "no:xdist"]
    status = pytest.main([*files, *options, "-o", "addopts=--strict-markers"], [collector])
    if status != pytest.ExitCode.OK:
        sys.exit("the tests cannot be collected")
    return collector.cases


def _cell(cases: Iterable[tuple[str, bool]]) -> str:
    dtypes = {d: {last for dtype, last in cases if dtype == d} for d in DTYPES.values()}
    return ", ".join(d + ("*" if len(last) == 2 else "") for d, last in dtypes.items() if last)


def page(cases: Cases) -> str:
    unknown = {row for _, row, _ in cases} - set(ROWS) | {mode for mode, _, _ in cases} - set(MODES)
    if unknown:
        sys.exit(f"not in the page's lists: {unknown}")
    lines = [
        "# What runs where",
        "",
        "Written by `python tools/support.py` from the cases of the tests, so it names what is",
        "tested. A star is for both memory formats, contiguous and channels-last; what has none is",
        "tested in contiguous memory. `cuda` is tested on its emulator and `triton` in its",
        "interpreter, most cases of the latter among the slow tests. What an empty cell stands for",
        "is not tested, or runs the plain modules.",
    ]
    for mode, title in MODES.items():
        rows = [r for r in ROWS if any((mode, r, b) in cases for b in BACKENDS)]
        if not rows:
            continue
        lines += ["", f"## {title}", ""]
        lines += [f"| | {' | '.join(f'`{b}`' for b in BACKENDS)} |", "|---" * 5 + "|"]
        lines += [
            f"| {r} | {' | '.join(_cell(cases.get((mode, r, b), ())) for b in BACKENDS)} |"
            for r in rows
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    text = page(collect())
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text() != text and "docs/support.md: run python tools/support.py")
    PAGE.write_text(text)
