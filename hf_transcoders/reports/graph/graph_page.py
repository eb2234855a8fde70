"""Render an attribution graph as one interactive HTML page."""

import base64
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...files import write_text
from ...text.strict_json import to_json
from ..html import page_templates


# Parts of the page's script, in order.
_SCRIPTS = ("data", "state", "pruning", "layout", "nodes", "edges", "tooltip", "panel", "pinned", "main")


def write_graph(path: str | os.PathLike, data: Mapping[str, Any]) -> Path:
    """Write a graph as one self-contained HTML file, which makes no requests.

    Args:
        path (`str` or `os.PathLike`): The file to write.
        data (`Mapping[str, Any]`): The data, as for [`render_graph`].

    Returns:
        `Path`: the file.
    """
    return write_text(path, render_graph(data))


def render_graph(data: Mapping[str, Any]) -> str:
    """Render a graph as the text of one HTML page.

    Args:
        data (`Mapping[str, Any]`): Plain values, with

            - `prompt` (`str`), `tokens` (`list[str]`), `num_layers` (`int`);
            - `dictionaries`: `name` and further values of each;
            - `targets`: `label`, `weight` and `probability` (or `None`) of each;
            - `nodes`: `id`, `kind`, `label`, `layer`, `position`, `index`, `dictionary` (number or -1), `value`,
              `influence`, `total` (or `None`) and `rest` of each;
            - `edges`: equally long lists `source` and `target` (numbers of nodes), `weight`, and `flow`, the influence
              that each edge carries;
            - `features`: `"dictionary/feature"` -> [`~hf_transcoders.features.FeatureExplanation`] as a `dict`;
            - `scores` (`replacement`, `completeness`, `rest`), `pruning` (or `None`), `validation` (or `None`; the
              `summary` and the `edges` of an [`EdgeValidation`]), `facts` (further values to show);
            - `warning` (or `None`): a sentence why the graph must not be trusted.

    Returns:
        `str`: HTML.
    """
    from markupsafe import Markup

    environment = page_templates()
    script = "\n".join(
        environment.loader.get_source(environment, f"graph/{name}.js")[0].replace("\r\n", "\n") for name in _SCRIPTS
    )
    # The browser runs this script and no other, also where text in the page contains one.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("graph/graph.html").render(
        title=data["prompt"],
        script=Markup(script),
        digest=digest,
        data=Markup(embedded_json(data)),
        warning=data.get("warning"),
    )


def embedded_json(data: Mapping[str, Any]) -> str:
    """JSON that can neither end the `<script>` element around it nor open a comment in it."""
    text = to_json(data, indent=None, ensure_ascii=False, default=str, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
