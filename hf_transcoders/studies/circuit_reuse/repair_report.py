"""Write repairs that were found by search as a page, pictures, and JSON and CSV files."""

import os
from pathlib import Path

from ...circuits.patching.report import task_title
from ...files import write_csv
from ...reports.results_folder import write_results
from ...reports.sections import Heatmap, Section
from .found_repair import RepairStudy
from .repair_tables import (
    downstream_tables,
    evidence_tables,
    found_table,
    ioi_tables,
    outcome_tables,
    outcomes_csv,
    paper_tables,
)


def save_repair(study: RepairStudy, folder: str | os.PathLike) -> Path:
    """Write repairs: `report.html`, `results.json`, `outcomes.csv` and, with matplotlib, a PNG file for each set of tokens.

    Args:
        study ([`RepairStudy`]): The result of [`find_repair`].
        folder (`str` or `os.PathLike`): The folder to write to. It is made if it does not exist.

    Returns:
        `Path`: the page.
    """
    maps = {name: _heatmap(study, number, name) for number, name in enumerate(study.search.sets)}
    pictures = {f"forced_to_{name.replace(' ', '_')}": each for name, each in maps.items()}
    title = f"Repairs of {task_title(study.protocol['task'])}, {study.protocol['model']}"
    page = write_results(folder, title, repair_sections(study), study.protocol, study.to_dict(), pictures)
    table = outcomes_csv(study)
    write_csv(page.parent / "outcomes.csv", table.headers, table.rows)
    return page


def repair_sections(study: RepairStudy) -> list[Section]:
    """Make the sections of the page."""
    sections = [
        Section(
            "Repairs found by search",
            f"Each head is forced to attend from {study.protocol['query']} only to some tokens, alone and then together with "
            "others, and judged on other prompts. An edit that uses the answer is a diagnostic of what the heads do, not a "
            "mitigation.",
            tables=[found_table(study)],
        ),
        Section("The best repairs compared with controls", tables=[*outcome_tables(study), *paper_tables(study)]),
    ]
    if study.heads:
        sections.append(Section("What the heads found do without an edit", tables=evidence_tables(study)))
    if study.downstream:
        sections.append(Section("What changes after the edit", tables=downstream_tables(study)))
    if study.in_ioi:
        sections.append(Section("The same heads in IOI", tables=ioi_tables(study)))
    sections.append(
        Section(
            "Every head alone",
            "Change of the accuracy on the prompts of the search with one head forced onto the tokens. Orange: the edit helps. "
            "Framed: heads of the repair with these tokens.",
            heatmaps=[_heatmap(study, number, name) for number, name in enumerate(study.search.sets)],
        )
    )
    return sections


def _heatmap(study, number, name):
    objective = study.protocol["objective"]
    repair = next(each for each in study.search.repairs if each.tokens == name)
    base = getattr(repair.steps[0], objective)
    change = study.search.alone[objective][number] - base
    searched = [layer for layer in range(len(change)) if not change[layer].isnan().all()]
    change = change[searched]
    marks = {(searched.index(each.head[0]), each.head[1]): f"step {step}" for step, each in enumerate(repair.heads, 1)}
    return Heatmap(
        f"Forced onto {name}",
        change.tolist(),
        [str(layer) for layer in searched],
        [str(head) for head in range(change.shape[1])],
        marks=marks,
        note=f"{objective.replace('_', ' ').capitalize()} without an edit: {base:.1%}.",
    )
