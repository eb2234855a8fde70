"""Write the comparison of explanations as a folder: a page, a chart, and every number as JSON."""

import os
from pathlib import Path

from ...reports.lines import LineChart
from ...reports.results_folder import write_results
from ...reports.sections import Section
from .autointerp_results import SCORES, AutointerpStudy, autointerp_table


def autointerp_charts(study: AutointerpStudy) -> list[LineChart]:
    """Mean scores by layer, one line for each method; none for a single layer."""
    charts = []
    for score in SCORES:
        series: dict[str, list[tuple[float, float]]] = {}
        for each in sorted(study.dictionaries, key=lambda each: -1 if each.layer is None else each.layer):
            if each.layer is not None and (mean := each.mean(score)) is not None:
                series.setdefault(each.method, []).append((float(each.layer), mean.mean))
        if len({x for points in series.values() for x, _ in points}) > 1:
            charts.append(LineChart(score.partition(".")[2], "layer", "mean correlation", series))
    return charts


def save_autointerp(study: AutointerpStudy, folder: str | os.PathLike) -> Path:
    """Write `report.html` and `results.json`, and pictures of several layers, and give the path of the page."""
    charts = autointerp_charts(study)
    sections = [Section("Scores", tables=[autointerp_table(study)], charts=charts)]
    pictures = {chart.title: chart for chart in charts}
    protocol = {key: value for key, value in study.protocol.items() if value is not None}
    return write_results(folder, "Auto-interpretation of dictionaries", sections, protocol, study.to_dict(), pictures)
