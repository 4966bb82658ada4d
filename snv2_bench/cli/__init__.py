"""The command line ``snv2``; ``app.py`` has the list of its commands."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; the entry point ``snv2``.

    click and rich are extras of the package, so they are looked for here and not at import.
    """
    try:
        import click  # noqa: F401
        import psutil  # noqa: F401
        import rich  # noqa: F401
    except ImportError as missing:
        print(
            f'snv2: the command line needs {missing.name}: pip install "snv2_kernels[cli]"',
            file=sys.stderr,
        )
        sys.exit(1)
    from snv2_bench.cli.app import app

    app(prog_name="snv2")
