"""The parts of a results page: heatmaps, tables, curves and attention patterns, and tables as text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import TranscoderError
from ..text.columns import aligned
from ..text.printable import printable
from .lines import LineChart
from .plots import is_finite


@dataclass(frozen=True)
class Heatmap:
    """A table of numbers to be seen at once.

    Args:
        title (`str`):
            What it shows.
        values (`Sequence[Sequence[float | None]]`):
            Numbers of each row; `None` or NaN where there is none.
        rows, columns (`Sequence[str]`):
            Names of the rows and columns.
        row_label, column_label (`str`, *optional*, defaults to `"layer"` and `"head"`):
            What they are.
        low, high (`Sequence[Sequence[float | None]]`, *optional*):
            Ends of the interval of each number.
        marks (`Mapping[tuple[int, int], str]`, *optional*):
            Row and column -> a note on the cell, which gets a frame.
        note (`str`, *optional*):
            A sentence beneath.
        protocol (`Mapping[str, Any]`, *optional*):
            How the numbers were measured, for beneath the map.
    """

    title: str
    values: Sequence[Sequence[float | None]]
    rows: Sequence[str]
    columns: Sequence[str]
    row_label: str = "layer"
    column_label: str = "head"
    low: Sequence[Sequence[float | None]] | None = None
    high: Sequence[Sequence[float | None]] | None = None
    marks: Mapping[tuple[int, int], str] = field(default_factory=dict)
    note: str = ""
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("values", "low", "high"):
            table = getattr(self, name)
            if table is None:
                continue
            if len(table) != len(self.rows) or any(len(row) != len(self.columns) for row in table):
                raise TranscoderError(
                    f"The {name} of the heatmap '{self.title}' are not {len(self.rows)} rows of {len(self.columns)} "
                    "numbers: give one for each cell."
                )

    @property
    def limit(self) -> float:
        """The largest magnitude, at least a tiny number: where colours are strongest."""
        return max((abs(value) for row in self.values for value in row if is_finite(value)), default=0.0) or 1e-12


@dataclass(frozen=True)
class AttentionView:
    """Where one head looks in one prompt.

    Args:
        title (`str`): Which head and prompt.
        tokens (`Sequence[str]`): The tokens as text.
        pattern (`Sequence[Sequence[float]]`): For each token that looks, what it gives to each token; rows sum to 1.
        query (`int`, *optional*, defaults to -1): The token whose row is also shown on the text itself.
    """

    title: str
    tokens: Sequence[str]
    pattern: Sequence[Sequence[float]]
    query: int = -1


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers.

    Args:
        title (`str`): What it shows.
        headers (`Sequence[str]`): Names of the columns.
        rows (`Sequence[Sequence[Any]]`): Cells; floats are shown with four digits.
        note (`str`, *optional*): Sentences beneath.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: text, then tables, curves, maps and attention.

    Args:
        title (`str`): Heading.
        text (`str`, *optional*): A paragraph.
        tables (`Sequence[Table]`, *optional*): Tables.
        heatmaps (`Sequence[Heatmap]`, *optional*): Maps, two side by side where there is room.
        attention (`Sequence[AttentionView]`, *optional*): Patterns.
        charts (`Sequence[LineChart]`, *optional*): Curves, before the maps, two side by side where there is room.
    """

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    heatmaps: Sequence[Heatmap] = ()
    attention: Sequence[AttentionView] = ()
    charts: Sequence[LineChart] = ()


def tables_text(tables: Sequence[Table]) -> str:
    """Tables as aligned plain text for a terminal; what a terminal might act on in them is escaped."""
    lines = []
    for table in tables:
        rows = [[cell_text(cell) for cell in row] for row in table.rows]
        lines += ["", printable(table.title), aligned(table.headers, rows, left=len(table.headers), rule=False)]
        if table.note:
            lines.append(printable(table.note))
    return "\n".join(lines).lstrip()


def cell_text(value):
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return "–" if value is None else value


def fact_text(value):
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {fact_text(each)}" for key, each in value.items() if each is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(str(fact_text(each)) for each in value)
    return cell_text(value)
