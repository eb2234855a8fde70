"""Nodes and targets of attribution graphs as plain values, and their labels."""

from dataclasses import dataclass

import torch

from ...text.visible import visible


#: Kinds of nodes. Files store indices into this tuple: add new kinds at the end only.
KINDS = ("token", "position", "feature", "error", "mlp", "bias", "target")


@dataclass(frozen=True)
class TargetInfo:
    """One target of a graph.

    Args:
        label (`str`): Label, such as `" Mary"` or `" Mary - John"`.
        position (`int`): Position of the token at which the target is read.
        weight (`float`): Weight of the target in the influence of nodes. A logit's probability by default.
        probability (`float`, *optional*): Probability of the token, for a target that is the logit of one token.
        token_id (`int`, *optional*): Id of that token.
        layer (`int`, *optional*), point (`str`, *optional*):
            Place at which the target is read; the point `"final"` is the output of the final norm.
    """

    label: str
    position: int
    weight: float
    probability: float | None = None
    token_id: int | None = None
    layer: int | None = None
    point: str | None = None


@dataclass(frozen=True)
class Node:
    """One node of a graph as plain values, as [`AttributionGraph.node`] returns it.

    `index` is the graph's column of that name, whose meaning depends on the kind; `feature` is the number of a feature.
    """

    number: int
    kind: str
    layer: int
    position: int
    index: int
    dictionary: str | None
    value: float
    total: float | None

    @property
    def feature(self) -> int | None:
        """Number of the feature in its dictionary; `None` for nodes of other kinds."""
        return self.index if self.kind == "feature" else None


def is_kind(kind: torch.Tensor, *kinds: str) -> torch.Tensor:
    """Whether each node is of one of some kinds.

    Args:
        kind (`torch.LongTensor` of shape `(nodes,)`): Indices into [`KINDS`].
        kinds (`str`): The kinds.

    Returns:
        `torch.BoolTensor` of shape `(nodes,)`.
    """
    return torch.isin(kind, torch.tensor([KINDS.index(each) for each in kinds]))


def node_label(kind: str, layer: int, position: int, index: int, tokens: list[str], num_layers: int) -> str:
    """A short label for a node that is not a target: see [`AttributionGraph`] for the arguments."""
    if kind == "bias":
        return "bias after the last block" if layer == num_layers else f"L{layer} biases"
    # Nodes of graphs that are summed over positions have no position.
    somewhere = position >= 0 and tokens
    at = f'at "{visible(tokens[position], in_text=True)}" ({position})' if somewhere else "anywhere"
    if kind in ("token", "position"):
        return f"{kind} {at if somewhere else max(index, position)}"
    return f"L{layer} {f'feature {index}' if kind == 'feature' else kind} {at}"
