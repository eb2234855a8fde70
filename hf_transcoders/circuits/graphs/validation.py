"""Validate the edges of a graph: ablate features in the model and compare the changes with the edges."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from ...dictionaries import Dictionaries, fitting_dictionaries
from ...errors import TranscoderError
from ...lm.architectures import final_norm, locate
from ...lm.devices import input_device
from ...lm.hooks import Location, read_at
from ...lm.inputs import forget_lengths_
from ...lm.sites import Site
from ...lm.wrappers import measures_model
from ..interventions.feature_edits import FeatureEdit
from ..interventions.intervene import intervene
from .edge_validation import HELD_FIXED, EdgeValidation
from .graph import AttributionGraph
from .read_vectors import FINAL, node_read_vectors


@measures_model
@torch.no_grad()
def validate_edges(
    base_model: PreTrainedModel,
    transcoders: Dictionaries,
    graph: AttributionGraph,
    edges: int | Sequence[tuple[int, int]] = 64,
    *,
    modes: Sequence[str] = tuple(HELD_FIXED),
    batch_size: int = 16,
    seed: int | None = None,
) -> EdgeValidation:
    """Ablate features of a graph one by one, and compare the changes of other nodes with the predictions of the edges.

    Args:
        base_model ([`~transformers.PreTrainedModel`]), transcoders:
            Model and dictionaries that the graph was made with.
        graph ([`AttributionGraph`]):
            The graph, pruned or not.
        edges (`int` or `Sequence[tuple[int, int]]`, *optional*, defaults to 64):
            Edges out of features, as (source, target), or their number. Of a number, half are the edges that carry most
            influence, and the others are drawn from the rest.
        modes (`Sequence[str]`, *optional*, defaults to all three):
            `"direct"`, `"frozen"` and `"free"`: see [`EdgeValidation`].
        batch_size (`int`, *optional*, defaults to 16):
            Ablations per forward pass.
        seed (`int`, *optional*, defaults to 0):
            Seed for the edges that are drawn.

    Returns:
        [`EdgeValidation`]: [`AttributionGraph.with_validation`] adds it to a graph.

    Raises:
        [`TranscoderError`]: the graph has no edge out of a feature, or was made with another model or other dictionaries.
    """
    named = fitting_dictionaries(base_model, transcoders)
    if missing := [name for name in graph.dictionaries if name not in named]:
        raise TranscoderError(
            f"The graph was made with '{missing[0]}' too: give all dictionaries that it was made with."
        )
    if not graph.input_ids:
        raise TranscoderError("This graph combines several prompts: validate the graphs that it was made of.")
    if any(mode not in HELD_FIXED for mode in modes):
        raise TranscoderError(f"The modes are {', '.join(HELD_FIXED)}, not {', '.join(modes)}.")
    chosen = _choose(graph, edges, seed)
    source, target = graph.source[chosen], graph.target[chosen]
    features, feature_of = source.unique(return_inverse=True)
    edits = [
        [FeatureEdit(node.dictionary, node.feature, position=node.position)]
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
    return EdgeValidation(
        source=source,
        target=target,
        depth=layer[target] - layer[source],
        predicted=-graph.weight[chosen],
        measured=measured,
        labels=[(graph.label(a), graph.label(b)) for a, b in zip(source.tolist(), target.tolist(), strict=True)],
    )


def _choose(graph, edges, seed):
    possible = graph.is_kind("feature")[graph.source]
    if not isinstance(edges, int):
        if seed is not None:
            raise TranscoderError("The edges are named, so none are drawn: leave `seed` out.")
        pairs = zip(graph.source.tolist(), graph.target.tolist(), strict=True)
        numbers = {pair: number for number, pair in enumerate(pairs)}
        unknown = [pair for pair in edges if tuple(pair) not in numbers or not possible[numbers[tuple(pair)]]]
        if unknown or not edges:
            raise TranscoderError(
                f"The graph has no edge {unknown[0] if unknown else ''} out of a feature: give pairs of source and target."
            )
        return torch.tensor([numbers[tuple(pair)] for pair in edges])
    possible = possible.nonzero()[:, 0]
    if not len(possible) or edges < 1:
        raise TranscoderError(
            "There is no edge out of a feature to validate: prune less, or give `edges` of at least 1."
        )
    order = possible[graph.edge_influence()[possible].argsort(descending=True, stable=True)]
    strongest, others = order[: -(-edges // 2)], order[-(-edges // 2) :]
    drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed or 0))[: edges // 2]
    return torch.cat([strongest, others[drawn]])


class _Reader:
    """Activations that some nodes read in each row of a batch, and changes of their pre-activations."""

    def __init__(self, base_model, named, graph, nodes):
        dictionaries = [named[name] for name in graph.dictionaries]
        self.functionals = node_read_vectors(graph, dictionaries, nodes, input_device(base_model))
        norm = final_norm(base_model)
        self.places = {
            (layer, point): (Location(norm, "out") if point == FINAL else locate(base_model, Site(point, layer)), rows)
            for (layer, point), rows in self.functionals.places().items()
        }

    def read(self, model, ids):
        """Place -> activations that its nodes read, `(batch, nodes of the place, width)`."""
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
        """Differences of pre-activations, `(batch, nodes)`."""
        batch = len(next(iter(after.values())))
        found = self.functionals.bias.new_zeros(batch, len(self.functionals))
        for place, (_, rows) in self.places.items():
            # Activations are subtracted, not pre-activations: an ablation changes pre-activations by a thousandth or less,
            # and their rounding, eps times the magnitudes of a product's terms, would dominate the difference.
            found[:, rows] = torch.einsum(
                "bnd,nd->bn", after[place] - before[place], self.functionals.vector[rows].float()
            )
        return found.cpu()
