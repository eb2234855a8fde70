"""Undo what the language model of another library did to the activations that a dictionary reads and writes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..errors import TranscoderError
from .dictionary import ForeignDictionary, Norm
from .tensor_files import LazyTensor


def read_through_norm(dictionary: ForeignDictionary, norm: Norm) -> ForeignDictionary:
    """
    Converts a dictionary that reads what a norm gives before its gain and bias, `z = (x - bias) / gain`, to one that reads
    x, the value of the site: `W_enc ← W_enc / gain`, `b_enc ← b_enc - W_enc (bias / gain)`, and the same for the skip connection; `b_pre` is in the
    units of z and becomes `b_pre gain + bias`.
    """
    if (norm.gain == 0).any():
        raise TranscoderError(
            "The norm in front of the dictionary's input has a gain of zero in some dimension, so what the dictionary reads "
            "there cannot be computed from the site: give another `input_site=`."
        )
    gain, bias = norm.gain.double(), norm.bias.double()
    tensors = dict(dictionary.tensors)
    encoder = tensors["W_enc"]
    tensors["W_enc"] = encoder.then(lambda rows: rows.double() / gain)
    if "W_skip" in tensors:
        skip = tensors["W_skip"]
        tensors["W_skip"] = skip.then(lambda rows: rows.double() / gain)
    if "b_pre" in tensors:
        tensors["b_pre"] = tensors["b_pre"].then(lambda values: values.double() * gain + bias)
        return replace(dictionary, tensors=tensors)
    _shift(tensors, dictionary.fields, lambda: -(encoder.read().double() @ (bias / gain)))
    if "W_skip" in tensors:
        tensors["b_dec"] = tensors["b_dec"].then(lambda values: values - skip.read().double() @ (bias / gain))
    return replace(dictionary, tensors=tensors)


def read_centered(dictionary: ForeignDictionary) -> ForeignDictionary:
    """
    Converts a dictionary that reads a residual stream minus its mean over dimensions to one that reads the stream itself:
    `W_enc` and `W_skip` then subtract that mean. The mean of `b_pre` must not be lost with it and goes into the biases.
    """
    tensors = dict(dictionary.tensors)
    encoder, skip, pre_bias = tensors["W_enc"], tensors.get("W_skip"), tensors.get("b_pre")
    if pre_bias is not None:
        _shift(tensors, dictionary.fields, lambda: -encoder.read().double().sum(-1) * pre_bias.read().double().mean())
    if pre_bias is not None and skip is not None:
        tensors["b_dec"] = tensors["b_dec"].then(
            lambda values: values.double() - skip.read().double().sum(-1) * pre_bias.read().double().mean()
        )
    for name in {"W_enc", "W_skip"} & tensors.keys():
        tensors[name] = tensors[name].then(lambda rows: rows.double() - rows.double().mean(-1, keepdim=True))
    return replace(dictionary, tensors=tensors)


def write_through_norm(dictionary: ForeignDictionary, norm: Norm) -> ForeignDictionary:
    """Converts a dictionary that writes what a norm gives before its gain and bias to one that writes the value of the site."""
    gain, bias = norm.gain.double(), norm.bias.double()
    tensors = dict(dictionary.tensors)
    tensors["W_dec"] = tensors["W_dec"].then(lambda rows: rows.double() * gain)
    tensors["b_dec"] = tensors["b_dec"].then(lambda values: values.double() * gain + bias)
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].then(lambda rows: rows.double() * gain[:, None])
    return replace(dictionary, tensors=tensors)


def _shift(tensors: dict[str, LazyTensor], fields: dict[str, Any], shift: Callable[[], torch.Tensor]) -> None:
    """Adds to every pre-activation; the magnitudes of a gated dictionary have a bias of their own."""
    tensors["b_enc"] = tensors["b_enc"].then(lambda values: values.double() + shift())
    if fields["activation"] == "gated":
        factor = tensors["r_mag"]
        tensors["b_mag"] = tensors["b_mag"].then(
            lambda values: values.double() + factor.read().double().exp() * shift()
        )
