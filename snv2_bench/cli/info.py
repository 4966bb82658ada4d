"""``snv2 info``: the machine, the versions and the backends."""

import click
import torch
from rich.table import Table

import snv2_kernels
from snv2_bench.cli.common import output
from snv2_bench.cli.environment import isa_note, machine, versions
from snv2_bench.cli.fitted import FittedTable
from snv2_kernels import cuda_kernels

__all__ = ["info"]


def _backends() -> FittedTable:
    table = FittedTable("backends")
    table.add_texts("backend", "status")
    for name, status in snv2_kernels.backends().items():
        table.add_row(name, status, style="green" if status.startswith("ok") else "dim")
    return table


def _occupancy(kernel: cuda_kernels.Kernel) -> tuple[str, str]:
    """CTAs and warps of an SM."""
    if kernel.max_threads is None:
        return "unknown", "unknown"  # without launch bounds the caller decides
    try:
        found = cuda_kernels.occupancy(
            kernel.arch,
            registers=kernel.registers,
            threads=kernel.max_threads,
            shared=kernel.shared,
            barriers=kernel.barriers,
        )
    except ValueError:  # an architecture newer than our table
        return "unknown", "unknown"
    return str(found.ctas), f"{found.warps} of {found.max_warps}"


def _kernels(build: cuda_kernels.Build) -> FittedTable:
    table = FittedTable(
        f"CUDA kernels for {', '.join(build.targets)}, compiled by nvcc {build.nvcc}; "
        "occupancy at the launch bounds, with no dynamic shared memory"
    )
    table.add_texts("kernel", "arch")
    table.add_numbers("registers", "shared, B", "spills, B", "threads/CTA", "CTAs/SM", "warps/SM")
    for kernel in build.kernels:
        spills = kernel.spill_stores + kernel.spill_loads
        table.add_row(
            kernel.kernel,
            kernel.arch,
            str(kernel.registers),
            str(kernel.shared),
            str(spills),
            str(kernel.max_threads or "unknown"),
            *_occupancy(kernel),
            style="red" if spills else None,
        )
    return table


@click.command()
@click.option(
    "--kernels", is_flag=True, help="Show instead what the CUDA kernels use: registers, memory."
)
def info(kernels: bool) -> None:
    """Show the machine, the versions and which backends can run."""
    console = output()
    if kernels:
        build = cuda_kernels.read_build()
        if build is None:
            console.print("The CUDA kernels were not built: install again with SNV2_CUDA=1.")
        else:
            console.print(_kernels(build))
        return
    host, version = machine(), versions()
    about = Table.grid(padding=(0, 2))
    about.add_column(no_wrap=True)
    about.add_column(overflow="fold")
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
    console.print()
    console.print(_backends())
