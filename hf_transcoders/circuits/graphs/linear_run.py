"""A forward pass as linear maps: writers to the residual stream, activations that were read, and the maps between them."""

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
class WrittenFeatures:
    """The active features of one dictionary in one prompt, as they write at one site.

    A dictionary that writes at several sites has these for each, and they share their tensors.

    Args:
        dictionary (`int`): Number of the dictionary.
        position, feature (`torch.LongTensor` of shape `(active,)`): Position and number of active features, by position.
        activation (`torch.Tensor` of shape `(active,)`): Activations of these features.
        offsets (`torch.LongTensor` of shape `(seq + 1,)`): Index of the first feature of each position.
        skip (`torch.Tensor` of shape `(width, d_in)`, *optional*): Skip connection of the dictionary to the site.
    """

    dictionary: int
    position: torch.Tensor
    feature: torch.Tensor
    activation: torch.Tensor
    offsets: torch.Tensor
    skip: torch.Tensor | None


@dataclass(frozen=True)
class Writer:
    """One site that dictionaries, or an MLP without one, write at, and the output there in one prompt.

    At most sites one dictionary writes; several layers of a cross-layer transcoder write at one site together.

    Args:
        site ([`Site`]): Output site.
        dictionary (`int`): Number of the dictionary whose own site this is; -1 for an MLP as a whole.
        error (`torch.Tensor` of shape `(seq, width)`): Error of the dictionaries; the whole output for an MLP as a whole.
        bias (`torch.Tensor` of shape `(width,)`, *optional*): Bias at every token that the dictionaries are used on.
        works (`torch.BoolTensor` of shape `(seq,)`): Tokens that the dictionaries are used on; elsewhere all is error.
        parts (`tuple[WrittenFeatures]`): Features of each dictionary that writes here.
    """

    site: Site
    dictionary: int
    error: torch.Tensor
    bias: torch.Tensor | None
    works: torch.Tensor
    parts: tuple[WrittenFeatures, ...] = ()


@dataclass(frozen=True)
class LinearLayer:
    """The linear maps of one block.

    Args:
        attention_norm, mlp_norm ([`FrozenNorm`], *optional*):
            Norms before attention and MLP, at `(seq, 1, hidden)`, if the family has them.
        attention_post_norm, mlp_post_norm ([`FrozenNorm`], *optional*):
            Norms after attention and MLP, if the family has them or multiplies what it adds to the stream.
        attention_norm_bias, mlp_norm_bias, attention_post_bias, mlp_post_bias (`torch.Tensor` or `float`):
            Biases of these norms.
        pattern (`torch.Tensor` of shape `(heads, seq, seq)`): Attention patterns.
        value (`torch.Tensor` of shape `(kv_heads * head_dim, hidden)`): Value projection.
        output (`torch.Tensor` of shape `(heads * head_dim, hidden)`): Output projection.
        attention_constant (`torch.Tensor` of shape `(seq, hidden)`): Output of attention that is due to biases.
        rounding (`torch.Tensor` of shape `(seq, hidden)`, *optional*):
            Difference of attention from these maps if its projections are quantized and round their inputs.
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
    """One forward pass of one prompt as a linear map from all writers to all readers.

    Args:
        model ([`~transformers.PreTrainedModel`]): The language model.
        dictionaries (`list[TranscoderModel]`), names (`list[str]`): The dictionaries and their names.
        input_sites (`list[Site]`): The site that each dictionary reads.
        input_ids (`torch.LongTensor` of shape `(seq,)`): Token ids of the prompt.
        logits (`torch.Tensor` of shape `(seq, vocab)`, *optional*): Logits, if the model has a language-model head.
        layers (`list[LinearLayer]`): Maps of each block.
        writers (`dict[Site, Writer]`): Writers by site.
        activations (`dict[Site, torch.Tensor]`): Activations `(seq, width)` at all points of [`READS`] in all layers.
        final (`torch.Tensor` of shape `(seq, hidden)`): Output of the final norm.
        final_norm ([`FrozenNorm`]): The final norm, at `(seq, 1, hidden)`.
        final_bias (`torch.Tensor` or `float`): Bias of the final norm.
        token_embedding (`torch.Tensor` of shape `(seq, hidden)`): Token embeddings, as they enter the stream.
        position_embedding (`torch.Tensor` of shape `(seq, hidden)`, *optional*): Embeddings of learned positions.
        parallel (`bool`): Whether attention and MLP both read the block's input.
    """

    model: PreTrainedModel
    dictionaries: list[TranscoderModel]
    names: list[str]
    input_sites: list[Site]
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
        """The norm between the stream and a site that reads it, if there is one, and its bias."""
        layer = self.layers[site.layer]  # pyright: ignore[reportCallIssue]
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
