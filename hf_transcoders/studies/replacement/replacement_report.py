"""Write a study of whole-model replacement as a folder: a page, pictures, and every number as JSON."""

import math
import os
from pathlib import Path

from ...reports.lines import LineChart
from ...reports.results_folder import write_results
from ...reports.sections import Section
from .study import ReplacementStudy, replacement_tables


def save_replacement(study: ReplacementStudy, folder: str | os.PathLike) -> Path:
    """Write a study of whole-model replacement: `report.html`, `results.json` and, with matplotlib, PNG files.

    Args:
        study ([`ReplacementStudy`]): Results of [`replacement_study`].
        folder (`str` or `os.PathLike`): Folder to write to, made if it does not exist.

    Returns:
        `Path`: Path of the page.
    """
    rows = study.dictionaries
    charts = {}
    if len({row.layers[0] for row in rows}) > 1:
        recovered = {
            "against zero-ablation": [row.recovered_zero for row in rows],
            "against mean-ablation": [row.recovered_mean for row in rows],
        }
        agreement = {
            "with the dictionary": [row.replaced.top1_agreement for row in rows],
            "set to its mean": [row.mean.top1_agreement for row in rows],
            "set to zero": [row.zero.top1_agreement for row in rows],
        }
        charts["recovered"] = _chart(rows, "Loss recovered", "share of the loss increase avoided", recovered)
        charts["agreement"] = _chart(rows, "Same most likely token", "top-1 agreement", agreement)
    groups, alone = replacement_tables(study)
    sections = [
        Section("Many layers at once", tables=[groups]),
        Section("Each layer alone", tables=[alone], charts=list(charts.values())),
    ]
    title = f"Whole-model replacement, {study.protocol['base_model'] or 'unnamed model'}"
    return write_results(folder, title, sections, study.protocol_lines(), study.to_dict(), charts)


def _chart(rows, title, label, series) -> LineChart:
    points = {
        name: [(row.layers[0], value) for row, value in zip(rows, values, strict=True) if math.isfinite(value)]
        for name, values in series.items()
    }
    return LineChart(f"{title}, each layer alone", "layer", label, points)
