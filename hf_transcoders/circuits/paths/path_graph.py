"""Merge paths into one graph in which shared steps count once."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from graphlib import TopologicalSorter
from typing import Any

from ...text.printable import printable
from ..graphs.nodes import TargetInfo
from .steps import Path, Step


@dataclass(frozen=True)
class PathNode:
    """A component at a token, and its contribution to the target along the paths of the graph.

    For nodes with edges into them, `sum of the weights of these edges + errors + biases + rest = total`.

    Args:
        label (`str`): Label, such as `L8 f1203 @ " gave" (5)`.
        kind (`str`): Kind of step, or `"target"`.
        layer, position, to, index (`int`), dictionary (`str`, *optional*): As for a [`Step`].
        total (`float`): Contributions of the paths up to this node, each counted once.
        errors (`float`): Contribution of errors of dictionaries, and of MLPs without one, that have no edges.
        biases (`float`): Contribution of biases that have no edges.
        rest (`float`): Contribution of everything else that is not in the graph.
    """

    label: str
    kind: str
    layer: int
    position: int
    to: int
    index: int
    dictionary: str | None
    total: float
    errors: float = 0.0
    biases: float = 0.0
    rest: float = 0.0


@dataclass(frozen=True)
class PathGraph:
    """Paths merged by their components.

    Args:
        nodes (`list[PathNode]`): Nodes, the target first; sources of a node come after it.
        edges (`list[tuple[int, int, float]]`): Source, target and weight of each edge.
        target (`TargetInfo`): The target of the paths.
    """

    nodes: list[PathNode]
    edges: list[tuple[int, int, float]]
    target: TargetInfo

    def incoming(self, number: int) -> list[tuple[int, float]]:
        """(node, weight) of the edges into a node, strongest first."""
        found = [(source, weight) for source, reader, weight in self.edges if reader == number]
        return sorted(found, key=lambda edge: -abs(edge[1]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "target": asdict(self.target),
            "nodes": [asdict(node) for node in self.nodes],
            "edges": [{"source": source, "target": reader, "weight": weight} for source, reader, weight in self.edges],
        }

    def to_text(self) -> str:
        """Nodes and the edges into them as text for the terminal."""
        lines = []
        for number, node in enumerate(self.nodes):
            incoming = self.incoming(number)
            if not incoming:
                continue
            lines.append(f"{node.label}  {node.total:+.4f}")
            lines += [f"  {weight:+.4f}  {self.nodes[source].label}" for source, weight in incoming]
            others = (("errors", node.errors), ("biases", node.biases), ("rest", node.rest))
            lines += [f"  {amount:+.4f}  {name}" for name, amount in others if amount]
        return "\n".join(lines)

    __str__ = to_text


def merge_paths(
    paths: Iterable[Path], target: TargetInfo, value: float, sums: Mapping[tuple, Mapping[str, float]]
) -> PathGraph:
    """Merge paths into one graph (Dunefsky et al. 2024, Alg. 2).

    Steps with which several paths begin are counted once. A component on different paths is one node, to which all of them
    contribute.

    Args:
        paths (`Iterable[Path]`): Paths to one target.
        target (`TargetInfo`), value (`float`): The target, and its value.
        sums (`Mapping`): Contributions to expanded paths, by kind: [`GreedyPaths.sums`].

    Returns:
        [`PathGraph`]
    """
    beginnings: dict[tuple, Step] = {}
    for path in paths:
        key = path.key
        beginnings.update((key[: end + 1], step) for end, step in enumerate(path.steps))
    components = {key[-1]: step for key, step in beginnings.items()}
    readers_of: dict[tuple, set[tuple]] = {key: set() for key in components}
    for key in beginnings:
        if len(key) > 1:
            readers_of[key[-1]].add(key[-2])
    order = list(TopologicalSorter(readers_of).static_order())
    number = {key: place for place, key in enumerate(order, start=1)}
    totals = [value] + [0.0] * len(order)
    errors, biases, kept = ([0.0] * len(totals) for _ in range(3))
    edges: dict[tuple[int, int], float] = {}
    expanded = set()
    for key, step in beginnings.items():
        reader = number[key[-2]] if len(key) > 1 else 0
        source = number[key[-1]]  # pyright: ignore[reportGeneralTypeIssues]
        totals[source] += step.contribution
        edges[source, reader] = edges.get((source, reader), 0.0) + step.contribution
        kept[reader] += step.contribution
        # Steps with an edge are not part of the errors and biases.
        if step.kind in ("error", "mlp"):
            errors[reader] -= step.contribution
        elif step.kind == "bias":
            biases[reader] -= step.contribution
        expanded.add(key[:-1])
    for key in expanded:
        node = number[key[-1]] if key else 0
        errors[node] += sums[key]["error"] + sums[key]["mlp"]
        biases[node] += sums[key]["bias"]
    readers = {reader for _, reader in edges}
    nodes = [PathNode(printable(target.label), "target", -1, target.position, target.position, -1, None, value)]
    nodes += [PathNode(str(components[key]), *key, totals[place]) for key, place in number.items()]  # pyright: ignore[reportCallIssue]
    for node in readers:
        rest = totals[node] - kept[node] - errors[node] - biases[node]
        nodes[node] = replace(nodes[node], errors=errors[node], biases=biases[node], rest=rest)
    ordered = sorted((source, reader, weight) for (source, reader), weight in edges.items())
    return PathGraph(nodes, ordered, target)
