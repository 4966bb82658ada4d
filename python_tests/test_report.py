"""The page of ``snv2 report``: well formed, complete, for everybody, and without a link outside."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from _cli import run
from _results import PEERS, a_result, row

from snv2_bench.cli.files import write_result
from snv2_bench.cli.page import words_of
from snv2_bench.cli.summary import summary_of

html5lib = pytest.importorskip("html5lib")
pytest.importorskip("itables")
H = "{http://www.w3.org/1999/xhtml}"


def _page(folder: Path, *results: Any) -> tuple[ET.Element, str]:
    files = []
    for index, result in enumerate(results):
        files.append(folder / f"r{index}.json")
        write_result(result, files[-1])
    path = folder / "deeper" / "page.html"
    out = run("report", *files, "-o", path)
    assert out.exit_code == 0, out.output
    text = path.read_text()
    short = re.sub(r'(id="datatables">)[^<]+', r"\1", text)
    assert len(text) - len(short) > 100_000
    parser = html5lib.HTMLParser(strict=True)  # raises where it is not well formed
    return parser.parse(short), short


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[ET.Element, str]:
    return _page(tmp_path_factory.mktemp("page"), a_result())


def _words(element: ET.Element) -> str:
    return re.sub(r"\s+", " ", "".join(element.itertext()))


def _sections(root: ET.Element) -> dict[str, ET.Element]:
    return {s.get("id", ""): s for s in root.iter(f"{H}section")}


def test_page_has_every_section(page: tuple[ET.Element, str]) -> None:
    root, _ = page
    sections = _sections(root)
    assert list(sections) == [
        "f0-summary", "f0-times", "f0-layers", "f0-startup", "f0-guidelines", "f0-table8", "f0-gpu",
        "origin",
    ]  # fmt: skip
    links = {a.get("href") for a in root.iter(f"{H}a")}
    assert links == {f"#{name}" for name in sections}
    said = _words(sections["f0-summary"])
    assert "snv2.Engine is 4.00 times as fast as the fastest other way" in said
    assert "Against eager PyTorch it is 11.31 times." in said  # 8 and 16
    assert "A <fast> CPU" in said
    assert "RuntimeError: <no> luck & more" in _words(sections["f0-times"])
    origin = _words(sections["origin"])
    for fact in ("0123abc", "snv2 bench --json out.json", "2.13.0+cpu", "avx2", "repeats"):
        assert fact in origin


def test_tables_hold_the_numbers_and_sort_by_them(page: tuple[ET.Element, str]) -> None:
    root, _ = page
    (table,) = [
        t for t in root.iter(f"{H}table") if _words(t).startswith(" Every way in every case")
    ]
    assert table.get("class") == "sortable"
    headings = [_words(th).strip() for th in table.iter(f"{H}th")]
    assert headings[:2] == ["threads", "peer"], "what all cases share stands in the caption"
    body = table.find(f"{H}tbody")
    assert body is not None
    rows = [list(tr) for tr in body]
    assert len(rows) == 2 * len(PEERS) + 1
    median = headings.index("median, ms")
    assert [r[median].text for r in rows[:4]] == ["8.000", "4.000", "2.000", "1.000"]
    assert [r[median].get("data-order") for r in rows[-2:]] == ["0.5", "-inf"]


def test_charts_tell_what_they_show(page: tuple[ET.Element, str]) -> None:
    root, _ = page
    figures = list(root.iter(f"{H}figure"))
    assert len(figures) >= 9
    for figure in figures:
        picture, caption = figure
        assert picture.get("role") == "img"
        assert len(picture.get("aria-label", "")) > 30
        assert _words(caption).strip()
        assert picture.find("{http://www.w3.org/2000/svg}svg") is not None
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))


def test_page_needs_no_network(page: tuple[ET.Element, str]) -> None:
    root, text = page
    for element in root.iter():
        for name in ("src", "href", "{http://www.w3.org/1999/xlink}href"):
            assert element.get(name, "#").startswith("#")
    (style,) = [e.text or "" for e in root.iter(f"{H}style") if "--ink" in (e.text or "")]
    assert "prefers-color-scheme: dark" in style
    assert "url(" not in style
    assert "width=device-width" in text
    assert "#010203" not in text.lower(), "lines of charts take the colour of the page"
    assert "DataTable" in text


def test_page_of_several_files(tmp_path: Path) -> None:
    other = a_result(2.0)
    other["interrupted"] = True
    for name in ("guidelines", "table8", "gpu", "layers", "startup"):
        del other[name]  # type: ignore[misc]
    root, _ = _page(tmp_path, a_result(), other)
    sections = _sections(root)
    assert list(sections)[:4] == ["f0-summary", "f1-summary", "f0-times", "f1-times"]
    assert "f1-layers" not in sections
    assert "Who is faster (r1.json, A <fast> CPU" in _words(sections["f1-summary"])
    assert "The run was interrupted" in _words(sections["f1-summary"])


def test_throughput_over_batches(tmp_path: Path) -> None:
    result = a_result()
    result["rows"] = [
        row("engine", 2.0) | {"batch": n, "images_per_s": 100.0} for n in (1, 64, 512)
    ]
    result["summary"] = summary_of(result["rows"])
    root, _ = _page(tmp_path, result)
    assert "Throughput, x1.0, fp32, threads 1." in _words(_sections(root)["f0-times"])
    assert "f0-summary" not in _sections(root), "nothing to compare with"


def test_text_is_shown_as_it_is(tmp_path: Path) -> None:
    """Not as mathematics, by those who draw; what a later version adds does no harm."""
    result = a_result()
    name = r"$\frac$ <b>"
    for line in (*result["rows"], *result["layers"][0]["kernels"], *result["startup"]):
        line.update({"peer": name, "kernel": name, "more": [[]]})
    result["floor"][0]["more"] = [[]]  # type: ignore[typeddict-unknown-key]
    root, _ = _page(tmp_path, result)
    assert name in _words(_sections(root)["f0-times"])


def test_words_say_when_ours_is_slower() -> None:
    result = a_result()
    result["rows"] = [row("eager", 1.0), row("engine", 1.25)]
    result["summary"] = summary_of(result["rows"])
    (sentence,) = words_of(result)
    assert "is 0.80 times as fast as the fastest other way to run the network (slower)" in sentence


def test_report_without_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_result(a_result(), path)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    out = run("report", path, "-o", tmp_path / "page.html")
    assert out.exit_code == 1
    assert 'the page needs jinja2: pip install "snv2_kernels[report]"' in out.output
    assert run("report").exit_code == 2
