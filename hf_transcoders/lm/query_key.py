"""Queries and keys of one head as linear maps of the input of attention."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import TranscoderError
from .architectures import locate
from .attention import attention_modules, edit_attention
from .devices import input_device
from .heads import key_weight, query_weight
from .hooks import before_call, read_at
from .inputs import forget_lengths_
from .linear_maps import is_quantized
from .norms import frozen_norm, norm_bias, norm_width
from .sites import Site
from .wrappers import measures_model


# How far a map's query or key may be from the model's own, relative to it: a rounding of half precision.
_TOLERANCE = 0.02
# With quantized projections, which may round what they read to 8 bits.
_QUANTIZED_TOLERANCE = 0.1


@dataclass(frozen=True)
class QueryKey:
    """The score of one head between two tokens: `scaling * (query @ x_q + query_bias) . (key @ x_k + key_bias)`.

    `x` is what attention reads at a token, `attn.in`. The rotary embedding is in the maps, and so are norms of queries
    and keys, at the scale that they have in this run.

    Args:
        query, key (`torch.Tensor` of shape `(head_dim, hidden)`): The maps.
        query_bias, key_bias (`torch.Tensor` of shape `(head_dim,)`): Their constants.
        scaling (`float`): Factor on scores.
        query_position, key_position (`int`): The tokens.
        probability (`float`): Attention weight between the two tokens.
    """

    query: torch.Tensor
    query_bias: torch.Tensor
    key: torch.Tensor
    key_bias: torch.Tensor
    scaling: float
    query_position: int
    key_position: int
    probability: float


@measures_model
@torch.no_grad()
def linear_query_key(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    layer: int,
    head: int,
    query_position: int,
    key_position: int | None = None,
) -> QueryKey:
    """Run a prompt, and take the query and key of one head as linear maps.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        input_ids (`torch.LongTensor` of shape `(seq,)`): The prompt.
        layer, head (`int`): Which head.
        query_position (`int`): Token that attends.
        key_position (`int`, *optional*): Token that it attends to. Defaults to the one with the largest attention weight.

    Returns:
        [`QueryKey`]

    Raises:
        [`TranscoderError`]: the head cannot attend from one token to the other, or the model does something else to its
            queries and keys than a norm and a rotary embedding.
    """
    seen = {}

    def compute(call):
        z, pattern = call.run()
        if call.layer == layer:
            seen["call"], seen["pattern"] = call, pattern[0, head, query_position].float()
        return z

    def keep_rotary(module, args, kwargs):
        seen["rotary"] = kwargs.get("position_embeddings")

    (module,) = attention_modules(model, [layer])
    with ExitStack() as stack:
        stack.enter_context(edit_attention(model, compute=compute))
        read_at(
            stack, locate(model, Site("attn.in", layer)), lambda value: seen.__setitem__("inputs", value[0].float())
        )
        before_call(stack, module, keep_rotary)
        forget_lengths_(model)
        model.get_decoder()(input_ids=input_ids[None].to(input_device(model)), use_cache=False)

    call, pattern = seen["call"], seen["pattern"]
    if key_position is None:
        key_position = int(pattern.argmax())
    if call.mask is not None and call.mask[0, 0, query_position, key_position] < -1e4:
        raise TranscoderError(
            f"Heads of layer {layer} cannot attend from token {query_position} to token {key_position}: choose an earlier "
            "token, within the layer's window if it has one."
        )
    parts = []
    for weights, vectors, number, position, norms in (
        (query_weight(model, layer), call.query, head, query_position, ("q_norm", "q_layernorm")),
        (
            key_weight(model, layer),
            call.key,
            head * call.key.shape[1] // call.query.shape[1],
            key_position,
            ("k_norm", "k_layernorm"),
        ),
    ):
        weight, bias = (None if each is None else each[number].float() for each in weights)
        norm = next((getattr(module, name) for name in norms if hasattr(module, name)), None)
        inputs = seen["inputs"][position]
        weight, bias = _behind_norm(norm, weight, bias, inputs)
        if seen["rotary"] is not None:
            cos, sin = (each[0, position].float() for each in seen["rotary"])
            weight, bias = _rotated(weight.T, cos, sin).T, _rotated(bias, cos, sin)
        tolerance = _QUANTIZED_TOLERANCE if is_quantized(module) else _TOLERANCE
        parts += _as_the_model_has_it(model, weight, bias, inputs, vectors[0, number, position].float(), tolerance)
    scaling = call.options.get("scaling")
    return QueryKey(
        *parts,
        scaling=call.query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        query_position=query_position,
        key_position=key_position,
        probability=float(pattern[key_position]),
    )


def _behind_norm(norm: nn.Module | None, weight, bias, inputs):
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    # Some families have one norm over all heads.
    if norm is None or norm_width(norm) != len(bias):
        return weight, bias
    linear = frozen_norm(norm, (weight @ inputs + bias)[None])
    return linear(weight.T).T, linear(bias[None])[0] + norm_bias(norm)


def _rotated(vectors, cos, sin):
    """The rotary embedding of one token, of the first dimensions if it is a partial one; `(..., head_dim)`."""
    size = len(cos)
    turned, left = vectors[..., :size], vectors[..., size:]
    half = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], dim=-1)
    return torch.cat([turned * cos + half * sin, left], dim=-1)


def _as_the_model_has_it(model, weight, bias, inputs, vector, tolerance):
    """Weight and bias times the factor that some families have in their queries already, if they give `vector`."""
    ours = weight @ inputs + bias
    factor = (vector @ ours) / (ours @ ours)
    if not (vector - factor * ours).norm() <= tolerance * vector.norm():
        raise TranscoderError(
            f"The queries and keys of this {model.config.model_type} model cannot be taken apart: they are not a "
            "projection, a norm and a rotary embedding of half dimensions. Use a model of another family."
        )
    return weight * factor, bias * factor
