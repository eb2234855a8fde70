"""How much of the targets each node of an attribution graph accounts for."""

from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from .graph import AttributionGraph


def influence(graph: "AttributionGraph") -> torch.Tensor:
    """Influence of each node on the targets, over paths of every length (Ameisen et al. 2025, "Circuit Tracing").

    Each row of magnitudes is normalised to one, `rest` included; `I = sum over k of w A^k` from the weights `w` of the
    targets. The graph is acyclic, so the sum ends after as many steps as its longest path has.

    Args:
        graph ([`AttributionGraph`]): The graph.

    Returns:
        `torch.Tensor` of shape `(nodes,)` in float64; 0 for targets. That of all tokens, positions, errors, MLPs, biases
        and of unexpanded features sums to one less what goes into `rest`.
    """
    return influence_of(graph.source, graph.target, normalized_weights(graph), graph.target_weights)


def influence_of(
    source: torch.Tensor, target: torch.Tensor, share: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Influence over the edges `source -> target`, of which each carries `share` of its target.

    Args:
        source, target (`torch.LongTensor` of shape `(edges,)`): Ends of the edges.
        share (`torch.Tensor` of shape `(edges,)`): Non-negative; at most one in sum over the edges into a node.
        weights (`torch.Tensor` of shape `(nodes,)`): Where influence starts.

    Returns:
        `torch.Tensor` of shape `(nodes,)`.
    """
    total = torch.zeros_like(weights)
    current = weights
    # A path visits a node at most once.
    for _ in range(len(weights)):
        current = torch.zeros_like(total).index_add_(0, source, current[target] * share)
        if not current.any():
            break
        total += current
    return total


def normalized_weights(graph: "AttributionGraph") -> torch.Tensor:
    """`(edges,)`: the share that each edge has of the magnitudes of its target's row, in float64."""
    return graph.weight.double().abs() / row_magnitudes(graph)[graph.target]


def row_magnitudes(graph: "AttributionGraph") -> torch.Tensor:
    """`(nodes,)`: sum of the magnitudes of each row, `rest` included; a tiny number where there is none."""
    sums = graph.rest_abs.double().index_add(0, graph.target, graph.weight.double().abs())
    return sums.clamp(min=1e-10)


def scores(graph: "AttributionGraph") -> dict[str, float]:
    """How much of the graph is explained by features rather than by what the dictionaries miss.

    Args:
        graph ([`AttributionGraph`]): The graph.

    Returns:
        `dict[str, float]`:

        - `replacement`: share of the influence that reaches token and position embeddings, of that which reaches
          embeddings, errors or whole MLPs.
        - `completeness`: share of the inputs of nodes that does not come from errors or whole MLPs, nodes weighted by
          their influence.
        - `rest`: share of the influence that flows into effects that are not in the graph. The first two say nothing of
          those, as in the paper, except for their errors, which count in `completeness`.
    """
    influences, weights = influence(graph), graph.target_weights
    share = normalized_weights(graph)
    missed = graph.is_kind("error", "mlp")
    from_tokens = influences[graph.is_kind("token", "position")].sum()
    from_errors = influences[missed].sum()
    flow = influences + weights
    error_share = graph.rest_error.double() / row_magnitudes(graph)
    error_share = error_share.index_add(0, graph.target, share * missed[graph.source])
    rest_share = graph.rest_abs.double() / row_magnitudes(graph)
    expanded = graph.expanded
    return {
        "replacement": (from_tokens / (from_tokens + from_errors).clamp(min=1e-30)).item(),
        "completeness": (flow * (1 - error_share))[expanded].sum().item() / flow[expanded].sum().item(),
        "rest": (flow * rest_share)[expanded].sum().item(),
    }
