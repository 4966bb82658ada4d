"""Tables of the command line in terminals of 60 and 80 columns: every number is there, uncut."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from _cli import run
from _results import a_result
from rich.console import Console

from snv2_bench.cli import classify, compare, info, results, summary, tables
from snv2_bench.cli.files import read_result, write_result
from snv2_kernels.cuda_kernels import Build, Kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from snv2_bench.cli.fitted import FittedTable

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
WIDTHS = [60, 80]
LONG = "RuntimeError: a long reason that no narrow terminal has in one line"


def _measured(kind: str) -> Any:
    return read_result(str(RESULTS / f"cpu-amd-epyc-zen4{kind}.json"))


def _rows(kind: str, key: str) -> list[Any]:
    """The first rows of a committed result, with what a failure leaves in the last."""
    rows: list[Any] = _measured(kind)[key][:9]
    return [*rows[:-1], rows[-1] | {"reason": LONG}]


def _kernels() -> FittedTable:
    kernel = Kernel(
        kernel="unit_kernel<__nv_bfloat16, 2, 5, (snv2::Activation)3>", source="unit.cu",
        arch="sm_90", registers=255, shared=12288, stack=0, spill_stores=4, spill_loads=8,
        barriers=1, constant=528, max_threads=512, min_ctas=None,
    )  # fmt: skip
    return info._kernels(Build(nvcc="13.0.88", targets=("sm_90",), kernels=(kernel,)))


def _changes() -> FittedTable:
    before, after = a_result(), a_result(2.0)
    return compare._table_of(compare.differences_of(before, after).changes)


TABLES: dict[str, Callable[[], FittedTable]] = {
    "bench": lambda: results.table_of(_rows("", "rows"), "x1.0, batch 1"),
    "bench, layers": lambda: next(
        results.layers_tables_of(_measured("")["layers"][0], "x1.0, batch 1")
    ),
    "bench, start": lambda: results.startup_table_of(_rows("", "startup"), "x1.0"),
    "bench, summary": lambda: summary.summary_table(_measured("")["summary"]),
    "classify": lambda: classify._table(
        torch.tensor([0.75, 0.125, 0.0625, 0.03125, 0.03125]),
        ["Staffordshire bullterrier, Staffordshire bull terrier", "b", "c", "d", "e"],
    ),
    "compare": _changes,
    "guidelines": lambda: tables._table(_rows("-guidelines", "guidelines"), "G1"),
    "info --kernels": _kernels,
    "table8": lambda: tables._table(_rows("-table8", "table8"), "table8"),
}


def _shown(table: FittedTable, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(table)
    file: Any = console.file
    written: str = file.getvalue()
    return written


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", list(TABLES))
def test_tables_lose_nothing(name: str, width: int) -> None:
    table = TABLES[name]()
    written = _shown(table, width)
    assert "…" not in written
    assert max(map(len, written.splitlines())) <= width
    numbers: Counter[str] = Counter()
    for column in table.columns:
        cells = [str(cell) for cell in column.cells]
        if column.justify == "right":
            numbers.update(cells)
        for word in " ".join(cells).split():
            assert word[:12] in written
    assert numbers
    for number, count in numbers.items():
        assert written.count(number) >= count, number


@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_is_a_line_where_it_fits(width: int) -> None:
    """A row is a paragraph only where its numbers do not fit beside each other."""
    lines = _shown(TABLES["bench, layers"](), width).splitlines()
    assert any("of the time" in line and "ms beyond it" in line for line in lines[:3])


@pytest.mark.parametrize("width", WIDTHS)
def test_commands_keep_to_the_width(tmp_path: Path, width: int) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    write_result(a_result(), before)
    changed = a_result(2.0)
    changed["machine"]["cpu"] = "A CPU of a name that goes on and on for sixty columns or more"
    write_result(changed, after)
    compared = run("compare", before, after, columns=width)
    about = run("info", columns=width)
    for result in (compared, about):
        assert result.exit_code == 0, result.output
        assert max(map(len, result.output.splitlines())) <= width
        assert "…" not in result.output
    for number in ("8.000", "16.000", "0.50x", "3000.000", "6000.000"):
        assert number in compared.output
    assert torch.__version__ in about.output
