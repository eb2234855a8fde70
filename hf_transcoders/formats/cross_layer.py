"""What the formats of cross-layer transcoders share."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import TranscoderError
from ..text.printable import printable
from .dictionary import ForeignDictionary, Given
from .tensor_files import LazyTensor


@dataclass(frozen=True)
class PlainCrossLayer:
    """
    A cross-layer transcoder as plain data, with its normalization folded.

    Args:
        fields (`Mapping[str, Any]`): Fields of its configuration.
        sources (`list[Mapping[str, torch.Tensor]]`): Tensors of each layer by their native names.
    """

    fields: Mapping[str, Any]
    sources: list[Mapping[str, torch.Tensor]]


def assembled(
    layers: list[ForeignDictionary], place: Callable[[int, ForeignDictionary, Given], ForeignDictionary], given: Given
) -> ForeignDictionary:
    """
    One dictionary of the layers of a cross-layer transcoder.

    Args:
        layers (`list[ForeignDictionary]`): The layers, each with decoders `(n, sites, d_out)`.
        place (`Callable`): Fills in base model and sites of one layer, by its number.
        given ([`Given`]): What the user says. Sites are points of each layer, such as `mlp.in`.
    """
    placed = []
    for number, layer in enumerate(layers):
        sites = {name: _at(getattr(given, name), number) for name in ("input_site", "output_site")}
        placed.append(place(number, layer, replace(given, **sites)))
    first = dict(placed[0].fields)
    for number, layer in enumerate(placed):
        fields = {**layer.fields, "input_site": None, "output_site": None}
        if fields != {**first, "input_site": None, "output_site": None}:
            raise TranscoderError(
                f"Layer {number} of the cross-layer transcoder has another size or activation than layer 0: copy or download it "
                "again."
            )
    first |= {"input_site": None, "output_site": None}
    first["input_sites"] = [layer.fields["input_site"] for layer in placed]
    first["output_sites"] = [layer.fields["output_site"] for layer in placed]
    tensors = {
        f"sources.{number}.{name}": t for number, layer in enumerate(placed) for name, t in layer.tensors.items()
    }
    return ForeignDictionary(first, tensors, placed[0].facts)


def _at(point: str | None, layer: int) -> str | None:
    if point is not None and re.match(r"layers\.|module:", point):
        raise TranscoderError(
            f"'{printable(point)[:60]}' is a site of one layer: give its point, such as 'mlp.in', which is then that of each layer "
            "of the cross-layer transcoder."
        )
    return None if point is None else f"layers.{layer}.{point}"


def no_choice(choice: Mapping[str, Any], place: str) -> None:
    """Refuses a choice among the dictionaries of a folder that holds one cross-layer transcoder."""
    if choice:
        raise TranscoderError(
            f"{printable(place)} holds one cross-layer transcoder, so there is nothing to choose: leave out {', '.join(choice)}."
        )


def whole_layers(numbers: list[int], place: str) -> None:
    """Refuses files that are not those of all layers from 0 on."""
    if sorted(numbers) != list(range(len(numbers))):
        raise TranscoderError(
            f"{printable(place)} holds layers {', '.join(map(str, sorted(numbers)))[:200]} of a cross-layer transcoder, and all from "
            "0 on are needed: copy or download the others."
        )


def decoders(tensor: LazyTensor, shape: tuple[int, ...], first: int, place: str) -> LazyTensor:
    """Decoder rows of a layer from the site `first` on, `(n, sites, d_out)`.

    Args:
        tensor ([`LazyTensor`]): What the file holds.
        shape (`tuple[int, ...]`): Shape that it must have.
        first (`int`): Number of sites at the start that are left out.
        place (`str`): The file, for messages.
    """
    if tensor.shape != shape:
        raise TranscoderError(
            f"The decoders in {printable(place)} have shape {tensor.shape} where the other tensors ask for {shape}: copy or download "
            "the cross-layer transcoder again."
        )
    if not first:
        return tensor
    rest = (shape[0], shape[1] - first, shape[2])
    return LazyTensor(rest, tensor.dtype, lambda: tensor.read()[:, first:].contiguous())


def with_thresholds(model: PlainCrossLayer) -> PlainCrossLayer:
    """BatchTopK as the JumpReLU that it is after training; other activations as they are."""
    if model.fields["activation"] != "batchtopk":
        return model
    n = model.fields["num_features"]
    sources = [{**source, "threshold": source["threshold"].expand(n).clone()} for source in model.sources]
    return PlainCrossLayer({**model.fields, "activation": "jumprelu", "k": None}, sources)


def all_sites(decoder: torch.Tensor, layers: int, first: int) -> torch.Tensor:
    """Decoder rows `(n, layers, d_out)` for a layer that writes from layer `first` on: zero at the others."""
    whole = decoder.new_zeros(decoder.shape[0], layers, decoder.shape[2])
    whole[:, first : first + decoder.shape[1]] = decoder
    return whole


def points(model: PlainCrossLayer, name: str) -> tuple[str, str]:
    """The points that all layers read and write; refused where they differ, or where layers are left out."""
    found = []
    for field in ("input_sites", "output_sites"):
        parts = [re.fullmatch(r"layers\.(\d+)\.(.+)", site) for site in model.fields[field]]
        if None in parts or [int(part[1]) for part in parts] != list(range(len(parts))):  # pyright: ignore[reportOptionalSubscript]
            raise cannot(name, "needs every layer from 0 on", f"this one has {', '.join(model.fields[field])}")
        if len({part[2] for part in parts}) > 1:  # pyright: ignore[reportOptionalSubscript]
            raise cannot(name, "has one kind of site", f"this one has {', '.join(model.fields[field])}")
        found.append(parts[0][2])  # pyright: ignore[reportOptionalSubscript]
    return found[0], found[1]


def cannot(name: str, what: str, advice: str) -> TranscoderError:
    """The error that a format cannot express a cross-layer transcoder."""
    return TranscoderError(
        f"The cross-layer transcoder cannot be written for {name}, which {what}: {printable(advice)[:200]}."
    )
