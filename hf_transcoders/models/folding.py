"""Fold normalization, input offset and decoder norms into the weights without changing the function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import TranscoderError
from .token_norms import refuse_token_norm


if TYPE_CHECKING:
    from .modeling_transcoder import TranscoderModel


# Relative differences of decoder norms below this do not change the ranking of features.
_EQUAL_NORMS = 1e-6


@torch.no_grad()
def fold_normalization_(model: TranscoderModel) -> TranscoderModel:
    """
    With `x̃ = (x - μ) / σ` before the encoder and `y = ỹ σ' + μ'` after the decoder:
    `W_enc ← W_enc / σ`, `W_dec ← W_dec σ'`, `W_skip ← σ' W_skip / σ`, and the means go into the biases.
    """
    config = model.config
    if config.normalization == "none":
        return model
    refuse_token_norm(config, "folded weights")
    _untie_(model)
    mean, scale = model.input_mean, model.input_scale
    out_mean, out_scale = model.output_mean, model.output_scale
    # A dictionary of several sites has a scale for each, and writes its bias and skip connection at the first.
    own_scale = out_scale.view(-1, out_scale.shape[-1])[0]
    model.W_enc.div_(scale)
    if model.W_skip is not None:
        model.W_skip.div_(scale)
    if model.b_pre is not None:
        model.b_pre.mul_(scale).add_(mean)
    else:
        model.activation.shift_(model, -(model.W_enc @ mean.to(model.W_enc.dtype)))
    _ensure_decoder_bias_(model)
    if model.W_skip is not None and model.b_pre is None:
        model.b_dec.sub_(model.W_skip @ mean.to(model.W_skip.dtype))
    model.W_dec.mul_(out_scale)
    model.b_dec.mul_(own_scale).add_(out_mean)
    if model.W_skip is not None:
        model.W_skip.mul_(own_scale[:, None])
    for name in ("input_mean", "input_scale", "output_mean", "output_scale"):
        delattr(model, name)
    config.normalization = "none"
    # The rows now include the scale of the output; normalizing them again would change the function.
    config.decoder_norm = "free"
    if config.target_variance is not None:
        # It was measured on normalized targets; in the units of the site it is not known.
        config.target_variance = None
    return model


@torch.no_grad()
def fold_pre_bias_(model: TranscoderModel) -> TranscoderModel:
    """`W_enc (x - b_pre) + b_enc = W_enc x + (b_enc - W_enc b_pre)`; a skip connection's share goes into `b_dec`."""
    if model.b_pre is None:
        return model
    model.activation.shift_(model, -(model.encoder_weight @ model.b_pre))
    if model.W_skip is not None:
        _ensure_decoder_bias_(model)
        model.b_dec.sub_(model.W_skip @ model.b_pre)
    model.b_pre = None
    model.config.pre_bias = False
    return model


@torch.no_grad()
def fold_decoder_norm_(model: TranscoderModel) -> TranscoderModel:
    """
    With ν the norm of a decoder row: `W_dec ← W_dec / ν`, `W_enc, b_enc, threshold ← · ν`.

    Rescaling can change which k pre-activations are the largest, so a TopK dictionary is folded only if its norms are
    equal. A BatchTopK dictionary has a fixed threshold after training and becomes the equivalent JumpReLU dictionary.
    """
    config = model.config
    norms = model.decoder_weight.norm(dim=-1)
    # A feature with a zero decoder row keeps its scale.
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))
    if config.activation == "topk" and (norms.max() - norms.min()) > _EQUAL_NORMS * norms.max():
        raise TranscoderError(
            "Folding the decoder norms of a TopK dictionary would change which features are the k largest: train it with "
            '`decoder_norm="unit"` if you need unit rows.'
        )
    if config.tied:
        return model  # Its rows have unit norm already.
    if config.activation == "batchtopk":
        _batchtopk_to_jumprelu_(model)
    model.W_dec.div_(norms[:, None])
    model.W_enc.mul_(norms[:, None])
    model.b_enc.mul_(norms)
    for name in model.activation.pre_activation_parameters:
        getattr(model, name).mul_(norms)
    return model


def _batchtopk_to_jumprelu_(model: TranscoderModel) -> None:
    from .activations import ACTIVATIONS

    threshold = model.threshold.expand(model.config.num_features).clone()
    del model.threshold
    model.threshold = nn.Parameter(threshold)
    model.config.activation = "jumprelu"
    model.config.k = None
    model.activation = ACTIVATIONS["jumprelu"]()


def _untie_(model: TranscoderModel) -> None:
    if model.config.tied:
        rows = model.encoder_weight.clone()
        model.W_enc.copy_(rows)
        model.W_dec = nn.Parameter(rows)
        model.config.tied = False


def _ensure_decoder_bias_(model: TranscoderModel) -> None:
    if model.b_dec is None:
        model.b_dec = nn.Parameter(model.W_enc.new_zeros(model.config.d_out))
        model.config.decoder_bias = True
