"""Write a study of feature patching as a folder: a page, pictures, and every number as JSON."""

import os
from pathlib import Path

from ...reports.results_folder import write_results
from ...reports.sections import Section
from .patching_results import FeaturePatchingStudy, patching_charts, patching_table


def save_feature_patching(study: FeaturePatchingStudy, folder: str | os.PathLike) -> Path:
    """Write a study of feature patching: `report.html`, `results.json` and, with matplotlib, PNG files of its curves.

    Args:
        study ([`FeaturePatchingStudy`]): Results of [`feature_patching_study`].
        folder (`str` or `os.PathLike`): Folder to write to, made if it does not exist.

    Returns:
        `Path`: Path of the page.
    """
    charts = patching_charts(study)
    section = Section(
        "Counterfactual activations of few features",
        tables=[patching_table(study)],
        charts=list(charts.values()),
        warning=study.warning or "",
    )
    title = f"Feature patching, {study.protocol['model']}"
    return write_results(folder, title, [section], study.protocol, study.to_dict(), charts)
