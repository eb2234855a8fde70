"""llamascopium (lm-saes): a folder with `config.json` and `sae_weights.safetensors` or `.pt`; Llama Scope R1-Distill has the same."""

import math
from typing import Any

import torch

from ..errors import TranscoderError
from ..text.printable import printable
from .decoder_norms import decoder_norms, norms_into_encoder
from .dictionary import ForeignDictionary, Given, setting
from .folder import Folder
from .hook_names import place
from .llama_scope import positive_norm
from .tensor_files import LazyTensor, Weights, filled, open_weights


NAME = "llamascopium"
CONFIG = "config.json"
FILES = r"sae_weights\.(safetensors|pt)"
NEWEST = 2

# The settings of SAELens, which has weights of the same name.
_SAELENS = "cfg.json"

LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
NORM = "dataset_average_activation_norm"
# Files before version 2 have the tensors of two linear layers.
_OLD = {"W_E": "encoder.weight", "b_E": "encoder.bias", "W_D": "decoder.weight", "b_D": "decoder.bias"}
_OLD_LOG_THRESHOLD = "log_jumprelu_threshold"
# The threshold of a feature that writes nothing.
_NEVER = torch.finfo(torch.float32).max


def detect(folder: Folder) -> bool:
    if CONFIG not in folder or not folder.matching(FILES):
        return False
    # Other libraries have files of these names. On the Hub, settings are not downloaded to list what is there.
    return "act_fn" in folder.json(CONFIG) if folder.files.is_local else _SAELENS not in folder


def read(folder: Folder, given: Given) -> ForeignDictionary:
    settings, source = folder.json(CONFIG), folder.label(CONFIG)
    kind = setting(settings, "sae_type", str, source, "sae")
    if kind != "sae" or settings.get("use_glu_encoder"):
        kind = kind if kind != "sae" else "sae with a gated linear encoder"
        advice = (
            "CrossLayerTranscoder.from_pretrained loads it"
            if kind == "clt"
            else "it is not loaded, and plain 'sae' is"
        )
        raise TranscoderError(f"{source} has the kind '{printable(kind)[:40]}': {advice}.")
    weights = open_weights(folder.find(folder.only(FILES)))
    weights.refuse_newer(NEWEST, NAME)
    activation = activation_of(settings, source)
    tensors = _tensors(weights, activation, setting(settings, "use_decoder_bias", bool, source, True))
    n, d = tensors["W_dec"].shape
    hooks = [setting(settings, name, str, source, None) for name in ("hook_point_in", "hook_point_out")]
    fields = {
        "d_in": d,
        "d_out": d,
        "num_features": n,
        "activation": activation,
        "k": setting(settings, "top_k", int, source) if activation == "topk" else None,
    }
    if setting(settings, "sparsity_include_decoder_norm", bool, source, True):
        gate_by_decoder_norm(tensors, activation)
    how = setting(settings, "norm_activation", str, source, "dataset-wise")
    if how == "token-wise" and hooks[0] == hooks[1]:
        fields["normalization"] = "token_scale"
    else:
        ends = zip(hooks, ("in", "out"), strict=True)
        factors = [norm_factor(weights, settings, source, given, d, *end) for end in ends]
        scale(tensors, factors[0], factors[1:])
    facts = {name: hook for name, hook in zip(("hook_point_in", "hook_point_out"), hooks, strict=True) if hook}
    return place(ForeignDictionary(fields, tensors, facts), given, source, None, *hooks, hooks[0] == hooks[1])  # pyright: ignore[reportCallIssue]


def _tensors(weights: Weights, activation: str, has_bias: bool) -> dict[str, LazyTensor]:
    old = _OLD["W_E"] in weights
    names = {name: _OLD[name] if old else name for name in _OLD if has_bias or name != "b_D"}
    threshold = [_OLD_LOG_THRESHOLD if old else LOG_THRESHOLD] if activation == "jumprelu" else []
    weights.expect_only(*names.values(), *threshold, *norm_names(weights))
    encoder, decoder = weights[names["W_E"]], weights[names["W_D"]]
    weights.matrix(names["W_E"])
    encoder, decoder = (encoder, decoder.T) if old else (encoder.T, decoder)
    n, d = encoder.shape
    weights.take(names["W_D"], *((d, n) if old else (n, d)))
    tensors = {
        "W_enc": encoder,
        "b_enc": weights.take(names["b_E"], n),
        "W_dec": decoder,
        "b_dec": weights.take(names["b_D"], d) if has_bias else filled(0.0, d),
    }
    for name in threshold:
        tensors["threshold"] = exponential(weights.take(name, n))
    return tensors


def activation_of(settings: dict[str, Any], source: str) -> str:
    """The activation of a dictionary, of those that a batch does not change."""
    function = setting(settings, "act_fn", str, source, "relu").lower()
    if function not in ("relu", "jumprelu", "topk"):
        raise TranscoderError(
            f"{source} has the activation '{printable(function)[:40]}', by which the features of a token depend on other tokens or layers: "
            "convert it to JumpReLU with llamascopium."
        )
    return function


def norm_names(weights: Weights) -> list[str]:
    """The tensors that hold average norms of activations."""
    return [name for name in weights.tensors if name.startswith(f"{NORM}.")]


def exponential(logarithm: LazyTensor) -> LazyTensor:
    """Thresholds from their logarithms."""
    return logarithm.then(lambda values: values.float().exp(), torch.float32)


def gate_by_decoder_norm(tensors: dict[str, LazyTensor], activation: str) -> None:
    """
    Their activation function sees each pre-activation times the norm of the feature's decoder rows, which is divided out after.
    Thresholds are divided by it; the k largest remain those of the products, so features of TopK become these. To ReLU it
    makes no difference.
    """
    norms = decoder_norms(tensors["W_dec"])

    def divided(thresholds):
        its = norms()
        return torch.where(its > 0, thresholds / its, _NEVER).clamp(max=_NEVER)

    if activation == "jumprelu":
        tensors["threshold"] = tensors["threshold"].then(divided)
    elif activation == "topk":
        norms_into_encoder(tensors, norms)


def norm_factor(
    weights: Weights, settings: dict[str, Any], source: str, given: Given, width: int, hook: str | None, side: str
) -> float:
    """
    The factor that brings the activations of a hook to the norm that their dictionaries are trained with, the square root of the
    width on average.

    Args:
        weights ([`Weights`]), settings (`dict[str, Any]`), source (`str`): What the files hold, and their name.
        given ([`Given`]): What the user says.
        width (`int`): Width of the activations.
        hook (`str`, *optional*): Name of the hook.
        side (`str`): `"in"` or `"out"`, by which older files name it.
    """
    how = setting(settings, "norm_activation", str, source, "dataset-wise")
    if how == "inference":
        return 1.0
    if how != "dataset-wise":
        raise TranscoderError(
            f"{source} has `norm_activation` '{printable(how)[:40]}', which scales outputs by what they are or by their batch: a "
            "TranscoderConfig cannot express that, so it is not loaded."
        )
    name = f"{NORM}.{hook}"
    known = setting(settings, NORM, dict, source, {})
    if name in weights:
        average = weights.take(name).read().item()
    elif known:
        average = setting(known, hook if hook in known else side, float, source)
    elif given.scaling_factor is not None or not given.complete:
        return given.scaling_factor or 1.0
    else:
        raise TranscoderError(
            f"{source} does not say the average norm of the activations at {printable(hook)[:60]}: give `scaling_factor=`, the square root "
            "of their width over that norm."
        )
    return math.sqrt(width) / positive_norm(average, str(hook)[:60], source)


def scale(tensors: dict[str, LazyTensor], factor_in: float, factors_out: list[float]) -> None:
    """Makes the encoder read inputs as they are, and the decoder write outputs as they are.

    Args:
        tensors (`dict[str, LazyTensor]`): Tensors that read inputs times a factor, and write outputs times others.
        factor_in (`float`): The factor of inputs.
        factors_out (`list[float]`): The factors of the sites that are written at, the own first.
    """
    if factor_in != 1:
        tensors["W_enc"] = tensors["W_enc"].then(lambda rows: rows * factor_in)
    if factors_out != [1.0] * len(factors_out):
        by_site = torch.tensor(factors_out)
        tensors["W_dec"] = tensors["W_dec"].then(
            lambda rows: rows / (by_site[:, None] if rows.dim() == 3 else by_site)
        )
        tensors["b_dec"] = tensors["b_dec"].then(lambda values: values / factors_out[0])
