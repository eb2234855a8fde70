"""Trees of features that make a feature fire, and their tables."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ...reports.sections import Table, tables_text
from ...text.columns import paired
from ...text.visible import visible


@dataclass
class TreeNode:
    """
    A feature in the tree.

    Args:
        dictionary (`str`), feature (`int`): Dictionary and number of the feature.
        level (`int`): Steps from the root, which is at 0.
        example (`str`): Its strongest context in the text; empty if it never fires there.
        drop (`float`, *optional*): Mean over contexts of the decrease of the parent's activation when this feature is ablated;
            `None` for the root.
        drop_share (`float`, *optional*): The same as a share of the parent's mean activation.
        edge (`float`, *optional*): Mean over contexts of its edges into the parent in the attribution graph, summed over tokens.
        active (`int`, *optional*): Number of the parent's contexts in which it is active.
        contexts (`int`): Number of contexts of this feature that its children were measured in; 0 if it has none.
        compared (`int`): Number of features that were active in them and were ablated.
        spearman (`float`, *optional*): Rank correlation over these features of their drops with their edges.
        p_value (`float`, *optional*): Its two-sided p-value, from shuffles.
        children (`list[TreeNode]`): Features whose ablation lowers this one most, the strongest first.
    """

    dictionary: str
    feature: int
    level: int
    example: str
    drop: float | None = None
    drop_share: float | None = None
    edge: float | None = None
    active: int | None = None
    contexts: int = 0
    compared: int = 0
    spearman: float | None = None
    p_value: float | None = None
    children: list["TreeNode"] = field(default_factory=list)

    def nodes(self) -> list["TreeNode"]:
        """This node and all below it, each before its children."""
        return [self, *(node for child in self.children for node in child.nodes())]


@dataclass
class FeatureTree:
    """
    The tree of a feature.

    Args:
        root ([`TreeNode`]): The feature.
        protocol (`dict`): Model, dictionaries, text and settings.
    """

    root: TreeNode
    protocol: dict[str, Any]

    def to_text(self) -> str:
        """Format the tables and the protocol as text for a terminal."""
        return "\n".join([tables_text(tree_tables(self)), "", paired(self.protocol)])

    __str__ = to_text

    def to_dict(self) -> dict[str, Any]:
        """Return all results as JSON values."""
        return asdict(self)


def tree_tables(tree: FeatureTree) -> list[Table]:
    """A table of all nodes, and one of the agreement with attribution edges."""
    rows = [
        [
            "· " * node.level + f"{node.dictionary} {node.feature}",
            node.drop,
            None if node.drop_share is None else f"{node.drop_share:.1%}",
            node.edge,
            node.active,
            visible(node.example, in_text=True),
        ]
        for node in tree.root.nodes()
    ]
    note = (
        "Drop: by how much the activation of the feature above falls when this one is ablated at all tokens, mean over its contexts. "
        "Edge: what the attribution graph says that this feature contributes there, summed over tokens."
    )
    found = Table(
        "Features by ablation", ["feature", "drop", "share", "edge", "contexts", "strongest context"], rows, note
    )
    compared = [
        [f"{node.dictionary} {node.feature}", node.contexts, node.compared, node.spearman, node.p_value]
        for node in tree.root.nodes()
        if node.compared
    ]
    headers = ["feature", "contexts", "features ablated", "Spearman", "p"]
    note = "Rank correlation, over all features that were ablated, of the drop with the edge."
    return [found, Table("Agreement of ablations and attribution edges", headers, compared, note)]
