"""Llama Scope: a folder with `hyperparams.json` and `checkpoints/final.safetensors`."""

import math
import re

import torch

from ..errors import TranscoderError
from ..text.printable import printable
from .decoder_norms import decoder_norms, norms_into_encoder
from .dictionary import ForeignDictionary, Given, setting
from .folder import Folder
from .hook_names import place
from .tensor_files import filled, open_weights


NAME = "Llama Scope"
CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"


def detect(folder: Folder) -> bool:
    return CONFIG in folder and WEIGHTS in folder


def read(folder: Folder, given: Given) -> ForeignDictionary:
    source, settings = folder.label(CONFIG), folder.json(CONFIG)
    function = setting(settings, "act_fn", str, source, "jumprelu")
    if function.lower() != "jumprelu" or settings.get("use_glu_encoder"):
        kind = "a gated linear encoder" if settings.get("use_glu_encoder") else f"'{printable(function)[:40]}'"
        raise TranscoderError(f"{source} has the activation {kind}, which cannot be loaded: 'jumprelu' can.")
    norms = setting(settings, "dataset_average_activation_norm", dict, source)
    weights = open_weights(folder.find(WEIGHTS))
    weights.expect_only("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    n, d_in = weights.matrix("encoder.weight")
    d_out = weights.matrix("decoder.weight")[0]
    # Their encoder reads inputs of norm sqrt(width) on average, and their decoder writes outputs of it.
    scale_in = math.sqrt(d_in) / positive_norm(setting(norms, "in", float, source), "in", source)
    scale_out = math.sqrt(d_out) / positive_norm(setting(norms, "out", float, source), "out", source)
    tensors = {
        "W_enc": weights["encoder.weight"],
        "b_enc": weights.take("encoder.bias", n).then(lambda values: values / scale_in),
        "W_dec": weights.take("decoder.weight", d_out, n).T.then(lambda rows: rows * (scale_in / scale_out)),
        "b_dec": weights.take("decoder.bias", d_out).then(lambda values: values / scale_out),
    }
    if setting(settings, "sparsity_include_decoder_norm", bool, source, True):
        norms_into_encoder(tensors, decoder_norms(tensors["W_dec"], torch.float32))
    # In the units of the site, after decoder rows have norm one.
    threshold = max(0.0, setting(settings, "jump_relu_threshold", float, source))
    tensors["threshold"] = filled(threshold, n)
    subtracts = bool(settings.get("use_decoder_bias") and settings.get("apply_decoder_bias_to_pre_encoder"))
    if subtracts:
        tensors["b_pre"] = tensors["b_dec"]
    fields = {
        "d_in": d_in,
        "d_out": d_out,
        "num_features": n,
        "activation": "jumprelu",
        "pre_bias": subtracts,
    }
    hooks = [setting(settings, name, str, source, None) for name in ("hook_point_in", "hook_point_out")]
    facts = {name: hook for name, hook in zip(("hook_point_in", "hook_point_out"), hooks, strict=True) if hook}
    dictionary = ForeignDictionary(fields, tensors, facts)
    # Its language models have RMS norms, whose residual stream TransformerLens leaves as it is.
    return place(dictionary, given, source, _base_model(settings), *hooks, hooks[0] == hooks[1], False)  # pyright: ignore[reportCallIssue]


def positive_norm(value: float, side: str, source: str) -> float:
    """Refuses an average norm that nothing can be divided by."""
    if not 0 < value < math.inf:
        raise TranscoderError(
            f"`{printable(side)}` of the average norms in {printable(source)} is {value:g}, but must be positive: copy or download the "
            "dictionary again."
        )
    return value


def _base_model(settings: dict) -> str | None:
    name = settings.get("model_name")
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None
