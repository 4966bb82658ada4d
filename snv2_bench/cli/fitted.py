"""Tables for terminals of any width, which lose no cell."""

from __future__ import annotations

import copy
import textwrap
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Column

__all__ = ["FittedTable"]

_TEXT_LEAST = 16  # columns that a text is folded to before rows are stacked
# Boxes and paddings to try, and how many characters of a line each column and the edges take.
_FORMS: tuple[tuple[box.Box, tuple[int, int, int, int], int, int], ...] = (
    (box.HEAVY_HEAD, (0, 1, 0, 1), 3, 1),
    (box.SIMPLE_HEAD, (0, 1, 0, 0), 2, 0),
    (box.SIMPLE_HEAD, (0, 0, 0, 0), 1, 0),
)


class FittedTable(Table):
    """A table whose numbers are never cut or wrapped.

    Where it is too wide it goes without its box, then texts and headings are folded, and at last
    each row is a paragraph: its first cell, and the others behind their headings.
    """

    def __init__(self, title: str | None = None) -> None:
        super().__init__(title=title, title_justify="left")

    def add_texts(self, *headings: str) -> None:
        """Add columns of text, which may be folded."""
        for heading in headings:
            self.add_column(heading, overflow="fold")

    def add_numbers(self, *headings: str) -> None:
        """Add columns of numbers, which stay in one line."""
        for heading in headings:
            self.add_column(heading, justify="right", no_wrap=True, overflow="fold")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        natural, least = zip(*map(_widths, self.columns), strict=True)
        for folds in (False, True):
            widths = least if folds else natural
            for edges, padding, each, ends in _FORMS:
                if sum(widths) + each * len(widths) + ends <= options.max_width:
                    shown = copy.copy(self)
                    shown.box, shown.padding = edges, padding
                    shown.show_edge = edges is box.HEAVY_HEAD
                    if folds:
                        shown.columns = list(map(_folded, self.columns))
                    yield from Table.__rich_console__(shown, console, options)
                    return
        yield from self._paragraphs(options.max_width)

    def _paragraphs(self, width: int) -> Iterator[Text]:
        if self.title:
            yield Text(str(self.title), style="table.title", overflow="fold")
        rows = zip(*(column.cells for column in self.columns), strict=True)
        for row, (first, *cells) in zip(self.rows, rows, strict=True):
            head = _text(first)
            head.stylize("bold")
            head.overflow = "fold"
            yield head
            line = Text("  ", overflow="fold")
            for column, cell in zip(self.columns[1:], map(_text, cells), strict=True):
                if not cell.plain:
                    continue
                pair = Text.assemble((f"{column.header} " if column.header else "", "dim"), cell)
                if row.style:
                    pair.stylize(row.style)
                if line.cell_len > 2 and line.cell_len + 2 + pair.cell_len > width:
                    yield line
                    line = Text("  ", overflow="fold")
                line = line + ("  " if line.cell_len > 2 else "") + pair
            if line.cell_len > 2:
                yield line


def _text(cell: Any) -> Text:
    return cell.copy() if isinstance(cell, Text) else Text(str(cell))


def _is_number(column: Column) -> bool:
    return column.justify == "right"


def _widths(column: Column) -> tuple[int, int]:
    """As wide as all of it, and as it may become."""
    heading = _text(column.header)
    cells = max((_text(cell).cell_len for cell in column.cells), default=0)
    natural = max(heading.cell_len, cells)
    if not _is_number(column):
        return natural, min(natural, _TEXT_LEAST)
    word = max((len(word) for word in heading.plain.split()), default=0)
    return natural, max(cells, word)


def _folded(column: Column) -> Column:
    """A column whose heading takes no more room than its numbers."""
    if not _is_number(column):
        return column
    folded = copy.copy(column)
    _, least = _widths(column)
    folded.header = "\n".join(textwrap.wrap(_text(column.header).plain, least))
    return folded
