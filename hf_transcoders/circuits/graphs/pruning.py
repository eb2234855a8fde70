"""Leaving out of an attribution graph what hardly matters, and saying how much that was."""

from typing import TYPE_CHECKING

import torch

from ...errors import TranscoderError
from .influence import influence, normalized_weights, scores


if TYPE_CHECKING:
    from .graph import AttributionGraph


def prune(graph: "AttributionGraph", nodes: float = 0.8, edges: float = 0.98) -> "AttributionGraph":
    """The nodes, and then the edges, that together carry so much of the influence (Ameisen et al. 2025).

    Tokens, positions and targets stay. Features without an edge in or out, and other nodes without one out, go as well.
    What is left out goes into `rest` of each row, so that rows still sum; what was dropped is counted in
    `metadata["pruning"]`, errors by themselves, and `metadata["scores"]` are those of the whole graph.

    Args:
        graph ([`AttributionGraph`]): The graph.
        nodes (`float`, *optional*, defaults to 0.8): Share of the cumulative influence that the nodes kept have.
        edges (`float`, *optional*, defaults to 0.98): The same for edges between those.

    Returns:
        [`AttributionGraph`]: a new graph.

    Raises:
        [`TranscoderError`]: a share is not between 0 and 1.
    """
    for name, share in (("nodes", nodes), ("edges", edges)):
        if not 0 <= share <= 1:
            raise TranscoderError(f"`{name}` is {share}; give the share of the influence to keep, between 0 and 1.")
    influences = influence(graph)
    always = graph.is_kind("token", "position", "target")
    keep = always | (influences >= _threshold(influences, nodes))
    thinner = graph.select(keep)

    flow = influence(thinner) + thinner.target_weights
    carried = normalized_weights(thinner) * flow[thinner.target]
    keep_edges = carried >= _threshold(carried, edges)
    keep_nodes = _connected(thinner, keep_edges)
    pruned = thinner.select(keep_nodes, keep_edges)

    dropped = keep.clone()
    dropped[keep.nonzero()[:, 0][~keep_nodes]] = False
    dropped = ~dropped
    total = influences.sum().clamp(min=1e-30)
    missed = graph.is_kind("error", "mlp") & dropped
    pruned.metadata = {
        **graph.metadata,
        "scores": graph.metadata.get("scores") or scores(graph),
        "pruning": {
            "nodes": nodes,
            "edges": edges,
            "dropped_nodes": int(dropped.sum()),
            "dropped_influence": (influences[dropped].sum() / total).item(),
            "dropped_error_nodes": int(missed.sum()),
            "dropped_error_influence": (influences[missed].sum() / total).item(),
        },
    }
    return pruned


def _threshold(values, share):
    """The smallest value among the largest ones that together have a share of the sum."""
    ordered = values.sort(descending=True).values
    if not len(ordered) or ordered[0] <= 0:
        return 0.0
    reached = ordered.cumsum(0) >= share * ordered.sum() * (1 - 1e-12)
    return ordered[int(reached.long().argmax()) if reached.any() else -1]


def _connected(graph, keep_edges):
    """Nodes that remain when those without an edge that goes on have gone, over and over."""
    fixed = graph.is_kind("token", "position", "target")
    features = graph.is_kind("feature") & graph.expanded
    keep = torch.ones(graph.num_nodes, dtype=torch.bool)
    while True:
        alive = keep_edges & keep[graph.source] & keep[graph.target]
        has_out = torch.zeros_like(keep).index_put_((graph.source[alive],), torch.tensor(True))
        has_in = torch.zeros_like(keep).index_put_((graph.target[alive],), torch.tensor(True))
        new = fixed | (keep & has_out & (has_in | ~features))
        if torch.equal(new, keep):
            return keep
        keep = new
