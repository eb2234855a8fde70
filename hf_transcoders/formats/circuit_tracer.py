"""Circuit-tracer: a set of transcoders, one file for each layer, with `config.yaml`."""

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from ..errors import TranscoderError
from ..files import inner_path
from ..text.logging import get_logger
from ..text.printable import printable
from .dictionary import ForeignDictionary, Given, setting
from .folder import Folder
from .gemma_scope import jumprelu_dictionary
from .hook_names import hook_of_site, place
from .tensor_files import Weights, open_weights
from .writing import (
    PlainDictionary,
    cannot,
    refuse_token_norm,
    with_threshold,
    without_pre_bias,
    write_safetensors,
)


NAME = "circuit-tracer"
CONFIG = "config.yaml"
FILES = r"layer_(\d+)\.safetensors"
THRESHOLD = "activation_function.threshold"

logger = get_logger(__name__)


def detect(folder: Folder) -> bool:
    if folder.settings is not None:
        return True
    if CONFIG not in folder:
        return False
    if folder.matching(FILES) or folder.matching(r"W_enc_\d+\.safetensors"):
        return True
    # A set can name files elsewhere; other programs have files of this name too.
    settings = folder.yaml(CONFIG)
    return "model_kind" in settings and "transcoders" in settings


def members(folder: Folder) -> dict[str, Folder]:
    """The layers of a set, by the names that they have here."""
    source, settings = folder.label(CONFIG), _settings(folder)
    listed = settings.get("transcoders")
    if listed is None:
        found = {}
        for name in folder.matching(FILES):
            found[int(re.fullmatch(FILES, name)[1])] = folder.one_file(name)
    elif isinstance(listed, list) and listed:
        found = {layer: _listed_file(folder, entry, source) for layer, entry in enumerate(listed)}
    else:
        raise TranscoderError(f"`transcoders` in {source} must be a list of files: copy or download the set again.")
    for layer, member in found.items():
        member.settings = {**settings, "layer": layer}
    return {f"layer_{layer}": member for layer, member in found.items()}


def read(folder: Folder, given: Given) -> ForeignDictionary:
    source, settings = folder.label(CONFIG), folder.settings
    if settings is None:
        settings, name = _settings(folder), folder.only(FILES)
        settings = {**settings, "layer": int(re.fullmatch(FILES, name)[1])}
    else:
        name = folder.file
    weights = open_weights(folder.find(name))
    dictionary = _dictionary(weights, settings, source)
    layer = settings["layer"]
    hooks = [
        f"blocks.{layer}.{setting(settings, hook, str, source)}"
        for hook in ("feature_input_hook", "feature_output_hook")
    ]
    # Its language models are loaded without processing.
    return place(dictionary, given, source, setting(settings, "model_name", str, source, None), *hooks, False, False)  # pyright: ignore[reportCallIssue]


def _dictionary(weights: Weights, settings: dict, source: str) -> ForeignDictionary:
    if weights.path.endswith(".npz") or "w_enc" in weights:
        return jumprelu_dictionary(weights)
    has_threshold, has_skip = THRESHOLD in weights, "W_skip" in weights
    optional = [name for name in (THRESHOLD, "W_skip") if name in weights]
    weights.expect_only("W_enc", "W_dec", "b_enc", "b_dec", *optional)
    n, d_in = weights.matrix("W_enc")
    d_out = weights.matrix("W_dec")[1]
    function = setting(settings, "activation", str, source, "jumprelu" if has_threshold else "relu")
    activation = "jumprelu" if has_threshold else function
    if activation not in ("relu", "topk", "jumprelu") or (activation == "jumprelu" and not has_threshold):
        raise TranscoderError(
            f"{source} has the activation '{printable(function)[:40]}', which cannot be loaded: 'relu' and 'topk' can."
        )
    tensors = {
        "W_enc": weights["W_enc"],
        "b_enc": weights.take("b_enc", n),
        "W_dec": weights.take("W_dec", n, d_out),
        "b_dec": weights.take("b_dec", d_out),
    }
    if has_threshold:
        tensors["threshold"] = weights.take(THRESHOLD, n)
    if has_skip:
        tensors["W_skip"] = weights.take("W_skip", d_out, d_in)
    if activation == "topk":
        logger.warning_once(
            "circuit-tracer keeps negative values among the k largest pre-activations, and this library does not: features "
            "differ at tokens with fewer than k positive ones."
        )
    fields = {
        "d_in": d_in,
        "d_out": d_out,
        "num_features": n,
        "activation": activation,
        "k": setting(settings, "k", int, source) if activation == "topk" else None,
        "skip_connection": has_skip,
    }
    return ForeignDictionary(
        fields, tensors, {"scan": settings["scan"]} if isinstance(settings.get("scan"), str) else {}
    )


def _settings(folder: Folder) -> dict:
    source, settings = folder.label(CONFIG), folder.yaml(CONFIG)
    kind = setting(settings, "model_kind", str, source)
    if kind == "cross_layer_transcoder":
        raise TranscoderError(
            f"{source} is that of a cross-layer transcoder, whose features write to several layers: load it with "
            "CrossLayerTranscoder.from_pretrained."
        )
    if kind != "transcoder_set":
        raise TranscoderError(
            f"{source} has the kind '{printable(kind)[:60]}', which is not known: 'transcoder_set' can be loaded."
        )
    return settings


def _listed_file(folder: Folder, entry: object, source: str) -> Folder:
    """A file that a set names: one of its own folder, or `hf://owner/name/path?revision=...` on the Hub."""
    if isinstance(entry, str) and entry.startswith("hf://"):
        path, _, query = entry.removeprefix("hf://").partition("?")
        revision = query.removeprefix("revision=") if query.startswith("revision=") else None
        parts = inner_path(path, source).split("/")
        if len(parts) > 2:
            return folder.on_hub("/".join(parts[:2]), "/".join(parts[2:]), revision)
        raise TranscoderError(f"{source} names '{printable(entry)[:100]}', which must be a file in a repo on the Hub.")
    return folder.one_file(inner_path(entry, source))


def write(dictionaries: Mapping[str, PlainDictionary], folder: Path) -> None:
    layers, kinds = {}, set()
    for name, dictionary in dictionaries.items():
        dictionary = without_pre_bias(with_threshold(dictionary))
        fields = dictionary.fields
        refuse_token_norm(name, NAME, dictionary)
        if fields["activation"] not in ("relu", "topk", "jumprelu"):
            raise cannot(name, NAME, f"has no activation '{fields['activation']}'", "it has ReLU, TopK and JumpReLU")
        hooks = [hook_of_site(fields[site]) for site in ("input_site", "output_site")]
        if None in hooks or hooks[0].split(".")[1] != hooks[1].split(".")[1]:
            raise cannot(
                name,
                NAME,
                f"has no hooks of one layer for {fields['input_site']} and {fields['output_site']}",
                "choose other sites in training",
            )
        layer = int(hooks[0].split(".")[1])
        if layer in layers:
            raise cannot(name, NAME, f"has one transcoder for layer {layer}", "convert a set with one for each layer")
        layers[layer] = dictionary
        kinds.add(
            (*(hook.split(".", 2)[2] for hook in hooks), fields["activation"], fields["k"], fields["num_features"])
        )
    name = next(iter(dictionaries))
    if sorted(layers) != list(range(len(layers))):
        raise cannot(name, NAME, "needs every layer from 0 on", f"this set has {', '.join(map(str, sorted(layers)))}")
    if len(kinds) > 1:
        raise cannot(
            name, NAME, "has one kind of site, activation and width", "the dictionaries of this set differ in them"
        )
    reads, writes, activation, k, _ = kinds.pop()
    settings = {
        "model_name": dictionaries[name].fields["base_model_name_or_path"],
        "model_kind": "transcoder_set",
        "feature_input_hook": reads,
        "feature_output_hook": writes,
        "scan": None,
    }
    if activation == "topk":
        settings |= {"activation": "topk", "k": k}
        logger.warning_once("circuit-tracer 0.5.0 takes TopK transcoders for ReLU ones: use a later version.")
    for layer, dictionary in layers.items():
        tensors = {THRESHOLD if key == "threshold" else key: tensor for key, tensor in dictionary.tensors.items()}
        write_safetensors(tensors, folder / f"layer_{layer}.safetensors")
    (folder / CONFIG).write_text(yaml.safe_dump(settings), encoding="utf-8")
