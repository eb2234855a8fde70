"""Combine attribution graphs: the mean of several, and the difference of two."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch

from ...errors import TranscoderError
from ...lm.order import POINTS, STEPS
from ...lm.sites import Site
from .graph import AttributionGraph


# Metadata that is not true of a combination.
_OF_ONE_GRAPH = ("scores", "pruning", "certificate", "validated_edges")


def union(graphs: Sequence[AttributionGraph], align: Literal["position", "feature"] = "position") -> AttributionGraph:
    """The mean of several graphs. A node that a graph lacks counts as 0 in it.

    Args:
        graphs (`Sequence[AttributionGraph]`): Graphs with the same model, dictionaries and number of targets.
        align (`"position"` or `"feature"`, *optional*, defaults to `"position"`):
            Nodes that count as the same: the nodes of a feature at one position, for prompts of equal length, or all
            nodes of a feature, with edges summed over positions.

    Returns:
        [`AttributionGraph`]: a graph whose rows sum to the mean of the graphs' totals.

    Raises:
        [`TranscoderError`]: the graphs cannot be combined.
    """
    return _combine(graphs, [1 / len(graphs)] * len(graphs) if graphs else [], align, "union")


def contrast(
    graph: AttributionGraph, other: AttributionGraph, align: Literal["position", "feature"] = "position"
) -> AttributionGraph:
    """One graph minus another: the sources of a difference between two prompts.

    Args:
        graph, other ([`AttributionGraph`]): Graphs with the same model, dictionaries and number of targets.
        align (`"position"` or `"feature"`, *optional*, defaults to `"position"`): As in [`union`].

    Returns:
        [`AttributionGraph`]: a graph of differences of activations, totals and edges, whose rows sum.
    """
    return _combine([graph, other], [1.0, -1.0], align, "contrast")


def _combine(graphs, factors, align, how):
    _check(graphs, align)
    first = graphs[0]
    keys = torch.cat([_keys(graph, align) for graph in graphs])
    unique, node_of = keys.unique(dim=0, return_inverse=True)
    count = len(unique)
    node_of = node_of.split([graph.num_nodes for graph in graphs])
    summed = {
        name: torch.zeros(count, dtype=torch.float64) for name in ("value", "total", "rest", "rest_abs", "rest_error")
    }
    expanded = torch.zeros(count, dtype=torch.bool)
    sources, targets, weights = [], [], []
    for graph, nodes, factor in zip(graphs, node_of, factors, strict=True):
        expanded[nodes[graph.expanded]] = True
        for name, sums in summed.items():
            size = abs(factor) if name in ("rest_abs", "rest_error") else factor
            sums.index_add_(0, nodes, getattr(graph, name).double().nan_to_num() * size)
        sources.append(nodes[graph.source])
        targets.append(nodes[graph.target])
        weights.append(graph.weight.double() * factor)
    edges = torch.cat(targets) * count + torch.cat(sources)
    edges, edge_of = edges.unique(return_inverse=True)
    weight = torch.zeros(len(edges), dtype=torch.float64).index_add_(0, edge_of, torch.cat(weights))
    summed["total"][~expanded] = float("nan")
    layer, _, kind, dictionary, index, position = unique.T.contiguous()
    same_place = align == "position"
    return dataclasses.replace(
        first,
        kind=kind, layer=layer, position=position, index=index, dictionary=dictionary,
        **{name: sums.float() for name, sums in summed.items()},
        source=edges % count,
        target=edges // count,
        weight=weight.float(),
        input_ids=first.input_ids if same_place else [],
        tokens=first.tokens if same_place else [],
        # Combined graphs have influences, scores and a validation of their own.
        cumulative_influence=None,
        metadata={
            **{name: value for name, value in first.metadata.items() if name not in _OF_ONE_GRAPH},
            "warning": next((said for graph in graphs if (said := graph.warning)), None),
            how: {
                "align": align,
                "prompts": [graph.input_ids for graph in graphs],
                "targets": [[target.label for target in graph.targets] for graph in graphs],
            },
        },
    )  # fmt: skip


def _keys(graph, align):
    """Keys by which nodes of two graphs are the same, `(nodes, 6)`. Edges lead from lower to higher keys."""
    # The first site that a dictionary writes at is in the layer of its nodes. Older files have no list of sites.
    sites = [
        [Site.parse(site) for site in entry.get("output_sites") or [entry["output_site"]]]
        for entry in graph.metadata["dictionaries"]
    ]
    first = [min((site.layer, POINTS[site.point].writes) for site in each)[1] for each in sites]
    order = torch.tensor([1 + writes for writes in first] + [0])[graph.dictionary]
    order = torch.where(graph.is_kind("mlp"), 1 + POINTS["mlp.out"].writes, order)
    order = torch.where(graph.is_kind("target"), 1 + STEPS, order)
    layer = torch.where(graph.is_kind("target"), graph.num_layers, graph.layer)
    position, index = graph.position, graph.index
    if align == "feature":
        # Position embeddings differ by their position only; all other nodes are merged over positions.
        index = torch.where(graph.is_kind("position"), position, index)
        position = torch.full_like(position, -1)
    return torch.stack([layer, order, graph.kind, graph.dictionary, index, position], dim=1)


def _check(graphs, align):
    if not graphs:
        raise TranscoderError("There are no graphs to combine: give at least one.")
    if align not in ("position", "feature"):
        raise TranscoderError(f"align='{align}' is unknown; use 'position' or 'feature'.")
    first = graphs[0]
    for graph in graphs[1:]:
        if graph.dictionaries != first.dictionaries or graph.num_layers != first.num_layers:
            raise TranscoderError("The graphs have different models or dictionaries: combine graphs with the same.")
        if len(graph.targets) != len(first.targets):
            raise TranscoderError(
                f"The graphs have {len(first.targets)} and {len(graph.targets)} targets: name the same number for each, such "
                "as one difference of logits."
            )
        if align == "position" and len(graph.tokens) != len(first.tokens):
            raise TranscoderError(
                f"The prompts have {len(first.tokens)} and {len(graph.tokens)} tokens: combine prompts of equal length, or "
                'use align="feature".'
            )
