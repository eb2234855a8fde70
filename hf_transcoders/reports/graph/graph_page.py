"""An attribution graph as one HTML page to walk through."""

import base64
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...files import write_text
from ...text.strict_json import to_json
from ..html import page_templates


# In this order they make up the page's one script.
_SCRIPTS = ("data", "state", "pruning", "layout", "nodes", "edges", "tooltip", "panel", "pinned", "main")


def write_graph(path: str | os.PathLike, data: Mapping[str, Any]) -> Path:
    """Writes a graph as one self-contained HTML file, which makes no request to anywhere.

    Args:
        path (`str` or `os.PathLike`): The file to write.
        data (`Mapping[str, Any]`): As for [`render_graph`].

    Returns:
        `Path`: the file.
    """
    return write_text(path, render_graph(data))


def render_graph(data: Mapping[str, Any]) -> str:
    """A graph as the text of one HTML page.

    Args:
        data (`Mapping[str, Any]`): Plain values, with

            - `prompt` (`str`), `tokens` (`list[str]`), `num_layers` (`int`);
            - `dictionaries`: `name` of each, and what else there is to tell of it;
            - `targets`: `label`, `weight` and `probability` (or `None`) of each;
            - `nodes`: `id`, `kind`, `label`, `layer`, `position`, `index`, `dictionary` (number or -1), `value`,
              `influence`, `total` (or `None`) and `rest` of each;
            - `edges`: equally long lists `source` and `target` (numbers of nodes), `weight`, and `flow`, the influence
              that each carries;
            - `features`: `"dictionary/index"` -> [`~hf_transcoders.evaluation.FeatureExplanation`] as a `dict`;
            - `scores` (`replacement`, `completeness`, `rest`), `pruning` (or `None`), `certificate` (or `None`;
              a [`~hf_transcoders.circuits.graphs.certificate.Certificate`] as a `dict`), `facts` (what else to tell);
            - `warning` (or `None`): what speaks against trusting it.

    Returns:
        `str`: HTML.
    """
    from markupsafe import Markup

    environment = page_templates()
    script = "\n".join(
        environment.loader.get_source(environment, f"graph/{name}.js")[0].replace("\r\n", "\n") for name in _SCRIPTS
    )
    # The browser runs this script and no other, whatever else might have found its way into the page.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("graph/graph.html").render(
        title=data["prompt"],
        script=Markup(script),
        digest=digest,
        data=Markup(embedded_json(data)),
        warning=data.get("warning"),
    )


def embedded_json(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the `<script>` element that it stands in, nor open a comment there."""
    text = to_json(data, indent=None, ensure_ascii=False, default=str, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
