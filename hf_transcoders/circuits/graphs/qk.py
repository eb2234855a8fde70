"""QK attribution: which pairs of features make a head attend from one token to another."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...dictionaries import Dictionaries, fitting_dictionaries
from ...errors import TranscoderError
from ...lm.query_key import linear_query_key
from ...lm.wrappers import measures_model
from ...text.printable import printable
from ..prompt_tokens import Prompt, encode_prompt, token_labels
from .adjoint import Adjoint
from .attribution import measured
from .graph import AttributionGraph, node_label
from .read_vectors import ReadVectors
from .recording import record
from .rerun import rerun
from .row_sums import sums_do_not_hold, warn
from .targets import check_position


# Elements of the scores of pairs that are computed at once.
_MAX_ELEMENTS = 2**24


@dataclass(frozen=True)
class QKAttribution:
    """The attention score between two tokens as a sum over pairs of sources.

    Args:
        layer, head (`int`): The head.
        query_position, key_position (`int`): Token that attends, and token that it attends to.
        score (`float`): The attention score between them, before a soft-cap and softmax.
        probability (`float`): Attention weight between them in this run.
        query_source, key_source (`torch.LongTensor` of shape `(pairs,)`):
            Numbers of the sources of the pairs with the largest scores, strongest first.
        pair_score (`torch.Tensor` of shape `(pairs,)`): Contribution of each of these pairs to the score.
        query_marginal, key_marginal (`torch.Tensor` of shape `(sources,)`):
            Contribution of each source through the query, with the whole key, and the reverse. Each sums to the score.
        labels (`dict[int, str]`): Labels of the strongest sources.
        warning (`str`, *optional*): Warning if the sources do not sum to the query and the key.
    """

    layer: int
    head: int
    query_position: int
    key_position: int
    score: float
    probability: float
    query_source: torch.Tensor
    key_source: torch.Tensor
    pair_score: torch.Tensor
    query_marginal: torch.Tensor
    key_marginal: torch.Tensor
    labels: dict[int, str] = field(repr=False)
    warning: str | None = None

    @property
    def pairs(self) -> list[tuple[str, str, float]]:
        """The strongest pairs, as (source in the query, source in the key, score)."""
        return [
            (self.labels[query], self.labels[key], score)
            for query, key, score in zip(
                self.query_source.tolist(), self.key_source.tolist(), self.pair_score.tolist(), strict=True
            )
        ]

    def strongest(self, side: str) -> list[tuple[str, float]]:
        """The strongest sources of one side, `"query"` or `"key"`, as (source, score); as many as there are pairs."""
        if side not in ("query", "key"):
            raise TranscoderError(f"side='{side}' is unknown; use 'query' or 'key'.")
        values = self.query_marginal if side == "query" else self.key_marginal
        return [(self.labels[number], float(values[number])) for number in _largest(values, len(self.pair_score))]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "layer": self.layer,
            "head": self.head,
            "query_position": self.query_position,
            "key_position": self.key_position,
            "score": self.score,
            "probability": self.probability,
            "pairs": [{"query": query, "key": key, "score": score} for query, key, score in self.pairs],
            "other_pairs": self.score - float(self.pair_score.sum()),
            **{
                side: [{"source": source, "score": score} for source, score in self.strongest(side)]
                for side in ("query", "key")
            },
            "warning": self.warning,
        }

    def to_text(self) -> str:
        """The strongest pairs as a table for the terminal."""
        pairs = [(printable(query), printable(key), score) for query, key, score in self.pairs]
        width = max((len(query) for query, _, _ in pairs), default=0)
        lines = [f"WARNING: {self.warning}", ""] if self.warning else []
        lines += [
            f"L{self.layer}H{self.head} from token {self.query_position} to token {self.key_position}: "
            f"score {self.score:.4g}, attention {self.probability:.1%}",
            f"{'score':>10}  {'query':<{width}}  key",
            *(f"{score:>10.4g}  {query:<{width}}  {key}" for query, key, score in pairs),
            f"{self.score - float(self.pair_score.sum()):>10.4g}  all other pairs",
        ]
        return "\n".join(lines)

    __str__ = to_text


@measures_model
@torch.no_grad()
def qk_attribution(
    base_model: PreTrainedModel,
    transcoders: Dictionaries,
    prompt: AttributionGraph | Prompt,
    layer: int,
    head: int,
    query_position: int = -1,
    key_position: int | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    top: int = 10,
    skip_first: int | None = None,
) -> QKAttribution:
    """Decompose the attention score of a head between two tokens into pairs of sources (Kamath et al. 2025).

    With frozen norm scales and frozen attention patterns in all layers below, the query is linear in everything that
    writes to the stream before it, and so is the key: their product is a sum over pairs of embeddings, features, errors
    and biases, one in the query and one in the key. Norms of queries and keys are frozen too, and the rotary embedding is
    that of the two positions.

    Args:
        base_model ([`~transformers.PreTrainedModel`]), transcoders ([`TranscoderSet`], ...):
            As for [`attribution_graph`].
        prompt ([`AttributionGraph`], `str`, `Sequence[int]` or `Mapping`):
            A graph made with them, text, token ids, or what the tokenizer returned.
        layer, head (`int`):
            Layer and number of the head; with grouped queries, the number of the query head.
        query_position (`int`, *optional*, defaults to -1):
            Token that attends; negative numbers count from the end.
        key_position (`int`, *optional*):
            Token that it attends to. Defaults to the one with the largest attention weight.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Needed for text; otherwise only for labels.
        top (`int`, *optional*, defaults to 10):
            Number of pairs.
        skip_first (`int`, *optional*):
            As for [`attribution_graph`], 1 by default; a graph has its own.

    Returns:
        [`QKAttribution`]

    Raises:
        [`TranscoderError`]: there is no such head or token, the head cannot attend there, or the queries of the model's
            family cannot be decomposed.

    Example:

    ```python
    >>> print(qk_attribution(base, transcoders, "When Mary and John went home, John gave", 8, 3, tokenizer=tokenizer).to_text())
    ```
    """
    if isinstance(prompt, AttributionGraph):
        if skip_first is not None:
            raise TranscoderError("A graph was given, which has its own `skip_first`: leave it out.")
        run, tokens = rerun(base_model, transcoders, prompt), prompt.tokens
    else:
        ids = encode_prompt(base_model, prompt, tokenizer)
        run = record(
            base_model, fitting_dictionaries(base_model, transcoders), [ids], 1 if skip_first is None else skip_first
        )[0]
        tokens = token_labels(ids.tolist(), tokenizer)
    heads = len(run.layers[0].pattern)
    if not (0 <= layer < run.num_layers and 0 <= head < heads):
        raise TranscoderError(
            f"There is no head {head} in layer {layer}: this model has the layers 0 to {run.num_layers - 1} with the heads "
            f"0 to {heads - 1}."
        )
    if top < 1:
        raise TranscoderError(f"`top` is {top}; give at least 1.")
    query_position = check_position(run, query_position)
    if key_position is not None:
        key_position = check_position(run, key_position)
    maps = linear_query_key(base_model, run.input_ids, layer, head, query_position, key_position)
    adjoint = Adjoint(run)
    queries = _sources_of(adjoint, layer, maps.query_position, maps.query, maps.query_bias) * maps.scaling
    keys = _sources_of(adjoint, layer, maps.key_position, maps.key, maps.key_bias)
    warning = _check_sums(run, layer, maps, queries, keys)
    warn(warning)
    query_source, key_source, pair_score = _strongest_pairs(queries, keys, top)
    query, key = queries.double().sum(0), keys.double().sum(0)
    query_marginal, key_marginal = (queries.double() @ key).float().cpu(), (keys.double() @ query).float().cpu()
    shown = {*query_source.tolist(), *key_source.tolist()}
    shown |= {*_largest(query_marginal, len(pair_score)), *_largest(key_marginal, len(pair_score))}
    return QKAttribution(
        layer=layer, head=head, query_position=maps.query_position, key_position=maps.key_position,
        score=float(query @ key), probability=maps.probability,
        query_source=query_source, key_source=key_source, pair_score=pair_score,
        query_marginal=query_marginal, key_marginal=key_marginal,
        labels={number: _label(adjoint.sources, number, tokens, run.num_layers) for number in shown},
        warning=warning,
    )  # fmt: skip


def _read_vectors(layer, position, weight, bias):
    places = (torch.full((len(weight),), value, device=weight.device) for value in (layer, position))
    at, token = places
    return ReadVectors(at, ["attn.in"] * len(weight), token, weight, bias)


def _check_sums(run, layer, maps, queries, keys):
    """A warning if sources do not sum to the query and the key of the head, `None` otherwise."""
    expected = torch.cat(
        [
            measured(run, _read_vectors(layer, maps.query_position, maps.query, maps.query_bias)) * maps.scaling,
            measured(run, _read_vectors(layer, maps.key_position, maps.key, maps.key_bias)),
        ]
    )
    parts = torch.cat([queries, keys], dim=1).double()
    return sums_do_not_hold(run.model.dtype, parts.sum(0), parts.abs().sum(0), expected, "attribution")


def _sources_of(adjoint, layer, position, weight, bias):
    """Contributions of all sources to a query or key, `(sources, head_dim)`."""
    rows = [
        adjoint.rows(_read_vectors(layer, position, vector, constant))
        for vector, constant in zip(
            weight.split(adjoint.batch_size()), bias.split(adjoint.batch_size()), strict=True
        )
    ]  # fmt: skip
    return torch.cat(rows).T


def _strongest_pairs(queries, keys, top):
    """Numbers and scores of the pairs with the largest products, without all products in memory at once."""
    with_query, with_key = (each.abs().amax(1).nonzero()[:, 0] for each in (queries, keys))
    keys = keys[with_key].T
    found = []
    for rows in with_query.split(max(1, _MAX_ELEMENTS // max(1, len(with_key)))):
        scores = (queries[rows] @ keys).flatten()
        best = scores.abs().topk(min(top, len(scores))).indices
        found.append((rows[best // len(with_key)], with_key[best % len(with_key)], scores[best]))
    query, key, score = (torch.cat(each) for each in zip(*found, strict=True))
    order = score.abs().topk(min(top, len(score))).indices
    return query[order].cpu(), key[order].cpu(), score[order].cpu()


def _largest(values, count):
    return values.abs().topk(min(count, len(values))).indices.tolist()


def _label(sources, number, tokens, num_layers):
    segment = next(segment for segment in sources.segments if number < segment.end)
    at, position, index = number - segment.start, -1, -1
    if segment.kind == "feature":
        position, index = int(segment.features.position[at]), int(segment.features.feature[at])
    elif segment.kind != "bias":
        position = at
    return node_label(segment.kind, segment.layer, position, index, tokens, num_layers)
