"""Many paths as one graph, in which what they have in common counts once."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from graphlib import TopologicalSorter
from typing import Any

from ...text.printable import printable
from ..graphs.graph import TargetInfo
from .steps import Path, Step


@dataclass(frozen=True)
class PathNode:
    """A component at a token, and what it adds to the target along the paths of the graph.

    For nodes that something leads into, `sum of the weights of these edges + errors + biases + rest = total`.

    Args:
        label (`str`): Such as `L8 f1203 @ " gave" (5)`.
        kind (`str`): Kind of step, or `"target"`.
        layer, position, to, index (`int`), dictionary (`str`, *optional*): As of a [`Step`].
        total (`float`): What the paths add that lead through it or end in it, each counted as far as this node, and once.
        errors (`float`): What dictionaries miss of it, and MLPs without one, beyond what has edges.
        biases (`float`): What biases add, beyond what has edges.
        rest (`float`): What everything else adds that is not in the graph.
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
    """Paths merged by the components they lead through.

    Args:
        nodes (`list[PathNode]`): The target first; what adds to a node comes after it.
        edges (`list[tuple[int, int, float]]`): Number of the node that adds, of the node it is added to, and what.
        target (`TargetInfo`): What is explained.
    """

    nodes: list[PathNode]
    edges: list[tuple[int, int, float]]
    target: TargetInfo

    def incoming(self, number: int) -> list[tuple[int, float]]:
        """(node, weight) of the edges into a node, strongest first."""
        found = [(source, weight) for source, reader, weight in self.edges if reader == number]
        return sorted(found, key=lambda edge: -abs(edge[1]))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {
            "target": asdict(self.target),
            "nodes": [asdict(node) for node in self.nodes],
            "edges": [{"source": source, "target": reader, "weight": weight} for source, reader, weight in self.edges],
        }

    def __str__(self):
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


def merge_paths(
    paths: Iterable[Path], target: TargetInfo, value: float, sums: Mapping[tuple, Mapping[str, float]]
) -> PathGraph:
    """Paths as one graph (Dunefsky et al. 2024, Alg. 2).

    What several paths begin with is counted once. Components that are met along different paths are one node, to which
    all of them add.

    Args:
        paths (`Iterable[Path]`): Paths to one target.
        target (`TargetInfo`), value (`float`): The target, and what it was.
        sums (`Mapping`): What paths were expanded into, by kind: [`GreedyPaths.sums`].

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
        # What has an edge of its own is not among the others.
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
