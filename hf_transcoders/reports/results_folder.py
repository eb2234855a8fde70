"""Write a folder of results: a page, every number as JSON, and pictures."""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..files import write_text
from ..text.strict_json import to_json
from .heatmap_png import write_png
from .html import page_templates
from .lines import LineChart, write_lines_png
from .sections import Heatmap, Section


def write_results(
    folder: str | os.PathLike,
    title: str,
    sections: Sequence[Section],
    protocol: Mapping[str, Any],
    results: Mapping[str, Any],
    pictures: Mapping[str, Heatmap | LineChart] | None = None,
) -> Path:
    """Write a folder of results: `report.html`, `results.json` and, with matplotlib, PNG files.

    Args:
        folder (`str` or `os.PathLike`):
            Folder to write to, made if it does not exist.
        title (`str`):
            Heading of the page.
        sections (`Sequence[Section]`):
            Sections of the page.
        protocol (`Mapping[str, Any]`):
            Measurement protocol, shown at the end of the page.
        results (`Mapping[str, Any]`):
            Numbers for `results.json`; those that are not finite become `null`.
        pictures (`Mapping[str, Heatmap | LineChart]`, *optional*):
            Pictures by file name, without the ending `.png`.

    Returns:
        `Path`: Path of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", to_json(results, indent=1) + "\n")
    if find_spec("matplotlib"):
        for name, picture in (pictures or {}).items():
            write = write_png if isinstance(picture, Heatmap) else write_lines_png
            write(folder / f"{name}.png", picture)
    return write_page(folder / "report.html", title, sections, protocol)


def write_page(
    path: str | os.PathLike, title: str, sections: Sequence[Section], protocol: Mapping[str, Any] | None = None
) -> Path:
    """Write sections as one self-contained HTML file, without scripts and without requests to the network.

    Args:
        path (`str` or `os.PathLike`):
            File to write.
        title (`str`):
            Heading of the page.
        sections (`Sequence[Section]`):
            Sections of the page.
        protocol (`Mapping[str, Any]`, *optional*):
            Measurement protocol, shown at the end of the page.

    Returns:
        `Path`: Path of the page.
    """
    template = page_templates().get_template("results.html")
    return write_text(path, template.render(title=title, sections=sections, protocol=protocol or {}))
