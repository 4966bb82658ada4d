"""``snv2 report``: results as a page that needs nothing but a browser."""

from __future__ import annotations

import base64
import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING

import click

from snv2_bench.cli.files import read_result

if TYPE_CHECKING:
    from snv2_bench.cli.page_parts import Section
    from snv2_bench.cli.schema import Result

__all__ = ["page_of", "render", "report"]

_EXTRA = 'pip install "snv2_kernels[report]"'


def render(files: list[tuple[str, Result]]) -> str:
    """The page as HTML: plots as SVG, tables that DataTables makes sortable, and no link outside.

    Args:
        files: names and results.

    Raises:
        ImportError: if a package of the extra ``report`` is missing.
    """
    from snv2_bench.cli.page import sections_of

    return page_of(files, sections_of(files))


def page_of(files: list[tuple[str, Result]], sections: list[Section]) -> str:
    """The page of sections that were made of these files."""
    import jinja2

    from snv2_bench.cli.page_parts import Chart, Fold, Table
    from snv2_bench.peers import OURS

    bundle = importlib.resources.files("itables") / "html" / "dt_bundle.js"
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("snv2_bench.cli", "."),
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    kinds = {Table: "table", Chart: "chart", Fold: "fold"}
    environment.filters["kind"] = lambda part: kinds[type(part)]
    page = environment.get_template("report.html.j2")
    # In base64, since the bundle has characters that are none of HTML's.
    datatables = base64.b64encode(bundle.read_bytes()).decode("ascii")
    made = page.render(sections=sections, files=files, ours=OURS, datatables=datatables)
    return f"{made}\n"


@click.command()
@click.argument(
    "files",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILES...",
)
@click.option(
    "-o", "--output", "page", default="report.html", show_default=True,
    type=click.Path(dir_okay=False, writable=True), help="The page.",
)  # fmt: skip
def report(files: tuple[str, ...], page: str) -> None:
    """Make a page of results of `snv2 bench` and the commands that write the same files.

    Summaries come first, then times, layers, start and memory, the paper's tables, and what
    produced it all. The page is one file and needs no network.
    """
    results = [(click.format_filename(path), read_result(path)) for path in files]
    try:
        text = render(results)
    except ImportError as missing:
        raise click.ClickException(f"the page needs {missing.name}: {_EXTRA}") from None
    Path(page).parent.mkdir(parents=True, exist_ok=True)
    Path(page).write_text(text, encoding="utf-8")
    click.echo(f"{click.format_filename(page)}: {len(text.encode()) / 1e6:.1f} MB")
