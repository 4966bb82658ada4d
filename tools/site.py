"""Hooks of MkDocs: pages that lie outside ``docs``, links between them, and pictures of results.

The Markdown files link to each other as code hosts want it, by their places in the repository. The
site has some of them elsewhere, so links are written anew for it, and a link to what it lacks fails
the build (``mkdocs build --strict``).
"""

from __future__ import annotations

import ast
import html
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

from snv2_bench.cli.files import read_result
from snv2_bench.cli.page import sections_of
from snv2_bench.cli.page_parts import Chart
from snv2_bench.cli.report import page_of

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}  # fmt: skip
# Pages that stand for folders, and for what they say themselves.
FOLDERS = {
    "benchmarks/results/mixed": "benchmarks.md",
    "benchmarks/results/relatives": "benchmarks.md",
    "examples": "examples.md",
    "examples/cpp": "examples.md",
    "examples/triton_server/README.md": "examples.md",
}
DATA = sorted(ROOT.glob("benchmarks/results/**/*.json"))
LANGUAGES = {".cpp": "cpp", ".c": "c", ".py": "python", ".txt": "cmake", ".pbtxt": "", ".ipynb": ""}
EXAMPLES = sorted(
    path
    for path in (ROOT / "examples").rglob("*.*")
    if path.suffix in LANGUAGES and "__pycache__" not in path.parts
)
REPORT = "report.html"
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>~?([^<]+)</code>")

FOREIGN = re.compile(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"')
LOG = get_plugin_logger("site")

_charts = ""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and data from outside ``docs``, and the report on all results."""
    global _charts  # noqa: PLW0603 - hooks have no other place to keep what they made
    for source, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text()))
    for path in (*DATA, *EXAMPLES):
        place = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(path)))
    results = [
        (path.name, read_result(str(path))) for path in DATA if path.parent.name == "results"
    ]
    sections = sections_of(results)
    files.append(File.generated(config, REPORT, content=page_of(results, sections)))
    shown = [part for s in sections for part in (*s.aside, *s.parts) if isinstance(part, Chart)]
    _charts = "".join(
        f'<figure><div role="img" aria-label="{html.escape(chart.alt)}">{chart.svg}</div>'
        f"<figcaption>{html.escape(chart.caption)}</figcaption></figure>"
        for chart in shown
    )
    _check_api()
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Write links for the site, and show the examples' sources."""
    name = page.file.src_uri
    source = next((key for key, place in PAGES.items() if place == name), f"docs/{name}")

    def rewrite(link: re.Match[str]) -> str:
        before, target, anchor, after = link.groups()
        if "://" in target:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = (PAGES | FOLDERS).get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(place) is None:
            LOG.warning("%s links to %s, which the site lacks", source, target)
        relative = posixpath.relpath(place, posixpath.dirname(name) or ".")
        return f"{before}{relative}{anchor or ''}{after}"

    written = LINK.sub(rewrite, markdown)
    if name == "examples.md":
        for path in EXAMPLES:
            if path.suffix != ".ipynb":
                written += (
                    f"\n## {path.relative_to(ROOT).as_posix()}\n\n"
                    f"```{LANGUAGES[path.suffix]}\n{path.read_text()}```\n"
                )
    return written


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Show docstrings' roles as plain code, and pictures of the results."""
    if page.file.src_uri == "benchmarks.md":
        content += (
            f'<p><a href="{REPORT}">All results on one page</a>, with every table.</p>'
            f'<div class="charts">{_charts}</div>'
        )
    return ROLE.sub(r"<code>\1</code>", content)


def on_post_build(config: Any) -> None:
    """Raise where a page would load something from another host."""
    for path in Path(config.site_dir).rglob("*.html"):
        found = FOREIGN.search(path.read_text())
        if found is not None:
            raise PluginError(f"{path}: loads from another host: {found[0]}")


def _public(module: str) -> set[str]:
    tree = ast.parse((ROOT / module).read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise PluginError(f"{module}: no __all__")


def _check_api() -> None:
    """Raise unless every public name has its place in docs/api.md."""
    documented = {
        line.split(".")[-1]
        for line in (ROOT / "docs/api.md").read_text().splitlines()
        if line.startswith("::: ")
    }
    modules = ("__init__.py", "models/__init__.py", "nn/__init__.py", "ops.py")
    public = set().union(*(_public(f"snv2_kernels/{module}") for module in modules))
    missing = sorted(public - documented - {"models", "nn", "ops", "quantization"})
    if missing:
        raise PluginError(f"docs/api.md lacks {', '.join(missing)}")
