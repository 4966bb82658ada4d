"""The page of ``snv2 report`` as Chromium lays it out, on a phone and on desktops."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from _browser import chromium, show
from _cli import run
from _results import a_result

from snv2_bench.cli.files import read_result, write_result
from snv2_bench.cli.summary import summary_of

pytest.importorskip("itables")
if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
PHONE, DESKTOPS = 390, (1280, 1440, 1920)

# Text that is drawn: its box, size, colour and what is behind it. Tables scroll inside their boxes,
# so of boxes only the horizontal extent counts for text in them.
TEXTS = """
const seen = [];
const channels = c => c.match(/[\\d.]+/g).map(Number);
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, element = node.parentElement;
  if (!node.data.trim() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
  const range = document.createRange();
  range.selectNodeContents(node);
  const box = range.getBoundingClientRect();
  if (!box.width) continue;
  let behind = element;
  while (behind && (channels(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0)
    behind = behind.parentElement;
  const style = getComputedStyle(element), svg = element.closest("svg");
  const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  seen.push({
    text: node.data.trim(), size: parseFloat(style.fontSize) * scale,
    box: [box.left, box.top, box.right, box.bottom],
    colour: channels(svg ? style.fill : style.color),
    behind: behind ? channels(getComputedStyle(behind).backgroundColor) : [255, 255, 255],
    figure: [...document.querySelectorAll("figure")].indexOf(element.closest("figure")),
  });
}
return seen;
"""

OPEN = "for (const fold of document.querySelectorAll('details')) fold.open = true;"

CELLS = """
return [...document.querySelectorAll("table.sortable tbody tr")].map(row =>
  [...row.cells].filter(cell => cell.textContent).map(cell => {
    const box = cell.getBoundingClientRect();
    return [cell.classList.contains("chief"), cell.textContent, box.left, box.right];
  }));
"""

WIDTHS = """
const root = document.documentElement;
return {
  page: [root.scrollWidth, root.clientWidth],
  main: document.querySelector("main").getBoundingClientRect().width,
  scrolling: [...document.querySelectorAll(".scroll")]
    .filter(box => box.scrollWidth > box.clientWidth).map(box => box.ariaLabel),
};
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The committed results of x1.0, and a result with every section and a long reason."""
    folder = tmp_path_factory.mktemp("page")
    files = []
    for path in sorted(RESULTS.glob("*.json")):
        result: Any = read_result(str(path))
        for name in ("rows", "layers", "startup"):
            result[name] = [row for row in result.get(name, []) if row["width"] == "x1.0"]
        result["summary"] = summary_of(result["rows"])
        result["guidelines"] = [r for r in result.get("guidelines", []) if r["table"] == "unit"]
        files.append(folder / path.name)
        write_result(result, files[-1])
    files.append(folder / "a-result-with-every-section.json")
    write_result(a_result(), files[-1])
    out = run("report", *files, "-o", folder / "page.html")
    assert out.exit_code == 0, out.output
    return (folder / "page.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


def _luminance(colour: list[float]) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(text: dict[str, Any]) -> float:
    """WCAG's ratio."""
    dark, light = sorted((_luminance(text["colour"]), _luminance(text["behind"])))
    return (light + 0.05) / (dark + 0.05)


def _overlap(a: list[float], b: list[float]) -> bool:
    """More than a line box has around its letters."""
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    return across > 1 and down > 0.3 * min(a[3] - a[1], b[3] - b[1])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, *DESKTOPS])
def test_text_is_readable(browser: Any, page: str, width: int, scheme: str) -> None:
    """Small labels of charts, grey on grey, labels of charts over each other or beside the page."""
    show(browser, page, width, scheme)
    browser.execute_script(OPEN)
    texts = browser.execute_script(TEXTS)
    assert len(texts) > 1000
    assert [t["text"] for t in texts if t["size"] < 12] == []
    assert [(t["text"], t["colour"], t["behind"]) for t in texts if _contrast(t) < 4.5] == []
    paper = texts[0]["behind"]
    assert (_luminance(paper) < 0.1) == (scheme == "dark")
    drawn = [t for t in texts if t["figure"] >= 0]
    assert [t["text"] for t in drawn if t["box"][0] < 0 or t["box"][2] > width] == []
    clashes = [
        (a["text"], b["text"])
        for index, a in enumerate(drawn)
        for b in drawn[index + 1 :]
        if a["figure"] == b["figure"] and _overlap(a["box"], b["box"])
    ]
    assert clashes == []


def test_phone_shows_each_number_without_scrolling_sideways(browser: Any, page: str) -> None:
    show(browser, page, PHONE, "light")
    browser.execute_script(OPEN)
    found = browser.execute_script(WIDTHS)
    assert found["page"][0] <= found["page"][1]
    assert found["scrolling"] == []
    rows = browser.execute_script(CELLS)
    assert len(rows) > 100
    for row in rows:
        (chief,) = [cell for cell in row if cell[0]]
        assert chief[1].strip()
        assert all(0 <= left < right <= PHONE for _, _, left, right in row), row


@pytest.mark.parametrize("width", DESKTOPS)
def test_desktop_uses_its_width(browser: Any, page: str, width: int) -> None:
    """No narrow column in the middle, no table that is wider than its place."""
    show(browser, page, width, "light")
    browser.execute_script(OPEN)
    found = browser.execute_script(WIDTHS)
    assert found["page"][0] <= found["page"][1]
    assert found["main"] >= 0.85 * width
    assert found["scrolling"] == []
