"""The group of commands that ``snv2`` runs. A command's module, and torch with it, is imported when
the command is run, so that help and errors need not wait for them."""

from __future__ import annotations

import importlib

import click

from snv2_bench.cli.errors import Commands

__all__ = ["COMMANDS", "app"]

# Each is a function of its name in a module of its name; its line in the help is the first sentence
# of its own.
COMMANDS = {
    "bench": "Time the fused network beside other ways to run it, taking turns.",
    "classify": "Show the five likeliest classes of each IMAGE.",
    "compare": "Say how two results of `snv2 bench` differ.",
    "export": "Write a network as one file, which C++ programs and `snv2 run` take.",
    "guidelines": "The paper's guidelines G1 to G4 again, and G4 for ShuffleNet units.",
    "info": "Show the machine, the versions and which backends can run.",
    "report": "Make a page of results of `snv2 bench` and the commands that write the same files.",
    "run": "Show the five likeliest classes of each IMAGE by a network of `snv2 export`.",
    "table8": "ShuffleNet v2 and v1, MobileNet v1 and v2 side by side, as in the paper's Table 8.",
    "verify": "Compare every op, unit and network with float64, and with eager PyTorch's error.",
}


class _Imported(Commands):
    """Commands that are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"snv2_bench.cli.{name}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        room = formatter.width - 6 - max(map(len, COMMANDS))
        with formatter.section("Commands"):
            rows = [(name, _shortened(line, room)) for name, line in COMMANDS.items()]
            formatter.write_dl(rows)


def _shortened(line: str, room: int) -> str:
    """A line in ``room`` columns, cut between words."""
    return click.Command(None, help=line).get_short_help_str(room)


@click.group(cls=_Imported, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="snv2_kernels", prog_name="snv2_kernels")
def app() -> None:
    """ShuffleNet V2 units and networks as fused kernels for PyTorch."""
