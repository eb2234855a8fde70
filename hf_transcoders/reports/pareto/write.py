"""Write Pareto fronts as a page, a picture and a table."""

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
    Write fronts as `<stem>.html`, as `<stem>.png` if matplotlib is installed, and optionally as `<stem>.csv`.

    Args:
        stem (`str` or `os.PathLike`): Path of the files without the ending.
        fronts (`Sequence[ParetoFronts]`): Fronts from [`pareto_fronts`].
        title (`str`): Heading of the page and the picture.
        notes (`Sequence[str]`, *optional*): Sentences for the page, such as which runs were left out.
        csv (`bool`, *optional*, defaults to `False`): Whether to write the table.

    Returns:
        `list[Path]`: Paths of the files.
    """
    stem = Path(stem)
    files = [write_pareto_page(stem.with_name(f"{stem.name}.html"), fronts, title=title, notes=notes)]
    if importlib.util.find_spec("matplotlib"):
        files.append(write_pareto_png(stem.with_name(f"{stem.name}.png"), fronts, title=title))
    if csv:
        files.append(save_pareto_csv(stem.with_name(f"{stem.name}.csv"), fronts))
    return files
