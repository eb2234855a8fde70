"""Curves over one number, as SVG for pages and as PNG files."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from ..errors import TranscoderError
from .pictures import legend_name, new_figure, save_figure
from .plots import COLOURS, Chart


@dataclass(frozen=True)
class LineChart:
    """Curves of several names over one axis.

    Args:
        title (`str`): What they show.
        x_label, y_label (`str`): What the axes are.
        series (`Mapping[str, Sequence[tuple[float, float]]]`): Name -> points, from left to right.
        levels (`Mapping[str, float]`, *optional*): Name -> a height that does not depend on x.
        note (`str`, *optional*): A sentence beneath.
    """

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    levels: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self):
        if len({x for points in self.series.values() for x, _ in points}) < 2:
            raise TranscoderError(
                f"The curves of '{self.title}' have fewer than two places: there is no line to draw."
            )

    def lines(self) -> dict[str, list[tuple[float, float]]]:
        """Name -> points, levels among them as lines from end to end."""
        xs = [x for points in self.series.values() for x, _ in points]
        ends = (min(xs), max(xs))
        flat = {name: [(x, level) for x in ends] for name, level in self.levels.items()}
        return {**{name: list(points) for name, points in self.series.items()}, **flat}

    def svg(self) -> str:
        """The curves as an `<svg>` element whose lines tell their names on hover."""
        lines = self.lines()
        chart = Chart(self.title, self.x_label, self.y_label, list(lines), width=520, height=300)
        points = [point for line in lines.values() for point in line]
        chart.scale([x for x, _ in points], [y for _, y in points])
        chart.end_at(max(x for x, _ in points))
        for name, line in lines.items():
            path = " ".join(f"{chart.x(x):.1f},{chart.y(y):.1f}" for x, y in line)
            width = "1.2" if name in self.levels else "1.8"
            chart.add(
                f'<polyline points="{path}" fill="none" stroke-width="{width}" {chart.stroke(name)}>'
                f"<title>{escape(name)}</title></polyline>"
            )
        return chart.svg()


def write_lines_png(path: str | os.PathLike, chart: LineChart) -> Path:
    """Write curves as a PNG file.

    Raises:
        [`TranscoderError`]: matplotlib is not installed.
    """
    figure = new_figure(7.2, 4.6)
    axes = figure.add_subplot()
    for number, (name, line) in enumerate(chart.lines().items()):
        style = {"linewidth": 1.1, "linestyle": "--"} if name in chart.levels else {"linewidth": 1.6}
        axes.plot(*zip(*line, strict=True), color=COLOURS[number % len(COLOURS)], label=legend_name(name), **style)
    axes.set_xlabel(chart.x_label, parse_math=False)
    axes.set_ylabel(chart.y_label, parse_math=False)
    axes.set_title(chart.title, fontsize=10, parse_math=False)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return save_figure(figure, path)
