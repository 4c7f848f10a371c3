"""Tables of text that fit a terminal: where it is narrow, intervals stand below values, and no word is broken."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

# What stays in one piece: an interval in brackets, a control, and a word.
_PIECE = re.compile(r"\[[^\[\]]*\]|\(control [^()]*\)|\S+")
# Where a cell goes on in the next line when it has to be narrow: before an interval and before a control.
_BREAK = re.compile(r" (?=\[|\(control)")
# Cells that say nothing.
_NOTHING = ("", "-")
# Columns of the terminal between two columns of a table.
_GAP = 2
# The least room that text of several words is laid out in; where columns leave less, rows become blocks.
_READABLE = 18


@dataclass(frozen=True)
class Narrow:
    """What a table gives up where it is narrow.

    Attributes:
        below: column -> the column in whose cells it stands as a line of its own, and how: ("value", "n {}").
        notes: columns of text, each cell of which becomes a line under the table.
        named: the columns that say in such a line which row it is about.
    """

    below: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    named: Sequence[str] = ()

    def table(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The columns that are left, with the others' cells in them."""
        shown = frame.copy()
        for column, (target, words) in self.below.items():
            if column in shown and target in shown:
                more = ["" if cell in _NOTHING else "\n" + words.format(cell) for cell in frame[column]]
                shown[target] = [stacked(cell) + line for cell, line in zip(shown[target], more, strict=True)]
        return shown.drop(columns=[*self.below, *self.notes], errors="ignore")

    def lines(self, frame: pd.DataFrame) -> list[str]:
        """What stands under the table."""
        return [
            f"{', '.join(str(row[name]) for name in self.named)}: {column}: {row[column]}"
            for row in frame.to_dict("records")
            for column in self.notes
            if row.get(column, "") not in _NOTHING
        ]


class FittedTable(Table):
    """A table of text that is laid out for the width it is shown in: as it is, stacked, or as a block for each row."""

    def __init__(self, frame: pd.DataFrame, title: str, narrow: Narrow | None = None) -> None:
        super().__init__(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        self._frame, self._narrow = frame.astype(str).rename(columns=str), narrow or Narrow()
        for heading in self._frame.columns:
            self.add_column(heading, overflow="fold")
        for row in self._frame.to_numpy().tolist():
            self.add_row(*map(Text, row))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What rich calls to show it."""
        if _natural(_cells(self._frame)) <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        frame = self._narrow.table(self._frame)
        if widths := fitted_widths(_cells(frame), options.max_width):
            yield self._stacked(frame, widths)
            yield from map(Text, self._narrow.lines(self._frame))
            yield Text("")
        else:
            yield Text(str(self.title), style="italic")
            yield from self._blocks(options.max_width)

    def _stacked(self, frame: pd.DataFrame, widths: Sequence[int]) -> Table:
        """The table with each column as wide as said, values above their intervals."""
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.show_edge = table.pad_edge = False
        for heading, width in zip(frame.columns, widths, strict=True):
            table.add_column(stacked(heading), width=width, overflow="fold")
        for row in frame.to_numpy().tolist():
            table.add_row(*(Text(stacked(cell)) for cell in row))
        return table

    def _blocks(self, room: int) -> list[RenderableType]:
        """Each row as a heading, its first cell, and a line for each of the others that says something."""
        shown: list[RenderableType] = []
        headings, *rows = _cells(self._frame)
        for first, *others in rows:
            said = [(heading, cell) for heading, cell in zip(headings[1:], others, strict=True) if cell not in _NOTHING]
            grid = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
            for width in fitted_widths(said, room - _GAP) or (None, None):  # a word wider than the terminal is folded
                grid.add_column(width=width, overflow="fold")
            for heading, cell in said:
                grid.add_row(Text(heading), Text(stacked(cell)))
            shown += [Text(""), Text(first, style="bold"), Padding(grid, (0, 0, 0, 2))]
        return [*shown, Text("")]


def stacked(cell: str) -> str:
    """A number above its interval and its control.

    >>> stacked("0.30 [0.25, 0.35] (control 0.10)").splitlines()
    ['0.30', '[0.25, 0.35]', '(control 0.10)']
    """
    return _BREAK.sub("\n", cell)


def fitted_widths(rows: Sequence[Sequence[str]], room: int) -> list[int]:
    """Widths of columns in which no word and no interval is broken; none where `room` is too little for that.

    Text of several words gets what is left, but never so little that a sentence stands in a pillar.

    >>> fitted_widths([["name", "value [95 %]"], ["reverse probability", "0.30 [0.25, 0.35]"]], 40)
    [19, 12]
    >>> fitted_widths([["name", "value [95 %]"], ["reverse probability", "0.30 [0.25, 0.35]"]], 20)
    []
    """
    columns = [[stacked(cell) for cell in column] for column in zip(*rows, strict=True)]
    pieces = [[piece for cell in column for piece in _PIECE.findall(cell)] for column in columns]
    least = [max(map(cell_len, found), default=1) for found in pieces]
    most = [max(map(_width, column)) for column in columns]
    widths = [max(low, min(high, _READABLE)) if high > 2 * low else low for low, high in zip(least, most, strict=True)]
    spare = room - sum(widths) - _GAP * (len(widths) - 1)
    if spare < 0:
        return []
    while spare and any(width < high for width, high in zip(widths, most, strict=True)):
        # The next character goes where text is folded most.
        place = max(range(len(widths)), key=lambda n: most[n] / widths[n])
        widths[place], spare = widths[place] + 1, spare - 1
    return widths


def _cells(frame: pd.DataFrame) -> list[list[str]]:
    """Headings and rows."""
    return [list(map(str, frame.columns)), *frame.to_numpy().tolist()]


def _natural(rows: Sequence[Sequence[str]]) -> int:
    """Columns of the terminal that a table takes when nothing is folded."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    return sum(widths) + (_GAP + 1) * len(widths) + 1


def _width(cell: str) -> int:
    return max((cell_len(line) for line in cell.splitlines()), default=0)
