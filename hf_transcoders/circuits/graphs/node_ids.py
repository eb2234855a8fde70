"""Unique ids of nodes in the format of published viewers."""

from typing import TYPE_CHECKING

from .nodes import KINDS


if TYPE_CHECKING:
    from .graph import AttributionGraph


class LayerNumbers:
    """Numbers of features and errors within their layer, where a layer may have several dictionaries.

    Where it has one, a feature keeps its number and its error is -1. With `n` on a layer, feature `i` of the `k`-th is
    `i * n + k`, their errors are -1, -2 ..., and the output of a whole MLP comes after those.

    Args:
        graphs ([`AttributionGraph`]): Graphs of the same dictionaries that share their numbers.
    """

    def __init__(self, *graphs: "AttributionGraph"):
        self._layers: dict[int, int] = {}
        for graph in graphs:
            has = graph.dictionary >= 0
            self._layers |= dict(zip(graph.dictionary[has].tolist(), graph.layer[has].tolist(), strict=True))
        self._on_layer: dict[int, list[int]] = {}
        for dictionary, layer in sorted(self._layers.items()):
            self._on_layer.setdefault(layer, []).append(dictionary)

    def layer(self, dictionary: int) -> int | None:
        """Layer of a dictionary; `None` where it has no node."""
        return self._layers.get(dictionary)

    def feature(self, dictionary: int, feature: int) -> int:
        """Number of a feature on its layer."""
        others = self._on_layer[self._layers[dictionary]]
        return feature * len(others) + others.index(dictionary)

    def error(self, dictionary: int) -> int:
        """Number of a dictionary's error on its layer."""
        return -1 - self._on_layer[self._layers[dictionary]].index(dictionary)

    def mlp(self, layer: int) -> int:
        """Number of a whole MLP output on its layer."""
        return -1 - len(self._on_layer.get(layer, ()))

    def bias(self, layer: int) -> int:
        """Number of the biases of a layer, which follows that of a whole MLP output."""
        return self.mlp(layer) - 1


def node_ids(graph: "AttributionGraph", numbers: LayerNumbers | None = None) -> list[str]:
    """A unique id for each node of a graph.

    `{layer}_{feature}_{position}`, `{layer}_-1_{position}` for errors, `E_{token}_{position}` for tokens and
    `{num_layers + 1}_{token}_{position}` for logits; a target that is not a logit has -1, -2 and so on in
    place of a token. `P_{position}_{position}` are position embeddings and `B_{layer}_0` biases.

    Args:
        graph ([`AttributionGraph`]): The graph.
        numbers ([`LayerNumbers`], *optional*): Numbers of several graphs whose ids must agree.

    Returns:
        `list[str]`: one per node.
    """
    numbers = numbers or LayerNumbers(graph)
    names: list[str] = []
    logits = set()
    columns = (graph.kind, graph.layer, graph.position, graph.index, graph.dictionary)
    for code, layer, position, index, dictionary in zip(*(column.tolist() for column in columns), strict=True):
        kind = KINDS[code]
        if kind == "feature":
            names.append(f"{layer}_{numbers.feature(dictionary, index)}_{position}")
        elif kind == "error":
            names.append(f"{layer}_{numbers.error(dictionary)}_{position}")
        elif kind == "mlp":
            names.append(f"{layer}_{numbers.mlp(layer)}_{position}")
        elif kind == "token":
            names.append(f"E_{index}_{position}")
        elif kind == "position":
            # In graphs that are summed over positions, the index is the position.
            place = max(index, position)
            names.append(f"P_{place}_{place}")
        elif kind == "bias":
            names.append(f"B_{layer}_0")
        else:
            token = graph.targets[index].token_id
            if token is None or (token, position) in logits:
                token = -1 - index
            logits.add((token, position))
            names.append(f"{graph.num_layers + 1}_{token}_{position}")
    return names
