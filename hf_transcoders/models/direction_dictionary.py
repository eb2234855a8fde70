"""Dictionaries whose features are given directions, such as principal components, and not trained ones."""

import torch

from ..errors import TranscoderError
from .configuration_transcoder import TranscoderConfig
from .modeling_transcoder import TranscoderModel


def directions_config(width: int, directions: int, *, both_signs: bool, centered: bool) -> dict:
    """The fields of a [`TranscoderConfig`] for [`direction_dictionary`]."""
    return {
        "d_in": width,
        "d_out": width,
        "num_features": directions * (2 if both_signs else 1),
        "activation": "relu",
        "pre_bias": centered,
        "decoder_bias": centered,
        "auxk_coefficient": 0.0,
    }


@torch.no_grad()
def direction_dictionary(
    config: TranscoderConfig, writes: torch.Tensor, reads: torch.Tensor | None = None, mean: torch.Tensor | None = None
) -> TranscoderModel:
    """
    Makes a dictionary of given directions: feature i is `relu(reads[i] @ (x - mean))` and writes `writes[i]`.

    A coordinate along a direction has either sign, and features are not negative. With twice as many features as
    directions, n, feature i has the positive part of coordinate i, and feature n + i, with both rows negated, the negative
    part; together they write the coordinate exactly, so that as many directions as the activations are wide reconstruct
    them.

    Args:
        config ([`TranscoderConfig`]):
            Configuration with the fields of [`directions_config`]: as many features as directions, or twice as many.
        writes (`torch.Tensor` of shape `(directions, width)`): Decoder rows.
        reads (`torch.Tensor` of shape `(directions, width)`, *optional*): Encoder rows. By default the decoder rows.
        mean (`torch.Tensor` of shape `(width,)`, *optional*): Origin of the coordinates. By default 0.

    Returns:
        [`TranscoderModel`] in evaluation mode.
    """
    if config.num_features not in (len(writes), 2 * len(writes)):
        raise TranscoderError(
            f"The configuration has {config.num_features} features for {len(writes)} directions: give as many, or twice as "
            "many for both signs."
        )
    signs = (1, -1)[: config.num_features // len(writes)]
    model = TranscoderModel(config)
    model.W_enc.copy_(torch.cat([sign * (writes if reads is None else reads) for sign in signs]))
    model.W_dec.copy_(torch.cat([sign * writes for sign in signs]))
    model.b_enc.zero_()
    if mean is not None:
        model.b_pre.copy_(mean)
        model.b_dec.copy_(mean)
    return model.eval()


@torch.no_grad()
def num_signed_directions(dictionary: TranscoderModel) -> int | None:
    """
    Number n of directions of a dictionary in which feature n + i is feature i with the other sign, as
    [`direction_dictionary`] makes it; `None` for any other dictionary.
    """
    config = dictionary.config
    if config.activation != "relu" or config.tied or config.num_features % 2:
        return None
    n = config.num_features // 2
    rows = (dictionary.W_enc, dictionary.W_dec, dictionary.b_enc[:, None])
    return n if all(bool((row[:n] == -row[n:]).all()) for row in rows) else None
