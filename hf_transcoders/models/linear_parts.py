"""The linear maps of a dictionary for a fixed set of active features."""

import torch

from ..errors import TranscoderError
from .modeling_transcoder import TranscoderModel
from .token_norms import refuse_token_norm


# What is computed from the linear maps of a dictionary.
_NEEDS = "attribution graphs, paths, feature weights and interventions"


@torch.no_grad()
def encoder_rows(model: TranscoderModel, features: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder rows of features: where feature i is active, its activation is `rows[i] @ x + biases[i]`.

    Rows and biases include normalization, `b_pre`, the unit norm of a tied dictionary and the magnitudes of a gated one.

    Args:
        model ([`TranscoderModel`]): The dictionary.
        features (`torch.LongTensor` of shape `(k,)`, *optional*): Numbers of the features. All by default.

    Returns:
        `tuple`: Rows `(k, d_in)` and biases `(k,)` in fp32, for activations `x` of the input site as the model has them.
    """
    refuse_token_norm(model.config, _NEEDS)
    gain, bias = model.activation.magnitude(model)
    rows = _take(model.W_enc, features).float()
    if model.config.tied:
        rows = torch.nn.functional.normalize(rows, dim=-1)
    if isinstance(gain, torch.Tensor):
        rows = rows * _take(gain, features).float()[:, None]
    rows, shift = _on_raw_inputs(model, rows)
    return rows, _take(bias, features).float() - shift


@torch.no_grad()
def decoder_rows(
    model: TranscoderModel,
    features: torch.Tensor | None = None,
    site: object | None = None,
    up_to_scale: bool = False,
) -> torch.Tensor:
    """Decoder rows of features: the write of each at a site per unit of its activation.

    Args:
        model ([`TranscoderModel`]): The dictionary.
        features (`torch.LongTensor` of shape `(k,)`, *optional*): Numbers of the features. All by default.
        site (`str` or [`Site`], *optional*): One of `model.config.output_sites`; needed if there are several.
        up_to_scale (`bool`, *optional*, defaults to `False`):
            Whether only directions and relative lengths matter, so that a dictionary that scales each token by itself has rows
            too, per unit of that scale.

    Returns:
        `torch.Tensor` of shape `(k, d_out)` in fp32, in the units of the site.
    """
    if not up_to_scale:
        refuse_token_norm(model.config, _NEEDS)
    model = _writing_at(model, site)
    rows = _take(model.W_enc if model.config.tied else model.W_dec, features).float()
    if model.config.tied:
        rows = torch.nn.functional.normalize(rows, dim=-1)
    return rows * model.output_scale if model.config.has_site_scales else rows


@torch.no_grad()
def skip_and_bias(model: TranscoderModel, site: object | None = None) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Skip connection and bias of a dictionary, which writes `skip @ x + bias` besides its features.

    Args:
        model ([`TranscoderModel`]): The dictionary.
        site (`str` or [`Site`], *optional*): One of `model.config.output_sites`; needed if there are several.

    Returns:
        `tuple`: Skip connection `(d_out, d_in)`, or `None` if there is none, and bias `(d_out,)`, in fp32.
    """
    refuse_token_norm(model.config, _NEEDS)
    model = _writing_at(model, site)
    bias = model.W_enc.new_zeros(model.config.d_out, dtype=torch.float32)  # pyright: ignore[reportCallIssue]
    if model.b_dec is not None:
        bias = bias + model.b_dec.float()
    skip = None
    if model.W_skip is not None:
        skip, shift = _on_raw_inputs(model, model.W_skip.float())
        bias = bias - shift
    if model.config.normalization != "none":
        bias = bias * model.output_scale + model.output_mean
        skip = None if skip is None else skip * model.output_scale[:, None]
    return skip, bias


def _writing_at(model, site):
    """The dictionary with the decoder of one of its sites."""
    sites = model.config.output_sites
    if site is None and len(sites) < 2:
        return model.at(*sites) if sites else model
    if str(site) not in sites:
        raise TranscoderError(
            f"site={site}: the dictionary writes at {', '.join(sites) or 'no site'}, so name one of these."
        )
    return model.at(str(site))


def _on_raw_inputs(model, rows):
    """Rows for inputs that are not normalized or centered, and the constants to subtract from the products."""
    offset = 0.0
    if model.config.normalization != "none":
        rows = rows / model.input_scale
        offset = model.input_mean
        if model.b_pre is not None:
            offset = offset + model.b_pre.float() * model.input_scale
    elif model.b_pre is not None:
        offset = model.b_pre.float()
    shift = rows @ offset if isinstance(offset, torch.Tensor) else rows.new_zeros(len(rows))
    return rows, shift


def _take(tensor, features):
    return tensor if features is None else tensor.index_select(0, features)
