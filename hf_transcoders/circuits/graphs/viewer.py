"""Export attribution graphs as the JSON of published viewers.

The format is that of the viewers of Ameisen et al. (2025, "Circuit Tracing") and Neuronpedia, schema version 1: feature
numbers are Cantor pairs of layer and feature. Comments say what the client of circuit-tracer 0.5.0 needs beyond the schema.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ...errors import TranscoderError
from ...features.feature_examples import FeatureExplanation
from ...text.printable import printable
from ...text.visible import visible
from .influence import cumulative_shares
from .node_ids import LayerNumbers, node_ids
from .nodes import KINDS


if TYPE_CHECKING:
    from .graph import AttributionGraph


_TYPES = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    # Without a dictionary, the whole output is error.
    "mlp": "mlp reconstruction error",
    "token": "embedding",
    "position": "embedding",
    "bias": "bias",
    "target": "logit",
}
# Settings of the generation -> their names here.
_GENERATION = {
    "max_n_logits": "max_logits", "desired_logit_prob": "logit_mass", "max_feature_nodes": "max_features",
}  # fmt: skip
#: Names of graphs and of folders with features.
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_SCAN = re.compile(rf"(\./)?{NAME.pattern}(/{NAME.pattern})*")
#: File with the metadata of all graphs in a folder, without its ending.
OVERVIEW = "graph-metadata"
_NOT_IN_URLS = set(' "<>\\^`{|}?#')


def cantor(layer: int, feature: int) -> int:
    """A unique number for a feature of a layer (Cantor's pairing function)."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def viewer_graph(
    graph: "AttributionGraph",
    slug: str,
    scan: str | None = None,
    *,
    features: Mapping[str, Sequence[FeatureExplanation]] | None = None,
    description: str = "",
    feature_base_url: str | None = None,
    numbers: LayerNumbers | None = None,
) -> dict[str, Any]:
    """Convert a graph to the JSON object of the published viewers. Prune it first: viewers show every node.

    Args:
        graph ([`AttributionGraph`]): The graph.
        slug (`str`): Name of the graph in addresses.
        scan (`str`, *optional*):
            Path at which the client of circuit-tracer finds the files of features, by default `./data/features/{model}`.
            Neuronpedia takes it for the id of the model, such as `gemma-2-2b`. Without `./` in front, biases have a type of
            their own, which Neuronpedia knows and circuit-tracer draws as features.
        features (`Mapping[str, Sequence[FeatureExplanation]]`, *optional*): Dictionary -> explanations, for labels.
        description (`str`, *optional*): Description of the graph.
        feature_base_url (`str`, *optional*):
            Public https address of a folder with the files of features, which Neuronpedia reads.
        numbers ([`~hf_transcoders.circuits.graphs.node_ids.LayerNumbers`], *optional*):
            Numbers of several graphs that share feature files.

    Returns:
        `dict`: `metadata`, `qParams`, `nodes` and `links`.

    Raises:
        [`TranscoderError`]: `slug`, `scan` or `feature_base_url` is not of this form, or the graph lacks a dictionary of
            `features`.
    """
    scan = f"./data/features/{model_name(graph)}" if scan is None else scan
    check_names(slug, scan, feature_base_url)
    numbers = numbers or LayerNumbers(graph)
    ids = node_ids(graph, numbers)
    for name in features or {}:
        graph.dictionary_number(name)  # Refuses names that the graph does not have.
    labels = {
        (name, explanation.feature): feature_label(explanation)
        for name, explanations in (features or {}).items()
        for explanation in explanations
    }
    influences, threshold, note = _pruned_by(graph)
    targets = graph.is_kind("target").nonzero()[:, 0].tolist()
    best = max(targets, key=lambda number: _probability(graph.targets[graph.index[number]]), default=None)
    nodes = [
        {
            **_viewer_node(graph, number, ids[number], numbers, labels),
            "influence": influences[number],
            "is_target_logit": number == best,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
        }
        for number in range(graph.num_nodes)
    ]
    if scan.startswith("./"):
        # The client draws biases as circles, which are features; Neuronpedia has a mark for them.
        for node in nodes:
            node["feature_type"] = _TYPES["error"] if node["feature_type"] == "bias" else node["feature_type"]
    links = [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for source, target, weight in zip(
            graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True
        )
    ]
    description = " ".join(filter(None, [graph.warning, note, description]))
    return {
        "metadata": _metadata(graph, slug, scan, threshold, feature_base_url, description),
        "qParams": {
            "linkType": "both",
            "pinnedIds": [ids[number] for number in targets],
            "clickedId": "",
            "supernodes": [],
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": links,
    }


def check_names(slug: str, scan: str | None = None, feature_base_url: str | None = None) -> None:
    """Check names and the address before they are written; arguments as for [`viewer_graph`].

    Raises:
        [`TranscoderError`]: `slug`, `scan` or `feature_base_url` is not usable.
    """
    for what, name, form in (("slug", slug, NAME), ("scan", scan, _SCAN)):
        if name is not None and not form.fullmatch(name):
            raise TranscoderError(
                f"'{printable(name)}' cannot be a {what}, because files are named after it: use letters, digits, '-', '_' "
                "and '.'."
            )
    if slug.lower() == OVERVIEW:
        raise TranscoderError(f"'{slug}' is the name of the list of graphs: give the graph another slug.")
    if feature_base_url is None:
        return
    try:
        parts = urlsplit(feature_base_url)
        known = parts.scheme == "https" and bool(parts.hostname) and parts.username is None and parts.port != 0
    except ValueError:
        known = False
    plain = feature_base_url.isascii() and feature_base_url.isprintable() and not set(feature_base_url) & _NOT_IN_URLS
    if not known or not plain:
        raise TranscoderError(
            f"'{printable(feature_base_url)[:200]}' is not the address of a folder that browsers can read: give one such as "
            "https://example.org/features, without a user, '?' or '#'."
        )


def feature_label(explanation: FeatureExplanation) -> str:
    """Label a feature as the graph page does: by the tokens with its top activations, and its promoted tokens."""
    peaks = dict.fromkeys(
        visible(context.tokens[context.peak], in_text=True).strip() for context in explanation.contexts[:3]
    )
    raised = ", ".join(visible(token, in_text=True).strip() for token, _ in explanation.top_tokens[:3])
    quoted = ", ".join(f"“{token}”" for token in [*peaks][:2])
    return " ".join(filter(None, [quoted, raised and f"direct path → {raised}"]))


def model_name(graph: "AttributionGraph") -> str:
    """Name of the graph's model, without its organization or folder, that can name a file."""
    last = str(graph.metadata.get("model") or "").rstrip("/").split("/")[-1]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-._") or "model"


def _pruned_by(graph):
    """Cumulative influence of each node, the largest of those that pruning keeps, and a note where it is not exact."""
    pruning, shares = graph.metadata.get("pruning"), graph.cumulative_influence
    if pruning is None or shares is None:
        note = pruning and "Influence is that within the pruned graph, because the file of the graph has no other."
        return cumulative_shares(graph.influence()).tolist(), 1.0, note
    # Viewers hide nodes above the threshold, except for embeddings and logits. A graph can be pruned twice.
    filtered = shares[~graph.is_kind("token", "position", "target")]
    return shares.tolist(), max([pruning["nodes"], *filtered.tolist()]), None


def _viewer_node(graph, number, name, numbers, labels):
    kind = KINDS[graph.kind[number]]
    layer, position, index, dictionary = (
        int(getattr(graph, column)[number]) for column in ("layer", "position", "index", "dictionary")
    )
    value = float(graph.value[number])
    node = {
        "node_id": name,
        "feature": index,
        "layer": str(layer),
        "ctx_idx": _first_position(graph) + max(position, 0),
        "feature_type": _TYPES[kind],
        "token_prob": 0.0,
        "clerp": "",
        "activation": value,
    }
    if kind == "feature":
        feature = numbers.feature(dictionary, index)
        label = labels.get((graph.dictionaries[dictionary], index)) or f"L{layer} #{index}"
        changed = {"feature": cantor(layer, feature), "jsNodeId": f"{layer}_{feature}-0", "clerp": label}
    elif kind in ("error", "mlp"):
        rank = -1 - (numbers.error(dictionary) if kind == "error" else numbers.mlp(layer))
        # The client merges nodes with one layer, position and `feature`.
        changed = {"feature": -1 - rank, "jsNodeId": f"{layer}_{position}-{rank}"}
        if kind == "mlp":
            changed["clerp"] = f"MLP {layer}, without a dictionary"
        elif rank:
            changed["clerp"] = f"Error of {graph.dictionaries[dictionary]}"
    elif kind == "token":
        # Graphs that are summed over positions have no prompt.
        token = visible(graph.tokens[position]) if graph.tokens else str(index)
        changed = {
            "feature": position if graph.tokens else index,
            "layer": "E",
            "jsNodeId": f"E_{index}-{position}",
            "clerp": f'Emb: "{token}"',
        }
    elif kind == "position":
        place = max(index, position)
        changed = {
            # Unlike those of tokens.
            "feature": -1 - place,
            "layer": "E",
            "jsNodeId": f"P_{place}-{place}",
            "clerp": f"Position {place}",
        }
    elif kind == "bias":
        changed = {"feature": numbers.bias(layer), "jsNodeId": f"B_{layer}-0", "clerp": graph.label(number)}
    else:
        target = graph.targets[index]
        token = name.split("_")[1]
        probability = _probability(target)
        # Viewers cut the label at "(p=".
        text = visible(target.label, in_text=True).replace("(p=", "( p=")
        changed = {
            "feature": int(token),
            "layer": str(graph.num_layers + 1),
            "jsNodeId": f"L_{token}-{position}",
            "clerp": f'Output "{text}" (p={probability:.3f})',
            "token_prob": probability,
            "activation": None,
        }
    node |= changed
    # The client shows labels in tooltips as HTML.
    return node | {"clerp": node["clerp"].replace("<", "‹").replace(">", "›")}


def _metadata(graph, slug, scan, threshold, feature_base_url, description):
    from ...version import __version__

    scores = graph.whole_scores
    settings = graph.metadata.get("settings", {})
    pruning = graph.metadata.get("pruning", {})
    generation = {name: settings[key] for name, key in _GENERATION.items() if key in settings}
    # Neuronpedia asks for features at this address, or at its own by the names of sources, where there is one.
    details = {"feature_details": {"feature_json_base_url": feature_base_url.rstrip("/")}} if feature_base_url else {}
    return {
        "slug": slug,
        "scan": scan,
        "prompt": "".join(graph.tokens),
        "prompt_tokens": [""] * _first_position(graph) + (graph.tokens or [""]),
        "transcoder_list": graph.dictionaries,
        "schema_version": 1,
        "node_threshold": threshold,
        **details,
        "info": {
            "description": description,
            "creator_name": "",
            "creator_url": "",
            "source_urls": [],
            "generator": {"name": "hf_transcoders", "version": __version__, "url": "", "email": ""},
        },
        "generation_settings": generation,
        "pruning_settings": {
            "node_threshold": pruning.get("nodes", 1.0),
            "edge_threshold": pruning.get("edges", 1.0),
        },
        "replacement_score": scores["replacement"],
        "completeness_score": scores["completeness"],
    }


def _first_position(graph):
    """Position of the first token. The client cannot lay out a single position, and hides what makes up two thirds of them."""
    return int(len(graph.tokens) < 2)


def _probability(target):
    return target.weight if target.probability is None else target.probability


def dump(content: dict[str, Any]) -> str:
    """A viewer's object as JSON text."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False)
