"""Write a patching result as a page, a picture, and JSON and CSV files."""

import os
from pathlib import Path

from ...reports.results_folder import write_results
from ...reports.sections import AttentionView, Heatmap, Section, Table
from .results import PatchResult


_TASK_TITLES = {"ioi": "IOI", "colored-objects": "Colored Objects"}


def save_patch(result: PatchResult, folder: str | os.PathLike, attention: list[AttentionView] | None = None) -> Path:
    """Write a patching result: `report.html`, `results.json`, `results.csv` and, with matplotlib, `effects.png`.

    Args:
        result ([`PatchResult`]): A result with two axes.
        folder (`str` or `os.PathLike`): The folder to write to. It is made if it does not exist.
        attention (`list[AttentionView]`, *optional*): Attention patterns to show below the heatmap.

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
    top = Table("The ten greatest effects", [*result.axes, "effect", "from", "to"], rows, heatmap.note)
    section = Section(heatmap.title, tables=[top], heatmaps=[heatmap], attention=attention or [])
    title = f"{heatmap.title}, {protocol.get('model', '')}"
    page = write_results(folder, title, [section], protocol, result.to_dict(), {"effects": heatmap})
    result.to_csv(page.parent / "results.csv")
    return page


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
