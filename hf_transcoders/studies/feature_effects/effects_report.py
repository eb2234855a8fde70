"""Tables of the effects of features, as text and as a folder with a page and every number as JSON."""

import os
from pathlib import Path

from ...reports.results_folder import write_results
from ...reports.sections import Section, Table, tables_text
from ...text.columns import paired
from ...text.visible import visible
from .study import FeatureEffect, FeatureEffects


def save_feature_effects(study: FeatureEffects, folder: str | os.PathLike) -> Path:
    """Write effects of features: `report.html` and `results.json`.

    Args:
        study ([`FeatureEffects`]): Results of [`feature_effects_study`].
        folder (`str` or `os.PathLike`): Folder to write to, made if it does not exist.

    Returns:
        `Path`: Path of the page.
    """
    sections = [Section("Features", tables=[_summary(study)])]
    sections += [Section(f"Feature {each.feature}", text=visible(each.example), tables=[_tokens(each)]) for each in study.features]
    title = f"Effects of features, {study.protocol['model']}, {study.protocol['writes']}"
    return write_results(folder, title, sections, study.protocol, study.to_dict())


def effects_text(study: FeatureEffects) -> str:
    """Format all tables and the protocol for a terminal."""
    tables = [_summary(study), *map(_tokens, study.features)]
    return "\n".join([tables_text(tables), "", paired(study.protocol)])


def _summary(study: FeatureEffects) -> Table:
    headers = ["feature", "contexts", "activation", "removed", "rounds", "still on", "KL", "Spearman", "Spearman, likely"]
    rows = [
        [each.feature, each.contexts, each.activation, each.removed, each.rounds, f"{each.still_active:.0%}", each.kl,
         each.spearman, each.spearman_likely]
        for each in study.features
    ]  # fmt: skip
    note = (
        "Means over contexts. Removed: activation that was taken away, in as many rounds, until the feature was off. KL: from the "
        "prediction with the feature to that without. Spearman: rank correlation over tokens of the change of logits with the "
        "direct path."
    )
    if study.silent:
        note += f" Never active in the text: {', '.join(map(str, study.silent))}."
    return Table("Ablated features", headers, rows, note)


def _tokens(effect: FeatureEffect) -> Table:
    columns = (effect.raised, effect.lowered, effect.direct_raised, effect.direct_lowered)
    rows = [
        [f"{visible(repr(column[row][0]))} {column[row][1]:+.3f}" if row < len(column) else "" for column in columns]
        for row in range(max(map(len, columns)))
    ]
    headers = ["ablation raises", "ablation lowers", "direct path raises", "direct path lowers"]
    note = f"Change of logits, less its mean over the vocabulary, in {effect.contexts} contexts such as: {visible(effect.example)}"
    return Table(f"Feature {effect.feature}", headers, rows, note)
