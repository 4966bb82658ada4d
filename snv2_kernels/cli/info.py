"""``snv2 info``: the machine, the versions and the backends."""

import click
import torch
from rich.table import Table

import snv2_kernels
from snv2_kernels.cli.common import output
from snv2_kernels.cli.environment import isa_note, machine, versions

__all__ = ["info"]


@click.command()
def info() -> None:
    """Show the machine, the versions and which backends can run."""
    console = output()
    host, version = machine(), versions()
    about = Table.grid(padding=(0, 2))
    about.add_row("CPU", str(host["cpu"]))
    about.add_row("cores", f"{host['cores']}, of which this process may use {host['usable_cores']}")
    about.add_row("torch threads", str(torch.get_num_threads()))
    about.add_row("OS", str(host["os"]))
    about.add_row("Python", version["python"])
    about.add_row("PyTorch", version["torch"])
    about.add_row("snv2_kernels", version["snv2_kernels"])
    available = host["available_isas"]
    assert isinstance(available, list)
    about.add_row("instruction set", f"{host['isa']} (available: {', '.join(available)})")
    console.print(about)
    note = isa_note()
    if note is not None:
        console.print(note, style="yellow")

    backends = Table(title="backends", title_justify="left")
    backends.add_column("backend")
    backends.add_column("status")
    for name, status in snv2_kernels.backends().items():
        backends.add_row(name, status, style="green" if status.startswith("ok") else "dim")
    console.print()
    console.print(backends)
