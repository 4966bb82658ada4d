"""What ``snv2 guidelines`` and ``snv2 table8`` share: options, the run, tables and pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import torch
from rich.text import Text

from snv2_bench.cli.common import (
    AMOUNT,
    DEVICE,
    INTERRUPTED,
    THREADS,
    exact_products,
    measure,
    output,
    output_file,
    progress,
)
from snv2_bench.cli.files import write_result
from snv2_bench.cli.fitted import FittedTable
from snv2_bench.cli.results import new_result
from snv2_bench.cli.rule import upper_bound
from snv2_bench.cli.tables_plot import plot_ratios
from snv2_bench.peers import GPU_PEERS, PEERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from snv2_bench.cli.schema import Result
    from snv2_bench.guidelines.cases import Group

__all__ = ["run_and_write", "table_options"]

_REPEATS, _QUICK_REPEATS = 30, 5


def _folder(context: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """A folder that is there, and matplotlib, so that no run is lost for them."""
    if path is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            message = 'needs matplotlib: pip install "snv2_kernels[bench]"'
            raise click.BadParameter(message) from None
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise click.BadParameter(f"{path}: {error.strerror}") from None
    return path


def table_options(quick: str) -> Callable[[Any], Any]:
    """The options of both commands.

    Args:
        quick: what the option of that name leaves out.
    """
    options = [
        DEVICE,
        click.option(
            "--threads", multiple=True, default=[1], show_default=True,
            type=THREADS, help="Threads on the CPU. May be repeated.",
        ),
        click.option(
            "--repeats", type=AMOUNT,
            help=f"Timed turns of each network; by default {_REPEATS}, {_QUICK_REPEATS} with "
            "--quick.",
        ),
        click.option(
            "--peer", "peers", multiple=True, type=click.Choice(list(PEERS | GPU_PEERS)),
            help="A way to run the networks. May be repeated.",
        ),
        click.option(
            "--size", type=AMOUNT,
            help="Height and width of inputs, in place of the paper's.",
        ),
        click.option("--quick", is_flag=True, help=f"{quick}, and fewer turns."),
        click.option(
            "--json", "json_path", type=click.Path(dir_okay=False, writable=True),
            callback=output_file, help="Write the results to this file.",
        ),
        click.option(
            "--plot", "plot_folder", type=click.Path(file_okay=False), callback=_folder,
            help="Draw a picture of each table into this folder.",
        ),
    ]  # fmt: skip

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def run_and_write(
    key: str,
    groups: Callable[[], Iterable[Group]],
    settings: dict[str, Any],
    json_path: str | None,
    plot_folder: str | None,
) -> None:
    """Measure, print each group as it is done, and write what was asked for; until Ctrl-C.

    Args:
        key: of the rows in the result.
        groups: for one number of threads.
        settings: of the command.
        json_path: where the result goes.
        plot_folder: where the pictures go.
    """
    before = torch.get_num_threads()
    try:
        result = _run(key, groups, settings)
    finally:
        torch.set_num_threads(before)
    if json_path is not None:
        write_result(cast("Result", result), json_path)
    if plot_folder is not None:
        for name in dict.fromkeys(row.get("table", key) for row in result[key]):
            rows = [row for row in result[key] if row.get("table", key) == name]
            plot_ratios(rows, name, result, str(Path(plot_folder) / f"{name}.png"))
    if result["interrupted"]:
        sys.exit(INTERRUPTED)


def _run(
    key: str, groups: Callable[[], Iterable[Group]], settings: dict[str, Any]
) -> dict[str, Any]:
    console = output()
    device, quick = settings["device"], settings["quick"]
    settings = settings | {"device": str(device)}
    repeats = settings["repeats"] or (_QUICK_REPEATS if quick else _REPEATS)
    gpu = device.type == "cuda"
    result: dict[str, Any] = {**new_result(settings | {"repeats": repeats}), key: []}
    where = torch.cuda.get_device_name(device) if gpu else result["machine"]["cpu"]
    result["machine"]["device"] = where
    batch = settings["batch"]
    console.print(f"{where}, batch {batch}, float32, torch {result['versions']['torch']}")
    try:
        with progress() as bar, exact_products(device):
            for threads in (torch.get_num_threads(),) if gpu else settings["threads"]:
                torch.set_num_threads(threads)
                suffix = "" if gpu else f", {threads} thread{'s' if threads > 1 else ''}"
                for group in groups():
                    turns = group.turns(device, upper_bound("network", torch.float32))
                    title = group.title + suffix
                    try:
                        measure(turns, repeats, bar, title)
                    finally:
                        common = {"device": device.type, "batch": batch, "threads": threads}
                        rows = group.rows(turns.rows, common)
                        result[key] += rows
                        console.print()
                        console.print(_table(rows, title))
    except KeyboardInterrupt:
        result["interrupted"] = True
        console.print("interrupted; what was measured is above", style="yellow")
    return result


def _names(row: dict[str, Any]) -> dict[str, str]:
    """The columns that say what a row is of."""
    names: dict[str, str] = {k: row[k] for k in ("model", "size", "setting") if k in row}
    if "channels" in row:
        names["channels"] = ", ".join(map(str, row["channels"]))
    work = row["multiply_adds"]
    names["M multiply-adds"] = "-" if work is None else f"{work / 1e6:.1f}"
    return names | {"peer": row["peer"]}


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(rows: list[dict[str, Any]], title: str) -> FittedTable:
    table = FittedTable(title)
    table.add_texts(*_names(rows[0]))
    headings = ["error", "median ms", "p10 - p90 ms", "a second", "ratio"]
    paper = any(row["paper_per_s"] for row in rows)
    headings += ["paper's", "its ratio"] if paper else []
    compared = len({row["peer"] for row in rows}) > 1
    headings += ["vs eager"] if compared else []
    table.add_numbers(*headings)
    if any(row["reason"] for row in rows):
        table.add_texts("not measured because")
    for row in rows:
        percentiles = row["percentiles_ms"]
        spread = f"{percentiles['p10']:.3f} - {percentiles['p90']:.3f}" if percentiles else "-"
        cells = [_number(row["error"], ".1e"), _number(row["median_ms"], ".3f"), spread]
        cells += [_number(row["per_s"], ".1f"), _number(row["ratio"], ".2f")]
        if paper:
            cells += [_number(row["paper_per_s"], "g"), _number(row["paper_ratio"], ".2f")]
        if compared:
            cells.append("-" if row["speedup"] is None else f"{row['speedup']:.2f}x")
        reason = Text(row["reason"] or "", style="yellow")
        table.add_row(*_names(row).values(), *cells, *([reason] if row["reason"] else []))
    return table
