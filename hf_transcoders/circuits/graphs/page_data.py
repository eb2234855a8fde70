"""The page of one attribution graph or several: its plain data, and writing it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import TranscoderError
from ...features.feature_examples import FeatureExplanation
from .node_ids import node_ids
from .nodes import KINDS
from .page_labels import page_labels
from .verdicts import graph_verdicts, left_out, notes


if TYPE_CHECKING:
    from .graph import AttributionGraph


#: Largest number of edges that a browser draws without a pause.
MAX_EDGES = 50_000
# Metadata with places of their own on the page.
_NO_FACTS = ("scores", "pruning", "certificate", "validated_edges", "dictionaries", "warning", "notes")


def write_graph_page(
    path: str | os.PathLike,
    graphs: "AttributionGraph | Sequence[AttributionGraph]",
    features: Mapping[str, Sequence[FeatureExplanation]] | None = None,
    labels: str | os.PathLike | Mapping[str, Mapping[int, str]] | None = None,
) -> Path:
    """Write one graph or several as one self-contained interactive HTML page. Prune large graphs first.

    Args:
        path (`str` or `os.PathLike`): The file to write.
        graphs ([`AttributionGraph`] or `Sequence[AttributionGraph]`):
            The graphs, usually of several prompts, among which the page has a selector.
        features (`Mapping[str, Sequence[FeatureExplanation]]`, *optional*):
            Dictionary -> explanations ([`explain_features`]) of its features.
        labels (`str`, `os.PathLike` or `Mapping[str, Mapping[int, str]]`, *optional*):
            Labels of features: a file that a page saved, with pins and groups, or dictionary -> feature -> label.

    Returns:
        `Path`: the file.

    Raises:
        [`TranscoderError`]: a graph has too many edges for a browser, there is no graph, or `features` or `labels` are of other
            dictionaries.

    Example:

    ```python
    >>> graphs = attribution_graph(base, transcoders, ["The capital of France is", "The capital of Italy is"], tokenizer=tokenizer)
    >>> write_graph_page("capitals.html", [graph.prune() for graph in graphs])
    ```
    """
    from ...reports.graph.graph_page import write_graph

    return write_graph(path, page_data(graphs, features, labels))


def page_data(
    graphs: "AttributionGraph | Sequence[AttributionGraph]",
    features: Mapping[str, Sequence[FeatureExplanation]] | None = None,
    labels: str | os.PathLike | Mapping[str, Mapping[int, str]] | None = None,
) -> dict[str, Any]:
    """The data that [`~hf_transcoders.reports.graph.render_graph`] takes; arguments and errors as for [`write_graph_page`].

    Returns:
        `dict`: plain values.
    """
    graphs = list(graphs) if isinstance(graphs, Sequence) else [graphs]
    if not graphs:
        raise TranscoderError("There is no graph for the page: give at least one.")
    for name in features or {}:
        if not any(name in graph.dictionaries for graph in graphs):
            graphs[0].dictionary_number(name)  # Refuses names that no graph has.
    return {
        "graphs": [_graph_data(graph) for graph in graphs],
        "features": _details(graphs, features or {}),
        "saved": page_labels(labels, graphs),
    }


def _graph_data(graph):
    if graph.num_edges > MAX_EDGES:
        raise TranscoderError(
            f"The graph has {graph.num_edges:,} edges, and a page shows up to {MAX_EDGES:,}: make the page of "
            "`graph.prune()`, with smaller shares if needed."
        )
    metadata = graph.metadata
    summary = metadata.get("certificate")
    known = {entry["name"]: entry for entry in metadata.get("dictionaries", ())}
    return {
        "prompt": "".join(graph.tokens) or ", ".join(target.label for target in graph.targets),
        "tokens": graph.tokens,
        "num_layers": graph.num_layers,
        "dictionaries": [known.get(name, {"name": name}) for name in graph.dictionaries],
        "targets": [
            {"label": target.label, "weight": target.weight, "probability": target.probability}
            for target in graph.targets
        ],
        "nodes": _nodes(graph),
        "edges": {
            "source": graph.source.tolist(),
            "target": graph.target.tolist(),
            "weight": _rounded(graph.weight),
            "flow": _rounded(graph.edge_influence()),
        },
        "scores": graph.whole_scores,
        "verdicts": [verdict.to_dict() for verdict in graph_verdicts(graph)],
        "left_out": left_out(graph),
        "notes": notes(graph),
        "validation": summary and {"summary": summary, "edges": metadata.get("validated_edges", [])},
        "warning": graph.warning,
        "facts": {key: value for key, value in metadata.items() if key not in _NO_FACTS and value is not None},
    }


def _nodes(graph):
    ids = node_ids(graph)
    columns = {
        "layer": graph.layer.tolist(),
        "position": graph.position.tolist(),
        "index": graph.index.tolist(),
        "dictionary": graph.dictionary.tolist(),
        "value": _rounded(graph.value),
        "influence": _rounded(graph.influence()),
        "total": _rounded(graph.total),
        "rest": _rounded(graph.rest),
    }
    return [
        {
            "id": ids[number],
            "kind": KINDS[code],
            "label": graph.label(number),
            **{name: column[number] for name, column in columns.items()},
        }
        for number, code in enumerate(graph.kind.tolist())
    ]


def _details(graphs, features):
    """`dictionary/feature` -> explanation, for features that have a node in one of the graphs."""
    shown = {(name, feature) for graph in graphs for name, its in graph.feature_numbers().items() for feature in its}
    return {
        f"{name}/{explanation.feature}": explanation.to_dict()
        for name, explanations in features.items()
        for explanation in explanations
        if (name, explanation.feature) in shown
    }


def _rounded(values):
    """Values with six digits, which halves the size of a page; `None` for NaN."""
    return [None if value != value else float(f"{value:.6g}") for value in values.tolist()]
