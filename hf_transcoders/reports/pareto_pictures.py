"""Pareto fronts as a page and as a PNG file."""

import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..errors import TranscoderError
from ..evaluation.evaluation_report import METRICS
from ..files import atomic_file
from . import plots
from .page import page_templates, present
from .pareto import (
    HIGHER_IS_BETTER,
    PROTOCOL_FACTS,
    MeasuredDictionary,
    ParetoFronts,
    protocol_differences,
    save_pareto_csv,
)
from .plots import _Chart


_TITLES = {
    "fvu": "Reconstruction error",
    "ce_recovered_zero": "Loss recovered",
    "ce_recovered_mean": "Loss recovered",
}
_X_LABEL = "L0: active features per token"
_LABEL_LENGTH = 30
_LABEL_SIZE = 10.5


def write_pareto(
    stem: str | os.PathLike,
    fronts: Sequence[ParetoFronts],
    *,
    title: str,
    notes: Sequence[str] = (),
    csv: bool = False,
) -> list[Path]:
    """
    Writes fronts as `<stem>.html`, as `<stem>.png` where matplotlib is installed, and as `<stem>.csv` if asked.

    Args:
        stem (`str` or `os.PathLike`): The files' path without the ending.
        fronts (`Sequence[ParetoFronts]`): As [`pareto_fronts`] gave them.
        title (`str`): Heading of page and picture.
        notes (`Sequence[str]`, *optional*): Sentences for the page, such as which runs were left out.
        csv (`bool`, *optional*, defaults to `False`): Whether to write the table too.

    Returns:
        `list[Path]`: the files written.
    """
    stem = Path(stem)
    files = [write_pareto_page(stem.with_name(f"{stem.name}.html"), fronts, title=title, notes=notes)]
    if importlib.util.find_spec("matplotlib"):
        files.append(write_pareto_png(stem.with_name(f"{stem.name}.png"), fronts, title=title))
    if csv:
        files.append(save_pareto_csv(stem.with_name(f"{stem.name}.csv"), fronts))
    return files


def write_pareto_page(
    path: str | os.PathLike, fronts: Sequence[ParetoFronts], *, title: str, notes: Sequence[str] = ()
) -> Path:
    """
    Writes fronts as one self-contained HTML file: no script, no request to anywhere.

    Args:
        path (`str` or `os.PathLike`): The file to write.
        fronts (`Sequence[ParetoFronts]`): As [`pareto_fronts`] gave them.
        title (`str`): Heading of the page.
        notes (`Sequence[str]`, *optional*): Further sentences for the top.

    Returns:
        `Path`: the file.
    """
    _require(fronts)
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
            shown=[*("l0", *fronts[0].on_front), *(m for m in ("kl", "dead_fraction"))],
            several_runs=len({d.run for group in fronts for d in group.dictionaries}) > 1,
        )
    )
    path = Path(path)
    with atomic_file(path) as partial:
        partial.write_text(html, encoding="utf-8")
    return path


def write_pareto_png(path: str | os.PathLike, fronts: Sequence[ParetoFronts], *, title: str) -> Path:
    """
    Draws fronts as a PNG file: a row of charts for each site that is written, with matplotlib.

    Args:
        path (`str` or `os.PathLike`): The file to write.
        fronts (`Sequence[ParetoFronts]`): As [`pareto_fronts`] gave them.
        title (`str`): Heading of the picture.

    Returns:
        `Path`: the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    _require(fronts)
    rows = [(group, target, members) for group in fronts for target, members in group.targets().items()]
    # No `pyplot`: it would keep the figure and choose a window system. A `$` in a name is no formula.
    height = 4.1 * len(rows) + 1.4
    figure = Figure(figsize=(12, height), facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.text(0.03, 1 - 0.32 / height, title, fontsize=15, weight="bold", va="center", parse_math=False)
    if sentence := warning(fronts):
        figure.text(0.03, 1 - 0.66 / height, sentence, fontsize=9, color="#b4231f", va="center", parse_math=False)
    axes = figure.subplots(len(rows), len(fronts[0].on_front), squeeze=False)
    figure.subplots_adjust(
        left=0.065, right=0.985, top=1 - 1.25 / height, bottom=0.62 / height, wspace=0.17, hspace=1.15 / 3.2
    )
    canvas.draw()
    for row, (group, target, members) in zip(axes, rows, strict=True):
        for axis, metric in zip(row, group.on_front, strict=True):
            _draw_axes(axis, _Picture.of(group, members, metric), figure.dpi)
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
    path = Path(path)
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", dpi=130)
    return path


def warning(fronts: Sequence[ParetoFronts]) -> str | None:
    """What must be said where numbers were measured in different ways."""
    mixed = [group for group in fronts if group.differences]
    if mixed:
        return f"Measured in different ways and still on one front: {_describe(mixed[0].differences)}."
    if len(fronts) > 1:
        differences = protocol_differences([group.protocol for group in fronts])
        return (
            f"Measured in {len(fronts)} different ways, each with fronts of its own: "
            f"{_describe(differences) or 'how was not recorded'}."
        )
    if fronts and fronts[0].protocol is None:
        return "How these numbers were measured was not recorded."
    return None


def _require(fronts):
    if not any(place is not None for group in fronts for front in group.on_front.values() for place in front):
        raise TranscoderError(
            "No dictionary has both an L0 and a fidelity, so that there is nothing to draw: evaluate the runs first."
        )


def _page_group(group: ParetoFronts) -> dict[str, Any]:
    origins = [_origin(dictionary) for dictionary in group.dictionaries]
    same = len(set(origins)) == 1
    return {
        "heading": heading(group),
        "fronts": group,
        "targets": [
            (target or "", present(chart.svg() for chart in _charts(group, members)))
            for target, members in group.targets().items()
        ],
        # Beside each dictionary where they differ, else once beneath.
        "origins": [] if same else origins,
        "protocol": {**({"measured in": origins[0]} if same else {}), **_protocol_lines(group.protocol)},
    }


def _describe(differences: Mapping[str, Sequence[Any]]) -> str:
    return ", ".join(f"{fact} ({' / '.join(map(_value, values))})" for fact, values in differences.items())


def _value(value) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value[:5])) + (f" and {len(value) - 5} more" if len(value) > 5 else "") or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _origin(dictionary: MeasuredDictionary) -> str:
    return dictionary.source + (f", step {dictionary.step:,}" if dictionary.step is not None else "")


def _protocol_lines(protocol) -> dict[str, str]:
    facts = protocol or {}
    return {name: _value(facts[key]) for key, name in PROTOCOL_FACTS.items() if facts.get(key) is not None}


def heading(group: ParetoFronts) -> str:
    """How the dictionaries of a group were measured, in a few words."""
    if group.differences:
        return "Measured in different ways"
    if group.protocol is None:
        runs = sorted({dictionary.run for dictionary in group.dictionaries})
        return f"{', '.join(runs)}: how it was measured was not recorded"
    tokens = group.protocol.get("fidelity_tokens")
    return f"Measured on {group.protocol.get('dataset') or 'unnamed text'}" + (
        f", {tokens:,} tokens" if tokens else ""
    )


# ------------------------------------------------------------------------------------------------ what is drawn


@dataclass
class _Point:
    x: float
    y: float
    label: str
    title: str
    on_front: bool


@dataclass
class _Picture:
    """One chart before it is drawn: points by series, and the scales."""

    metric: str
    series: dict[str, list[_Point]]
    log_x: bool

    @classmethod
    def of(cls, group: ParetoFronts, members: Sequence[int], metric: str) -> "_Picture":
        by_task: dict[str, list[int]] = {group.dictionaries[i].task: [] for i in members}
        for i in members:
            if group.on_front[metric][i] is not None:
                by_task[group.dictionaries[i].task].append(i)
        series = {}
        for task, drawn in by_task.items():
            dictionaries = [group.dictionaries[i] for i in drawn]
            labels = short_labels([(dictionary.run, dictionary.name) for dictionary in dictionaries])
            series[task] = [
                _Point(
                    d.metrics["l0"], d.metrics[metric], label, f"{d.run}: {d.name}", bool(group.on_front[metric][i])
                )
                for i, d, label in zip(drawn, dictionaries, labels, strict=True)
            ]
        xs = [point.x for points in series.values() for point in points]
        return cls(metric, series, bool(xs) and min(xs) > 0 and max(xs) >= 4 * min(xs))

    @property
    def points(self) -> list[_Point]:
        return [point for points in self.series.values() for point in points]

    @property
    def title(self) -> str:
        return f"{_TITLES[self.metric]} ({'higher' if HIGHER_IS_BETTER[self.metric] else 'lower'} is better)"

    def x_range(self) -> tuple[float, float]:
        """On the axis's own scale, with room for the outermost markers."""
        return _with_margin([math.log2(p.x) if self.log_x else p.x for p in self.points], 0.09)

    def y_range(self) -> tuple[float, float]:
        return _with_margin([p.y for p in self.points], 0.12)


def _with_margin(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = share * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def short_labels(names: Sequence[tuple[str, str]]) -> list[str]:
    """
    What tells dictionaries apart: of `(run, dictionary)` the run where there are several, and of the dictionary's name the
    words that not all share.
    """
    words = [name.split(".") for _, name in names]
    shared = set.intersection(*(set(some) for some in words)) if words else set()
    several = len({run for run, _ in names}) > 1
    labels = []
    for (run, name), some in zip(names, words, strict=True):
        own = " ".join(word for word in some if word not in shared)
        label = " ".join(part for part in (run if several else "", own) if part) or name
        labels.append(label if len(label) <= _LABEL_LENGTH else label[: _LABEL_LENGTH - 1] + "…")
    return labels


def step_line(points: Sequence[_Point]) -> list[tuple[float, float]]:
    """The edge of what a front dominates: to the right at one height, then to the next point."""
    front = sorted({(point.x, point.y) for point in points if point.on_front})
    line = front[:1]
    for (_, last_y), (x, y) in zip(front, front[1:], strict=False):
        line += [(x, last_y), (x, y)]
    return line


def place_labels(
    points: Sequence[tuple[float, float, str]],
    bounds: tuple[float, float, float, float],
    size: float,
    lines: Sequence[Sequence[tuple[float, float]]] = (),
) -> list[tuple[float, float] | None]:
    """
    Where labels go beside their points, so that none covers another, a point or a line. The first points choose first.

    Args:
        points (`Sequence[tuple[float, float, str]]`): x, y (downwards) and text, in pixels.
        bounds (`tuple[float, float, float, float]`): Left, top, right and bottom of the chart.
        size (`float`): Font size.
        lines (`Sequence[Sequence[tuple[float, float]]]`, *optional*):
            To keep clear of: strokes, and rectangles by two of their corners.

    Returns:
        For each point the label's left end and baseline; `None` where there is no room.
    """
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    for line in lines:
        for (x1, y1), (x2, y2) in zip(line, line[1:], strict=False):
            taken.append((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    placed: list[tuple[float, float] | None] = []
    for x, y, text in points:
        width = 0.56 * size * len(text)
        lefts_and_baselines = (
            (x - width - 9, y + size + 2), (x - width - 9, y - 5), (x + 9, y - 5), (x + 9, y + size + 2),
            (x - width - 10, y + size / 3), (x + 10, y + size / 3),
            (x - width / 2, y - 11), (x - width / 2, y + size + 9),
        )  # fmt: skip
        for left, baseline in lefts_and_baselines:
            box = (left - 1, baseline - size, left + width + 1, baseline + 2)
            inside = box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                placed.append((left, baseline))
                break
        else:
            placed.append(None)
    return placed


def _overlap(a, b) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# --------------------------------------------------------------------------------------------------- as SVG


def _charts(group: ParetoFronts, members: Sequence[int]):
    for metric in group.on_front:
        picture = _Picture.of(group, members, metric)
        if picture.points:
            yield _svg_chart(picture)


def _svg_chart(picture: _Picture) -> _Chart:
    chart = _Chart(picture.title, _X_LABEL, METRICS[picture.metric], list(picture.series), width=520, height=360)
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
    # Dominated ones first, so that those of a front lie on top.
    for (point, name, x, y), label in reversed(list(zip(at, labels, strict=True))):
        opacity = 1.0 if point.on_front else 0.35
        chart.add(
            f'<g opacity="{opacity}"><circle cx="{x:.1f}" cy="{y:.1f}" r="{5.5 if point.on_front else 4.5}" '
            f'fill="{chart.colour(name)}" stroke="currentColor" stroke-opacity="0.5">'
            f"<title>{escape(point.title)}: L0 {point.x:.4g}, {METRICS[picture.metric]} {point.y:.4g}</title></circle></g>"
        )
        if label is not None:
            chart.add(
                f'<text x="{label[0]:.1f}" y="{label[1]:.1f}" font-size="{_LABEL_SIZE}" '
                f'fill-opacity="{0.95 if point.on_front else 0.55}">{escape(point.label)}</text>'
            )
    return chart


# --------------------------------------------------------------------------------------------------- as PNG


def _draw_axes(axis, picture: _Picture, dpi: float) -> None:
    axis.set_title(picture.title, fontsize=10.5, loc="left")
    axis.set_xlabel(_X_LABEL, fontsize=9)
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
        colour = plots.COLOURS[number % len(plots.COLOURS)]
        if line := step_line(points):
            axis.plot(*zip(*line, strict=True), color=colour, alpha=0.6, linewidth=1.4)
        for front in (False, True):
            chosen = [(p.x, p.y) for p in points if p.on_front == front]
            if chosen:
                axis.scatter(
                    *zip(*chosen, strict=True),
                    s=46 if front else 32,
                    color=colour,
                    alpha=1.0 if front else 0.3,
                    edgecolors="black",
                    linewidths=0.5,
                    zorder=3,
                )
        axis.plot([], [], "o-", color=colour, label=name)
    if len(picture.series) > 1:
        legend = axis.legend(fontsize=8.5, frameon=False, loc="best")
        for text in legend.get_texts():
            text.set_parse_math(False)
    _write_labels(axis, picture, dpi)


def _write_labels(axis, picture: _Picture, dpi: float) -> None:
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
