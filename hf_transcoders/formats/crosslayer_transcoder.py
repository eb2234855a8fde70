"""crosslayer-transcoder: a folder with `config.yaml` and `checkpoint.safetensors`, of a cross-layer or of per-layer transcoders."""

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import TranscoderError
from ..text.printable import printable
from .conventions import read_through_norm
from .cross_layer import assembled, no_choice
from .dictionary import ForeignDictionary, Given, Norm, above_zero, setting
from .folder import Folder
from .hook_names import PLAIN, place_at
from .tensor_files import Weights, open_weights, stacked


NAME = "crosslayer-transcoder"
CONFIG, WEIGHTS = "config.yaml", "checkpoint.safetensors"

# Class of the activation -> activation and scope of BatchTopK. Both kinds of BatchTopK have a fixed threshold when they are used.
_ACTIVATIONS = {
    "ReLU": ("relu", "layer"),
    "JumpReLU": ("jumprelu", "layer"),
    "PerLayerTopK": ("topk", "layer"),
    "PerLayerBatchTopK": ("batchtopk", "layer"),
    "BatchTopK": ("batchtopk", "all"),
}
# Whether the decoders of a layer write at later ones.
_DECODERS = {"CrosslayerDecoder": True, "Decoder": False}
# Class of a standardizer -> whether it has statistics of each dimension, or of each layer; none has no statistics at all.
_STANDARDIZERS = {
    "DimensionwiseInputStandardizer": True,
    "DimensionwiseOutputStandardizer": True,
    "LayerwiseInputStandardizer": False,
    "LayerwiseOutputStandardizer": False,
    "Standardizer": None,
}


@dataclass(frozen=True)
class _Parts:
    """What the settings say of the parts, in our words."""

    activation: str
    scope: str
    arguments: dict[str, Any]
    writes_later: bool
    inputs: bool | None
    outputs: bool | None


def detect(folder: Folder) -> bool:
    return CONFIG in folder and WEIGHTS in folder


def read(folder: Folder, given: Given, choice: dict) -> ForeignDictionary:
    no_choice(choice, folder.files.place)
    source = folder.label(CONFIG)
    parts = _parts(setting(folder.yaml(CONFIG), "model", dict, source), source)
    weights = open_weights(folder.find(WEIGHTS))
    shape = weights["encoder.W"].shape
    if len(shape) != 3 or 0 in shape:
        raise TranscoderError(
            f"encoder.W in {printable(weights.path)} has shape {shape}, but must have a matrix for each layer: copy or download it again."
        )
    weights.expect_only(*_names(parts, shape[0]))
    inputs, outputs = [
        _statistics(weights, side, kind, *shape[:2])
        for side, kind in (("input", parts.inputs), ("output", parts.outputs))
    ]
    layers = [_layer(weights, parts, source, inputs, outputs, layer) for layer in range(shape[0])]

    def placed(layer, dictionary, given):
        return place_at(dictionary, given, source, None, (given.input_site, PLAIN), (given.output_site, PLAIN))

    return assembled(layers, placed, given)


def _parts(model: dict[str, Any], source: str) -> _Parts:
    arguments = setting(model, "init_args", dict, source)
    classes, own = {}, {}
    for name, known in (
        ("encoder", {"Encoder": None}),
        ("decoder", _DECODERS),
        ("nonlinearity", _ACTIVATIONS),
        ("input_standardizer", _STANDARDIZERS),
        ("output_standardizer", _STANDARDIZERS),
    ):
        part = setting(arguments, name, dict, source, {} if name.endswith("standardizer") else ...)
        kind = setting(part, "class_path", str, source, "Standardizer" if not part else ...).rpartition(".")[2]
        if kind not in known:
            raise TranscoderError(
                f"{source} has the {name} '{printable(kind)[:60]}', which cannot be loaded: the ones that can are {', '.join(known)}."
            )
        classes[name], own[name] = known[kind], setting(part, "init_args", dict, source, {})
    activation, scope = classes["nonlinearity"]
    return _Parts(
        activation,
        scope,
        own["nonlinearity"],
        classes["decoder"],
        classes["input_standardizer"],
        classes["output_standardizer"],
    )


def _names(parts: _Parts, count: int) -> list[str]:
    decoders = [f"decoder.W_{layer}" for layer in range(count)] if parts.writes_later else ["decoder.W"]
    names = ["encoder.W", "encoder.b", *decoders, "decoder.b"]
    if parts.activation == "jumprelu":
        names += ["nonlinearity.theta", "nonlinearity.bandwidth"]
    elif parts.activation == "batchtopk":
        names += ["nonlinearity.threshold"]
    for side, kind in (("input", parts.inputs), ("output", parts.outputs)):
        names += [] if kind is None else [f"{side}_standardizer.{name}" for name in ("mean", "std")]
    return names


def _statistics(weights: Weights, side: str, by_dimension: bool | None, count: int, width: int) -> list[Norm]:
    """Mean and standard deviation of each layer, as gain and bias; 1 and 0 where none are used."""
    if by_dimension is None:
        return [Norm(torch.ones(width), torch.zeros(width), False)] * count
    shape = (count, width) if by_dimension else (count,)
    mean, deviation = (weights.take(f"{side}_standardizer.{name}", *shape).read() for name in ("mean", "std"))
    if not (deviation > 0).all():
        raise TranscoderError(
            f"The standard deviations of the {side}s in {printable(weights.path)} are not all positive: copy or download it again."
        )
    return [Norm(deviation[layer].expand(width), mean[layer].expand(width), False) for layer in range(count)]


def _layer(
    weights: Weights, parts: _Parts, source: str, inputs: list[Norm], outputs: list[Norm], layer: int
) -> ForeignDictionary:
    count, d, n = weights["encoder.W"].shape
    targets = range(layer, count) if parts.writes_later else [layer]
    rows = [
        (
            weights.take(f"decoder.W_{target}", target + 1, n, d)
            if parts.writes_later
            else weights.take("decoder.W", count, n, d)
        ).at(layer)
        for target in targets
    ]
    own = outputs[layer]
    tensors = {
        "W_enc": weights["encoder.W"].at(layer).T,
        "b_enc": weights.take("encoder.b", count, n).at(layer),
        "W_dec": stacked(
            [part.then(_times(outputs[target].gain)) for part, target in zip(rows, targets, strict=True)]
        ),
        "b_dec": weights.take("decoder.b", count, d)
        .at(layer)
        .then(lambda values: values.double() * own.gain + own.bias),
    }
    fields = {"d_in": d, "d_out": d, "num_features": n, "activation": parts.activation}
    fields["window"] = None if parts.writes_later else 0
    if parts.activation == "jumprelu":
        tensors["threshold"] = above_zero(weights.take("nonlinearity.theta", 1, count, n).at(0).at(layer))
    elif parts.activation == "batchtopk":
        thresholds = weights.take("nonlinearity.threshold", 1 if parts.scope == "all" else count)
        tensors["threshold"] = above_zero(thresholds.at(0 if parts.scope == "all" else layer))
        fields["batchtopk_scope"] = parts.scope
    if parts.activation in ("topk", "batchtopk"):
        fields["k"] = setting(parts.arguments, "k", int, source)
    dictionary = ForeignDictionary(fields, tensors)
    return dictionary if parts.inputs is None else read_through_norm(dictionary, inputs[layer])


def _times(gain: torch.Tensor):
    return lambda rows: rows.double() * gain
