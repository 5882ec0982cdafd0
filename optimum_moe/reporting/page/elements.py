"""What a report is made of: sections of texts, tables and pictures, as data that the template turns into HTML.

Pictures are geometry in boxes that stretch to the width of the page; all of their text is HTML beside them, so that it
keeps its size on a phone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Args:
        text: Its sentences.
    """

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Missing:
    """What the report cannot show, and how to get it.

    Args:
        what: In a sentence.
        remedy: What to do about it, in a sentence that ends before the command.
        command: A command of the shell; empty for none.
    """

    kind: ClassVar[str] = "missing"
    what: str
    remedy: str = ""
    command: str = ""


@dataclass(frozen=True)
class Code:
    """Text in the type of a terminal.

    Args:
        title: What it is.
        text: The lines.
    """

    kind: ClassVar[str] = "code"
    title: str
    text: str


@dataclass(frozen=True)
class Tile:
    """One number that is shown large.

    Args:
        label: What it is.
        value: The number with its unit.
        note: What it is compared with; empty for nothing.
    """

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """Numbers beside each other.

    Args:
        tiles: In their order.
    """

    kind: ClassVar[str] = "tiles"
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Table:
    """A table; columns of numbers are aligned to the right.

    Args:
        title: What it shows.
        header: Names of the columns.
        rows: Cells of each row, the first of which names it.
        folded: Whether it is closed until the reader opens it.
    """

    kind: ClassVar[str] = "table"
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Whether each column holds numbers."""
        columns = zip(*self.rows, strict=True) if self.rows else ((),) * len(self.header)
        return tuple(any(cells) and all(_is_number(cell) for cell in cells) for cells in columns)


_NUMBER = re.compile(r"[-+x]?[\d.,]+(e[-+]?\d+)?%?( .*)?")
"""A number, with or without something behind it. A digest is none, whatever it begins with."""


def _is_number(cell: str) -> bool:
    return cell in ("", "–") or _NUMBER.fullmatch(cell) is not None


@dataclass(frozen=True)
class Tick:
    """A label on an axis.

    Args:
        at: Its place in percent of the axis, from the left or the top.
        text: The label.
    """

    at: float
    text: str


@dataclass(frozen=True)
class Swatch:
    """An entry of a legend.

    Args:
        style: Number of the color, texture or line.
        text: What it means.
    """

    style: str
    text: str


@dataclass(frozen=True)
class Row:
    """A row of a map.

    Args:
        title: What it shows, for readers that point at it.
        paths: Style and path of all cells of that style.
    """

    title: str
    paths: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A picture with two axes.

    Args:
        identifier: Unique in the page.
        title: What it shows.
        description: How to read it, for those who do not see it as well.
        x_label: What the horizontal axis is.
        x_ticks: Labels under it.
        y_label: What the vertical axis is.
        y_ticks: Labels beside it.
        table: The same in numbers.
    """

    identifier: str
    title: str
    description: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_label: str
    y_ticks: tuple[Tick, ...]
    table: Table


@dataclass(frozen=True, kw_only=True)
class Map(Plot):
    """Rows of cells, one row for each block.

    Args:
        columns: Width of the map in cells.
        rows: From the top.
        legend: Styles that occur.
        textured: Whether styles are categories, which have textures, else levels of one color.
    """

    kind: ClassVar[str] = "map"
    columns: int
    rows: tuple[Row, ...]
    legend: tuple[Swatch, ...]
    textured: bool

    @property
    def row_height(self) -> int:
        """Height of a row in pixels: maps of few rows have high ones."""
        return max(9, min(34, 320 // max(len(self.rows), 1)))


@dataclass(frozen=True)
class Line:
    """One series of a chart.

    Args:
        style: Number of its color and dashes.
        label: What it is; empty for a line without an entry in the legend.
        path: Its line; empty for points alone.
        points: Its points as a path.
        whiskers: Its intervals as a path.
    """

    style: str
    label: str
    path: str = ""
    points: str = ""
    whiskers: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart(Plot):
    """Lines and points in a box.

    Args:
        lines: The series.
        marks: Vertical lines with a label each.
    """

    kind: ClassVar[str] = "chart"
    lines: tuple[Line, ...]
    marks: tuple[Tick, ...] = ()


@dataclass(frozen=True)
class Tree:
    """A dendrogram above a strip of its leaves.

    Args:
        identifier: Unique in the page.
        title: What it shows.
        description: How to read it, for those who do not see it as well.
        path: The branches, in a box of 100 x 100.
        leaves: Width of the strip in cells.
        strip: Style and path of all cells of that style, one unit high.
        ticks: Labels of the leaves.
        table: Groups and their members.
    """

    kind: ClassVar[str] = "tree"
    identifier: str
    title: str
    description: str
    path: str
    leaves: int
    strip: tuple[tuple[str, str], ...]
    ticks: tuple[Tick, ...]
    table: Table


@dataclass(frozen=True)
class Words:
    """Some words of a text.

    Args:
        text: The words, with the space around them.
        differs: Whether the other text has others in their place.
    """

    text: str
    differs: bool


@dataclass(frozen=True)
class Continuation:
    """What two models wrote after the same prompt.

    Args:
        title: Which prompt it is.
        prompt: The end of the prompt.
        original: Words of the original model.
        model: Words of the compressed one.
        summary: How they differ, in a sentence.
    """

    kind: ClassVar[str] = "continuation"
    title: str
    prompt: str
    original: tuple[Words, ...]
    model: tuple[Words, ...]
    summary: str


Element = Text | Missing | Code | Tiles | Table | Map | Chart | Tree | Continuation


@dataclass(frozen=True)
class Section:
    """A part of the report with a heading.

    Args:
        identifier: Unique in the page.
        title: The heading.
        elements: In their order.
    """

    identifier: str
    title: str
    elements: Sequence[Element]
