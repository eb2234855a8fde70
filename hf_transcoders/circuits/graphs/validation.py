"""Whether a graph's edges say what happens when features are really changed."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ...dictionaries import Dictionaries, fitting_dictionaries
from ...errors import TranscoderError
from ...lm.architectures import architecture_of, locate
from ...lm.devices import input_device
from ...lm.hooks import Location, read_at
from ...lm.inputs import forget_lengths_
from ...lm.sites import Site
from ...lm.wrappers import measures_model
from ..interventions.feature_edits import FeatureEdit
from ..interventions.intervene import intervene
from .graph import AttributionGraph
from .influence import influence, normalized_weights
from .read_vectors import FINAL, node_read_vectors


#: How much of the model may answer to a change, from nothing to everything.
MODES = ("direct", "frozen", "free")


@dataclass(frozen=True)
class Certificate:
    """Predicted and measured changes of nodes when another node is ablated.

    Args:
        source, target (`torch.LongTensor` of shape `(edges,)`):
            Nodes of the graph; the source, a feature, is ablated.
        depth (`torch.LongTensor` of shape `(edges,)`):
            Layers between them.
        predicted (`torch.Tensor` of shape `(edges,)`):
            Minus the weight of the edge.
        measured (`dict[str, torch.Tensor]`):
            What happened to the target's pre-activation, `(edges,)`, by mode of [`intervene`]: `direct` with everything but
            the direct effect held fast, where prediction and measurement are equal up to rounding; `frozen` with MLPs that
            answer; `free`.
        labels (`list[tuple[str, str]]`):
            Source and target of each edge as text.
    """

    source: torch.Tensor
    target: torch.Tensor
    depth: torch.Tensor
    predicted: torch.Tensor
    measured: dict[str, torch.Tensor]
    labels: list[tuple[str, str]]

    def summary(self) -> dict[str, dict[str, Any]]:
        """For each mode: `pearson` and `spearman` correlation, `sign_agreement`, `relative_error` (norm of the difference
        over norm of the prediction), and the last two for each `by_depth`."""
        found = {}
        for mode, measured in self.measured.items():
            found[mode] = {
                "edges": len(measured),
                "pearson": _correlation(self.predicted, measured),
                "spearman": _correlation(_ranks(self.predicted), _ranks(measured)),
                **_agreement(self.predicted, measured),
                "by_depth": {
                    depth: {"edges": int(at.sum()), **_agreement(self.predicted[at], measured[at])}
                    for depth in self.depth.unique().tolist()
                    for at in [self.depth == depth]
                },
            }
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "summary": self.summary(),
            "edges": [
                {
                    "source": int(self.source[edge]),
                    "target": int(self.target[edge]),
                    "source_label": self.labels[edge][0],
                    "target_label": self.labels[edge][1],
                    "depth": int(self.depth[edge]),
                    "predicted": float(self.predicted[edge]),
                    **{mode: float(values[edge]) for mode, values in self.measured.items()},
                }
                for edge in range(len(self.predicted))
            ],
        }

    def __str__(self):
        lines = [f"{'held fast':26}{'edges':>6}{'Pearson':>9}{'Spearman':>10}{'same sign':>11}{'error':>10}"]
        said = {"direct": "all but the direct effect", "frozen": "attention and norms", "free": "nothing"}
        for mode, entry in self.summary().items():
            lines.append(
                f"{said[mode]:26}{entry['edges']:6}{entry['pearson']:9.3f}{entry['spearman']:10.3f}"
                f"{entry['sign_agreement']:11.1%}{entry['relative_error']:10.2g}"
            )
        depths = self.summary().get("free", {}).get("by_depth", {})
        if depths:
            cells = ", ".join(
                f"{depth}: {entry['relative_error']:.2g} ({entry['edges']})" for depth, entry in depths.items()
            )
            lines.append(f"error by layers between, nothing held fast: {cells}")
        return "\n".join(lines)


@measures_model
@torch.no_grad()
def certificate(
    base_model: PreTrainedModel,
    transcoders: Dictionaries,
    graph: AttributionGraph,
    edges: int | Sequence[tuple[int, int]] = 64,
    *,
    modes: Sequence[str] = MODES,
    batch_size: int = 16,
    seed: int = 0,
) -> Certificate:
    """Ablate features of a graph one by one, and compare what happens to others with what their edges predict.

    The summary goes into the graph's `metadata["certificate"]`.

    Args:
        base_model ([`~transformers.PreTrainedModel`]), transcoders:
            What the graph was made of.
        graph ([`AttributionGraph`]):
            The graph, pruned or not.
        edges (`int` or `Sequence[tuple[int, int]]`, *optional*, defaults to 64):
            Edges out of features, as (source, target); or how many: half of them those that carry most influence, the
            others drawn from the rest.
        modes (`Sequence[str]`, *optional*, defaults to all three):
            `"direct"`, `"frozen"`, `"free"`.
        batch_size (`int`, *optional*, defaults to 16):
            Ablations of one forward.
        seed (`int`, *optional*, defaults to 0):
            Of the edges that are drawn.

    Returns:
        [`Certificate`]

    Raises:
        [`TranscoderError`]: the graph has no edge out of a feature, or was made of something else.
    """
    named = fitting_dictionaries(base_model, transcoders)
    if missing := [name for name in graph.dictionaries if name not in named]:
        raise TranscoderError(f"The graph was made with '{missing[0]}' too: give all dictionaries it was made with.")
    if not graph.input_ids:
        raise TranscoderError("This graph is of several prompts: certify the graphs it was made of.")
    if any(mode not in MODES for mode in modes):
        raise TranscoderError(f"The modes are {', '.join(MODES)}, not {', '.join(modes)}.")
    chosen = _choose(graph, edges, seed)
    source, target = graph.source[chosen], graph.target[chosen]
    features, feature_of = source.unique(return_inverse=True)
    edits = [
        [FeatureEdit(node.dictionary, node.index, position=node.position)]
        for node in (graph.node(number) for number in features.tolist())
    ]
    reader = _Reader(base_model, named, graph, target)
    ids = torch.tensor([graph.input_ids], device=input_device(base_model))
    measured = {}
    for mode in modes:
        with intervene(base_model, named, [], mode=mode, frozen_at=None if mode == "free" else ids) as recorded:
            before = reader.read(base_model, ids)
        after = []
        for start in range(0, len(edits), batch_size):
            some = edits[start : start + batch_size]
            with intervene(base_model, named, some, mode=mode, frozen_at=recorded):
                after.append(reader.change(before, reader.read(base_model, ids.expand(len(some), -1))))
        measured[mode] = torch.cat(after)[feature_of, torch.arange(len(target))]
    layer = torch.where(graph.is_kind("target"), graph.num_layers, graph.layer)
    found = Certificate(
        source=source,
        target=target,
        depth=layer[target] - layer[source],
        predicted=-graph.weight[chosen],
        measured=measured,
        labels=[(graph.label(a), graph.label(b)) for a, b in zip(source.tolist(), target.tolist(), strict=True)],
    )
    graph.metadata["certificate"] = found.summary()
    return found


def _choose(graph, edges, seed):
    possible = graph.is_kind("feature")[graph.source]
    if not isinstance(edges, int):
        numbers = {
            pair: number for number, pair in enumerate(zip(graph.source.tolist(), graph.target.tolist(), strict=True))
        }
        unknown = [pair for pair in edges if tuple(pair) not in numbers or not possible[numbers[tuple(pair)]]]
        if unknown or not edges:
            raise TranscoderError(
                f"The graph has no edge {unknown[0] if unknown else ''} out of a feature: give pairs of source and target."
            )
        return torch.tensor([numbers[tuple(pair)] for pair in edges])
    possible = possible.nonzero()[:, 0]
    if not len(possible) or edges < 1:
        raise TranscoderError(
            "There is no edge out of a feature to certify: prune less, or give `edges` of at least 1."
        )
    flow = influence(graph) + graph.target_weights
    carried = (normalized_weights(graph) * flow[graph.target])[possible]
    order = possible[carried.argsort(descending=True, stable=True)]
    strongest, others = order[: -(-edges // 2)], order[-(-edges // 2) :]
    drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[: edges // 2]
    return torch.cat([strongest, others[drawn]])


class _Reader:
    """What some nodes read in every row of a batch, and how their pre-activations change with it."""

    def __init__(self, base_model, named, graph, nodes):
        dictionaries = [named[name] for name in graph.dictionaries]
        self.functionals = node_read_vectors(graph, dictionaries, nodes, input_device(base_model))
        norm = base_model.base_model.get_submodule(architecture_of(base_model).final_norm)
        self.places = {
            (layer, point): (Location(norm, "out") if point == FINAL else locate(base_model, Site(point, layer)), rows)
            for (layer, point), rows in self.functionals.places().items()
        }

    def read(self, model, ids):
        """Place -> what its nodes read there, `(batch, nodes of the place, width)`."""
        seen = {}
        with ExitStack() as stack:
            for place, (location, _) in self.places.items():
                read_at(stack, location, lambda value, place=place: seen.__setitem__(place, value))
            forget_lengths_(model)
            model.get_decoder()(input_ids=ids, use_cache=False)
        return {
            place: seen[place][:, self.functionals.position[rows]].float() for place, (_, rows) in self.places.items()
        }

    def change(self, before, after):
        """By how much pre-activations differ, `(batch, nodes)`."""
        batch = len(next(iter(after.values())))
        found = self.functionals.bias.new_zeros(batch, len(self.functionals))
        for place, (_, rows) in self.places.items():
            # Activations are subtracted, not pre-activations: an ablation changes these by a thousandth or less, and their
            # own rounding, eps times the sum of a product's absolute terms, would be most of the difference.
            found[:, rows] = torch.einsum(
                "bnd,nd->bn", after[place] - before[place], self.functionals.vector[rows].float()
            )
        return found.cpu()


def _agreement(predicted, measured):
    return {
        "sign_agreement": (predicted.sign() == measured.sign()).double().mean().item(),
        "relative_error": ((measured - predicted).norm() / predicted.norm().clamp(min=1e-30)).item(),
    }


def _correlation(a, b):
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = a.norm() * b.norm()
    return (a @ b / scale).item() if scale > 0 else float("nan")


def _ranks(values):
    """Ranks, ties at their mean."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts - 1) / 2)[group]
