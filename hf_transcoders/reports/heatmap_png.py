"""Heatmaps as PNG files."""

import math
import os
import textwrap
from pathlib import Path

from .heatmap_svg import tick_step
from .pictures import new_figure, save_figure
from .plots import is_finite
from .sections import Heatmap, fact_text


def write_png(path: str | os.PathLike, heatmap: Heatmap) -> Path:
    """Write a heatmap as a PNG file with its protocol below.

    Raises:
        [`TranscoderError`]: Matplotlib is not installed.
    """
    rows, columns = len(heatmap.rows), len(heatmap.columns)
    figure = new_figure(min(13, 2.6 + 0.32 * columns), min(12, 1.9 + 0.22 * rows))
    axes = figure.add_subplot()
    values = [[value if is_finite(value) else math.nan for value in row] for row in heatmap.values]
    image = axes.imshow(values, cmap="RdBu_r", vmin=-heatmap.limit, vmax=heatmap.limit, aspect="auto")
    axes.set_facecolor("#dddddd")
    axes.set_xticks(range(0, columns, tick_step(columns)), heatmap.columns[:: tick_step(columns)])
    axes.set_yticks(range(0, rows, tick_step(rows)), heatmap.rows[:: tick_step(rows)])
    if max(map(len, heatmap.columns)) > 3:
        axes.tick_params(axis="x", rotation=60)
    axes.set_xlabel(heatmap.column_label, parse_math=False)
    axes.set_ylabel(heatmap.row_label, parse_math=False)
    axes.set_title(_wrapped(heatmap.title, max(24, 3 * columns + 22)), fontsize=10, parse_math=False)
    for row, column in heatmap.marks:
        axes.plot(column, row, marker="o", markersize=4, markerfacecolor="none", markeredgecolor="black")
    figure.colorbar(image, ax=axes, shrink=0.85)
    protocol = ", ".join(f"{key} {fact_text(value)}" for key, value in heatmap.protocol.items() if _is_short(value))
    if heatmap.marks:
        protocol = f"Circles: {', '.join(dict.fromkeys(heatmap.marks.values()))}. {protocol}"
    if protocol:
        text = _wrapped(protocol, max(44, 5 * columns + 36))
        figure.supxlabel(text, fontsize=6, color="#555555", parse_math=False)
    return save_figure(figure, path)


def _is_short(value):
    return value is not None and len(str(fact_text(value))) <= 160


def _wrapped(text, width):
    return "\n".join(textwrap.wrap(text, width))
