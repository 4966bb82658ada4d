"""The group of commands that ``snv2`` runs."""

import click

import snv2_kernels
from snv2_kernels.cli.bench import bench
from snv2_kernels.cli.classify import classify
from snv2_kernels.cli.compare import compare
from snv2_kernels.cli.errors import Commands
from snv2_kernels.cli.export import export
from snv2_kernels.cli.guidelines import guidelines
from snv2_kernels.cli.info import info
from snv2_kernels.cli.report import report
from snv2_kernels.cli.run import run
from snv2_kernels.cli.table8 import table8
from snv2_kernels.cli.verify import verify

__all__ = ["app"]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(snv2_kernels.__version__, prog_name="snv2_kernels")
def app() -> None:
    """ShuffleNet V2 units and networks as fused kernels for PyTorch."""


for command in (info, verify, bench, compare, report, guidelines, table8, classify, export, run):
    app.add_command(command)
