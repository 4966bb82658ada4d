"""What a page of results consists of: sections of words, tables and charts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from snv2_bench.cli import charts
from snv2_bench.cli.summary import CASE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from matplotlib.figure import Figure

    from snv2_bench.cli.schema import Percentiles

__all__ = [
    "Cell",
    "Chart",
    "Fold",
    "Section",
    "Table",
    "Tile",
    "case_cells",
    "count",
    "groups_of",
    "number",
    "span",
    "table_of",
    "text",
]


_SETTINGS = (*CASE, "device", "input")


@dataclass(frozen=True)
class Cell:
    """What stands in a table, and what it is sorted by."""

    text: str
    order: float | str | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells; on a narrow page a block for each row, headed by its titles and chief cell."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    chief: str = ""  # heading of the number that a reader looks for; none in a list of facts
    titles: Sequence[str] = ()  # headings that say what a row is about


@dataclass(frozen=True)
class Chart:
    svg: str
    alt: str  # in its place for those who do not see it
    caption: str


@dataclass(frozen=True)
class Tile:
    """A number in large type, and what it is."""

    value: str
    what: str


@dataclass(frozen=True)
class Fold:
    """Details that open at a click."""

    title: str
    parts: Sequence[Table | Chart]


@dataclass
class Section:
    name: str  # unique on the page
    title: str
    words: list[str] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    aside: list[Chart] = field(default_factory=list)  # at the side of words and `beside`
    beside: list[Table] = field(default_factory=list)
    parts: list[Table | Chart | Fold] = field(default_factory=list)  # as wide as the page

    def chart(self, figure: Figure, alt: str, caption: str) -> Chart:
        """A chart of this section; ids in it begin with the section's name."""
        self._charts = getattr(self, "_charts", 0) + 1
        return Chart(charts.svg(figure, f"{self.name}-{self._charts}"), alt, caption)


def number(value: float | None, form: str) -> Cell:
    """A number as ``form`` writes it, sorted by its value; a dash for None."""
    return Cell("-", -math.inf) if value is None else Cell(form.format(value), value)


def text(value: object) -> Cell:
    return Cell("-" if value is None else str(value))


def count(value: int | None) -> Cell:
    return number(value, "{:,}")


def span(percentiles: Percentiles, form: str, low: str = "p10", high: str = "p90") -> Cell:
    if low not in percentiles or high not in percentiles:
        return number(None, form)
    text = f"{form.format(percentiles[low])} - {form.format(percentiles[high])}"
    return Cell(text, percentiles[low])


def table_of(
    caption: str, headings: Sequence[str], rows: Sequence[Sequence[Cell]],
    chief: str, titles: Sequence[str],
) -> Table:  # fmt: skip
    """A table without the columns of settings, or of reasons, that say the same in every row."""
    said = []
    keep = []
    for index, heading in enumerate(headings):
        texts = {row[index].text for row in rows}
        dull = texts == {""} or (heading in _SETTINGS and len(texts) == 1)
        if dull and texts != {""}:
            said.append(f"{heading} {texts.pop()}")
        if not dull:
            keep.append(index)
    return Table(
        f"{caption} ({', '.join(said)})" if said else caption,
        [headings[index] for index in keep],
        [[row[index] for index in keep] for row in rows],
        chief,
        titles,
    )


def case_cells(row: Mapping[str, Any]) -> list[Cell]:
    return [text(row[key]) for key in CASE]


def groups_of(
    rows: Iterable[Mapping[str, Any]], keys: Sequence[str]
) -> Iterator[tuple[tuple[Any, ...], list[Any]]]:
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    yield from groups.items()
