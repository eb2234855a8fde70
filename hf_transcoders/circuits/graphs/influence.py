"""Influence of nodes and edges on the targets of an attribution graph (Ameisen et al. 2025, "Circuit Tracing").

All functions work on plain tensors: `source` and `target` are the ends of the edges, `share` is the share of each edge in the
magnitudes of its target's row, and `start` the weight of each node at which influence starts: the weights of the targets.
"""

import torch


def row_magnitudes(target: torch.Tensor, weight: torch.Tensor, rest_abs: torch.Tensor) -> torch.Tensor:
    """Sum of the magnitudes of each row, `rest` included.

    Args:
        target (`torch.LongTensor` of shape `(edges,)`): Nodes that the edges lead to.
        weight (`torch.Tensor` of shape `(edges,)`): Weights of the edges.
        rest_abs (`torch.Tensor` of shape `(nodes,)`): Magnitudes of each row that are not among the edges.

    Returns:
        `torch.Tensor` of shape `(nodes,)` in float64; a tiny number for nodes without a row.
    """
    return rest_abs.double().index_add(0, target, weight.double().abs()).clamp(min=1e-10)


def edge_shares(target: torch.Tensor, weight: torch.Tensor, rest_abs: torch.Tensor) -> torch.Tensor:
    """Share that each edge has in the magnitudes of its target's row; arguments as for [`row_magnitudes`].

    Returns:
        `torch.Tensor` of shape `(edges,)` in float64.
    """
    return weight.double().abs() / row_magnitudes(target, weight, rest_abs)[target]


def influence(source: torch.Tensor, target: torch.Tensor, share: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Influence of each node on the targets, over paths of every length: `sum over k of start A^k`.

    The graph is acyclic, so the sum has as many terms as the longest path has edges.

    Args:
        source, target (`torch.LongTensor` of shape `(edges,)`): Ends of the edges.
        share (`torch.Tensor` of shape `(edges,)`): Non-negative; sums to at most one over the edges into a node.
        start (`torch.Tensor` of shape `(nodes,)`): Weights of the targets, 0 elsewhere.

    Returns:
        `torch.Tensor` of shape `(nodes,)`; 0 for targets. With weights that sum to one, the influence of all nodes without
        a row sums to one less the influence that flows into `rest`.
    """
    total = torch.zeros_like(start)
    current = start
    # A path visits a node at most once.
    for _ in range(len(start)):
        current = torch.zeros_like(total).index_add_(0, source, current[target] * share)
        if not current.any():
            break
        total += current
    return total


def edge_influence(
    source: torch.Tensor, target: torch.Tensor, share: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """Influence on the targets that each edge carries; arguments as for [`influence`].

    Returns:
        `torch.Tensor` of shape `(edges,)`.
    """
    return share * (influence(source, target, share, start) + start)[target]


def cumulative_shares(influences: torch.Tensor) -> torch.Tensor:
    """Share of the influence of each node and all stronger ones together, by which nodes are pruned.

    Args:
        influences (`torch.Tensor` of shape `(nodes,)`): Influence of each node.

    Returns:
        `torch.Tensor` of shape `(nodes,)`: from 0 to 1; small for nodes with much influence.
    """
    order = influences.argsort(descending=True, stable=True)
    shares = influences[order].cumsum(0) / influences.sum().clamp(min=1e-30)
    return torch.empty_like(shares).index_copy(0, order, shares).clamp(max=1.0)


def scores(
    source: torch.Tensor,
    target: torch.Tensor,
    share: torch.Tensor,
    start: torch.Tensor,
    *,
    rest_share: torch.Tensor,
    error_share: torch.Tensor,
    has_row: torch.Tensor,
    is_embedding: torch.Tensor,
    is_error: torch.Tensor,
) -> dict[str, float]:
    """Replacement and completeness score of a graph.

    Args:
        source, target, share, start: As for [`influence`].
        rest_share (`torch.Tensor` of shape `(nodes,)`): Share of each row that is not among the edges.
        error_share (`torch.Tensor` of shape `(nodes,)`): The part of `rest_share` that comes from errors.
        has_row (`torch.BoolTensor` of shape `(nodes,)`): Nodes with a row.
        is_embedding (`torch.BoolTensor` of shape `(nodes,)`): Embeddings of tokens and positions.
        is_error (`torch.BoolTensor` of shape `(nodes,)`): Errors of dictionaries, and outputs of MLPs without one.

    Returns:
        `dict[str, float]`: the scores, as described in [`AttributionGraph.scores`].
    """
    influences = influence(source, target, share, start)
    from_embeddings, from_errors = influences[is_embedding].sum(), influences[is_error].sum()
    flow = (influences + start)[has_row]
    error_share = error_share.index_add(0, target, share * is_error[source])[has_row]
    return {
        "replacement": (from_embeddings / (from_embeddings + from_errors).clamp(min=1e-30)).item(),
        "completeness": (flow * (1 - error_share)).sum().item() / flow.sum().item(),
        "rest": (flow * rest_share[has_row]).sum().item(),
    }
