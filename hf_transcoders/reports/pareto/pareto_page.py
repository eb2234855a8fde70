"""Pareto fronts as one HTML page."""

import math
import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...evaluation.evaluation_report import METRICS
from ...files import write_text
from ..html import page_templates, present
from ..plots import L0_LABEL, Chart
from .caveats import heading, origin, protocol_lines, warning
from .chart import FrontChart, require_points, step_line
from .fronts import ParetoFronts
from .labels import place_labels


_LABEL_SIZE = 10.5


def write_pareto_page(
    path: str | os.PathLike, fronts: Sequence[ParetoFronts], *, title: str, notes: Sequence[str] = ()
) -> Path:
    """
    Write fronts as one self-contained HTML file, without scripts and without requests to the network.

    Args:
        path (`str` or `os.PathLike`): File to write.
        fronts (`Sequence[ParetoFronts]`): Fronts from [`pareto_fronts`].
        title (`str`): Heading of the page.
        notes (`Sequence[str]`, *optional*): Further sentences for the top of the page.

    Returns:
        `Path`: Path of the file.
    """
    require_points(fronts)
    groups = [_page_group(group) for group in fronts]
    html = (
        page_templates()
        .get_template("pareto.html")
        .render(
            title=title,
            info={},
            groups=groups,
            warning=warning(fronts),
            notes=notes,
            metrics=METRICS,
            shown=["l0", *fronts[0].on_front, "kl", "dead_fraction"],
            several_runs=len({d.run for group in fronts for d in group.dictionaries}) > 1,
        )
    )
    return write_text(path, html)


def _page_group(group: ParetoFronts) -> dict[str, Any]:
    origins = [origin(dictionary) for dictionary in group.dictionaries]
    same = len(set(origins)) == 1
    return {
        "heading": heading(group),
        "fronts": group,
        "targets": [
            (target or "", present(chart.svg() for chart in _charts(group, members)))
            for target, members in group.targets().items()
        ],
        # In the table if they differ, otherwise once in the protocol.
        "origins": [] if same else origins,
        "protocol": {**({"measured in": origins[0]} if same else {}), **protocol_lines(group.protocol)},
    }


def _charts(group: ParetoFronts, members: Sequence[int]):
    for metric in group.on_front:
        picture = FrontChart.of(group, members, metric)
        if picture.points:
            yield _svg_chart(picture)


def _svg_chart(picture: FrontChart) -> Chart:
    chart = Chart(picture.title, L0_LABEL, METRICS[picture.metric], list(picture.series), width=520, height=360)
    to_axis: Callable[[float], float] = math.log2 if picture.log_x else float
    chart.window(picture.x_range(), picture.y_range(), powers_of_two=picture.log_x)
    at = [
        (point, name, chart.x(to_axis(point.x)), chart.y(point.y))
        for name, points in picture.series.items()
        for point in points
    ]
    lines = []
    for name, points in picture.series.items():
        line = [(chart.x(to_axis(x)), chart.y(y)) for x, y in step_line(points)]
        lines.append(line)
        if len(line) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
            chart.add(
                f'<polyline points="{path}" fill="none" stroke-width="1.6" stroke-opacity="0.6" {chart.stroke(name)}/>'
            )
    at.sort(key=lambda entry: not entry[0].on_front)
    labels = place_labels([(x, y, p.label) for p, _, x, y in at], chart.inside(), _LABEL_SIZE, lines)
    # Points of the front are drawn last, on top of dominated ones.
    for (point, name, x, y), label in reversed(list(zip(at, labels, strict=True))):
        opacity = 1.0 if point.on_front else 0.35
        chart.add(
            f'<g opacity="{opacity}"><circle cx="{x:.1f}" cy="{y:.1f}" r="{5.5 if point.on_front else 4.5}" '
            f'fill="{chart.color(name)}" stroke="currentColor" stroke-opacity="0.5">'
            f"<title>{escape(point.title)}: L0 {point.x:.4g}, {METRICS[picture.metric]} {point.y:.4g}</title></circle></g>"
        )
        if label is not None:
            chart.add(
                f'<text x="{label[0]:.1f}" y="{label[1]:.1f}" font-size="{_LABEL_SIZE}" '
                f'fill-opacity="{0.95 if point.on_front else 0.55}">{escape(point.label)}</text>'
            )
    return chart
