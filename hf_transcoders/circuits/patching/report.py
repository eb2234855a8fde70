"""Write a patching result as a page, a picture, and JSON and CSV files."""

import os
from pathlib import Path

from ...reports.results_folder import write_results
from ...reports.sections import AttentionView, Heatmap, Section, Table
from ...reports.task_section import task_section
from ...tasks.answer_metrics import estimate
from ...tasks.performance import TaskPerformance
from .results import PatchResult


_TASK_TITLES = {"ioi": "IOI", "colored-objects": "Colored Objects"}


def save_patch(
    result: PatchResult,
    folder: str | os.PathLike,
    attention: list[AttentionView] | None = None,
    performance: TaskPerformance | None = None,
) -> Path:
    """Write a patching result: `report.html`, `results.json`, `results.csv` and, with matplotlib, `effects.png`.

    Args:
        result ([`PatchResult`]): A result with two axes.
        folder (`str` or `os.PathLike`): The folder to write to. It is made if it does not exist.
        attention (`list[AttentionView]`, *optional*): Attention patterns to show below the heatmap.
        performance ([`~hf_transcoders.tasks.TaskPerformance`], *optional*):
            How well the model does the task, which then stands before the effects. Without it, only the metric of base and
            source runs does.

    Returns:
        `Path`: the page.
    """
    protocol = result.protocol
    method = protocol.get("method", "patching").capitalize()
    heatmap = result_heatmap(result, f"{method}: {task_title(protocol.get('task', ''))}")
    rows = []
    for place in result.top(10):
        row, column = (cells.index(place[axis]) for axis, cells in result.axes.items())
        cells = [place[axis] for axis in result.axes]
        rows.append([*cells, place["effect"], heatmap.low[row][column], heatmap.high[row][column]])
    note = f"{heatmap.note} Low and high are the ends of 95% intervals, bootstrapped over prompts."
    top = Table("The ten greatest effects", [*result.axes, "effect", "95% low", "95% high"], rows, note)
    runs = Table("The runs that were patched", ["run", result.metric.replace("_", " ")], run_rows(result))
    section = Section(
        heatmap.title, tables=[runs, top], heatmaps=[heatmap], attention=attention or [], warning=result.warning or ""
    )
    found = result.to_dict()
    sections = [section]
    if performance is not None:
        sections = [task_section(performance), section]
        found["performance"] = performance.to_dict()
    title = f"{heatmap.title}, {protocol.get('model', '')}"
    page = write_results(folder, title, sections, protocol, found, {"effects": heatmap})
    result.to_csv(page.parent / "results.csv")
    return page


def run_rows(result: PatchResult) -> list[list[str]]:
    """Name and metric of the runs without patches: the base run, and the source run if there is one.

    Args:
        result ([`PatchResult`]): A result.

    Returns:
        `list[list[str]]`: rows of a table, with 95% intervals over prompts.
    """
    clean_first = result.protocol.get("direction") != "denoising"
    names = ("clean", "corrupted") if clean_first else ("corrupted", "clean")
    runs = [(f"base ({names[0]} prompts)", result.base), (f"source ({names[1]} prompts)", result.source)]
    return [[name, str(estimate(values))] for name, values in runs if values is not None]


def result_heatmap(result: PatchResult, title: str, marks: dict[tuple[int, int], str] | None = None) -> Heatmap:
    """Make a heatmap of the effects and intervals of a result with two axes.

    Args:
        result ([`PatchResult`]): A result with two axes.
        title (`str`): Title of the heatmap.
        marks (`dict[tuple[int, int], str]`, *optional*): Row and column of cells to frame -> a note about each.

    Returns:
        [`Heatmap`]
    """
    low, high = result.intervals()
    (row_label, rows), (column_label, columns) = result.axes.items()
    if result.source is None:
        unit = f"Change of {result.metric.replace('_', ' ')} if the place is ablated; hover for intervals."
    else:
        unit = "Share of the way from the base run to the source run (0 to 1); hover for intervals."
    return Heatmap(
        title,
        result.effects.tolist(),
        rows,
        columns,
        row_label,
        column_label,
        low.tolist(),
        high.tolist(),
        marks or {},
        unit,
        {**result.protocol, "metric": result.metric, "intervals": "95%, bootstrap over prompts"},
    )


def task_title(name: str) -> str:
    """The name of a task as a heading."""
    return _TASK_TITLES.get(name, name)
