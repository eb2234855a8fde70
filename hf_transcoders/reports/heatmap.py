"""Heatmaps, patterns of attention and tables as PNG files and as one HTML page."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ..errors import TranscoderError
from ..files import atomic_file
from ..text.columns import aligned
from ..text.printable import printable
from .lines import LineChart
from .pictures import new_figure


# Readable on light and dark pages: what changes is their opacity.
POSITIVE, NEGATIVE = "#e8590c", "#1c7ed6"
_MOST_TICKS = 32


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
        return max((abs(value) for row in self.values for value in row if _is_number(value)), default=0.0) or 1e-12


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


def write_page(
    path: str | os.PathLike, title: str, sections: Sequence[Section], protocol: Mapping[str, Any] | None = None
) -> Path:
    """Write sections as one self-contained HTML file: no script, no request to anywhere.

    Args:
        path (`str` or `os.PathLike`): The file to write.
        title (`str`): Heading of the page.
        sections (`Sequence[Section]`): Its parts.
        protocol (`Mapping[str, Any]`, *optional*): How everything was measured, for the end of the page.

    Returns:
        `Path`: the file.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("hf_transcoders.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    environment.filters["fact"] = _fact
    environment.filters["token"] = _visible
    # All escape what they are given.
    environment.filters["curves"] = lambda chart: Markup(chart.svg())
    environment.filters["map"] = lambda heatmap: Markup(heatmap_svg(heatmap))
    environment.filters["matrix"] = lambda view: Markup(attention_svg(view))
    html = environment.get_template("heatmap.html").render(title=title, sections=sections, protocol=protocol or {})
    path = Path(path)
    with atomic_file(path) as partial:
        partial.write_text(html, encoding="utf-8")
    return path


def tables_text(tables: Sequence[Table]) -> str:
    """Tables as aligned plain text for a terminal; what a terminal might act on in them is escaped."""
    lines = []
    for table in tables:
        rows = [[_cell(cell) for cell in row] for row in table.rows]
        lines += ["", printable(table.title), aligned(table.headers, rows, left=len(table.headers), rule=False)]
        if table.note:
            lines.append(printable(table.note))
    return "\n".join(lines).lstrip()


def heatmap_svg(heatmap: Heatmap) -> str:
    """A heatmap as an `<svg>` element whose cells tell their number, interval and note on hover."""
    rows, columns = len(heatmap.rows), len(heatmap.columns)
    width, height = _cell_size(columns, 500), min(_cell_size(rows, 560), 20.0)
    # The legend is 190 wide, whatever the map.
    pad = max(0.0, (190 - columns * width) / 2 - 30)
    left = 28 + 7 * max(len(name) for name in heatmap.rows) + pad
    tilted = max(len(name) for name in heatmap.columns) * 7 > width
    bottom = 14 + (6 * max(len(name) for name in heatmap.columns) if tilted else 14)
    top, legend = 6, 26
    whole = (left + columns * width + 8 + pad + (30 if pad else 0), top + rows * height + bottom + 16 + legend)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole[0]:.0f} {whole[1]:.0f}" role="img" '
        f'style="max-width:{whole[0] * 1.25:.0f}px" aria-label="{escape(heatmap.title)}" '
        'font-family="system-ui, sans-serif" font-size="11" fill="currentColor">'
    ]
    for row, name in enumerate(heatmap.rows):
        y = top + row * height
        if row % _step(rows) == 0:
            parts.append(f'<text x="{left - 6}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for column in range(columns):
            parts.append(_svg_cell(heatmap, row, column, left + column * width, y, width, height))
    under = top + rows * height
    for column in range(0, columns, _step(columns)):
        x = left + (column + 0.5) * width
        turn = f' transform="rotate(-55 {x:.1f} {under + 13:.1f})" text-anchor="end"' if tilted else ""
        anchor = "" if tilted else ' text-anchor="middle"'
        parts.append(f'<text x="{x:.1f}" y="{under + 13:.1f}"{anchor}{turn}>{escape(heatmap.columns[column])}</text>')
    middle = left + columns * width / 2
    parts.append(f'<text x="{middle:.1f}" y="{under + bottom + 12:.1f}" text-anchor="middle" fill-opacity=".7">')
    parts.append(f"{escape(heatmap.column_label)}</text>")
    across = top + rows * height / 2
    parts.append(
        f'<text x="{11 + pad:.1f}" y="{across:.1f}" text-anchor="middle" fill-opacity=".7" '
        f'transform="rotate(-90 {11 + pad:.1f} {across:.1f})">{escape(heatmap.row_label)}</text>'
    )
    parts += _svg_legend(heatmap.limit, middle, under + bottom + 22)
    parts.append("</svg>")
    return "\n".join(parts)


def attention_svg(view: AttentionView) -> str:
    """A pattern as an `<svg>` element: rows look, columns are looked at, and hovering tells the share."""
    count = len(view.tokens)
    size = _cell_size(count, 440)
    names = [_visible(token) for token in view.tokens]
    step = 1 if size >= 9 else math.ceil(9 / size)
    margin = 8 + 6.4 * min(max(map(len, names)), 12)
    whole = margin + count * size + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole:.0f} {whole:.0f}" role="img" '
        f'style="max-width:{whole * 1.3:.0f}px" aria-label="{escape(view.title)}" '
        f'font-family="system-ui, sans-serif" font-size="{min(10.5, max(8, size)):.1f}" fill="currentColor">'
    ]
    steps = " ".join(f"h{size:.2f} v{size:.2f}" for _ in range(count))
    parts.append(f'<path d="M{margin:.1f} 2 {steps} H{margin:.1f} Z" fill="currentColor" fill-opacity=".05"/>')
    for at in range(0, count, step):
        along, name = margin + (at + 0.5) * size, escape(names[at][:12])
        parts.append(f'<text x="{margin - 4:.1f}" y="{2 + (at + 0.8) * size:.1f}" text-anchor="end">{name}</text>')
        below = 2 + count * size + 6
        parts.append(
            f'<text x="{along:.1f}" y="{below:.1f}" text-anchor="end" '
            f'transform="rotate(-90 {along:.1f} {below:.1f}) translate(0 {size / 3:.1f})">{name}</text>'
        )
    for query, row in enumerate(view.pattern):
        for key, share in enumerate(row):
            if share >= 0.005:
                hover = escape(f"{names[query]} → {names[key]}: {share:.4f}")
                parts.append(
                    f'<rect x="{margin + key * size:.1f}" y="{2 + query * size:.1f}" width="{size:.2f}" '
                    f'height="{size:.2f}" fill="{POSITIVE}" fill-opacity="{min(share, 1.0):.3f}">'
                    f"<title>{hover}</title></rect>"
                )
    parts.append("</svg>")
    return "\n".join(parts)


def write_png(path: str | os.PathLike, heatmap: Heatmap) -> Path:
    """Write a heatmap as a PNG file, its protocol in a line beneath.

    Raises:
        [`TranscoderError`]: matplotlib is not installed.
    """
    rows, columns = len(heatmap.rows), len(heatmap.columns)
    figure = new_figure(min(13, 2.6 + 0.32 * columns), min(12, 1.9 + 0.22 * rows))
    axes = figure.add_subplot()
    values = [[value if _is_number(value) else math.nan for value in row] for row in heatmap.values]
    image = axes.imshow(values, cmap="RdBu_r", vmin=-heatmap.limit, vmax=heatmap.limit, aspect="auto")
    axes.set_facecolor("#dddddd")
    axes.set_xticks(range(0, columns, _step(columns)), heatmap.columns[:: _step(columns)])
    axes.set_yticks(range(0, rows, _step(rows)), heatmap.rows[:: _step(rows)])
    if max(map(len, heatmap.columns)) > 3:
        axes.tick_params(axis="x", rotation=60)
    axes.set_xlabel(_plain(heatmap.column_label))
    axes.set_ylabel(_plain(heatmap.row_label))
    axes.set_title(_wrapped(heatmap.title, max(24, 3 * columns + 22)), fontsize=10, parse_math=False)
    for row, column in heatmap.marks:
        axes.plot(column, row, marker="o", markersize=4, markerfacecolor="none", markeredgecolor="black")
    figure.colorbar(image, ax=axes, shrink=0.85)
    protocol = ", ".join(f"{key} {_fact(value)}" for key, value in heatmap.protocol.items() if _is_short(value))
    if heatmap.marks:
        protocol = f"Circles: {', '.join(dict.fromkeys(heatmap.marks.values()))}. {protocol}"
    if protocol:
        text = _wrapped(protocol, max(44, 5 * columns + 36))
        figure.supxlabel(text, fontsize=6, color="#555555", parse_math=False)
    path = Path(path)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png")
    return path


def _svg_cell(heatmap, row, column, x, y, width, height):
    value = heatmap.values[row][column]
    place = f"{heatmap.row_label} {heatmap.rows[row]}, {heatmap.column_label} {heatmap.columns[column]}"
    text = f"{place}: {_cell(value)}"
    if heatmap.low is not None and heatmap.high is not None:
        text += f" [{_cell(heatmap.low[row][column])}, {_cell(heatmap.high[row][column])}]"
    mark = heatmap.marks.get((row, column))
    if mark:
        text += f" · {mark}"
    if _is_number(value):
        colour, opacity = (POSITIVE if value > 0 else NEGATIVE), abs(value) / heatmap.limit
    else:
        colour, opacity = "currentColor", 0.12
    frame = ' stroke="currentColor" stroke-width="1.6"' if mark else ' stroke="currentColor" stroke-opacity=".1"'
    return (
        f'<rect x="{x + 0.8:.1f}" y="{y + 0.8:.1f}" width="{width - 1.6:.1f}" height="{height - 1.6:.1f}" rx="1.5" '
        f'fill="{colour}" fill-opacity="{opacity:.3f}"{frame}><title>{escape(text)}</title></rect>'
    )


def _svg_legend(limit, middle, y):
    for step in range(-5, 6):
        colour = POSITIVE if step > 0 else NEGATIVE
        yield (
            f'<rect x="{middle + 11 * step - 5.5:.1f}" y="{y}" width="11" height="8" fill="{colour}" '
            f'fill-opacity="{abs(step) / 5:.1f}" stroke="currentColor" stroke-opacity=".12"/>'
        )
    yield f'<text x="{middle - 66:.1f}" y="{y + 8}" text-anchor="end" font-size="10">{-limit:.3g}</text>'
    yield f'<text x="{middle + 66:.1f}" y="{y + 8}" font-size="10">{limit:.3g}</text>'


def _cell_size(count, room):
    return max(5.0, min(24.0, room / max(count, 1)))


def _step(count):
    return max(1, math.ceil(count / _MOST_TICKS))


def _is_number(value):
    return value is not None and math.isfinite(value)


def _cell(value):
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return "–" if value is None else value


def _fact(value):
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_fact(each)}" for key, each in value.items() if each is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_fact(each)) for each in value)
    return _cell(value)


def _is_short(value):
    return value is not None and len(str(_fact(value))) <= 160


def _visible(token):
    return token.replace("\n", "⏎").replace("\t", "⇥") or "∅"


def _plain(text):
    """Text for matplotlib, which reads what stands between dollars as a formula."""
    return text.replace("$", r"\$")


def _wrapped(text, width):
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
