"""Tables of the effects of features, as text and as a folder with a page and every number as JSON."""

import os
from pathlib import Path

from ...reports.results_folder import write_results
from ...reports.sections import Section
from ...text.visible import visible
from .effects_results import FeatureEffects, summary_table, tokens_table


def save_feature_effects(study: FeatureEffects, folder: str | os.PathLike) -> Path:
    """Write effects of features: `report.html` and `results.json`.

    Args:
        study ([`FeatureEffects`]): Results of [`feature_effects_study`].
        folder (`str` or `os.PathLike`): Folder to write to, made if it does not exist.

    Returns:
        `Path`: Path of the page.
    """
    sections = [Section("Features", tables=[summary_table(study)])]
    sections += [
        Section(f"Feature {each.feature}", text=visible(each.example, in_text=True), tables=[tokens_table(each)])
        for each in study.features
    ]
    title = f"Effects of features, {study.protocol['model']}, {study.protocol['writes']}"
    return write_results(folder, title, sections, study.protocol, study.to_dict())
