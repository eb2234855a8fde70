"""Write a greater-than study as a folder: a page, pictures, and every number as JSON."""

import os
from pathlib import Path

from ...reports.lines import LineChart
from ...reports.results_folder import write_results
from ...reports.sections import Heatmap, Section
from .greater_than_results import MODEL, TRANSCODER, GreaterThanStudy, curve_table, features_table, scores_table


def save_greater_than(study: GreaterThanStudy, folder: str | os.PathLike) -> Path:
    """Write a greater-than study: `report.html`, `results.json` and, with matplotlib, PNG files of its curves.

    Args:
        study ([`GreaterThanStudy`]): Results of [`greater_than_study`].
        folder (`str` or `os.PathLike`): Folder to write to, made if it does not exist.

    Returns:
        `Path`: Path of the page.
    """
    curves = LineChart(
        f"Greater-than with few features of {study.protocol['writes']}",
        "features or neurons kept, by variance",
        "probability difference",
        {
            "features of the transcoder": list(enumerate(study.feature_curve)),
            "neurons of the MLP": list(enumerate(study.neuron_curve)),
        },
        {MODEL: study.original_score.mean, TRANSCODER: study.transcoder_score.mean},
        "Mean over years. All others are set to zero; biases are kept.",
    )
    last_digits = [int(year[-2:]) for year in study.years]
    years = LineChart(
        "Probability difference by year",
        "last two digits of the year",
        "probability difference",
        {
            MODEL: list(zip(last_digits, study.original, strict=True)),
            TRANSCODER: list(zip(last_digits, study.transcoder, strict=True)),
        },
    )
    names = [str(feature.index) for feature in study.features]
    by_year = Heatmap(
        "Activation at the last position, by year",
        [feature.activations for feature in study.features],
        names,
        study.years,
        "feature",
        "year",
    )
    by_ending = Heatmap(
        "Direct effect of one unit of a feature on the logit of each ending",
        [feature.by_ending for feature in study.features],
        names,
        study.endings,
        "feature",
        "ending",
        note="Through the final norm with its scale in each prompt, minus the mean over endings.",
    )
    sections = [
        Section("The task", tables=[scores_table(study)], charts=[years], warning=study.warning or ""),
        Section("Few features against few neurons", tables=[curve_table(study)], charts=[curves]),
        Section("The features", tables=[features_table(study)], heatmaps=[by_year, by_ending]),
    ]
    title = f"Greater-than, {study.protocol['model']}, {study.protocol['writes']}"
    pictures = {"curves": curves, "years": years}
    return write_results(folder, title, sections, study.protocol, study.to_dict(), pictures)
