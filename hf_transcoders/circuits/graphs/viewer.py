"""Export attribution graphs as the JSON of published viewers.

The format is that of the viewers of Ameisen et al. (2025, "Circuit Tracing") and Neuronpedia, schema version 1: feature
numbers are Cantor pairs of layer and feature.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import TranscoderError
from ...features.feature_examples import FeatureExplanation
from ...files import atomic_directory, write_text
from .graph import AttributionGraph
from .node_ids import LayerNumbers, node_ids
from .nodes import KINDS


_TYPES = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    # Without a dictionary, the whole output is error.
    "mlp": "mlp reconstruction error",
    "token": "embedding",
    "position": "unknown",
    "bias": "bias",
    "target": "logit",
}
# Settings of the generation -> their names here.
_GENERATION = {
    "max_n_logits": "max_logits", "desired_logit_prob": "logit_mass", "max_feature_nodes": "max_features",
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def cantor(layer: int, feature: int) -> int:
    """A unique number for a feature of a layer (Cantor's pairing function)."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def viewer_graph(
    graph: AttributionGraph,
    slug: str,
    scan: str | None = None,
    *,
    features: Mapping[str, Sequence[FeatureExplanation]] | None = None,
    description: str = "",
    numbers: LayerNumbers | None = None,
) -> dict[str, Any]:
    """Convert a graph to the JSON object of the published viewers. Prune it first: viewers show every node.

    Args:
        graph ([`AttributionGraph`]): The graph.
        slug (`str`): Name of the graph in addresses.
        scan (`str`, *optional*): Name of the dictionaries, by which a viewer finds features. The model's name by default.
        features (`Mapping[str, Sequence[FeatureExplanation]]`, *optional*):
            Dictionary -> explanations. A feature's label is the token with its largest activation.
        description (`str`, *optional*): Description of the graph.
        numbers ([`~hf_transcoders.circuits.graphs.node_ids.LayerNumbers`], *optional*):
            Numbers of several graphs that share feature files.

    Returns:
        `dict`: `metadata`, `qParams`, `nodes` and `links`.

    Raises:
        [`TranscoderError`]: `slug` or `scan` cannot name a file, or the graph lacks a dictionary of `features`.
    """
    scan = _scan(graph, scan)
    for what, name in (("slug", slug), ("scan", scan)):
        if not _NAME.fullmatch(name):
            raise TranscoderError(
                f"'{name}' cannot be a {what}, because files are named after it: use letters, digits, '-', '_' and '.'."
            )
    numbers = numbers or LayerNumbers(graph)
    ids = node_ids(graph, numbers)
    for name in features or {}:
        graph.dictionary_number(name)  # Refuses names that the graph does not have.
    labels = _labels(features)
    shares = _cumulative(graph.influence())
    targets = graph.is_kind("target").nonzero()[:, 0].tolist()
    best = max(targets, key=lambda number: _probability(graph.targets[graph.index[number]]), default=None)
    nodes = [
        {
            **_viewer_node(graph, number, ids[number], numbers, labels),
            "influence": shares[number],
            "is_target_logit": number == best,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
        }
        for number in range(graph.num_nodes)
    ]
    links = [
        {"source": ids[source], "target": ids[target], "weight": weight}
        for source, target, weight in zip(
            graph.source.tolist(), graph.target.tolist(), graph.weight.tolist(), strict=True
        )
    ]
    return {
        "metadata": _metadata(graph, slug, scan, description),
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


def feature_json(explanation: FeatureExplanation, number: int, dictionary: str) -> dict[str, Any]:
    """Convert a feature to the JSON object of the published viewers.

    Args:
        explanation ([`FeatureExplanation`]): Explanation of the feature.
        number (`int`): Cantor number of the feature.
        dictionary (`str`): Name of the dictionary.

    Returns:
        `dict`
    """
    listed = [value for context in explanation.contexts for value in context.activations]
    examples = [
        {
            "tokens": context.tokens,
            "tokens_acts_list": context.activations,
            "train_token_ind": context.peak,
            "is_repeated_datapoint": False,
        }
        for context in explanation.contexts
    ]
    return {
        "index": number,
        "transcoder_id": dictionary,
        "examples_quantiles": [{"quantile_name": "Top activations", "examples": examples}],
        "top_logits": [token for token, _ in explanation.top_tokens],
        "bottom_logits": [token for token, _ in explanation.bottom_tokens],
        "act_min": min(listed, default=0.0),
        "act_max": explanation.max_activation,
        "activation_frequency": explanation.density,
    }


def write_viewer_files(
    folder: str | os.PathLike,
    graphs: Mapping[str, AttributionGraph],
    features: Mapping[str, Sequence[FeatureExplanation]] | None = None,
    *,
    scan: str | None = None,
) -> Path:
    """Write graphs as the files that a local copy of the published viewer serves.

    `graph_data/{slug}.json`, `data/graph-metadata.json` with the metadata of all graphs, and
    `features/{scan}/{number}.json` for each explained feature.

    Args:
        folder (`str` or `os.PathLike`): Folder to write to, which gets all files or none.
        graphs (`Mapping[str, AttributionGraph]`): Slug -> graph. All graphs have the same dictionaries.
        features (`Mapping[str, Sequence[FeatureExplanation]]`, *optional*): Dictionary -> explanations.
        scan (`str`, *optional*): As for [`viewer_graph`].

    Returns:
        `Path`: the folder.

    Raises:
        [`TranscoderError`]: there are no graphs, their dictionaries differ, or a name cannot be a file name.
    """
    if not graphs:
        raise TranscoderError("There is no graph to write: give at least one, as {slug: graph}.")
    first = next(iter(graphs.values()))
    for slug, graph in graphs.items():
        if graph.dictionaries != first.dictionaries:
            raise TranscoderError(
                f"The graph '{slug}' has other dictionaries than the first, so that their features would be mixed up: write "
                "it to a separate folder."
            )
    scan = _scan(first, scan)
    numbers = LayerNumbers(*graphs.values())
    data = {
        slug: viewer_graph(graph, slug, scan, features=features, numbers=numbers) for slug, graph in graphs.items()
    }
    with atomic_directory(folder) as partial:
        for slug, content in data.items():
            write_text(partial / "graph_data" / f"{slug}.json", dump(content))
        overview = {"graphs": [content["metadata"] for content in data.values()]}
        write_text(partial / "data" / "graph-metadata.json", dump(overview))
        for name, explanations in (features or {}).items():
            dictionary = first.dictionary_number(name)
            layer = numbers.layer(dictionary)
            # No graph leads to the features of a dictionary without a node.
            for explanation in explanations if layer is not None else ():
                number = cantor(layer, numbers.feature(dictionary, explanation.feature))
                path = partial / "features" / scan / f"{number}.json"
                # Thousands of files: `write_text` would look for leftovers among them each time.
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(dump(feature_json(explanation, number, name)), encoding="utf-8")
    return Path(folder)


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
        "ctx_idx": max(position, 0),
        "feature_type": _TYPES[kind],
        "token_prob": 0.0,
        "clerp": "",
        "activation": value,
    }
    if kind == "feature":
        feature = numbers.feature(dictionary, index)
        label = labels.get((graph.dictionaries[dictionary], index), "")
        changed = {"feature": cantor(layer, feature), "jsNodeId": f"{layer}_{feature}-0", "clerp": label}
    elif kind in ("error", "mlp"):
        rank = -1 - (numbers.error(dictionary) if kind == "error" else numbers.mlp(layer))
        changed = {"feature": -1, "jsNodeId": f"{layer}_{position}-{rank}"}
        if kind == "mlp":
            changed["clerp"] = f"MLP {layer}, without a dictionary"
        elif rank:
            changed["clerp"] = f"Error of {graph.dictionaries[dictionary]}"
    elif kind == "token":
        # Graphs that are summed over positions have no prompt.
        token = _shown(graph.tokens[position]) if graph.tokens else str(index)
        changed = {
            "feature": position,
            "layer": "E",
            "jsNodeId": f"E_{index}-{position}",
            "clerp": f'Emb: "{token}"',
        }
    elif kind == "position":
        place = max(index, position)
        changed = {
            "feature": place,
            "layer": "E",
            "jsNodeId": f"P_{place}-{place}",
            "clerp": f"Position {place}",
        }
    elif kind == "bias":
        changed = {"feature": -1, "jsNodeId": f"B_{layer}-0", "clerp": graph.label(number)}
    else:
        target = graph.targets[index]
        token = name.split("_")[1]
        probability = _probability(target)
        # Viewers cut the label at "(p=".
        text = _shown(target.label).replace("(p=", "( p=")
        changed = {
            "feature": int(token),
            "layer": str(graph.num_layers + 1),
            "jsNodeId": f"L_{token}-{position}",
            "clerp": f'Output "{text}" (p={probability:.3f})',
            "token_prob": probability,
            "activation": None,
        }
    return node | changed


def _metadata(graph, slug, scan, description):
    from ...version import __version__

    scores = graph.whole_scores
    settings = graph.metadata.get("settings", {})
    pruning = graph.metadata.get("pruning", {})
    generation = {name: settings[key] for name, key in _GENERATION.items() if key in settings}
    return {
        "slug": slug,
        "scan": scan,
        "prompt": "".join(graph.tokens),
        "prompt_tokens": graph.tokens,
        "transcoder_list": graph.dictionaries,
        "schema_version": 1,
        "node_threshold": pruning.get("nodes", 1.0),
        "feature_details": {"feature_json_base_url": f"./features/{scan}"},
        "info": {
            "description": " ".join(filter(None, [graph.warning, description])),
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


def _scan(graph, scan):
    if scan is not None:
        return scan
    return re.sub(r"[^\w.-]+", "-", str(graph.metadata.get("model") or "model").rstrip("/").split("/")[-1])


def _labels(features):
    """(dictionary, feature) -> the token with its largest activation."""
    return {
        (name, explanation.feature): _shown(context.tokens[context.peak])
        for name, explanations in (features or {}).items()
        for explanation in explanations
        for context in explanation.contexts[:1]
    }


def _cumulative(influences):
    """Share of the influence of each node and all stronger ones together, by which viewers prune."""
    order = influences.argsort(descending=True, stable=True)
    shares = influences[order].cumsum(0) / influences.sum().clamp(min=1e-30)
    return torch.empty_like(shares).index_copy(0, order, shares).clamp(max=1.0).tolist()


def _probability(target):
    return target.weight if target.probability is None else target.probability


def _shown(text):
    return text.replace("\n", "⏎").replace("\t", "⇥")


def dump(content: dict[str, Any]) -> str:
    """A viewer's object as JSON text."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False)
