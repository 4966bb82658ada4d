"""What the commands share: names of widths and dtypes, and where text goes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from snv2_bench.cli.errors import is_special
from snv2_bench.peers import peers_of
from snv2_kernels import backends, models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from snv2_bench.benchmarking import Turns

__all__ = [
    "AMOUNT", "DEVICE", "DTYPES", "FORMATS", "INTERRUPTED", "LOAD", "THREADS", "WIDTHS",
    "checked_peers", "exact_products", "measure", "output", "output_file", "progress",
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


def _device(context: click.Context, parameter: click.Parameter, name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise click.BadParameter(f"{name}: expected cpu or cuda, or cuda:1 and so on") from None
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"{name}: expected cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        why = f"there are {count}" if count else f"its backend is {backends()['cuda']}"
        raise click.BadParameter(f"{name}: there is no such GPU; {why}")
    return device


DEVICE = click.option(
    "--device", default="cpu", show_default=True, callback=_device,
    help="Where to run: cpu, cuda or cuda:1.",
)  # fmt: skip


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 as such on a GPU, where cuDNN measures its kernels first."""
    if device.type != "cuda":
        yield
        return
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)
    with torch.cuda.device(device), flags:
        yield


def checked_peers(peers: Sequence[str], device: torch.device, default: Sequence[str]) -> list[str]:
    """The peers that were asked for, or the default ones.

    Raises:
        click.BadParameter: if one does not run on the device.
    """
    for peer in peers:
        if peer not in peers_of(device):
            expected = ", ".join(peers_of(device))
            raise click.BadParameter(
                f"{peer}: expected one of {expected} on {device}", param_hint="--peer"
            )
    return list(peers or default)


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
