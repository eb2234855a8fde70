"""Edges of attribution graphs from all features of a dictionary into one feature, without the rest of the graphs."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from ...circuits.graphs.adjoint import Adjoint
from ...circuits.graphs.recording import record
from ...circuits.graphs.targets import Target, resolve_targets
from ...models.modeling_transcoder import TranscoderModel


@torch.no_grad()
def target_edges(
    base_model: PreTrainedModel,
    dictionaries: Mapping[str, TranscoderModel],
    source: str,
    target: str,
    feature: int,
    contexts: Sequence[torch.Tensor],
    skip_first: int = 1,
) -> torch.Tensor:
    """
    Computes the rows that [`attribution_graph`] has for the pre-activation of a feature at the end of contexts.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): A causal language model, in evaluation mode.
        dictionaries (`Mapping[str, TranscoderModel]`): Dictionaries of the graph by name.
        source, target (`str`): Dictionary with the sources, and dictionary with the feature.
        feature (`int`): Number of the feature.
        contexts (`Sequence[torch.LongTensor]`): Token ids of each context.
        skip_first (`int`, *optional*, defaults to 1): Tokens at the start at which the dictionaries are not used.

    Returns:
        `torch.Tensor` of shape `(features of source,)` in float64: edges, summed over tokens, mean over contexts.
    """
    edges = torch.zeros(dictionaries[source].config.num_features, dtype=torch.float64)
    for run in record(base_model, dictionaries, contexts, skip_first):
        functionals, _ = resolve_targets(run, [Target.pre_activation(target, feature)], None)
        solver = Adjoint(run)
        segment = solver.sources.segment("feature", run.names.index(source))
        row = solver.rows(functionals)[0, segment.start : segment.end]
        edges.index_add_(0, segment.features.feature.cpu(), row.double().cpu())
    return edges / max(len(contexts), 1)
