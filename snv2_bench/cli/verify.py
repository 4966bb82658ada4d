"""``snv2 verify``: the kernels on this machine against float64."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click
from rich.text import Text

from snv2_bench.benchmarking import one_line
from snv2_bench.cli.cases import all_cases
from snv2_bench.cli.common import DTYPES, output, progress
from snv2_bench.cli.fitted import FittedTable
from snv2_bench.cli.rule import allowed_error, describe_rule
from snv2_kernels import _native
from snv2_kernels.backends import NAMES, check_backend

if TYPE_CHECKING:
    from snv2_bench.cli.cases import Case

__all__ = ["verify"]


def _available(context: click.Context, parameter: click.Parameter, name: str) -> str:
    try:
        check_backend(_native.requested_backend() or name if name == "auto" else name)
    except (RuntimeError, ValueError) as error:
        raise click.BadParameter(str(error)) from None
    return name


def _check(case: Case, backend: str) -> tuple[bool, list[str]]:
    """Whether a case passes, and its cells: error, error of eager, bound, result."""
    try:
        ours, eager = case.errors()
    except Exception as error:  # a case that cannot run is a failure like any other
        return False, ["-", "-", "-", f"FAIL: {one_line(error)}"]
    bound = allowed_error(case.kind, DTYPES[case.dtype], eager)
    passed = ours <= bound  # false for NaN
    return passed, [f"{ours:.1e}", f"{eager:.1e}", f"{bound:.1e}", "ok" if passed else "FAIL"]


@click.command()
@click.option(
    "--backend", default="auto", show_default=True, type=click.Choice(NAMES), callback=_available,
    help="The backend to check.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Fewer shapes, and only the smallest network.")
def verify(backend: str, quick: bool) -> None:
    """Compare every op, unit and network with float64, and with eager PyTorch's error.

    The exit code is 1 if a comparison fails.
    """
    console = output()
    cases = all_cases(backend, quick)
    table = FittedTable()
    table.add_texts("case", "dtype", "format")
    table.add_numbers("error", "eager", "bound")
    table.add_texts("")
    failures = 0
    with progress() as bar:
        for case in bar.track(cases, description="verify"):
            passed, cells = _check(case, backend)
            failures += not passed
            *numbers, result = cells
            style = "green" if passed else "bold red"
            table.add_row(
                case.name, case.dtype, case.memory_format, *numbers, Text(result, style=style)
            )
    console.print(table)
    console.print(describe_rule())
    if failures:
        console.print(f"{failures} of {len(cases)} cases FAILED", style="bold red")
        sys.exit(1)
    console.print(f"all {len(cases)} cases passed", style="green")
