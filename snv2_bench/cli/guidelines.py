"""``snv2 guidelines``: the paper's Tables 1 to 4 on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from snv2_bench.cli.common import AMOUNT, checked_peers
from snv2_bench.cli.tables import run_and_write, table_options
from snv2_bench.guidelines.cases import TABLES, guideline_groups

if TYPE_CHECKING:
    import torch

__all__ = ["guidelines"]


@click.command()
@click.option(
    "--table", "tables", multiple=True, default=TABLES, show_default=True,
    type=click.Choice(TABLES), help="What to measure. May be repeated.",
)  # fmt: skip
@click.option("--batch", default=1, show_default=True, type=AMOUNT, help="Images in a call.")
@table_options(quick="Only the smallest scale, and of the units only stage 2")
def guidelines(
    tables: tuple[str, ...],
    batch: int,
    device: torch.device,
    threads: tuple[int, ...],
    repeats: int | None,
    peers: tuple[str, ...],
    size: int | None,
    quick: bool,
    json_path: str | None,
    plot_folder: str | None,
) -> None:
    """The paper's guidelines G1 to G4 again, and G4 for ShuffleNet units.

    The set-ups are its Tables 1 to 4, on the CPU with its channels for ARM, on a GPU with those
    for its GPU; its speeds stand beside as ratios to the first row. `unit` and `stage` are one and
    ten units of x1.0 with less and less around their convolutions, as PyTorch runs them and fused.
    All of a table and scale take turns, each output is checked against float64 first, and Ctrl-C
    keeps what has been measured.
    """
    chosen = checked_peers(peers, device, ("eager", "fused"))
    settings = {
        "tables": tables, "device": device, "batch": batch, "threads": threads,
        "repeats": repeats, "peers": chosen, "size": size, "quick": quick,
    }  # fmt: skip
    run_and_write(
        "guidelines",
        lambda: guideline_groups(tables, device, batch, chosen, size, quick),
        settings,
        json_path,
        plot_folder,
    )
