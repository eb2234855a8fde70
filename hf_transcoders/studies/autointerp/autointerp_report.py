"""Tables, chart and page of the comparison of explanations."""

import os
from pathlib import Path

from ...reports.lines import LineChart
from ...reports.results_folder import write_results
from ...reports.sections import Section, Table, tables_text
from .study import SCORES, AutointerpStudy


_PAPER = (
    "Cunningham et al. (2023), Figure 2, Pythia-70M, 150 features each, GPT-4: SAE > ICA > PCA, random and default basis in early "
    "layers, about as good as ICA in layer 4, little gain in the last layer; the axes end at 0.35 (top and random) and 0.2 (random "
    "only). The paper prints no means. Explanations here are rules, so that the order can be compared and the level cannot."
)


def autointerp_table(study: AutointerpStudy) -> Table:
    """Mean scores of each dictionary with intervals, and what they add to a table of tokens."""
    headers = ["method", "site", "features", "L0", "scored", "of"]
    for score in SCORES:
        headers += [score.partition(".")[2], "95%", "above floor", "95%"]
    rows = []
    for each in study.dictionaries:
        row = [each.method, each.site, each.num_features, f"{each.l0:.1f}", each.scored, len(each.results)]
        for score in SCORES:
            mean = each.mean(score)
            row += [None] * 4 if mean is None else [
                f"{mean.mean:.3f}", f"{mean.low:.3f} to {mean.high:.3f}",
                None if mean.above_floor is None else f"{mean.above_floor:.3f}",
                None if mean.above_low is None else f"{mean.above_low:.3f} to {mean.above_high:.3f}",
            ]  # fmt: skip
        rows.append(row)
    return Table("Explanations of each kind of dictionary", headers, rows, _PAPER)


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


def autointerp_text(study: AutointerpStudy) -> str:
    """The table as text for a terminal."""
    return tables_text([autointerp_table(study)])


def save_autointerp(study: AutointerpStudy, folder: str | os.PathLike) -> Path:
    """Write `report.html` and `results.json`, and pictures of several layers, and give the path of the page."""
    charts = autointerp_charts(study)
    sections = [Section("Scores", tables=[autointerp_table(study)], charts=charts)]
    pictures = {chart.title: chart for chart in charts}
    protocol = {key: value for key, value in study.protocol.items() if value is not None}
    return write_results(folder, "Auto-interpretation of dictionaries", sections, protocol, study.to_dict(), pictures)
