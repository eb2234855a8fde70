"""Token effects of directions: tokens that they read from the embedding, and logits that they write."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.token_texts import token_texts
from ...errors import TranscoderError
from ...lm.architectures import architecture_of
from ...lm.devices import input_device
from ...lm.linear_maps import embedding_width, num_embeddings
from .connections import MAX_ELEMENTS


@dataclass(frozen=True)
class TokenScores:
    """The tokens with the highest and lowest scores, for each of some directions.

    Args:
        top_ids, bottom_ids (`torch.LongTensor` of shape `(..., k)`): The tokens, highest first and lowest first.
        top_values, bottom_values (`torch.Tensor` of shape `(..., k)`): Their scores.
    """

    top_ids: torch.Tensor
    top_values: torch.Tensor
    bottom_ids: torch.Tensor
    bottom_values: torch.Tensor

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list, list]:
        """Texts of the highest and of the lowest tokens, as nested lists of the shape of the ids."""
        return tuple(_nested(ids, tokenizer) for ids in (self.top_ids, self.bottom_ids))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {name: tensor.tolist() for name, tensor in asdict(self).items()}


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
    return list(torch.arange(num_embeddings(module)).split(max(1, MAX_ELEMENTS // embedding_width(module))))


def embedding_scores(model: PreTrainedModel, readers: torch.Tensor) -> torch.Tensor:
    """`W_E f` of readers of the stream `(n, hidden)`: `(n, vocabulary)`."""
    return torch.cat([readers @ embeddings(model, ids).T for ids in vocabulary_parts(model)], dim=-1)


def extreme_tokens(
    score: Callable[[torch.Tensor], torch.Tensor], directions: torch.Tensor, vocabulary: int, k: int
) -> TokenScores:
    """Tokens with the highest and lowest values of `score`.

    Args:
        score (`Callable`): Maps directions `(n, hidden)` to scores `(n, vocabulary)`; called on a few at a time.
        directions (`torch.Tensor` of shape `(..., hidden)`): The directions.
        vocabulary (`int`): How many tokens there are.
        k (`int`): How many to find at each end.
    """
    k = min(k, vocabulary)
    parts = []
    for rows in directions.reshape(-1, directions.shape[-1]).split(max(1, MAX_ELEMENTS // vocabulary)):
        scores = score(rows)
        top, bottom = scores.topk(k), scores.topk(k, largest=False)
        parts.append((top.indices, top.values, bottom.indices, bottom.values))
    return TokenScores(*(torch.cat(each).view(*directions.shape[:-1], k).cpu() for each in zip(*parts, strict=True)))


def _nested(ids, tokenizer):
    if ids.dim() > 1:
        return [_nested(row, tokenizer) for row in ids]
    return token_texts(tokenizer, ids.tolist())
