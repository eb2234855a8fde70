"""Token effects of directions: tokens that they read from the embedding, and logits that they write."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ...data.token_texts import token_texts
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
