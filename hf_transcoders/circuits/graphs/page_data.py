"""An attribution graph as the plain data that its page is made of."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import TranscoderError
from ...features.feature_examples import FeatureExplanation
from .graph import KINDS
from .influence import influence, normalized_weights
from .node_ids import node_ids


if TYPE_CHECKING:
    from .graph import AttributionGraph
    from .validation import Certificate

#: Edges that a browser still draws without a pause.
MAX_EDGES = 50_000
# Told in places of their own.
_NO_FACTS = ("scores", "pruning", "certificate", "dictionaries", "warning")


def page_data(
    graph: "AttributionGraph",
    features: Mapping[str, Sequence[FeatureExplanation]] | None = None,
    certificate: "Certificate | None" = None,
) -> dict[str, Any]:
    """What [`~hf_transcoders.reports.graph.render_graph`] takes.

    Args:
        graph ([`AttributionGraph`]): The graph.
        features (`Mapping[str, Sequence[FeatureExplanation]]`, *optional*): Dictionary -> explanations of its features.
        certificate ([`~hf_transcoders.circuits.graphs.certificate.Certificate`], *optional*):
            For its single edges; its summary is in the graph already.

    Returns:
        `dict`: plain values.

    Raises:
        [`TranscoderError`]: the graph has too many edges for a browser, or no dictionary of such a name.
    """
    if graph.num_edges > MAX_EDGES:
        raise TranscoderError(
            f"The graph has {graph.num_edges:,} edges, and a page shows up to {MAX_EDGES:,}: make it of "
            "`graph.prune()`, with smaller shares if need be."
        )
    if unknown := [name for name in features or {} if name not in graph.dictionaries]:
        raise TranscoderError(
            f"The graph has no dictionary '{unknown[0]}' to which features could belong: choose from "
            f"{', '.join(graph.dictionaries)}."
        )
    influences = influence(graph)
    flow = normalized_weights(graph) * (influences + graph.target_weights)[graph.target]
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
        "nodes": _nodes(graph, influences),
        "edges": {
            "source": graph.source.tolist(),
            "target": graph.target.tolist(),
            "weight": _rounded(graph.weight),
            "flow": _rounded(flow),
        },
        "features": _details(graph, features or {}),
        # Of the whole graph, where this is a part of it.
        "scores": metadata.get("scores") or graph.scores(),
        "pruning": metadata.get("pruning"),
        "certificate": certificate.to_dict() if certificate else summary and {"summary": summary},
        "warning": graph.warning,
        "facts": {key: value for key, value in metadata.items() if key not in _NO_FACTS and value is not None},
    }


def _nodes(graph, influences):
    ids = node_ids(graph)
    columns = {
        "layer": graph.layer.tolist(),
        "position": graph.position.tolist(),
        "index": graph.index.tolist(),
        "dictionary": graph.dictionary.tolist(),
        "value": _rounded(graph.value),
        "influence": _rounded(influences),
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
    """`dictionary/feature` -> its explanation, of those that have a node."""
    has = graph.is_kind("feature")
    shown = set(zip(graph.dictionary[has].tolist(), graph.index[has].tolist(), strict=True))
    return {
        f"{graph.dictionaries.index(name)}/{explanation.feature}": explanation.to_dict()
        for name, explanations in features.items()
        for explanation in explanations
        if (graph.dictionaries.index(name), explanation.feature) in shown
    }


def _rounded(values):
    """Six digits, which half the size of a page; `None` for NaN."""
    return [None if value != value else float(f"{value:.6g}") for value in values.tolist()]
