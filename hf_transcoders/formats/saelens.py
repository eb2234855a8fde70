"""SAELens: a folder with `cfg.json` and `sae_weights.safetensors`, since version 6 and before."""

from typing import Any

import torch

from ..errors import TranscoderError
from ..text.printable import printable
from .decoder_norms import decoder_norms, norms_into_encoder
from .dictionary import ForeignDictionary, Given, above_zero, setting
from .folder import Folder
from .hook_names import PLAIN, place, place_at
from .tensor_files import LazyTensor, Weights, open_weights


NAME = "SAELens"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
NEWEST = 6

# Architecture -> activation, and whether it has an output of its own.
ARCHITECTURES = {
    "standard": ("relu", False),
    "topk": ("topk", False),
    "jumprelu": ("jumprelu", False),
    "gated": ("gated", False),
    "transcoder": ("relu", True),
    "skip_transcoder": ("relu", True),
    "jumprelu_transcoder": ("jumprelu", True),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}
# Their name of a normalization of each token by itself -> ours.
TOKEN_NORMS = {"layer_norm": "token_standardize", "constant_norm_rescale": "token_scale"}
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


def detect(folder: Folder) -> bool:
    return CONFIG in folder and WEIGHTS in folder


def read(folder: Folder, given: Given) -> ForeignDictionary:
    source, settings = folder.label(CONFIG), folder.json(CONFIG)
    settings = {_OLD_NAMES.get(name, name): value for name, value in settings.items()}
    metadata = setting(settings, "metadata", dict, source, settings)
    _check_version(metadata, source)
    architecture = _architecture(settings, source)
    activation, is_transcoder = ARCHITECTURES[architecture]
    weights = open_weights(folder.find(WEIGHTS))
    d_in, n = weights.matrix("W_enc")
    d_out = weights.matrix("W_dec")[1] if is_transcoder else d_in
    normalization = TOKEN_NORMS.get(str(settings.get("normalize_activations")), "none")
    if normalization != "none" and is_transcoder:
        raise TranscoderError(
            f"{printable(source)} has `normalize_activations` '{settings['normalize_activations']}', which for a transcoder scales each "
            "token of the input and not the output: a TranscoderConfig cannot express that, so it is not loaded."
        )
    factor = 1.0 if normalization != "none" else _scaling_factor(settings, given, source)
    tensors = _tensors(weights, activation, d_in, d_out, n)
    subtracts = setting(settings, "apply_b_dec_to_input", bool, source, not is_transcoder)
    fields = {
        "d_in": d_in,
        "d_out": d_out,
        "num_features": n,
        "activation": activation,
        "k": _k(settings, source) if activation == "topk" else None,
        "skip_connection": "W_skip" in tensors,
        "normalization": normalization,
        "pre_bias": subtracts,
    }
    if setting(settings, "rescale_acts_by_decoder_norm", bool, source, False) and activation == "topk":
        _fold_decoder_norm(tensors)
    if subtracts:
        if d_in != d_out:
            raise TranscoderError(f"{source} subtracts a `b_dec` of width {d_out} from inputs of width {d_in}.")
        bias = tensors["b_pre"] = tensors["b_dec"]
        if skip := tensors.get("W_skip"):
            # Theirs reads the input as it is, ours what is left of it.
            tensors["b_dec"] = bias.then(lambda values: values.double() + skip.read().double() @ values.double())
    if factor != 1:
        _fold_factor(tensors, factor, is_transcoder)
    dictionary = ForeignDictionary(fields, tensors, _facts(metadata))
    hook, hook_out = (setting(metadata, name, str, source, None) for name in ("hook_name", "hook_name_out"))
    reads_heads = settings.get("reshape_activations") == "hook_z" or metadata.get("hook_head_index") is not None
    base_model = setting(metadata, "model_name", str, source, None)
    if metadata.get("model_class_name") == "AutoModelForCausalLM" and hook and not reads_heads:
        # Names of modules, whose outputs are meant.
        reads, writes = f"module:{hook}:out", f"module:{hook_out}:out" if hook_out else None
        reads = given.input_site or reads
        writes = given.output_site or (writes if is_transcoder else reads)
        return place_at(dictionary, given, source, base_model, (reads, PLAIN), (writes, PLAIN))
    if reads_heads:
        hook = None
    return place(dictionary, given, source, base_model, hook, hook_out, not is_transcoder, _folded(metadata))


def _architecture(settings: dict[str, Any], source: str) -> str:
    architecture = setting(settings, "architecture", str, source, "standard")
    function = setting(settings, "activation_fn", str, source, "relu")
    if architecture == "standard" and function == "topk":
        architecture = "topk"
    if architecture not in ARCHITECTURES:
        raise TranscoderError(
            f"{printable(source)} has the architecture '{printable(architecture)[:60]}', which cannot be loaded: the ones "
            f"that can are {', '.join(ARCHITECTURES)}."
        )
    if architecture in ("standard", "gated", "transcoder", "skip_transcoder") and function != "relu":
        raise TranscoderError(
            f"{printable(source)} has the activation function '{printable(function)[:60]}', which cannot be loaded: 'relu' and "
            "'topk' can."
        )
    return architecture


def _check_version(metadata: dict[str, Any], source: str) -> None:
    version = setting(metadata, "sae_lens_version", str, source, "0")
    major = version.split(".")[0]
    if not major.isdecimal() or int(major) > NEWEST:
        raise TranscoderError(
            f"{printable(source)} was written by SAELens {printable(version)[:20]}, and files up to version {NEWEST} are known: "
            "upgrade hf_transcoders with `pip install -U hf_transcoders`."
        )


def _k(settings: dict[str, Any], source: str) -> int:
    if settings.get("k") is None:
        settings = setting(settings, "activation_fn_kwargs", dict, source, {})
    return setting(settings, "k", int, source)


def _scaling_factor(settings: dict[str, Any], given: Given, source: str) -> float:
    how = settings.get("normalize_activations")
    if how in (None, False, "none"):
        return 1.0
    if how in (True, "expected_average_only_in"):
        if given.scaling_factor is None and not given.complete:
            return 1.0
        if given.scaling_factor is None:
            raise TranscoderError(
                f"{printable(source)} does not say the factor that brings inputs to the norm its dictionary was trained with: "
                "give `scaling_factor=`, the square root of their width over their average norm."
            )
        return given.scaling_factor
    raise TranscoderError(
        f"{printable(source)} has `normalize_activations` '{printable(how)[:40]}', which is not known, so the dictionary is not "
        "loaded: fold it into the weights with SAELens and save it again."
    )


def _tensors(weights: Weights, activation: str, d_in: int, d_out: int, n: int) -> dict[str, LazyTensor]:
    own = {
        "relu": ["b_enc"],
        "topk": ["b_enc"],
        "jumprelu": ["b_enc", "threshold"],
        "gated": ["b_gate", "r_mag", "b_mag"],
    }
    per_feature = list(own[activation])
    if activation == "jumprelu" and "log_threshold" in weights:
        per_feature[1] = "log_threshold"
    optional = [name for name in ("scaling_factor", "finetuning_scaling_factor") if name in weights]
    skip = ["W_skip"] if "W_skip" in weights else []
    weights.expect_only("W_enc", "W_dec", "b_dec", *per_feature, *optional, *skip)
    tensors = {
        "W_enc": weights["W_enc"].T,
        "W_dec": weights.take("W_dec", n, d_out),
        "b_dec": weights.take("b_dec", d_out),
        **{name: weights.take(name, n) for name in per_feature},
        **{name: weights.take(name, d_out, d_in) for name in skip},
    }
    if "b_gate" in tensors:
        tensors["b_enc"] = tensors.pop("b_gate")
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").then(lambda values: values.float().exp(), torch.float32)
    if "threshold" in tensors:
        tensors["threshold"] = above_zero(tensors["threshold"])
    for name in optional:
        scale, rows = weights.take(name, n), tensors["W_dec"]
        tensors["W_dec"] = rows.then(lambda values, scale=scale: values * scale.read()[:, None])
    return tensors


def _fold_decoder_norm(tensors: dict[str, LazyTensor]) -> None:
    """Their k largest are those of the pre-activations times the norms of the decoder rows, which are divided out after."""
    norms_into_encoder(tensors, decoder_norms(tensors["W_dec"]))


def _fold_factor(tensors: dict[str, LazyTensor], factor: float, is_transcoder: bool) -> None:
    """Their encoder reads inputs times the factor; the output of an SAE is divided by it, that of a transcoder is not."""
    tensors["W_enc"] = tensors["W_enc"].then(lambda rows: rows * factor)
    divided = ["b_pre"] if is_transcoder else ["b_pre", "W_dec", "b_dec"]
    for name in tensors.keys() & set(divided):
        tensors[name] = tensors[name].then(lambda values: values / factor)


def _folded(metadata: dict[str, Any]) -> bool | None:
    """Since version 6, models are loaded without processing, but for what their arguments ask for."""
    if "sae_lens_version" not in metadata or "model_from_pretrained_kwargs" not in metadata:
        return None
    arguments = metadata["model_from_pretrained_kwargs"]
    return isinstance(arguments, dict) and bool(arguments.get("center_writing_weights") or arguments.get("fold_ln"))


def _facts(metadata: dict[str, Any]) -> dict[str, Any]:
    names = ("hook_name", "hook_name_out", "dataset_path", "context_size", "prepend_bos", "sae_lens_version")
    return {name: metadata[name] for name in names if isinstance(metadata.get(name), str | int | bool)}
