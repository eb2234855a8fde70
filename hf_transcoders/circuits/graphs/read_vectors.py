"""Read vectors: linear functions of activations, which rows of an attribution graph decompose."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...lm.sites import input_site
from ...models.linear_parts import encoder_rows
from ...models.modeling_transcoder import TranscoderModel
from .graph import AttributionGraph


#: Point of the read vectors that read the residual stream after the final norm.
FINAL = "final"


@dataclass(frozen=True)
class ReadVectors:
    """Linear functions `vector @ x + bias` of activations `x`, such as pre-activations of features and logits.

    Args:
        layer (`torch.LongTensor` of shape `(rows,)`): Layer of the activation; the number of layers for `"final"`.
        point (`list[str]`): Point of the activation: one of [`READS`], or `"final"` for the output of the final norm.
        position (`torch.LongTensor` of shape `(rows,)`): Token of the activation.
        vector (`torch.Tensor` of shape `(rows, width)`): Vector that the activation is multiplied with.
        bias (`torch.Tensor` of shape `(rows,)`): Constant that is added.
    """

    layer: torch.Tensor
    point: list[str]
    position: torch.Tensor
    vector: torch.Tensor
    bias: torch.Tensor

    def __len__(self):
        return len(self.point)

    def places(self) -> dict[tuple[int, str], torch.Tensor]:
        """Rows by layer and point."""
        groups: dict[tuple[int, str], list[int]] = {}
        for row, place in enumerate(zip(self.layer.tolist(), self.point, strict=True)):
            groups.setdefault(place, []).append(row)
        return {place: torch.tensor(rows, device=self.layer.device) for place, rows in groups.items()}

    def __getitem__(self, rows: torch.Tensor) -> "ReadVectors":
        points = [self.point[row] for row in rows.tolist()]
        return ReadVectors(self.layer[rows], points, self.position[rows], self.vector[rows], self.bias[rows])


def node_read_vectors(
    graph: AttributionGraph, dictionaries: Sequence[TranscoderModel], nodes: torch.Tensor, device: torch.device
) -> ReadVectors:
    """Read vectors of features and targets of a graph.

    Args:
        graph ([`AttributionGraph`]): The graph.
        dictionaries (`Sequence[TranscoderModel]`): The dictionaries of the graph, in its order.
        nodes (`torch.LongTensor` of shape `(rows,)`): Numbers of features and targets.
        device (`torch.device`): Device of the result.

    Returns:
        [`ReadVectors`]: One row for each node.
    """
    vector = torch.zeros(len(nodes), graph.target_vector.shape[-1], device=device)
    bias = torch.zeros(len(nodes), device=device)
    layer, position, points = graph.layer[nodes].to(device), graph.position[nodes].to(device), [""] * len(nodes)
    is_target = graph.is_kind("target")[nodes]
    for number, dictionary in enumerate(dictionaries):
        mine = (~is_target & (graph.dictionary[nodes] == number)).nonzero()[:, 0]
        rows, biases = encoder_rows(dictionary, graph.index[nodes[mine]].to(dictionary.device))
        site = input_site(dictionary)
        vector[mine], bias[mine], layer[mine] = rows.to(device), biases.to(device), site.layer
        for at in mine.tolist():
            points[at] = site.point
    mine, targets = is_target.nonzero()[:, 0], graph.index[nodes[is_target]]
    vector[mine], bias[mine] = graph.target_vector[targets].to(vector), graph.target_bias[targets].to(bias)
    for at, target in zip(mine.tolist(), targets.tolist(), strict=True):
        points[at], layer[at] = graph.targets[target].point, graph.targets[target].layer
    return ReadVectors(layer, points, position, vector, bias)
