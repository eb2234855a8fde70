"""Sections of a results page: tables, curves, heatmaps and attention patterns."""

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
    """A matrix of numbers shown by color.

    Args:
        title (`str`):
            Title of the heatmap.
        values (`Sequence[Sequence[float | None]]`):
            Numbers of each row; missing ones are `None` or NaN.
        rows, columns (`Sequence[str]`):
            Names of the rows and of the columns.
        row_label, column_label (`str`, *optional*, defaults to `"layer"` and `"head"`):
            Labels of the axes.
        low, high (`Sequence[Sequence[float | None]]`, *optional*):
            Ends of the confidence interval of each number.
        marks (`Mapping[tuple[int, int], str]`, *optional*):
            Row and column -> note on the cell, which gets a frame.
        note (`str`, *optional*):
            Sentence below the heatmap.
        protocol (`Mapping[str, Any]`, *optional*):
            Measurement protocol, shown below the heatmap.
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
                    "numbers: give one number for each cell."
                )

    @property
    def limit(self) -> float:
        """The largest magnitude, at which colors are strongest; positive even if all numbers are 0."""
        return max((abs(value) for row in self.values for value in row if is_finite(value)), default=0.0) or 1e-12


@dataclass(frozen=True)
class AttentionView:
    """Attention pattern of one head in one prompt.

    Args:
        title (`str`): Title with the head and the prompt.
        tokens (`Sequence[str]`): Tokens as text.
        pattern (`Sequence[Sequence[float]]`): Attention weights, one row per query token; rows sum to 1.
        query (`int`, *optional*, defaults to -1): Query token whose weights are also shown on the text.
    """

    title: str
    tokens: Sequence[str]
    pattern: Sequence[Sequence[float]]
    query: int = -1


@dataclass(frozen=True)
class Table:
    """A table of text and numbers.

    Args:
        title (`str`): Title of the table.
        headers (`Sequence[str]`): Names of the columns.
        rows (`Sequence[Sequence[Any]]`): Cells; floats are shown with four digits.
        note (`str`, *optional*): Sentences below the table.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A section of the page: warning, text, tables, curves, heatmaps and attention patterns, in this order.

    Args:
        title (`str`): Heading.
        text (`str`, *optional*): Paragraph below the heading.
        tables (`Sequence[Table]`, *optional*): Tables.
        heatmaps (`Sequence[Heatmap]`, *optional*): Heatmaps, two side by side on wide pages.
        attention (`Sequence[AttentionView]`, *optional*): Attention patterns, two side by side on wide pages.
        charts (`Sequence[LineChart]`, *optional*): Curves, two side by side on wide pages.
        warning (`str`, *optional*): Sentence why the results must not be trusted.
    """

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    heatmaps: Sequence[Heatmap] = ()
    attention: Sequence[AttentionView] = ()
    charts: Sequence[LineChart] = ()
    warning: str = ""


def tables_text(tables: Sequence[Table]) -> str:
    """Format tables as aligned plain text for a terminal, with control characters escaped."""
    lines = []
    for table in tables:
        rows = [[cell_text(cell) for cell in row] for row in table.rows]
        lines += ["", printable(table.title), aligned(table.headers, rows, left=len(table.headers), rule=False)]
        if table.note:
            lines.append(printable(table.note))
    return "\n".join(lines).lstrip()


def cell_text(value: Any) -> Any:
    """Format a cell: floats with four digits, and a dash for missing numbers."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return "–" if value is None else value


def fact_text(value: Any) -> Any:
    """Format a value of a protocol, including mappings and lists."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {fact_text(each)}" for key, each in value.items() if each is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(str(fact_text(each)) for each in value)
    return cell_text(value)
