"""What weights alone expect a feature to fire on, as one number for every token of the vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ...circuits.weights.feature_weights import FeatureWeights
from ...circuits.weights.ov_circuits import OVCircuits
from ...circuits.weights.token_effects import embeddings, vocabulary_parts
from ...lm.heads import output_weight, value_weight
from ...lm.norms import frozen_norm, norm_bias, norm_scale
from ...lm.sites import Site
from ...lm.stream import multiplier_behind, norm_before, norm_behind, reading_stage, writing_stage


@dataclass(frozen=True)
class TokenHypotheses:
    """What some features are expected to fire on, from weights alone.

    Args:
        features (`list[int]`): The features.
        embedding (`torch.Tensor` of shape `(features, vocabulary)`):
            What each reads from the embedding of the present token.
        current (`torch.Tensor` of shape `(features, vocabulary)`):
            The same, with what the dictionaries of earlier layers make of that embedding added to it.
        preceding (`torch.Tensor` of shape `(features, vocabulary)`):
            What its strongest heads bring it from an earlier token that they attend to, their mean.
        scale (`torch.Tensor` of shape `(vocabulary,)`): Of the norm before the features, at the present token alone.
        heads (`list[list[tuple[int, int]]]`): The strongest heads of each, `(layer, head)`.
        mlp_layers (`list[int]`): The layers whose dictionaries were used.
    """

    features: list[int]
    embedding: torch.Tensor
    current: torch.Tensor
    preceding: torch.Tensor
    scale: torch.Tensor
    heads: list[list[tuple[int, int]]]
    mlp_layers: list[int]


@torch.no_grad()
def token_hypotheses(
    weights: FeatureWeights, name: str, features: Sequence[int], num_heads: int, progress: bool = False
) -> TokenHypotheses:
    """Hypotheses about features of one dictionary.

    Each token of the vocabulary is taken alone: its embedding goes up the residual stream, each earlier dictionary that
    stands for an MLP adds what it makes of it, and attention adds nothing. Norms have the scale that they have there.

    Args:
        weights ([`FeatureWeights`]): The dictionaries in their model.
        name (`str`): The dictionary.
        features (`Sequence[int]`): Its features.
        num_heads (`int`): Heads of each feature, those with the largest `ov_norms`.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.
    """
    model = weights.base_model
    into = Site.parse(weights.dictionary(name).config.input_site)
    reads, norm = weights.reads(name, features), norm_before(model, into)
    heads, pulled = _strongest_heads(weights, name, features, reads, num_heads)
    mlps = _mlps_before(weights, reading_stage(model, into))
    parts = []
    for ids in tqdm(vocabulary_parts(model), desc="hypotheses", disable=not progress):
        stream = embeddings(model, ids)
        embedding = _scale(norm, stream) * (stream @ reads.T)
        preceding = torch.zeros_like(embedding)
        for layer in sorted({*pulled, *mlps}):
            if layer in pulled:
                preceding += _attention_scale(model, layer, stream) * (stream @ pulled[layer].T)
            if layer in mlps:
                stream = stream + _written(model, mlps[layer], stream)
        scale = _scale(norm, stream)
        parts.append((embedding.T, (scale * (stream @ reads.T)).T, preceding.T, scale.T))
    embedding, current, preceding, scale = (torch.cat(each, dim=-1).cpu() for each in zip(*parts, strict=True))
    return TokenHypotheses(list(features), embedding, current, preceding, scale[0], heads, sorted(mlps))


def _strongest_heads(weights, name, features, reads, num_heads):
    """The strongest heads of each feature, and per layer its part of the mean of what it reads through them, `(features, hidden)`."""
    layers = weights.layers_before(name)
    if not layers or not num_heads:
        return [[] for _ in features], {}
    norms = weights.ov_norms(name, features)
    best = norms.flatten(1).topk(min(num_heads, norms[0].numel())).indices
    chosen = torch.zeros_like(norms.flatten(1)).scatter_(1, best, 1 / best.shape[1]).view_as(norms)
    pulled = {}
    for number, layer in enumerate(layers):
        if chosen[:, number].any():
            pulled[layer] = torch.einsum(
                "hno,nh->no", OVCircuits(weights.base_model, layer).pull(reads), chosen[:, number]
            )
    count = norms.shape[-1]
    return [[(layers[place // count], place % count) for place in row] for row in best.tolist()], pulled


def _mlps_before(weights, stage):
    """By layer, the dictionary that stands for its MLP, where that writes before `stage`."""
    found = {}
    for dictionary in weights.dictionaries.values():
        read, out = (Site.parse(site) for site in (dictionary.config.input_site, dictionary.config.output_site))
        if read.point == "mlp.in" and out.point in ("mlp.out", "mlp.branch") and read.layer == out.layer:
            if writing_stage(weights.base_model, out) <= stage:
                found.setdefault(read.layer, dictionary)
    return found


def _written(model, dictionary, stream):
    """What the dictionary of an MLP adds to the stream where that is `stream (tokens, hidden)`."""
    out = Site.parse(dictionary.config.output_site)
    inputs = _normed(norm_before(model, Site("mlp.in", out.layer)), stream)
    added = dictionary(inputs.to(dictionary.device), output_features=False).reconstruction.to(stream)
    norm = norm_behind(model, out)
    added = added if norm is None else _normed(norm, added)
    return added * multiplier_behind(model, out)


def _attention_scale(model, layer, stream):
    """Of the norm before attention, and of a post-norm, if any, when each token attends to itself: `(tokens, 1)`."""
    norm, post_norm = norm_before(model, Site("attn.in", layer)), norm_behind(model, Site("attn.out", layer))
    scale = _scale(norm, stream)
    if post_norm is None:
        return scale
    outputs, (values, bias) = output_weight(model, layer).float(), value_weight(model, layer)
    values = torch.einsum("to,hdo->thd", _normed(norm, stream), values.float())
    values = (values if bias is None else values + bias).repeat_interleave(len(outputs) // values.shape[1], dim=1)
    return scale * norm_scale(post_norm, torch.einsum("thd,hdo->to", values, outputs))


def _scale(norm, stream):
    return torch.ones_like(stream[:, :1]) if norm is None else norm_scale(norm, stream)


def _normed(norm, rows):
    return rows if norm is None else frozen_norm(norm, rows)(rows) + norm_bias(norm)
