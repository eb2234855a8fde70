"""Hypotheses from weights alone about the tokens that activate a feature, as a score for every token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ...circuits.weights.feature_weights import FeatureWeights
from ...circuits.weights.ov_circuits import OVCircuits
from ...errors import TranscoderError
from ...lm.heads import output_weight, value_weight
from ...lm.norms import frozen_norm, norm_bias, norm_scale
from ...lm.sites import Site, input_site, output_site
from ...lm.stream import multiplier_after, norm_after, norm_before, reading_stage, writing_stage
from ...lm.token_embeddings import embeddings, vocabulary_parts


@dataclass(frozen=True)
class TokenHypotheses:
    """Predicted contributions of tokens to the pre-activations of some features.

    Args:
        features (`list[int]`): Numbers of the features.
        embedding (`torch.Tensor` of shape `(features, vocabulary)`):
            Contribution of the embedding of the current token.
        current (`torch.Tensor` of shape `(features, vocabulary)`):
            The same, with the outputs of dictionaries of earlier layers for that embedding added.
        preceding (`torch.Tensor` of shape `(features, vocabulary)`):
            Mean contribution of an earlier token through the strongest heads, if they attend to it.
        scale (`torch.Tensor` of shape `(vocabulary,)`): Scale of the norm before the features, for the current token alone.
        heads (`list[list[tuple[int, int]]]`): Strongest heads of each feature, `(layer, head)`.
        mlp_layers (`list[int]`): Layers whose dictionaries were used.
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
    """Compute hypotheses about features of one dictionary.

    Each token of the vocabulary is processed alone: its embedding passes through the residual stream, each earlier
    dictionary of an MLP adds its output, and attention adds nothing. Norms have the scales of this stream.

    Args:
        weights ([`FeatureWeights`]): Dictionaries with their model.
        name (`str`): Name of the dictionary.
        features (`Sequence[int]`): Numbers of the features.
        num_heads (`int`): Number of heads per feature, those with the largest `ov_norms`.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.
    """
    model = weights.base_model
    into = input_site(weights.dictionary(name))
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
    """Strongest heads of each feature, and layer -> read vectors averaged over these heads, `(features, hidden)`."""
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
    """Layer -> dictionary of its MLP, if it writes before `stage`."""
    found = {}
    for dictionary in weights.dictionaries.values():
        read, out = input_site(dictionary), output_site(dictionary)
        if read.point == "mlp.in" and out.point in ("mlp.out", "mlp.branch") and read.layer == out.layer:
            if writing_stage(weights.base_model, out) <= stage:
                found.setdefault(read.layer, dictionary)
    return found


def _written(model, dictionary, stream):
    """Output of the dictionary of an MLP for the residual stream `stream (tokens, hidden)`."""
    if len(dictionary.config.output_sites) > 1:
        raise TranscoderError(
            "The outputs of MLPs are computed by the dictionary of one layer each, and a cross-layer transcoder sums several: use a "
            "set of transcoders."
        )
    out = output_site(dictionary)
    inputs = _normed(norm_before(model, Site("mlp.in", out.layer)), stream)
    added = dictionary(inputs.to(dictionary.device), output_features=False).reconstruction.to(stream)
    norm = norm_after(model, out)
    added = added if norm is None else _normed(norm, added)
    return added * multiplier_after(model, out)


def _attention_scale(model, layer, stream):
    """Scale of the norm before attention, and of a post-norm if there is one, if each token attends to itself: `(tokens, 1)`."""
    norm, post_norm = norm_before(model, Site("attn.in", layer)), norm_after(model, Site("attn.out", layer))
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
