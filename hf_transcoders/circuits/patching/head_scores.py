"""Descriptive scores of heads and MLPs: logit attribution, output norms and attention patterns."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...errors import TranscoderError
from ...lm.architectures import architecture_of, final_norm, locate, num_layers
from ...lm.attention import edit_attention
from ...lm.devices import input_device
from ...lm.heads import output_weight
from ...lm.hooks import read_at
from ...lm.inputs import check_tokens, forget_lengths_
from ...lm.linear_maps import linear_rows, num_embeddings
from ...lm.norms import frozen_norm, norm_bias
from ...lm.sites import Site
from ...lm.stream import UNEMBEDDING, map_after, multiplier_after, norm_after
from ...lm.wrappers import measures_model
from ...tasks.task import Task
from .results import PatchResult


@dataclass(frozen=True)
class ComponentOutputs:
    """Outputs of heads and MLPs at one token of each prompt, as added to the residual stream.

    Args:
        heads (`torch.Tensor` of shape `(prompts, layers, heads, hidden)`):
            Output of each head after the output projection, and after the norm that may follow, at the scale of that norm
            for the whole attention output.
        mlps (`torch.Tensor` of shape `(prompts, layers, hidden)`):
            Output of each MLP, after the norm that may follow.
        rest (`torch.Tensor` of shape `(prompts, hidden)`):
            Remainder of the residual stream after the last block: embeddings and biases of attention.
        final (`torch.Tensor` of shape `(prompts, hidden)`):
            Residual stream after the last block.
    """

    heads: torch.Tensor
    mlps: torch.Tensor
    rest: torch.Tensor
    final: torch.Tensor

    @property
    def norms(self) -> torch.Tensor:
        """Euclidean norm of the output of each head, `(prompts, layers, heads)`."""
        return self.heads.norm(dim=-1)


@measures_model
@torch.no_grad()
def component_outputs(
    model: PreTrainedModel, task: Task, which: str = "clean", position: str = "END", batch_size: int = 32
) -> ComponentOutputs:
    """Record the output of each head and MLP at one token, as added to the residual stream.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        task ([`Task`]): The prompts.
        which (`str`, *optional*, defaults to `"clean"`): The side of each pair, `"clean"` or `"corrupted"`.
        position (`str`, *optional*, defaults to `"END"`): Name of the token.
        batch_size (`int`, *optional*, defaults to 32): Number of prompts in one forward pass.

    Returns:
        [`ComponentOutputs`] in fp32.

    Raises:
        [`TranscoderError`]: the task has no such position, or the model's attention cannot be edited.
    """
    order, batches = [], []
    for rows, tokens in _token_batches(model, task, which, batch_size):
        order.append(rows)
        batches.append(_component_outputs(model, task, tokens, position))
    return ComponentOutputs(*(_in_order(order, each) for each in zip(*batches, strict=True)))


def _component_outputs(model, task, tokens, position):
    device = input_device(model)
    at = _position(task, tokens, position)
    prompts = torch.arange(len(at), device=device)
    layers = num_layers(model)
    z, attention, mlps, final = {}, {}, {}, {}

    def keep(store, layer):
        return lambda value: store.__setitem__(layer, value[prompts, at])

    with ExitStack() as stack:
        stack.enter_context(edit_attention(model, z=lambda value, layer: z.__setitem__(layer, value[prompts, :, at])))
        for layer in range(layers):
            read_at(stack, locate(model, Site("attn.out", layer)), keep(attention, layer))
            read_at(stack, locate(model, Site("mlp.branch", layer)), keep(mlps, layer))
        read_at(stack, locate(model, Site("resid_post", layers - 1)), keep(final, 0))
        model.get_decoder()(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)

    parts = []
    for layer in range(layers):
        added = torch.einsum("phd,hdo->pho", z[layer].float(), output_weight(model, layer).float())
        site = Site("attn.out", layer)
        at = attention[layer].float()[:, None]
        through = map_after(norm_after(model, site), multiplier_after(model, site), at)
        if through is not None:
            added = through(added)
        parts.append(added)
    head_parts = torch.stack(parts, dim=1)
    mlp_parts = torch.stack([mlps[layer] for layer in range(layers)], dim=1).float()
    last = final[0].float()
    return head_parts, mlp_parts, last - head_parts.sum((1, 2)) - mlp_parts.sum(1), last


@measures_model
@torch.no_grad()
def logit_attribution(model: PreTrainedModel, task: Task, which: str = "clean", batch_size: int = 32) -> PatchResult:
    """Attribute the logit difference of right and wrong answers at `END` to the outputs of heads and MLPs.

    This is direct logit attribution: the final norm keeps its scale for the whole stream, and logits are taken before a
    soft-cap. The attributions of all heads, all MLPs and the rest of the stream sum to the logit difference.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        task ([`Task`]): Prompts with right and wrong answers.
        which (`str`, *optional*, defaults to `"clean"`): The side of each pair, `"clean"` or `"corrupted"`.
        batch_size (`int`, *optional*, defaults to 32): Number of prompts in one forward pass.

    Returns:
        [`PatchResult`] with the axes `layer` and `head`, where the MLP is a last head named `mlp`; `values` are nats and
        `base` is 0. `protocol["rest"]` is the mean attribution of embeddings and biases.

    Raises:
        [`TranscoderError`]: a prompt has no wrong answers, or the model's attention cannot be edited.
    """
    answers = task.answers(device=input_device(model))
    if not answers.wrong.shape[1] or (answers.wrong < 0).all(1).any():
        raise TranscoderError("Logit attribution needs wrong answers: give some when making the task.")
    unembedding = model.get_output_embeddings()
    multiplier = architecture_of(model).logit_multiplier
    tokens = torch.cat([answers.right.flatten(), answers.wrong.flatten()]).clamp(min=0).unique()
    rows = linear_rows(unembedding, tokens, UNEMBEDDING)
    right, wrong = (
        torch.where(ids >= 0, torch.searchsorted(tokens, ids.clamp(min=0)), -1)
        for ids in (answers.right, answers.wrong)
    )
    direction = _mean_of(rows.weight, right) - _mean_of(rows.weight, wrong)
    direction = direction * multiplier
    norm = final_norm(model)
    values, rest = [], []
    for prompts in torch.arange(len(task)).split(batch_size):
        parts = component_outputs(model, task.select(prompts.tolist()), which, batch_size=batch_size)
        toward = direction[prompts.to(direction.device)]
        each = torch.cat([parts.heads, parts.mlps[:, :, None]], dim=2)
        values.append(torch.einsum("plho,po->lhp", frozen_norm(norm, parts.final[:, None, None])(each), toward))
        rest.append(((frozen_norm(norm, parts.final)(parts.rest) + norm_bias(norm)) * toward).sum(-1))
    rest = torch.cat(rest)
    if rows.bias is not None:
        bias = rows.bias[:, None] * multiplier
        rest = rest + (_mean_of(bias, right) - _mean_of(bias, wrong))[:, 0]
    values = torch.cat(values, dim=2).cpu()
    heads = [str(head) for head in range(values.shape[1] - 1)] + ["mlp"]
    protocol = {"method": "direct logit attribution", "prompts": which, "rest": rest.mean().item()}
    axes = {"layer": [str(layer) for layer in range(len(values))], "head": heads}
    return PatchResult(values, torch.zeros(len(task)), None, axes, "logit_difference", protocol)


@measures_model
@torch.no_grad()
def attention_between(
    model: PreTrainedModel,
    task: Task,
    query: str,
    keys: Sequence[str],
    which: str = "clean",
    batch_size: int = 32,
) -> torch.Tensor:
    """Measure the attention of each head from one named token to others.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        task ([`Task`]): The prompts.
        query (`str`): Name of the position of the query.
        keys (`Sequence[str]`): Names of the positions of the keys.
        which (`str`, *optional*, defaults to `"clean"`): The side of each pair, `"clean"` or `"corrupted"`.
        batch_size (`int`, *optional*, defaults to 32): Number of prompts in one forward pass.

    Returns:
        `torch.Tensor` of shape `(layers, heads, keys, prompts)` in fp32, on the CPU.
    """
    order, found = [], []
    for rows, tokens in _token_batches(model, task, which, batch_size):
        order.append(rows)
        found.append(_attention_between(model, task, tokens, query, keys))
    return _in_order(order, found).permute(1, 3, 2, 0)


def _attention_between(model, task, tokens, query, keys):
    """Attention in the prompts of one forward pass, `(prompts, layers, keys, heads)`."""
    prompts = torch.arange(len(tokens.lengths), device=input_device(model))[:, None]
    at = _position(task, tokens, query)[:, None]
    to = torch.stack([_position(task, tokens, key) for key in keys], dim=1)
    kept = {}

    def keep(pattern, layer):
        kept[layer] = pattern[prompts, :, at, to].float().cpu()

    with edit_attention(model, pattern=keep):
        model.get_decoder()(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False)
    return torch.stack([kept[layer] for layer in range(len(kept))], dim=1)


def _token_batches(model, task, which, batch_size):
    """Prompts that share a forward pass: their indices and tokens."""
    for rows in torch.arange(len(task)).split(batch_size):
        numbers = rows.tolist()
        for places, tokens in task.tokens(which, numbers, input_device(model)).forward_batches(model, numbers):
            yield rows[places], tokens


def _in_order(order, parts) -> torch.Tensor:
    """Put values of prompts that ran in several batches into the order of the prompts."""
    places = torch.cat(order).argsort()
    values = torch.cat(parts)
    return values[places.to(values.device)]


@measures_model
@torch.no_grad()
def pattern_scores(
    model: PreTrainedModel, length: int = 25, prompts: int = 8, seed: int = 0, bos_token_id: int | None = None
) -> dict[str, torch.Tensor]:
    """Score the attention of each head on repeated random tokens: previous token, duplicate token and induction.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        length (`int`, *optional*, defaults to 25): Number of random tokens, which are repeated once.
        prompts (`int`, *optional*, defaults to 8): Number of sequences.
        seed (`int`, *optional*, defaults to 0): Seed for the random tokens.
        bos_token_id (`int`, *optional*): Token to put before each sequence.

    Returns:
        `dict[str, torch.Tensor]`: mean attention of each head, `(layers, heads)`, between 0 and 1: `previous_token`,
        over all tokens; and over the second half, `duplicate_token` (to the first occurrence of the token) and
        `induction` (to the token after the first occurrence).
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = num_embeddings(model.get_input_embeddings())
    half = torch.rand(prompts, vocabulary, generator=generator).topk(length, dim=1).indices
    ids = torch.cat([half, half], dim=1)
    first = 0
    if bos_token_id is not None:
        ids, first = torch.cat([torch.full((prompts, 1), bos_token_id), ids], dim=1), 1
    check_tokens(model, list(ids), "The repeated text")
    second = torch.arange(first + length, first + 2 * length)
    every = torch.arange(first + 1, first + 2 * length)
    distances = {"previous_token": (every, 1), "duplicate_token": (second, length), "induction": (second, length - 1)}
    scores = {name: [] for name in distances}

    def keep(pattern, layer):
        for name, (queries, back) in distances.items():
            scores[name].append(pattern[:, :, queries, queries - back].float().mean((0, 2)).cpu())

    forget_lengths_(model)
    with edit_attention(model, pattern=keep):
        model.get_decoder()(input_ids=ids.to(input_device(model)), use_cache=False)
    return {name: torch.stack(layers) for name, layers in scores.items()}


def _position(task, tokens, name) -> torch.Tensor:
    if name not in tokens.positions:
        raise TranscoderError(
            f"The task '{task.name}' has no position '{name}': choose from {', '.join(task.position_names)}."
        )
    return tokens.positions[name]


def _mean_of(weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean rows of `weight` for token ids that are padded with -1, `(rows, width)`."""
    real = (ids >= 0)[..., None]
    return (weight[ids.clamp(min=0)].float() * real).sum(1) / real.sum(1)
