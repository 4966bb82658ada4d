"""What the commands share: names of widths and dtypes, and where text goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from snv2_bench.cli.errors import is_special
from snv2_kernels import models

if TYPE_CHECKING:
    from collections.abc import Callable

    from snv2_bench.benchmarking import Turns

__all__ = [
    "AMOUNT", "DTYPES", "FORMATS", "INTERRUPTED", "LOAD", "THREADS", "WIDTHS", "measure",
    "output", "output_file", "progress",
]  # fmt: skip

WIDTHS: dict[str, Callable[..., models.ShuffleNetV2]] = {
    "x0.5": models.shufflenet_v2_x0_5,
    "x1.0": models.shufflenet_v2_x1_0,
    "x1.5": models.shufflenet_v2_x1_5,
    "x2.0": models.shufflenet_v2_x2_0,
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# Of images, pixels and calls: more overflows, or takes longer than anybody waits.
AMOUNT = click.IntRange(1, 1 << 20)
THREADS = click.IntRange(1, 1024)
LOAD = click.IntRange(0, 1024)

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended
_FILE_COLUMNS = 160


def output() -> Console:
    """A console on standard output, wide enough not to wrap tables that go to a file."""
    console = Console(highlight=False, markup=False)
    if console.width < 1 or (not console.is_terminal and "COLUMNS" not in os.environ):
        console.width = _FILE_COLUMNS
    return console


def progress() -> Progress:
    """A progress bar on standard error, which leaves nothing behind; silent in a file."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        refresh_per_second=2,  # drawing takes time from what is measured
        disable=not console.is_terminal,
    )


def output_file(context: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """A path that can be written, so that no run is lost for a mistyped one."""
    if path is not None:
        folder = Path(path).resolve().parent
        if not folder.is_dir():
            raise click.BadParameter(f"{path}: no such directory")
        if not os.access(path if is_special(path) else folder, os.W_OK):
            raise click.BadParameter(f"{path}: cannot be written")
    return path


def measure(comparison: Turns, repeats: int, bar: Progress, label: str) -> None:
    """Prepare and time all peers."""
    task = bar.add_task(label, total=len(comparison.rows) + repeats)
    try:
        for peer in comparison.rows:
            bar.update(task, description=f"{label}: preparing {peer}")
            comparison.prepare(peer)
            bar.advance(task)
        bar.update(task, description=f"{label}: timing")
        for _ in range(repeats):
            comparison.time_round()
            bar.advance(task)
    finally:
        bar.remove_task(task)
