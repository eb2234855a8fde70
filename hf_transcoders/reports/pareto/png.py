"""Pareto fronts as a PNG file."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from ...evaluation.evaluation_report import METRICS
from .. import plots
from ..pictures import new_figure, save_figure
from .caveats import heading, warning
from .chart import FrontChart, require_points, step_line
from .fronts import ParetoFronts
from .labels import place_labels


def write_pareto_png(path: str | os.PathLike, fronts: Sequence[ParetoFronts], *, title: str) -> Path:
    """
    Draw fronts as a PNG file with matplotlib, one row of charts per written site.

    Args:
        path (`str` or `os.PathLike`): File to write.
        fronts (`Sequence[ParetoFronts]`): Fronts from [`pareto_fronts`].
        title (`str`): Heading of the picture.

    Returns:
        `Path`: Path of the file.
    """
    require_points(fronts)
    rows = [(group, target, members) for group in fronts for target, members in group.targets().items()]
    height = 4.1 * len(rows) + 1.4
    figure = new_figure(12, height, layout=None)
    figure.text(0.03, 1 - 0.32 / height, title, fontsize=15, weight="bold", va="center", parse_math=False)
    if sentence := warning(fronts):
        figure.text(0.03, 1 - 0.66 / height, sentence, fontsize=9, color="#b4231f", va="center", parse_math=False)
    axes = figure.subplots(len(rows), len(fronts[0].on_front), squeeze=False)
    figure.subplots_adjust(
        left=0.065, right=0.985, top=1 - 1.25 / height, bottom=0.62 / height, wspace=0.17, hspace=1.15 / 3.2
    )
    figure.canvas.draw()
    for row, (group, target, members) in zip(axes, rows, strict=True):
        for axis, metric in zip(row, group.on_front, strict=True):
            _draw_axes(axis, FrontChart.of(group, members, metric), figure.dpi)
        corner = row[0].get_position()
        where = f"writes {target}" if target else "sites not recorded"
        text = where if len(fronts) == 1 else f"{where}   ·   {heading(group)}"
        figure.text(
            corner.x0 - 0.035,
            corner.y1 + 0.36 / height,
            text,
            fontsize=11,
            weight="bold",
            va="center",
            parse_math=False,
        )
    return save_figure(figure, path)


def _draw_axes(axis, picture: FrontChart, dpi: float) -> None:
    axis.set_title(picture.title, fontsize=10.5, loc="left")
    axis.set_xlabel(plots.L0_LABEL, fontsize=9)
    axis.set_ylabel(METRICS[picture.metric], fontsize=9)
    axis.tick_params(labelsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    if not picture.points:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes, color="#777777")
        return
    low, high = picture.x_range()
    if picture.log_x:
        axis.set_xscale("log", base=2)
        axis.set_xlim(2**low, 2**high)
        ticks = [2.0**i for i in plots.even_steps(math.ceil(low), math.floor(high))]
        axis.set_xticks(ticks, [plots.short_number(tick) for tick in ticks])
        axis.minorticks_off()
    else:
        axis.set_xlim(low, high)
    axis.set_ylim(*picture.y_range())
    for number, (name, points) in enumerate(picture.series.items()):
        color = plots.COLORS[number % len(plots.COLORS)]
        if line := step_line(points):
            axis.plot(*zip(*line, strict=True), color=color, alpha=0.6, linewidth=1.4)
        for front in (False, True):
            chosen = [(p.x, p.y) for p in points if p.on_front == front]
            if chosen:
                axis.scatter(
                    *zip(*chosen, strict=True),
                    s=46 if front else 32,
                    color=color,
                    alpha=1.0 if front else 0.3,
                    edgecolors="black",
                    linewidths=0.5,
                    zorder=3,
                )
        axis.plot([], [], "o-", color=color, label=name)
    if len(picture.series) > 1:
        legend = axis.legend(fontsize=8.5, frameon=False, loc="best")
        for text in legend.get_texts():
            text.set_parse_math(False)
    _write_labels(axis, picture, dpi)


def _write_labels(axis, picture: FrontChart, dpi: float) -> None:
    points = sorted(picture.points, key=lambda point: not point.on_front)
    height = axis.figure.bbox.height
    pixels = [axis.transData.transform((p.x, p.y)) for p in points]
    box = axis.get_window_extent()
    bounds = (box.x0, height - box.y1, box.x1, height - box.y0)
    lines = [
        [(x, height - y) for x, y in map(axis.transData.transform, step_line(some))]
        for some in picture.series.values()
    ]
    if axis.get_legend():
        legend = axis.get_legend().get_window_extent()
        lines.append([(legend.x0, height - legend.y1), (legend.x1, height - legend.y0)])
    size = 8 * dpi / 72
    placed = place_labels(
        [(x, height - y, p.label) for (x, y), p in zip(pixels, points, strict=True)], bounds, size, lines
    )
    for point, label in zip(points, placed, strict=True):
        if label is not None:
            x, y = axis.transAxes.inverted().transform((label[0], height - label[1]))
            axis.text(
                x,
                y,
                point.label,
                fontsize=8,
                transform=axis.transAxes,
                alpha=0.95 if point.on_front else 0.5,
                parse_math=False,
            )
