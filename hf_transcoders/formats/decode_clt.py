"""decode-clt: a folder with `cfg.json` and the checkpoint of a cross-layer transcoder, and `norm_stats.json` if it was normalized."""

import math
import re
from typing import Any

import torch

from ..errors import TranscoderError
from ..text.printable import printable
from .conventions import read_through_norm
from .cross_layer import assembled, no_choice
from .dictionary import ForeignDictionary, Given, Norm, setting
from .folder import Folder
from .gemma_scope import site_of_module
from .hook_names import PLAIN, place_at
from .llamascopium import exponential
from .tensor_files import LazyTensor, Weights, open_weights, stacked


NAME = "decode-clt"
CONFIG, STATISTICS = "cfg.json", "norm_stats.json"
FILES = r"(clt_checkpoint_(latest|\d+)|model)\.safetensors"
_LATEST = "clt_checkpoint_latest.safetensors"

_ENCODER = r"encoder_module\.encoders\.\d+\.weight"
_THRESHOLD = "theta_manager.log_threshold"
# What they add to a standard deviation before they divide by it.
_EPSILON = 1e-6
# What mean and deviation are kept below; infinite numbers and NaN are not.
_LARGEST = torch.finfo(torch.float32).max
_OLD_NORMALIZATIONS = {
    "auto": "mean_std",
    "estimated_mean_std": "mean_std",
    "auto_sqrt_d_model": "sqrt_d_model",
    "estimated_mean_std_sqrt_d_model": "sqrt_d_model",
}


def detect(folder: Folder) -> bool:
    return CONFIG in folder and bool(folder.matching(FILES))


def read(folder: Folder, given: Given, choice: dict) -> ForeignDictionary:
    no_choice(choice, folder.files.place)
    settings, source = folder.json(CONFIG), folder.label(CONFIG)
    names = folder.matching(FILES)
    weights = open_weights(folder.find(_LATEST if _LATEST in names else folder.only(FILES)))
    activation = _activation(settings, source)
    count = setting(settings, "num_layers", int, source)
    held = sum(bool(re.fullmatch(_ENCODER, name)) for name in weights.tensors)
    if not held or count != held:
        raise TranscoderError(
            f"{source} says {count} layers, and {printable(weights.path)} has the encoders of {held}: copy or download it again."
        )
    width = weights.matrix("encoder_module.encoders.0.weight")[1]
    norms = _norms(folder, settings, source, count, width, given)
    tying = setting(settings, "decoder_tying", str, source, "none")
    if tying not in ("none", "per_source", "per_target"):
        raise TranscoderError(
            f"{source} has the `decoder_tying` '{printable(tying)[:40]}', which cannot be loaded: 'none', 'per_source' and 'per_target' can."
        )
    has_skip = setting(settings, "skip_connection", bool, source, False)
    if setting(settings, "enable_feature_offset", bool, source, False) and tying != "none":
        raise TranscoderError(
            f"{source} adds another number to a feature at each layer that it writes at (`enable_feature_offset`), which a "
            "CrossLayerTranscoderConfig cannot express: it is not loaded."
        )
    if has_skip and tying == "none" and count > 1:
        raise TranscoderError(
            f"{source} has skip connections to later layers, which a CrossLayerTranscoderConfig cannot express: it is not loaded."
        )
    decoders = _Decoders(weights, tying, count)
    layers = [_layer(weights, decoders, activation, has_skip, norms, layer) for layer in range(count)]
    used = [f"encoder_module.encoders.{layer}.{part}" for layer in range(count) for part in ("weight", "bias_param")]
    skips = [_skip_name(tying, layer) for layer in range(count)] if has_skip else []
    weights.expect_only(*used, *decoders.names(), *skips, *([_THRESHOLD] if activation == "jumprelu" else []))

    def placed(layer, dictionary, given):
        sites = (_site(settings, source, name, layer) for name in ("mlp_input_template", "mlp_output_template"))
        reads, writes = (said or site for said, site in zip((given.input_site, given.output_site), sites, strict=True))
        base_model = setting(settings, "model_name", str, source, None)
        return place_at(dictionary, given, source, base_model, (reads, PLAIN), (writes, PLAIN))

    return assembled(layers, placed, given)


def _activation(settings: dict[str, Any], source: str) -> str:
    function = setting(settings, "activation_fn", str, source, "jumprelu")
    if function not in ("relu", "jumprelu"):
        raise TranscoderError(
            f"{source} has the activation '{printable(function)[:40]}', by which the features of a token depend on other tokens: convert it "
            "to JumpReLU with decode-clt, as its documentation advises."
        )
    return function


def _site(settings: dict[str, Any], source: str, name: str, layer: int) -> str | None:
    template = setting(settings, name, str, source, None)
    return site_of_module(template.replace("{}", str(layer))) if template else None


def _norms(
    folder: Folder, settings: dict[str, Any], source: str, count: int, width: int, given: Given
) -> list[tuple[Norm, Norm]] | None:
    """What the activations of each layer were divided by, and their means; `None` where they were taken as they are."""
    how = setting(settings, "normalization_method", str, source, "none")
    how = _OLD_NORMALIZATIONS.get(how, how)
    if how == "none":
        return None
    if how == "sqrt_d_model":
        # Multiplied by it, and not brought to it.
        norm = Norm(torch.full((width,), 1 / math.sqrt(width)), torch.zeros(width), False)
        return [(norm, norm)] * count
    if how != "mean_std":
        raise TranscoderError(
            f"{source} has the `normalization_method` '{printable(how)[:40]}', which is not known, so it is not loaded: 'none', 'mean_std' and "
            "'sqrt_d_model' are."
        )
    if STATISTICS not in folder:
        if not given.complete:
            return None
        raise TranscoderError(
            f"{source} was trained on normalized activations, and their means and deviations are not beside it: copy {STATISTICS} of the "
            "training data into its folder."
        )
    statistics = folder.json(STATISTICS)
    label = folder.label(STATISTICS)
    return [
        (_norm(statistics, layer, "inputs", width, label), _norm(statistics, layer, "targets", width, label))
        for layer in range(count)
    ]


def _norm(statistics: dict[str, Any], layer: int, side: str, width: int, source: str) -> Norm:
    its = setting(setting(statistics, str(layer), dict, source), side, dict, source)
    mean, deviation = (setting(its, name, list, source) for name in ("mean", "std"))
    for values in (mean, deviation):
        if len(values) != width or not all(type(value) in (int, float) and abs(value) < _LARGEST for value in values):
            raise TranscoderError(
                f"{source} does not hold {width} numbers for the {side} of layer {layer}: copy it again."
            )
    if min(deviation) < 0:
        raise TranscoderError(f"{source} has a negative standard deviation in layer {layer}: copy it again.")
    return Norm(
        torch.tensor(deviation, dtype=torch.float32) + _EPSILON, torch.tensor(mean, dtype=torch.float32), False
    )


class _Decoders:
    """The decoders by source and target: one for each pair, for each source or for each target."""

    def __init__(self, weights: Weights, tying: str, count: int):
        self.weights, self.tying, self.count = weights, tying, count
        self.scales = [f"decoder_module.feature_scale.{layer}" for layer in range(count)]
        self.has_scales = self.scales[0] in weights and tying != "none"

    def name(self, source: int, target: int) -> str:
        key = {"none": f"{source}->{target}", "per_source": source, "per_target": target}[self.tying]
        return f"decoder_module.decoders.{key}"

    def names(self) -> list[str]:
        pairs = {self.name(source, target) for source in range(self.count) for target in range(source, self.count)}
        scales = self.scales if self.has_scales else []
        return [f"{name}.{part}" for name in pairs for part in ("weight", "bias_param")] + scales

    def rows(self, source: int, target: int, n: int, d: int) -> LazyTensor:
        rows = self.weights.take(f"{self.name(source, target)}.weight", d, n).T
        if not self.has_scales:
            return rows
        scale = self.weights.take(self.scales[target], n)
        return rows.then(lambda values: values * scale.read()[:, None])

    def bias(self, target: int, d: int) -> LazyTensor:
        """The sum of the biases of all decoders that write at a layer; one decoder that reads a sum of features has one bias."""
        sources = [target] if self.tying == "per_target" else range(target + 1)
        parts = [self.weights.take(f"{self.name(source, target)}.bias_param", d) for source in sources]
        return parts[0].then(lambda first: first + sum(part.read() for part in parts[1:]))


def _skip_name(tying: str, layer: int) -> str:
    return f"decoder_module.skip_weights.{f'{layer}->{layer}' if tying == 'none' else layer}"


def _layer(
    weights: Weights,
    decoders: _Decoders,
    activation: str,
    has_skip: bool,
    norms: list[tuple[Norm, Norm]] | None,
    layer: int,
) -> ForeignDictionary:
    name = f"encoder_module.encoders.{layer}"
    n, d = weights.matrix(f"{name}.weight")
    targets = range(layer, decoders.count)
    gains = [norms[target][1].gain if norms else torch.ones(()) for target in targets]
    rows = [decoders.rows(layer, target, n, d) for target in targets]
    tensors = {
        "W_enc": weights[f"{name}.weight"],
        "b_enc": weights.take(f"{name}.bias_param", n),
        "W_dec": stacked([_times(part, gain) for part, gain in zip(rows, gains, strict=True)]),
        "b_dec": decoders.bias(layer, d),
    }
    if has_skip:
        tensors["W_skip"] = weights.take(_skip_name(decoders.tying, layer), d, d)
    if activation == "jumprelu":
        tensors["threshold"] = exponential(weights.take(_THRESHOLD, decoders.count, n).at(layer))
    fields = {"d_in": d, "d_out": d, "num_features": n, "activation": activation, "skip_connection": has_skip}
    dictionary = ForeignDictionary(fields, tensors)
    if norms is None:
        return dictionary
    reads, writes = norms[layer]
    dictionary = read_through_norm(dictionary, reads)
    tensors = dict(dictionary.tensors)
    tensors["b_dec"] = tensors["b_dec"].then(lambda values: values.double() * writes.gain + writes.bias)
    if has_skip:
        tensors["W_skip"] = tensors["W_skip"].then(lambda rows: rows.double() * writes.gain[:, None])
    return ForeignDictionary(fields, tensors)


def _times(rows: LazyTensor, gain: torch.Tensor) -> LazyTensor:
    return rows.then(lambda values: values * gain) if gain.dim() else rows
