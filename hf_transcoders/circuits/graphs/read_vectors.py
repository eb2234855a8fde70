"""What nodes of a graph read, so that they can be measured or taken apart again."""

from collections.abc import Sequence

import torch

from ...lm.sites import Site
from ...models.linear_parts import encoder_rows
from ...models.modeling_transcoder import TranscoderModel
from .adjoint import Functionals
from .graph import AttributionGraph


def node_functionals(
    graph: AttributionGraph, dictionaries: Sequence[TranscoderModel], nodes: torch.Tensor, device: torch.device
) -> Functionals:
    """Pre-activations of features, and targets, as functionals.

    Args:
        graph ([`AttributionGraph`]): The graph.
        dictionaries (`Sequence[TranscoderModel]`): Those of the graph, in its order.
        nodes (`torch.LongTensor` of shape `(rows,)`): Features and targets.
        device (`torch.device`): Where the functionals shall be.

    Returns:
        [`Functionals`]
    """
    vector = torch.zeros(len(nodes), graph.target_vector.shape[-1], device=device)
    bias = torch.zeros(len(nodes), device=device)
    layer, position, points = graph.layer[nodes].to(device), graph.position[nodes].to(device), [""] * len(nodes)
    is_target = graph.is_kind("target")[nodes]
    for number, dictionary in enumerate(dictionaries):
        mine = (~is_target & (graph.dictionary[nodes] == number)).nonzero()[:, 0]
        rows, biases = encoder_rows(dictionary, graph.index[nodes[mine]].to(dictionary.device))
        site = Site.parse(dictionary.config.input_site)
        vector[mine], bias[mine], layer[mine] = rows.to(device), biases.to(device), site.layer
        for at in mine.tolist():
            points[at] = site.point
    mine, numbers = is_target.nonzero()[:, 0], graph.index[nodes[is_target]]
    vector[mine], bias[mine] = graph.target_vector[numbers].to(vector), graph.target_bias[numbers].to(bias)
    for at, number in zip(mine.tolist(), numbers.tolist(), strict=True):
        points[at], layer[at] = graph.targets[number].point, graph.targets[number].layer
    return Functionals(layer, points, position, vector, bias)
