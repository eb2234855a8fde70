"""Run the prompt of a graph again."""

import torch
from transformers import PreTrainedModel

from ...dictionaries import Dictionaries, fitting_dictionaries
from ...errors import TranscoderError
from .graph import AttributionGraph
from .linear_run import LinearRun
from .recording import record


def rerun(base_model: PreTrainedModel, transcoders: Dictionaries, graph: AttributionGraph) -> LinearRun:
    """The recorded run of a graph's prompt, which graphs do not store.

    Args:
        base_model ([`~transformers.PreTrainedModel`]), transcoders ([`TranscoderSet`], ...):
            The model and the dictionaries of the graph.
        graph ([`AttributionGraph`]): The graph, pruned or not.

    Returns:
        [`LinearRun`]

    Raises:
        [`TranscoderError`]: the dictionaries have other names than those of the graph, or do not fit the model.
    """
    named = fitting_dictionaries(base_model, transcoders)
    if list(named) != graph.dictionaries:
        raise TranscoderError(
            f"The graph was made with the dictionaries {', '.join(graph.dictionaries) or 'none'}, and these are "
            f"{', '.join(named) or 'none'}: give those of the graph, in their order."
        )
    ids = torch.tensor(graph.input_ids)
    return record(base_model, named, [ids], graph.metadata.get("settings", {}).get("skip_first", 1))[0]
