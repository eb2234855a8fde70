"""Scores of heads from the weights alone: copying, token matching, and composition with other heads."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from ...errors import TranscoderError
from ...lm.architectures import final_norm, locate, num_layers
from ...lm.attention import edit_attention, num_heads
from ...lm.devices import input_device
from ...lm.heads import key_weight, output_weight, query_weight, value_weight
from ...lm.hooks import read_at, write_at
from ...lm.inputs import check_tokens, forget_lengths_
from ...lm.linear_maps import map_size, num_embeddings
from ...lm.norms import norm_bias
from ...lm.sites import Site
from ...lm.stream import norm_after, read_directions, written_directions
from ...lm.wrappers import measures_model
from .attention_edits import check_heads


_MOST_LOGITS = 64_000_000
_MOST_ROWS = 8192


@measures_model
@torch.no_grad()
def copying_scores(model: PreTrainedModel, token_ids: Sequence[int], top: int = 5) -> dict[str, torch.Tensor]:
    """Score copying by the OV circuit: how often a head raises, or lowers, the logit of the token that it attends to most.

    Each token is a prompt of its own. Its residual stream after the first block goes through the values and the output
    projection of each head (with the norm that may follow), the final norm and the unembedding (Wang et al., 2022).

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        token_ids (`Sequence[int]`): Ids of the tokens, such as names.
        top (`int`, *optional*, defaults to 5): Number of logits that count as the most raised or lowered.

    Returns:
        `dict[str, torch.Tensor]`: shares of the tokens, `(layers, heads)`: `copying`, where the token is among the `top`
        logits, and `negative_copying`, where it is among those of the head's output with the opposite sign.
    """
    ids = torch.as_tensor(token_ids, device=input_device(model))
    check_tokens(model, [ids], "The list")
    z = _alone(model, ids, "z")
    norm = final_norm(model)
    unembedding = model.get_output_embeddings()
    vocabulary, hidden_size = map_size(unembedding)
    size = max(1, _MOST_LOGITS // vocabulary)
    # An output with the opposite sign has logits with the opposite sign, except for the biases of norm and unembedding.
    bias = norm_bias(norm) + torch.zeros(hidden_size, dtype=model.dtype, device=ids.device)
    twice = 2 * unembedding(bias[None])
    scores = {"copying": [], "negative_copying": []}
    for layer in range(num_layers(model)):
        added = torch.einsum("phd,hdo->pho", z[layer].float(), output_weight(model, layer).float())
        post_norm = norm_after(model, Site("attn.out", layer))
        if post_norm is not None:
            # Applied to the output of one head: the final norm sets the scale anyway.
            added = post_norm(added.to(model.dtype)).float()
        own = ids[:, None].expand(added.shape[:-1]).flatten()
        ranks = {name: [] for name in scores}
        for rows, tokens in zip(added.flatten(0, 1).split(size), own.split(size), strict=True):
            logits = unembedding(norm(rows.to(model.dtype)))
            for name, each in (("copying", logits), ("negative_copying", twice - logits)):
                ranks[name].append((each > each.gather(1, tokens[:, None])).sum(1))
        for name, each in ranks.items():
            scores[name].append((torch.cat(each).view(added.shape[:-1]) < top).float().mean(0))
    return {name: torch.stack(layers).cpu() for name, layers in scores.items()}


@measures_model
@torch.no_grad()
def duplicate_token_scores(
    model: PreTrainedModel, token_ids: Sequence[int], distance: int = 10, top: int = 1
) -> torch.Tensor:
    """Score token matching by the QK circuit: how often a token's query matches its own key better than other keys.

    Each token is a prompt of its own, once as a query at position `distance` and once as a key at position 0. All keys
    have the same position, so they differ only by their token. Heads after the first block read the output of the first
    block.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        token_ids (`Sequence[int]`): Ids of the tokens to compare, all different.
        distance (`int`, *optional*, defaults to 10): Number of tokens from the keys to the query.
        top (`int`, *optional*, defaults to 1): Number of best matching keys that must include the own key.

    Returns:
        `torch.Tensor` of shape `(layers, heads)`: shares of the tokens, on the CPU. Chance is `top / tokens`.
    """
    ids = torch.as_tensor(token_ids, device=input_device(model))
    if ids.unique().numel() != ids.numel() or len(ids) < 2:
        raise TranscoderError("Tokens are compared with each other: give at least two, all different.")
    check_tokens(model, [ids, ids[:1].expand(distance + 1)], "The text of these tokens at this distance")
    queries, keys = _alone(model, ids, "query", distance), _alone(model, ids, "key", last=distance)
    heads, kv_heads = num_heads(model)
    found = []
    for query, key in zip(queries, keys, strict=True):
        key = key.repeat_interleave(heads // kv_heads, dim=1)
        matches = torch.einsum("qhd,khd->hqk", query.float(), key.float())
        better = (matches > matches.diagonal(dim1=1, dim2=2)[..., None]).sum(2)
        found.append((better < top).float().mean(1))
    return torch.stack(found).cpu()


@measures_model
@torch.no_grad()
def previous_token_scores(model: PreTrainedModel, length: int = 16) -> torch.Tensor:
    """Score attention to the previous position by the QK circuit, on a text in which all tokens are the same mean token.

    Keys then differ only by their position, whether the model adds position embeddings or rotates queries and keys. Heads
    after the first block read the output of the first block, in which each position attends only to itself.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        length (`int`, *optional*, defaults to 16): Number of positions.

    Returns:
        `torch.Tensor` of shape `(layers, heads)`: mean attention to the previous token, over all positions but the first,
        on the CPU. Uniform attention has a score of 0.16 with 16 positions.
    """
    if length < 2:
        raise TranscoderError(f"length is {length}, but a previous token takes at least two positions.")
    embeddings = model.get_input_embeddings()
    # The module scales embeddings in some families, which `inputs_embeds` would skip.
    vocabulary = num_embeddings(embeddings)
    every = torch.arange(vocabulary, device=input_device(model)).split(_MOST_ROWS)
    mean = (sum(embeddings(ids).float().sum(0) for ids in every) / vocabulary).to(model.dtype)  # pyright: ignore[reportAttributeAccessIssue]
    queries = torch.arange(1, length)
    itself = torch.eye(length, device=input_device(model), dtype=model.dtype)
    found = {}

    def keep(pattern, layer):
        found[layer] = pattern[0][:, queries, queries - 1].float().mean(1).cpu()
        return itself.expand_as(pattern) if layer == 0 else None

    with ExitStack() as stack:
        stack.enter_context(edit_attention(model, pattern=keep))
        _give_first_output(stack, model)
        model.get_decoder()(inputs_embeds=mean.expand(1, length, -1), use_cache=False)
    return torch.stack([found[layer] for layer in range(len(found))])


@measures_model
@torch.no_grad()
def composition_scores(model: PreTrainedModel, senders: Sequence[tuple[int, int]], into: str = "key") -> torch.Tensor:
    """Score the composition of heads: the share of the output of earlier heads that each head reads, by weights.

    `||W_in W_OV|| / (||W_in|| ||W_OV||)` in the Frobenius norm, where `W_in` is `W_QK` with its side for the keys or for
    the queries, or `W_OV` of the reading head (Elhage et al., 2021, "A Mathematical Framework for Transformer Circuits").
    Induction heads are made of K-composition with previous-token heads. The gains of the norms before attention
    and after it are part of the weights; biases, norms of queries and keys and the rotary embedding are left out.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        senders (`Sequence[tuple[int, int]]`): Layer and number of the writing heads.
        into (`str`, *optional*, defaults to `"key"`): The input of the reading heads, `"query"`, `"key"` or `"value"`.

    Returns:
        `torch.Tensor` of shape `(senders, layers, heads)`: between 0 and 1; 0 for heads that are not after the sender.
        Two unrelated heads have about `1 / sqrt(hidden_size)`. On the CPU.

    Raises:
        [`TranscoderError`]: a sender does not exist, or there is no such input.
    """
    if into not in ("query", "key", "value"):
        raise TranscoderError(f"A head has no input '{into}': choose query, key or value.")
    layers, (heads, kv_heads) = num_layers(model), num_heads(model)
    check_heads(senders, layers, heads)
    if not senders:
        return torch.zeros(0, layers, heads)

    def folded(weight, layer):
        each = read_directions(model, Site("attn.in", layer), weight(model, layer)[0].float())
        return each if len(each) == heads else each.repeat_interleave(heads // kv_heads, dim=0)

    def outward(layer):
        return written_directions(model, Site("attn.out", layer), output_weight(model, layer).float())

    # W_OV of a sender is `written^T read`, both (head_dim, hidden); the norm depends only on the Gram matrix of `read`.
    by_layer = {layer: (outward(layer), folded(value_weight, layer)) for layer in {layer for layer, _ in senders}}
    written = torch.stack([by_layer[layer][0][head] for layer, head in senders])
    read = torch.stack([by_layer[layer][1][head] for layer, head in senders])
    read_gram = read @ read.mT
    sizes = _norm(written @ written.mT, read_gram)
    sender_layer = torch.tensor([layer for layer, _ in senders], device=sizes.device)
    scores = torch.zeros(len(senders), layers, heads, device=sizes.device)
    for layer in range(1, layers):
        inner = folded({"query": query_weight, "key": key_weight, "value": value_weight}[into], layer)
        if into == "value":
            outer = outward(layer)
        else:
            outer = folded(key_weight if into == "query" else query_weight, layer)
        outer_gram = outer @ outer.mT
        # (senders, heads, head_dim, head_dim): the inner side of the reading head times the output of each sender.
        through = torch.einsum("hio,sjo->shij", inner, written)
        squared = torch.einsum("shij,hik,shkl,sjl->sh", through, outer_gram, through, read_gram)
        size = sizes[:, None] * _norm(outer_gram, inner @ inner.mT)
        scores[:, layer] = (squared.clamp(min=0).sqrt() / size) * (sender_layer < layer)[:, None]
    return scores.cpu()


def _norm(gram: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Frobenius norms of `A^T B` from the Gram matrices `A A^T` and `B B^T`, `(..., width, width)`."""
    return (gram * other).sum((-1, -2)).clamp(min=0).sqrt()


def _alone(model, ids, part, position=0, last=0):
    """Record a component of every head for single tokens at a position, `(tokens, heads, head_dim)` for each layer.

    Their rotary embedding is that of texts whose last token is at `last`, because it depends on the length in some models.
    """
    last = max(position, last)
    found = {}
    with ExitStack() as stack:
        stack.enter_context(
            edit_attention(model, **{part: lambda value, layer: found.__setitem__(layer, value[:, :, 0])})
        )
        _give_first_output(stack, model)
        # A single token attends to itself, so its z is its value.
        positions = torch.full_like(ids, position)
        if last != position:
            ids, positions = (torch.cat([each, each[:1]]) for each in (ids, positions))
            positions[-1] = last
        forget_lengths_(model)
        model.get_decoder()(input_ids=ids[:, None], position_ids=positions[:, None], use_cache=False)
    return [found[layer][: len(ids) - (last != position)] for layer in range(len(found))]


def _give_first_output(stack, model):
    """Let every block after the first read the output of the first block."""
    first = {}
    read_at(stack, locate(model, Site("resid_post", 0)), lambda value: first.__setitem__(0, value))
    for layer in range(1, num_layers(model)):
        write_at(stack, locate(model, Site("resid_pre", layer)), lambda value: first[0])
