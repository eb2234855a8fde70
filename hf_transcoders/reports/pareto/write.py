"""Pareto fronts as files: page, picture and table."""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from .fronts import ParetoFronts
from .fronts_csv import save_pareto_csv
from .pareto_page import write_pareto_page
from .png import write_pareto_png


def write_pareto(
    stem: str | os.PathLike,
    fronts: Sequence[ParetoFronts],
    *,
    title: str,
    notes: Sequence[str] = (),
    csv: bool = False,
) -> list[Path]:
    """
    Writes fronts as `<stem>.html`, as `<stem>.png` where matplotlib is installed, and as `<stem>.csv` if asked.

    Args:
        stem (`str` or `os.PathLike`): The files' path without the ending.
        fronts (`Sequence[ParetoFronts]`): As [`pareto_fronts`] gave them.
        title (`str`): Heading of page and picture.
        notes (`Sequence[str]`, *optional*): Sentences for the page, such as which runs were left out.
        csv (`bool`, *optional*, defaults to `False`): Whether to write the table too.

    Returns:
        `list[Path]`: the files written.
    """
    stem = Path(stem)
    files = [write_pareto_page(stem.with_name(f"{stem.name}.html"), fronts, title=title, notes=notes)]
    if importlib.util.find_spec("matplotlib"):
        files.append(write_pareto_png(stem.with_name(f"{stem.name}.png"), fronts, title=title))
    if csv:
        files.append(save_pareto_csv(stem.with_name(f"{stem.name}.csv"), fronts))
    return files
