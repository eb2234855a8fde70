"""Write a study of whole-model replacement as a folder: a page, pictures, and every number as JSON."""

import math
import os
from pathlib import Path

from ...reports.lines import LineChart
from ...reports.results import write_results
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
    charts = {}
    layers = [row.layers[0] for row in study.dictionaries]
    if len(set(layers)) > 1:
        for name, title, label, series in (
            (
                "recovered",
                "Loss recovered, each layer alone",
                "share of the loss increase avoided",
                {
                    "against zero-ablation": [row.recovered_zero for row in study.dictionaries],
                    "against mean-ablation": [row.recovered_mean for row in study.dictionaries],
                },
            ),
            (
                "agreement",
                "Same most likely token, each layer alone",
                "top-1 agreement",
                {
                    "with the dictionary": [row.replaced.top1_agreement for row in study.dictionaries],
                    "set to its mean": [row.mean.top1_agreement for row in study.dictionaries],
                    "set to zero": [row.zero.top1_agreement for row in study.dictionaries],
                },
            ),
        ):
            points = {
                each: [(x, y) for x, y in zip(layers, values, strict=True) if math.isfinite(y)]
                for each, values in series.items()
            }
            charts[name] = LineChart(title, "layer", label, points)
    groups, alone = replacement_tables(study)
    sections = [
        Section("Many layers at once", tables=[groups]),
        Section("Each layer alone", tables=[alone], charts=list(charts.values())),
    ]
    title = f"Whole-model replacement, {study.protocol['base_model'] or 'unnamed model'}"
    return write_results(folder, title, sections, study.protocol_lines(), study.to_dict(), charts)
