"""``snv2 table8``: the speeds of the paper's Table 8 on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from snv2_bench.cli.common import AMOUNT, checked_peers
from snv2_bench.cli.tables import run_and_write, table_options
from snv2_bench.guidelines.cases import table8_group

if TYPE_CHECKING:
    import torch

__all__ = ["table8"]

# By type of device.
_BATCH = {"cpu": 1, "cuda": 8}
_PEERS = {
    "cpu": ("eager", "fused", "engine"),
    "cuda": ("eager", "channels_last", "cuda_graph", "fused", "engine"),
}


@click.command()
@click.option(
    "--batch", type=AMOUNT,
    help="Images in a call; by default the paper's, 1 on a CPU and 8 on a GPU.",
)  # fmt: skip
@table_options(quick="Only the two smaller sizes of each network")
def table8(
    batch: int | None,
    device: torch.device,
    threads: tuple[int, ...],
    repeats: int | None,
    peers: tuple[str, ...],
    size: int | None,
    quick: bool,
    json_path: str | None,
    plot_folder: str | None,
) -> None:
    """ShuffleNet v2 and v1, MobileNet v1 and v2 side by side, as in the paper's Table 8.

    Its batches a second on a GTX 1080 Ti stand beside, on the CPU too, as ratios to ShuffleNet v2
    1.0x; ours are to that network run in the same way. All networks take turns, each output is
    checked against float64 first, and Ctrl-C keeps what has been measured.
    """
    images = batch or _BATCH[device.type]
    chosen = checked_peers(peers, device, _PEERS[device.type])
    settings = {
        "device": device, "batch": images, "threads": threads, "repeats": repeats,
        "peers": chosen, "size": size, "quick": quick,
    }  # fmt: skip
    run_and_write(
        "table8",
        lambda: [table8_group(device, images, chosen, size, quick)],
        settings,
        json_path,
        plot_folder,
    )
