"""Sparsify: a folder for each hookpoint with `cfg.json` and `sae.safetensors`, under one `config.json` of the run."""

import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import TranscoderError
from ..text.printable import printable
from .dictionary import ForeignDictionary, Given, setting
from .folder import Folder
from .hook_names import PLAIN, place_at
from .tensor_files import open_weights
from .writing import (
    PlainDictionary,
    cannot,
    refuse_token_norm,
    with_output_bias_subtracted,
    without_pre_bias,
    write_safetensors,
    write_settings,
)


NAME = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"

# Model families -> what they call their list of blocks.
_BLOCKS = dict.fromkeys(("gpt2", "gpt_neo", "gptj", "codegen", "gpt_bigcode", "bloom", "falcon"), "h")
_POST_NORMS = ("gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3")


def detect(folder: Folder) -> bool:
    return CONFIG in folder and WEIGHTS in folder


def read(folder: Folder, given: Given) -> ForeignDictionary:
    source, settings = folder.label(CONFIG), folder.json(CONFIG)
    activation = setting(settings, "activation", str, source, "topk")
    if activation != "topk" or settings.get("signed"):
        kind = "signed" if settings.get("signed") else activation
        raise TranscoderError(
            f"{source} has the activation '{printable(kind)[:40]}', which a TranscoderConfig cannot express: only 'topk' "
            "can be loaded."
        )
    is_transcoder = setting(settings, "transcode", bool, source, False)
    weights = open_weights(folder.find(WEIGHTS))
    has_skip = "W_skip" in weights
    weights.expect_only("encoder.weight", "encoder.bias", "W_dec", "b_dec", *(["W_skip"] if has_skip else []))
    n, d_in = weights.matrix("encoder.weight")
    d_out = weights.matrix("W_dec")[1]
    tensors = {
        "W_enc": weights["encoder.weight"],
        "b_enc": weights.take("encoder.bias", n),
        "W_dec": weights.take("W_dec", n, d_out),
        "b_dec": weights.take("b_dec", d_out),
    }
    if has_skip:
        tensors["W_skip"] = weights.take("W_skip", d_out, d_in)
    if not is_transcoder:
        if d_in != d_out:
            raise TranscoderError(f"{source} is that of an SAE, but its input is {d_in} wide and its output {d_out}.")
        bias = tensors["b_pre"] = tensors["b_dec"]
        if skip := tensors.get("W_skip"):
            # Theirs reads the input as it is, ours what is left of it.
            tensors["b_dec"] = bias.then(lambda values: values.double() + skip.read().double() @ values.double())
    fields = {
        "d_in": d_in,
        "d_out": d_out,
        "num_features": n,
        "activation": "topk",
        "k": setting(settings, "k", int, source),
        "skip_connection": has_skip,
        "pre_bias": not is_transcoder,
    }
    run = folder.above("config.json")
    hookpoint = folder.name
    facts = {"hookpoint": hookpoint} | {
        key: run[key] for key in ("dataset", "ctx_len") if isinstance(run.get(key), str | int)
    }
    reads, writes = sites_of_hookpoint(hookpoint, is_transcoder)
    reads, writes = (
        given.input_site or reads,
        given.output_site or (writes if is_transcoder else given.input_site or writes),
    )
    dictionary = ForeignDictionary(fields, tensors, facts)
    base_model = setting(run, "model", str, f"the config.json above {source}", None)
    return place_at(dictionary, given, source, base_model, (reads, PLAIN), (writes, PLAIN))


def sites_of_hookpoint(hookpoint: str, is_transcoder: bool) -> tuple[str | None, str | None]:
    """Where a dictionary at a module reads and writes; the module is named from the base model on."""
    found = re.fullmatch(r"(?:layers|h)\.(\d+)(\.mlp)?", hookpoint)
    if found and found[2]:
        reads, writes = f"layers.{found[1]}.mlp.in", f"layers.{found[1]}.mlp.out"
    elif found:
        reads, writes = f"layers.{found[1]}.resid_pre", f"layers.{found[1]}.resid_post"
    elif re.fullmatch(r"(\w+\.)+\w+", hookpoint):
        reads, writes = f"module:{hookpoint}:in", f"module:{hookpoint}:out"
    else:
        return None, None
    return (reads if is_transcoder else writes), writes


def write(dictionaries: Mapping[str, PlainDictionary], folder: Path) -> None:
    base_models = {dictionary.fields["base_model_name_or_path"] for dictionary in dictionaries.values()}
    for name, dictionary in dictionaries.items():
        fields, is_sae = dictionary.fields, dictionary.is_autoencoder
        refuse_token_norm(name, NAME, dictionary)
        if fields["activation"] != "topk":
            raise cannot(name, NAME, f"has no activation '{fields['activation']}'", "its only one is TopK")
        if fields["d_in"] != fields["d_out"]:
            raise cannot(name, NAME, f"has one width, not {fields['d_in']} and {fields['d_out']}", "it stays as it is")
        place = folder / hookpoint_of(name, fields, is_sae)
        if place.exists():
            raise cannot(name, NAME, f"has one dictionary for the hookpoint {place.name}", "convert them one by one")
        plain = with_output_bias_subtracted(dictionary) if is_sae else without_pre_bias(dictionary)
        names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
        tensors = {names.get(key, key): tensor for key, tensor in plain.tensors.items() if key != "b_pre"}
        settings = {
            "activation": "topk",
            "expansion_factor": max(1, fields["num_features"] // fields["d_in"]),
            "normalize_decoder": fields["decoder_norm"] == "unit",
            "num_latents": fields["num_features"],
            "k": fields["k"],
            "multi_topk": False,
            "skip_connection": fields["skip_connection"],
            "transcode": not is_sae,
            "d_in": fields["d_in"],
        }
        place.mkdir()
        write_safetensors(tensors, place / WEIGHTS)
        write_settings(settings, place / CONFIG)
    write_settings({"model": next(iter(base_models))}, folder / "config.json")


def hookpoint_of(name: str, fields: Mapping, is_sae: bool) -> str:
    """The module that a dictionary belongs to, named from the base model on."""
    sites = (fields["input_site"], fields["output_site"])
    remembered = (fields.get("training_summary") or {}).get("hookpoint")
    if isinstance(remembered, str) and sites_of_hookpoint(remembered, not is_sae) == sites:
        return remembered
    modules = [re.fullmatch(r"module:([\w.]+):(?:in|out)", site or "") for site in sites]
    if all(modules) and sites_of_hookpoint(modules[0][1], not is_sae) == sites:
        return modules[0][1]
    family = fields["base_model_type"]
    found = re.fullmatch(r"layers\.(\d+)\.(mlp\.out|mlp\.branch|resid_post)", sites[1] or "")
    if found and family is None:
        raise cannot(
            name,
            NAME,
            "names modules, and the family of the language model is not known",
            "load it with `base_model=` the model",
        )
    if found and not (found[2] == "mlp.branch" and family in _POST_NORMS):
        hookpoint = f"{_BLOCKS.get(family, 'layers')}.{found[1]}{'' if found[2] == 'resid_post' else '.mlp'}"
        expected = (sites[0], sites[1].replace("branch", "out"))
        if sites_of_hookpoint(hookpoint, not is_sae) == (expected if not is_sae else (expected[1],) * 2):
            return hookpoint
    raise cannot(
        name,
        NAME,
        f"reads and writes at one module, not {sites[0]} and {sites[1]}",
        "choose the input and output of a module",
    )
