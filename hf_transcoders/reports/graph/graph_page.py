"""Render attribution graphs as one interactive HTML page."""

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
_SCRIPTS = (
    "data", "state", "saved", "pruning", "layout", "nodes", "edges", "tooltip", "panel", "pinned", "view", "panes", "main",
)  # fmt: skip


def write_graph(path: str | os.PathLike, data: Mapping[str, Any]) -> Path:
    """Write one graph or several as one self-contained HTML file, which makes no requests.

    Args:
        path (`str` or `os.PathLike`): The file to write.
        data (`Mapping[str, Any]`): The data, as for [`render_graph`].

    Returns:
        `Path`: the file.
    """
    return write_text(path, render_graph(data))


def render_graph(data: Mapping[str, Any]) -> str:
    """Render one graph or several as the text of one HTML page.

    Args:
        data (`Mapping[str, Any]`): Plain values, with

            - `graphs`: for each graph
                - `prompt` (`str`), `tokens` (`list[str]`), `num_layers` (`int`);
                - `dictionaries`: `name` and further values of each;
                - `targets`: `label`, `weight` and `probability` (or `None`) of each;
                - `nodes`: `id`, `kind`, `label`, `layer`, `position`, `index`, `dictionary` (number or -1), `value`,
                  `influence`, `total` (or `None`) and `rest` of each;
                - `edges`: equally long lists `source` and `target` (numbers of nodes), `weight`, and `flow`, the influence
                  that each edge carries;
                - `scores` (`replacement`, `completeness`, `rest`), `validation` (or `None`; the `summary` and the `edges` of
                  an [`EdgeValidation`]), `facts` (further values to show);
                - `verdicts`: `about`, `level` and `text` of each [`Verdict`]; `left_out` (or `None`), a sentence on what pruning
                  dropped; `notes`, sentences on what the page lacks;
                - `warning` (or `None`): a sentence why the graph must not be trusted;
            - `features`: `"dictionary/feature"` -> [`~hf_transcoders.features.FeatureExplanation`] as a `dict`;
            - `saved`: `labels` (dictionary -> feature -> label) and, for some prompts in `graphs`, `prompt`, `pins` (ids of nodes)
              and `groups` (`name` and `members`).

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
    graphs = data["graphs"]
    prompts = [graph["prompt"] for graph in graphs]
    title = prompts[0] if len(prompts) == 1 else f"{prompts[0]} and {len(prompts) - 1} more"
    return environment.get_template("graph/graph.html").render(
        title=title,
        prompts=prompts,
        has_warning=any(graph["warning"] for graph in graphs),
        script=Markup(script),
        digest=digest,
        # Each graph is parsed when it is opened.
        graphs=[Markup(embedded_json(graph)) for graph in graphs],
        data=Markup(embedded_json({"prompts": prompts, "features": data["features"], "saved": data["saved"]})),
    )


def embedded_json(data: Mapping[str, Any]) -> str:
    """JSON that can neither end the `<script>` element around it nor open a comment in it."""
    text = to_json(data, indent=None, ensure_ascii=False, default=str, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
