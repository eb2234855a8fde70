"""Plain data of an attribution graph for its page."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import TranscoderError
from ...features.feature_examples import FeatureExplanation
from .graph import AttributionGraph
from .node_ids import node_ids
from .nodes import KINDS


#: Largest number of edges that a browser draws without a pause.
MAX_EDGES = 50_000
# Metadata with places of their own on the page.
_NO_FACTS = ("scores", "pruning", "certificate", "validated_edges", "dictionaries", "warning")


def page_data(
    graph: AttributionGraph, features: Mapping[str, Sequence[FeatureExplanation]] | None = None
) -> dict[str, Any]:
    """The data that [`~hf_transcoders.reports.graph.render_graph`] takes.

    Args:
        graph ([`AttributionGraph`]): The graph.
        features (`Mapping[str, Sequence[FeatureExplanation]]`, *optional*): Dictionary -> explanations of its features.

    Returns:
        `dict`: plain values.

    Raises:
        [`TranscoderError`]: the graph has too many edges for a browser, or lacks a dictionary of `features`.
    """
    if graph.num_edges > MAX_EDGES:
        raise TranscoderError(
            f"The graph has {graph.num_edges:,} edges, and a page shows up to {MAX_EDGES:,}: make the page of "
            "`graph.prune()`, with smaller shares if needed."
        )
    for name in features or {}:
        graph.dictionary_number(name)  # Refuses names that the graph does not have.
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
        "features": _details(graph, features or {}),
        "scores": graph.whole_scores,
        "pruning": metadata.get("pruning"),
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


def _details(graph, features):
    """`dictionary/feature` -> explanation, for features that have a node."""
    has = graph.is_kind("feature")
    shown = set(zip(graph.dictionary[has].tolist(), graph.index[has].tolist(), strict=True))
    return {
        f"{graph.dictionaries.index(name)}/{explanation.feature}": explanation.to_dict()
        for name, explanations in features.items()
        for explanation in explanations
        if (graph.dictionaries.index(name), explanation.feature) in shown
    }


def _rounded(values):
    """Values with six digits, which halves the size of a page; `None` for NaN."""
    return [None if value != value else float(f"{value:.6g}") for value in values.tolist()]
