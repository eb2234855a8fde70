"""Line charts as SVG for pages and as PNG files."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import TranscoderError
from .pictures import legend_name, new_figure, save_figure
from .plots import COLORS, Chart


@dataclass(frozen=True)
class LineChart:
    """A line chart with several curves.

    Args:
        title (`str`): Title of the chart.
        x_label, y_label (`str`): Labels of the axes.
        series (`Mapping[str, Sequence[tuple[float, float]]]`): Name -> points, from left to right.
        levels (`Mapping[str, float]`, *optional*): Name -> height of a horizontal line.
        note (`str`, *optional*): Sentence below the chart.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    levels: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self):
        if len({x for points in self.series.values() for x, _ in points}) < 2:
            raise TranscoderError(f"The curves of '{self.title}' have fewer than two points: give at least two.")

    def lines(self) -> dict[str, list[tuple[float, float]]]:
        """Name -> points, with levels as lines from end to end."""
        xs = [x for points in self.series.values() for x, _ in points]
        ends = (min(xs), max(xs))
        flat = {name: [(x, level) for x in ends] for name, level in self.levels.items()}
        return {**{name: list(points) for name, points in self.series.items()}, **flat}

    def svg(self) -> str:
        """Draw the chart as an `<svg>` element whose lines show their names on hover."""
        lines = self.lines()
        chart = Chart(self.title, self.x_label, self.y_label, list(lines), width=520, height=300)
        chart.add_lines(lines, thin=self.levels)
        return chart.svg()


def write_lines_png(path: str | os.PathLike, chart: LineChart) -> Path:
    """Write a line chart as a PNG file.

    Raises:
        [`TranscoderError`]: Matplotlib is not installed.
    """
    figure = new_figure(7.2, 4.6)
    axes = figure.add_subplot()
    for number, (name, line) in enumerate(chart.lines().items()):
        style = {"linewidth": 1.1, "linestyle": "--"} if name in chart.levels else {"linewidth": 1.6}
        axes.plot(*zip(*line, strict=True), color=COLORS[number % len(COLORS)], label=legend_name(name), **style)
    axes.set_xlabel(chart.x_label, parse_math=False)
    axes.set_ylabel(chart.y_label, parse_math=False)
    axes.set_title(chart.title, fontsize=10, parse_math=False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return save_figure(figure, path)
