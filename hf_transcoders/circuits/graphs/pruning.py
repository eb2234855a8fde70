"""Prune nodes and edges with little influence, and report how much was dropped."""

from typing import Any

import torch

from ...errors import TranscoderError
from .influence import edge_influence, influence


# Shares of nodes that are tried for a page without features.
_SHARES = (0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)
_SEVERAL = 10


def prune(
    source: torch.Tensor,
    target: torch.Tensor,
    share: torch.Tensor,
    start: torch.Tensor,
    *,
    nodes: float,
    edges: float,
    fixed: torch.Tensor,
    needs_input: torch.Tensor,
    is_error: torch.Tensor,
    is_feature: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Choose the nodes, and then the edges between them, that carry most of the influence.

    Args:
        source, target, share, start: As for [`~hf_transcoders.circuits.graphs.influence.influence`].
        nodes (`float`): Share of the cumulative influence that is kept with the nodes.
        edges (`float`): Share of the cumulative influence that is kept with the edges between those nodes.
        fixed (`torch.BoolTensor` of shape `(nodes,)`): Nodes that are always kept.
        needs_input (`torch.BoolTensor` of shape `(nodes,)`):
            Nodes that are dropped where no edge into them is left. All but the fixed ones need an edge out.
        is_error, is_feature (`torch.BoolTensor` of shape `(nodes,)`):
            Nodes that are counted separately where they are dropped.

    Returns:
        `tuple`: masks of the kept nodes, `(nodes,)`, and edges, `(edges,)`, and a report of the dropped ones.

    Raises:
        [`TranscoderError`]: a share is not between 0 and 1.
    """
    for name, value in (("nodes", nodes), ("edges", edges)):
        if not 0 <= value <= 1:
            raise TranscoderError(f"`{name}` is {value}; give the share of the influence to keep, between 0 and 1.")
    influences = influence(source, target, share, start)
    carried_by_all = edge_influence(source, target, share, start)

    def chosen(nodes, edges):
        return _chosen(source, target, share, start, influences, nodes, edges, fixed, needs_input)

    keep, keep_edges = chosen(nodes, edges)
    total = influences.sum().clamp(min=1e-30)
    errors, features = is_error & ~keep, is_feature & ~keep
    report = {
        "nodes": nodes,
        "edges": edges,
        "dropped_nodes": int((~keep).sum()),
        "dropped_influence": (influences[~keep].sum() / total).item(),
        "dropped_edges": int((~keep_edges).sum()),
        "dropped_edge_influence": (carried_by_all[~keep_edges].sum() / carried_by_all.sum().clamp(min=1e-30)).item(),
        "dropped_error_nodes": int(errors.sum()),
        "dropped_error_influence": (influences[errors].sum() / total).item(),
        "dropped_features": int(features.sum()),
        "dropped_feature_influence": (influences[features].sum() / total).item(),
    }
    if features.any() and not (keep & is_feature).any():
        # For the advice on a page without features: shares of nodes and edges with several features, and their number.
        for wider in [*((each, edges) for each in _SHARES if each > nodes), (1.0, 1.0)]:
            count = int((chosen(*wider)[0] & is_feature).sum())
            if count:
                report |= {"features_from": wider[0], "features_edges": wider[1], "features_then": count}
            if count >= _SEVERAL:
                break
    return keep, keep_edges, report


def _chosen(source, target, share, start, influences, nodes, edges, fixed, needs_input):
    """Masks of the nodes and edges to keep."""
    keep = fixed | (influences >= _threshold(influences, nodes))
    # Dropped contributions go into `rest`, so that rows keep their magnitudes, and edges their shares.
    inside = (keep[source] & keep[target]).nonzero()[:, 0]
    carried = edge_influence(source[inside], target[inside], share[inside], start)
    inside = inside[carried >= _threshold(carried, edges)]
    keep = _connected(source[inside], target[inside], keep, fixed, needs_input)
    # An edge to a node that was dropped in the last step is dropped with it.
    inside = inside[keep[source[inside]] & keep[target[inside]]]
    return keep, torch.zeros_like(source, dtype=torch.bool).index_fill(0, inside, True)


def _threshold(values, share):
    """The smallest of the largest values that together have a share of the sum."""
    ordered = values.sort(descending=True).values
    if not len(ordered) or ordered[0] <= 0:
        return 0.0
    reached = ordered.cumsum(0) >= share * ordered.sum() * (1 - 1e-12)
    return ordered[int(reached.long().argmax()) if reached.any() else -1]


def _connected(source, target, keep, fixed, needs_input):
    """The nodes that remain after those without the edges that they need are dropped, over and over."""
    while True:
        alive = keep[source] & keep[target]
        has_out = torch.zeros_like(keep).index_fill(0, source[alive], True)
        has_in = torch.zeros_like(keep).index_fill(0, target[alive], True)
        remaining = fixed | (keep & has_out & (has_in | ~needs_input))
        if torch.equal(remaining, keep):
            return keep
        keep = remaining
