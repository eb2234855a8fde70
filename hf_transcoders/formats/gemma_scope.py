"""Gemma Scope 1 (`params.npz`) and Gemma Scope 2 (`params.safetensors` with or without `config.json`)."""

import math
import re

from ..errors import TranscoderError
from ..text.printable import printable
from .dictionary import ForeignDictionary, Given, above_zero, setting
from .folder import Folder
from .hook_names import NORMALIZED, PLAIN, place_at
from .tensor_files import Weights, open_weights


NAME = "Gemma Scope"
CONFIG = "config.json"
FILES = r".*params\.(npz|safetensors)"
# Where embeddings are read.
_EMBEDDED = "layers.0.resid_pre"

# A module of a block and its side, by the names that Gemma Scope 2 has -> the point of a site with the same value.
POINTS = {
    "pre_feedforward_layernorm.output": "mlp.in",
    "post_feedforward_layernorm.output": "mlp.branch",
    "post_attention_layernorm.output": "attn.branch",
    "mlp.output": "mlp.out",
    "mlp.input": "mlp.in",
    "output": "resid_post",
    "input": "resid_pre",
}


def detect(folder: Folder) -> bool:
    return bool(folder.matching(FILES))


def read(folder: Folder, given: Given) -> ForeignDictionary:
    name = folder.only(FILES)
    weights = open_weights(folder.find(name))
    return (
        _read_second(folder, given, weights) if name.endswith(".safetensors") else _read_first(folder, given, weights)
    )


def _read_first(folder: Folder, given: Given, weights: Weights) -> ForeignDictionary:
    dictionary = jumprelu_dictionary(weights)
    reads, writes = given.input_site, given.output_site
    if "embedding" in str(folder.files.place).split("/")[-3:] and reads in (None, _EMBEDDED):
        reads = _EMBEDDED
        _read_scaled(dictionary)
    # Transcoders of the first generation read what the norm gives before its gain; SAEs read other places.
    kind = NORMALIZED if reads and reads.endswith(".mlp.in") else PLAIN
    if kind == PLAIN and writes is None:
        writes = reads
    return place_at(dictionary, given, weights.path, None, (reads, kind), (writes, PLAIN))


def _read_scaled(dictionary: ForeignDictionary) -> None:
    """
    The SAEs of embeddings are trained on rows of the embedding matrix; Gemma multiplies these by the square root of their width
    before its first layer reads them.
    """
    tensors, factor = dictionary.tensors, math.sqrt(dictionary.fields["d_in"])
    tensors["W_enc"] = tensors["W_enc"].then(lambda rows: rows / factor)
    for name in ("W_dec", "b_dec"):
        tensors[name] = tensors[name].then(lambda rows: rows * factor)


def _read_second(folder: Folder, given: Given, weights: Weights) -> ForeignDictionary:
    settings, source = (folder.json(CONFIG), folder.label(CONFIG)) if CONFIG in folder else ({}, weights.path)
    architecture = setting(settings, "architecture", str, source, "jump_relu")
    if architecture != "jump_relu":
        raise TranscoderError(
            f"{source} has the architecture '{printable(architecture)[:60]}', which cannot be loaded: 'jump_relu' can."
        )
    dictionary = jumprelu_dictionary(weights)
    hooks = (settings.get(name) for name in ("hf_hook_point_in", "hf_hook_point_out"))
    reads, writes = (site_of_module(hook) if isinstance(hook, str) else None for hook in hooks)
    reads = given.input_site or reads
    writes = given.output_site or writes or (given.input_site and reads)
    base_model = setting(settings, "model_name", str, source, None)
    return place_at(dictionary, given, source, base_model, (reads, PLAIN), (writes, PLAIN))


def jumprelu_dictionary(weights: Weights) -> ForeignDictionary:
    """The tensors of either generation: an encoder of shape `(d_in, n)` and names in capitals or not."""
    lower = {name.lower(): name for name in weights.tensors}
    names = {name: lower.get(name, name) for name in ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")}
    skip = lower.get("affine_skip_connection")
    weights.expect_only(*names.values(), *([skip] if skip else []))
    if len(weights[names["w_dec"]].shape) == 3:
        raise TranscoderError(
            f"{printable(weights.path)} is a layer of a cross-layer transcoder, which writes to several layers: load the folder "
            "of all layers with CrossLayerTranscoder.from_pretrained."
        )
    d_in, n = weights.matrix(names["w_enc"])
    d_out = weights.matrix(names["w_dec"])[1]
    tensors = {
        "W_enc": weights[names["w_enc"]].T,
        "b_enc": weights.take(names["b_enc"], n),
        "W_dec": weights.take(names["w_dec"], n, d_out),
        "b_dec": weights.take(names["b_dec"], d_out),
        "threshold": above_zero(weights.take(names["threshold"], n)),
    }
    if skip:
        tensors["W_skip"] = weights.take(skip, d_in, d_out).T
    fields = {
        "d_in": d_in,
        "d_out": d_out,
        "num_features": n,
        "activation": "jumprelu",
        "skip_connection": skip is not None,
    }
    return ForeignDictionary(fields, tensors)


def site_of_module(hook: str) -> str | None:
    """The site of a module's input or output, named as in `model.layers.3.mlp.output`."""
    found = re.fullmatch(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.(.+)", hook)
    if found and found[2] in POINTS:
        return f"layers.{found[1]}.{POINTS[found[2]]}"
    named = re.fullmatch(r"(.+)\.(in|out)put", hook)
    return f"module:{named[1]}:{named[2]}" if named else None
