"""Write a study of circuit reuse as a page, pictures, and JSON and CSV files."""

import os
from pathlib import Path

from ...circuits.patching.report import result_heatmap, task_title
from ...files import write_csv
from ...reports.results_folder import write_results
from ...reports.sections import Section
from .repair_report import repair_sections
from .reuse_results import CircuitReuse
from .reuse_tables import (
    accuracy_table,
    faithfulness_table,
    overlap_table,
    published_heads_tables,
    repair_csv,
    repair_tables,
    roles_table,
    scores_csv,
    scores_table,
)


def save_reuse(result: CircuitReuse, folder: str | os.PathLike) -> Path:
    """Write a study of circuit reuse: `report.html`, `results.json`, CSV files and, with matplotlib, PNG files.

    Args:
        result ([`CircuitReuse`]): The result of [`reuse_circuit`].
        folder (`str` or `os.PathLike`): The folder to write to. It is made if it does not exist.

    Returns:
        `Path`: the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marks = _marks(result)
    maps, pictures = {}, {}
    for task, stages in result.stages.items():
        for number, stage in enumerate(stages, 1):
            title = f"{task_title(task)}, stage {number}: {stage.name}"
            maps.setdefault(number, []).append(result_heatmap(stage.result, title, marks))
            name = f"{task}_{number}_{stage.name.replace(' ', '_')}"
            stage.result.to_csv(folder / f"{name}.csv")
            pictures[name] = maps[number][-1]
    tables = {
        "overlap": overlap_table(result),
        "repair": repair_csv(result),
        "roles": roles_table(result),
        "scores": scores_csv(result),
    }
    for name, table in tables.items():
        write_csv(folder / f"{name}.csv", table.headers, table.rows)
    sections = [
        Section("Task performance of the model", tables=[accuracy_table(result)], warning=" ".join(result.warnings)),
        Section(
            "Overlap of the two circuits",
            "Heads with the greatest effects in each stage that both tasks share, against chance.",
            tables=[overlap_table(result)],
        ),
        Section("Heads by role", tables=[roles_table(result), scores_table(result), *published_heads_tables(result)]),
    ]
    if result.faithfulness:
        sections.append(
            Section(
                "Cross-task faithfulness",
                "All heads outside a circuit are mean-ablated; 1 is the whole model and 0 is the model with all heads ablated. "
                "A circuit that only one task uses preserves little of the other task.",
                tables=[faithfulness_table(result, task) for task in result.faithfulness],
            )
        )
    sections.append(
        Section(
            "The repair of Colored Objects with heads found through IOI",
            "From the last token, inhibition heads and negative movers are forced to attend to the two wrong colors. The edit "
            "uses the right answer: this is a diagnostic, not a mitigation.",
            tables=[table for repair in result.repairs for table in repair_tables(result, repair)],
        )
    )
    if result.search is not None:
        sections += repair_sections(result.search)
    sections.append(
        Section(
            "Path patching, stage by stage",
            "Orange: the head helps the task. Blue: the head works against it. Framed: movers, negative movers, inhibition "
            "heads and content gatherers.",
            heatmaps=[each for number in sorted(maps) for each in maps[number]],
        )
    )
    if result.attention:
        sections.append(Section("Attention of heads", attention=result.attention))
    title = f"Circuit reuse, {result.protocol['model']}"
    return write_results(folder, title, sections, result.protocol, result.to_dict(), pictures)


def _marks(result):
    marks = {}
    for role in ("mover", "negative mover", "inhibition", "content gatherer"):
        for head in result.roles.heads[role]:
            marks[head] = f"{marks[head]}, {role}" if head in marks else role
    return marks
