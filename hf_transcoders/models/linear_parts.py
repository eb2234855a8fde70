"""A dictionary as the linear maps that it is once it is known which features are active."""

import torch

from .modeling_transcoder import TranscoderModel


@torch.no_grad()
def encoder_rows(model: TranscoderModel, features: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """What features read: where feature i is active, its activation is `rows[i] @ x + biases[i]`.

    Normalisation, `b_pre`, unit rows of a tied dictionary and the magnitudes of a gated one are in them.

    Args:
        model ([`TranscoderModel`]): The dictionary.
        features (`torch.LongTensor` of shape `(k,)`, *optional*): Which features. All by default.

    Returns:
        `tuple`: rows `(k, d_in)` and biases `(k,)` in fp32, for activations `x` of the input site as they are.
    """
    gain, bias = model.activation.magnitude(model)
    rows = _take(model.W_enc, features).float()
    if model.config.tied:
        rows = torch.nn.functional.normalize(rows, dim=-1)
    if isinstance(gain, torch.Tensor):
        rows = rows * _take(gain, features).float()[:, None]
    rows, shift = _on_raw_inputs(model, rows)
    return rows, _take(bias, features).float() - shift


@torch.no_grad()
def decoder_rows(model: TranscoderModel, features: torch.Tensor | None = None) -> torch.Tensor:
    """What features write per unit of activation, `(k, d_out)` in fp32, in the units of the output site."""
    rows = _take(model.W_enc if model.config.tied else model.W_dec, features).float()
    if model.config.tied:
        rows = torch.nn.functional.normalize(rows, dim=-1)
    return rows if model.config.normalization == "none" else rows * model.output_scale


@torch.no_grad()
def skip_and_bias(model: TranscoderModel) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What a dictionary writes besides its features: `skip @ x + bias`.

    Returns:
        `tuple`: skip `(d_out, d_in)`, `None` without a skip connection, and bias `(d_out,)`, in fp32.
    """
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


def _on_raw_inputs(model, rows):
    """Rows for inputs as they are instead of normalised and centred ones, and what to subtract from the products."""
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
