"""One forward pass as linear maps: what wrote to the residual stream, what was read from it, and the maps in between."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...lm.norms import FrozenNorm
from ...lm.order import POINTS
from ...lm.sites import Site
from ...models.modeling_transcoder import TranscoderModel


#: Points at which a dictionary may write: in place of the output of attention or MLP, or of the whole stream.
WRITES = tuple(name for name, point in POINTS.items() if point.writes is not None and point.writable)
#: Points whose values are linear in everything that was written before.
READS = tuple(name for name, point in POINTS.items() if point.linear)


@dataclass(frozen=True)
class Writer:
    """A dictionary, or an MLP without one, and what it wrote in one prompt.

    Args:
        site ([`Site`]): Where it writes.
        dictionary (`int`): Number of the dictionary; -1 for an MLP as a whole.
        position, feature (`torch.LongTensor` of shape `(active,)`): Active features, sorted by position.
        activation (`torch.Tensor` of shape `(active,)`): Their activations.
        offsets (`torch.LongTensor` of shape `(seq + 1,)`): Where the features of each position begin.
        error (`torch.Tensor` of shape `(seq, width)`): What the dictionary missed; all of it for an MLP as a whole.
        bias (`torch.Tensor` of shape `(width,)`, *optional*): What the dictionary writes at every token it works on.
        skip (`torch.Tensor` of shape `(width, d_in)`, *optional*): Its skip connection.
        works (`torch.BoolTensor` of shape `(seq,)`): Where the dictionary is at work; elsewhere all is error.
    """

    site: Site
    dictionary: int
    position: torch.Tensor
    feature: torch.Tensor
    activation: torch.Tensor
    offsets: torch.Tensor
    error: torch.Tensor
    bias: torch.Tensor | None
    skip: torch.Tensor | None
    works: torch.Tensor


@dataclass(frozen=True)
class LinearLayer:
    """The linear maps of one block.

    Args:
        attention_norm, mlp_norm ([`FrozenNorm`], *optional*):
            Before attention and MLP, at `(seq, 1, hidden)`, where the family has such norms.
        attention_post_norm, mlp_post_norm ([`FrozenNorm`], *optional*):
            Behind them, where the family has such norms, or multiplies what it adds to the stream.
        attention_norm_bias, mlp_norm_bias, attention_post_bias, mlp_post_bias (`torch.Tensor` or `float`): Their biases.
        pattern (`torch.Tensor` of shape `(heads, seq, seq)`): Where each head looked.
        value (`torch.Tensor` of shape `(kv_heads * head_dim, hidden)`): Value projection.
        output (`torch.Tensor` of shape `(heads * head_dim, hidden)`): Output projection.
        attention_constant (`torch.Tensor` of shape `(seq, hidden)`): What biases make attention write.
        rounding (`torch.Tensor` of shape `(seq, hidden)`, *optional*):
            How far attention is from these maps where its projections are quantized and round what they read.
    """

    attention_norm: FrozenNorm | None
    mlp_norm: FrozenNorm | None
    attention_post_norm: FrozenNorm | None
    mlp_post_norm: FrozenNorm | None
    mlp_norm_bias: torch.Tensor | float
    attention_norm_bias: torch.Tensor | float
    attention_post_bias: torch.Tensor | float
    mlp_post_bias: torch.Tensor | float
    pattern: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    attention_constant: torch.Tensor
    rounding: torch.Tensor | None


@dataclass(frozen=True)
class LinearRun:
    """One prompt, run once: the linear map from everything that wrote to everything that read.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        dictionaries (`list[TranscoderModel]`), names (`list[str]`): What replaces MLPs.
        input_ids (`torch.LongTensor` of shape `(seq,)`): The prompt.
        logits (`torch.Tensor` of shape `(seq, vocab)`, *optional*): What the model says, if it has a head.
        layers (`list[LinearLayer]`): The maps of each block.
        writers (`dict[Site, Writer]`): What wrote, by place.
        activations (`dict[Site, torch.Tensor]`): What was read, `(seq, width)`, at every place of [`READS`].
        final (`torch.Tensor` of shape `(seq, hidden)`): What the unembedding read.
        final_norm ([`FrozenNorm`]): At `(seq, 1, hidden)`.
        final_bias (`torch.Tensor` or `float`): Bias of the final norm.
        token_embedding (`torch.Tensor` of shape `(seq, hidden)`): What tokens write.
        position_embedding (`torch.Tensor` of shape `(seq, hidden)`, *optional*): What learned positions write.
        parallel (`bool`): Whether attention and MLP both read the block's input.
    """

    model: PreTrainedModel
    dictionaries: list[TranscoderModel]
    names: list[str]
    input_ids: torch.Tensor
    logits: torch.Tensor | None
    layers: list[LinearLayer]
    writers: dict[Site, Writer]
    activations: dict[Site, torch.Tensor]
    final: torch.Tensor
    final_norm: FrozenNorm
    final_bias: torch.Tensor | float
    token_embedding: torch.Tensor
    position_embedding: torch.Tensor | None
    parallel: bool

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def norm_before(self, site: Site) -> tuple[FrozenNorm | None, torch.Tensor | float]:
        """The norm between the stream and a place that reads it, if there is one, and its bias."""
        layer = self.layers[site.layer]
        if site.point == "mlp.in":
            return layer.mlp_norm, layer.mlp_norm_bias
        if site.point == "attn.in":
            return layer.attention_norm, layer.attention_norm_bias
        return None, 0.0


def through_heads(
    inputs: torch.Tensor, pattern: torch.Tensor, value: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """Output of the linear maps of all heads of a layer, without biases.

    Args:
        inputs (`torch.Tensor` of shape `(seq, hidden)`): Input of attention.
        pattern, value, output: As in [`LinearLayer`].

    Returns:
        `torch.Tensor` of shape `(seq, hidden)`.
    """
    heads = len(pattern)
    values = (inputs @ value.T).unflatten(1, (-1, len(output) // heads)).transpose(0, 1)
    z = pattern @ values.repeat_interleave(heads // len(values), dim=0)
    return z.transpose(0, 1).flatten(1) @ output
