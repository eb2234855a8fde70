"""Points, scales and lines of a Pareto chart, independent of the output format."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import TranscoderError
from .fronts import HIGHER_IS_BETTER, ParetoFronts
from .labels import short_labels


_TITLES = {
    "fvu": "Reconstruction error",
    "ce_recovered_zero": "Loss recovered",
    "ce_recovered_mean": "Loss recovered",
}


@dataclass
class Point:
    x: float
    y: float
    label: str
    title: str
    on_front: bool


@dataclass
class FrontChart:
    """Points of a chart by series, and the scales of its axes."""

    metric: str
    series: dict[str, list[Point]]
    log_x: bool

    @classmethod
    def of(cls, group: ParetoFronts, members: Sequence[int], metric: str) -> "FrontChart":
        by_task: dict[str, list[int]] = {group.dictionaries[i].task: [] for i in members}
        for i in members:
            if group.on_front[metric][i] is not None:
                by_task[group.dictionaries[i].task].append(i)
        series = {}
        for task, drawn in by_task.items():
            dictionaries = [group.dictionaries[i] for i in drawn]
            labels = short_labels([(dictionary.run, dictionary.name) for dictionary in dictionaries])
            series[task] = [
                Point(d.metrics["l0"], d.metrics[metric], label, f"{d.run}: {d.name}", bool(group.on_front[metric][i]))
                for i, d, label in zip(drawn, dictionaries, labels, strict=True)
            ]
        xs = [point.x for points in series.values() for point in points]
        return cls(metric, series, bool(xs) and min(xs) > 0 and max(xs) >= 4 * min(xs))

    @property
    def points(self) -> list[Point]:
        return [point for points in self.series.values() for point in points]

    @property
    def title(self) -> str:
        return f"{_TITLES[self.metric]} ({'higher' if HIGHER_IS_BETTER[self.metric] else 'lower'} is better)"

    def x_range(self) -> tuple[float, float]:
        """Range on the scale of the axis, with margins for the outermost markers."""
        return _with_margin([math.log2(p.x) if self.log_x else p.x for p in self.points], 0.09)

    def y_range(self) -> tuple[float, float]:
        return _with_margin([p.y for p in self.points], 0.12)


def step_line(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Return the boundary of the dominated region as a step line through the front."""
    front = sorted({(point.x, point.y) for point in points if point.on_front})
    line = front[:1]
    for (_, last_y), (x, y) in zip(front, front[1:], strict=False):
        line += [(x, last_y), (x, y)]
    return line


def require_points(fronts: Sequence[ParetoFronts]) -> None:
    """Refuse fronts without points to draw."""
    if not any(place is not None for group in fronts for front in group.on_front.values() for place in front):
        raise TranscoderError(
            "No dictionary has both an L0 and a fidelity, so there is nothing to draw: evaluate the runs first."
        )


def _with_margin(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = share * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin
