"""What the writers of several formats share."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..errors import TranscoderError
from ..text.printable import printable
from ..text.strict_json import to_json


@dataclass(frozen=True)
class PlainDictionary:
    """
    A dictionary as plain data: normalization folded, unless it is that of each token, encoder and decoder apart, and with an
    output bias.

    Args:
        fields (`Mapping[str, Any]`): Fields of its configuration.
        tensors (`Mapping[str, torch.Tensor]`): Native name -> tensor.
    """

    fields: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @property
    def is_autoencoder(self) -> bool:
        return self.fields["input_site"] is not None and self.fields["input_site"] == self.fields["output_site"]


def with_threshold(dictionary: PlainDictionary) -> PlainDictionary:
    """A BatchTopK dictionary as the JumpReLU dictionary that it is after training; others as they are."""
    if dictionary.fields["activation"] != "batchtopk":
        return dictionary
    threshold = dictionary.tensors["threshold"].expand(dictionary.fields["num_features"]).clone()
    fields = {**dictionary.fields, "activation": "jumprelu", "k": None}
    return PlainDictionary(fields, {**dictionary.tensors, "threshold": threshold})


def without_pre_bias(dictionary: PlainDictionary) -> PlainDictionary:
    """The same function without `b_pre`: its part goes into `b_enc`, and that of the skip connection into `b_dec`."""
    if "b_pre" not in dictionary.tensors:
        return dictionary
    tensors = dict(dictionary.tensors)
    pre_bias = tensors.pop("b_pre").double()
    tensors["b_dec"] = _bias_of_raw_inputs(dictionary)
    _shift(dictionary.fields, tensors, -pre_bias)
    return PlainDictionary({**dictionary.fields, "pre_bias": False}, tensors)


def with_output_bias_subtracted(dictionary: PlainDictionary) -> PlainDictionary:
    """
    The same function where `b_pre` is `b_dec`, and where the skip connection reads inputs from which nothing was subtracted.
    """
    tensors = dict(dictionary.tensors)
    bias = tensors["b_dec"] = _bias_of_raw_inputs(dictionary)
    pre_bias = tensors.pop("b_pre", torch.zeros_like(bias))
    if not torch.equal(pre_bias, bias):
        _shift(dictionary.fields, tensors, bias.double() - pre_bias.double())
    return replace(dictionary, tensors={**tensors, "b_pre": bias})


def _bias_of_raw_inputs(dictionary: PlainDictionary) -> torch.Tensor:
    tensors, bias = dictionary.tensors, dictionary.tensors["b_dec"]
    if "W_skip" not in tensors or "b_pre" not in tensors:
        return bias
    return (bias.double() - tensors["W_skip"].double() @ tensors["b_pre"].double()).to(bias.dtype)


def _shift(fields, tensors, inputs: torch.Tensor) -> None:
    """Changes the biases as if these inputs were added to those that the encoder reads."""
    shift = tensors["W_enc"].double() @ inputs
    tensors["b_enc"] = (tensors["b_enc"].double() + shift).to(tensors["b_enc"].dtype)
    if fields["activation"] == "gated":
        magnitude = tensors["b_mag"].double() + tensors["r_mag"].double().exp() * shift
        tensors["b_mag"] = magnitude.to(tensors["b_mag"].dtype)


def refuse_token_norm(name: str, format_name: str, dictionary: PlainDictionary) -> None:
    """Refuses a dictionary that scales each token by itself, for formats that do not."""
    if dictionary.fields["normalization"] != "none":
        raise cannot(
            name,
            format_name,
            f"has no normalization '{dictionary.fields['normalization']}'",
            "write it for SAELens, or train one with another normalization",
        )


def cannot(name: str, format_name: str, what: str, advice: str) -> TranscoderError:
    """The error that a format cannot express a dictionary."""
    return TranscoderError(f"'{printable(name)}' cannot be written for {format_name}, which {what}: {advice}.")


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes tensors into one file, each with memory of its own."""
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, path)


def write_settings(settings: Mapping[str, Any], path: Path) -> None:
    """Writes a JSON file."""
    path.write_text(to_json(settings) + "\n", encoding="utf-8")


def places(dictionaries: Mapping[str, PlainDictionary], folder: Path) -> list[tuple[str, PlainDictionary, Path]]:
    """Name, dictionary and folder of each: the folder itself for a single one, and a sub-folder for each of several."""
    found = []
    for name, dictionary in dictionaries.items():
        place = folder if len(dictionaries) == 1 else folder / name
        place.mkdir(exist_ok=True)
        found.append((name, dictionary, place))
    return found
