"""Token embeddings as they enter the residual stream, and the tokens that directions read."""

import torch
from transformers import PreTrainedModel

from ..errors import TranscoderError
from .architectures import architecture_of
from .devices import input_device
from .linear_maps import embedding_width, num_embeddings


# Elements of the largest temporary, the embeddings of some tokens.
_MAX_ELEMENTS = 2**23


def embeddings(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Token embeddings as they enter the residual stream, without positions: `(..., hidden)` in fp32.

    The embedding module is called rather than its weight read: Gemma's multiplies by the root of the width.
    """
    architecture = architecture_of(model)
    names = architecture.embeddings
    rows = ids.to(input_device(model))
    for name in (names,) if isinstance(names, str) else names:
        rows = model.base_model.get_submodule(name)(rows)
    rows = rows.detach().float() * architecture.embedding_multiplier
    if rows.shape[-1] != model.config.get_text_config().hidden_size:
        raise TranscoderError(
            "The embeddings of this model are not as wide as its residual stream, so no tokens can be read off directions."
        )
    return rows


def vocabulary_parts(model: PreTrainedModel) -> list[torch.Tensor]:
    """All token ids, in parts whose embeddings are of a moderate size."""
    module = model.get_input_embeddings()
    return list(torch.arange(num_embeddings(module)).split(max(1, _MAX_ELEMENTS // embedding_width(module))))


def embedding_scores(model: PreTrainedModel, readers: torch.Tensor) -> torch.Tensor:
    """`W_E f` of readers of the stream `(n, hidden)`: `(n, vocabulary)`."""
    return torch.cat([readers @ embeddings(model, ids).T for ids in vocabulary_parts(model)], dim=-1)
