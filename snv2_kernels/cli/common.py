"""What the commands share: names of widths and dtypes, and where text goes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from snv2_kernels import models

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DTYPES", "FORMATS", "WIDTHS", "output", "progress"]

WIDTHS: dict[str, Callable[..., models.ShuffleNetV2]] = {
    "x0.5": models.shufflenet_v2_x0_5,
    "x1.0": models.shufflenet_v2_x1_0,
    "x1.5": models.shufflenet_v2_x1_5,
    "x2.0": models.shufflenet_v2_x2_0,
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

_FILE_COLUMNS = 160


def output() -> Console:
    """A console on standard output, wide enough not to wrap tables that go to a file."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
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
