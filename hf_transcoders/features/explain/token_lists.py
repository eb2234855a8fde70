"""Explain features by what they write and by what they read in the weights: lists of tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.token_texts import token_texts
from ...errors import TranscoderError
from ...lm.sites import input_site, output_sites
from ...lm.stream import read_directions, reads_from_stream
from ...lm.token_embeddings import embedding_scores
from ...models.linear_parts import encoder_rows
from ...models.modeling_transcoder import TranscoderModel
from ..promoted_tokens import direct_path_scores, why_no_logits
from .example_split import ExampleSplit
from .explanation import Explanation


# Tokens of an explanation, and those that its sentence names.
_TOKENS, _NAMED = 20, 10
# Features whose scores over the vocabulary are held at once.
_SOME_FEATURES = 64

#: Feature -> token id -> weight.
TokenWeights = Mapping[int, Mapping[int, float]]


class PromotedTokensExplainer:
    """Output-centric: the feature fires before the tokens that its direct path to the logits promotes most.

    Args:
        tokens (`Mapping[int, Mapping[int, float]]`): Feature -> promoted token -> z-score, of [`promoted_token_weights`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer that decodes the tokens.
    """

    name = "promoted tokens"

    def __init__(self, tokens: TokenWeights, tokenizer: PreTrainedTokenizerBase):
        self.tokens, self.tokenizer = tokens, tokenizer

    def fit(self, split: ExampleSplit) -> Explanation:
        weights = self.tokens[split.feature]
        predict = TokenListPredictor(weights, ahead=1, scale=_scale(weights, split, ahead=1))
        return Explanation(self.name, f"Fires before the tokens {_named(weights, self.tokenizer)}.", predict)


class DeembeddingExplainer:
    """Weight-centric: the feature fires on the tokens whose embeddings its encoder row reads most. No text is read for it.

    Args:
        tokens (`Mapping[int, Mapping[int, float]]`): Feature -> token -> weight, of [`deembedded_token_weights`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer that decodes the tokens.
    """

    name = "de-embedding"

    def __init__(self, tokens: TokenWeights, tokenizer: PreTrainedTokenizerBase):
        self.tokens, self.tokenizer = tokens, tokenizer

    def fit(self, split: ExampleSplit) -> Explanation:
        weights = self.tokens[split.feature]
        predict = TokenListPredictor(weights, ahead=0, scale=_scale(weights, split, ahead=0))
        return Explanation(self.name, f"Reads the tokens {_named(weights, self.tokenizer)}.", predict)


@dataclass(frozen=True)
class TokenListPredictor:
    """Predicted activation in proportion to the weight of a token, or of the next one.

    Args:
        weights (`Mapping[int, float]`): Token id -> weight.
        ahead (`int`): 0 for the weight of the token itself, 1 for that of the next token.
        scale (`float`): Activation for each unit of weight.
    """

    weights: Mapping[int, float]
    ahead: int
    scale: float

    def __call__(self, tokens: Sequence[int]) -> list[float]:
        found = [self.weights.get(token, 0.0) * self.scale for token in tokens[self.ahead :]]
        return found + [0.0] * (len(tokens) - len(found))


def _scale(weights, split, ahead):
    """Mean activation per unit of weight where the tokens are."""
    plain = TokenListPredictor(weights, ahead, 1.0)
    pairs = [
        (weight, activation)
        for window in split.train
        for weight, activation in zip(plain(window.tokens), window.activations, strict=True)
        if weight > 0
    ]
    total = sum(weight * weight for weight, _ in pairs)
    return sum(weight * activation for weight, activation in pairs) / total if total else 0.0


def _named(weights, tokenizer):
    ids = sorted(weights, key=lambda token: -weights[token])[:_NAMED]
    return ", ".join(map(repr, token_texts(tokenizer, ids)))


def promoted_token_weights(
    base_model: PreTrainedModel, dictionary: TranscoderModel, features: Sequence[int]
) -> dict[int, dict[int, float]] | None:
    """The twenty tokens that each feature promotes most, with their z-scores over features; `None` where the dictionary does
    not write to the residual stream."""
    if any(why_no_logits(base_model, dictionary, site) for site in output_sites(dictionary)):
        return None
    found = {}
    for z in direct_path_scores(base_model, dictionary, features):
        for row in z:
            found[features[len(found)]] = _strongest(row)
    return found


@torch.no_grad()
def deembedded_token_weights(
    base_model: PreTrainedModel, dictionary: TranscoderModel, features: Sequence[int]
) -> dict[int, dict[int, float]] | None:
    """The twenty tokens whose embeddings the encoder row of each feature reads most, by the cosine with the mean embedding
    taken off; `None` where the dictionary does not read from the residual stream."""
    site = input_site(dictionary)
    try:
        if not reads_from_stream(site):
            return None
        chosen = torch.tensor(list(features), device=dictionary.device)
        rows = read_directions(base_model, site, encoder_rows(dictionary, chosen)[0])
        found = {}
        for part in rows.split(_SOME_FEATURES):
            scores = embedding_scores(base_model, part)
            scores = scores - scores.mean(1, keepdim=True)
            for row in scores:
                found[features[len(found)]] = _strongest(row)
    except TranscoderError:
        return None
    return found


def _strongest(scores):
    best = scores.topk(min(_TOKENS, len(scores)))
    return {
        token: value for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True) if value > 0
    }
