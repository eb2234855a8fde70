"""Dictionaries of this library for SAELens 6."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .hook_names import hook_of_site
from .saelens import ARCHITECTURES, CONFIG, NAME, NEWEST, TOKEN_NORMS, WEIGHTS
from .writing import (
    PlainDictionary,
    cannot,
    places,
    with_output_bias_subtracted,
    with_threshold,
    without_pre_bias,
    write_safetensors,
    write_settings,
)


def write(dictionaries: Mapping[str, PlainDictionary], folder: Path) -> None:
    for name, dictionary, target in places(dictionaries, folder):
        settings, tensors = _to_saelens(name, with_threshold(dictionary))
        write_safetensors(tensors, target / WEIGHTS)
        write_settings(settings, target / CONFIG)


def _to_saelens(name: str, dictionary: PlainDictionary) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    fields, is_sae = dictionary.fields, dictionary.is_autoencoder
    kind = (fields["activation"], not is_sae)
    architecture = next((name for name, known in ARCHITECTURES.items() if known == kind), None)
    if fields["skip_connection"] and architecture is not None:
        architecture = None if is_sae else architecture.replace("transcoder", "skip_transcoder")
    if architecture is None:
        what = f"{'SAE' if is_sae else 'transcoder'} with activation '{fields['activation']}'"
        raise cannot(
            name,
            NAME,
            f"has no {what}{' and a skip connection' if fields['skip_connection'] else ''}",
            f"its architectures are {', '.join(ARCHITECTURES)}",
        )
    normalization = {ours: theirs for theirs, ours in TOKEN_NORMS.items()}.get(fields["normalization"], "none")
    if normalization != "none" and not is_sae:
        raise cannot(
            name,
            NAME,
            "does not scale the output of transcoders by each token",
            "train one with another normalization",
        )
    pre_bias = dictionary.tensors.get("b_pre")
    subtracts = is_sae and pre_bias is not None and torch.equal(pre_bias, dictionary.tensors["b_dec"])
    dictionary = with_output_bias_subtracted(dictionary) if subtracts else without_pre_bias(dictionary)
    tensors = {key: tensor for key, tensor in dictionary.tensors.items() if key != "b_pre"}
    tensors["W_enc"] = tensors["W_enc"].T
    if fields["activation"] == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    settings = {
        "architecture": architecture,
        "d_in": fields["d_in"],
        "d_sae": fields["num_features"],
        "dtype": str(tensors["W_enc"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": subtracts,
        "normalize_activations": normalization,
        "reshape_activations": "none",
        "metadata": _metadata(name, fields, is_sae),
    }
    if not is_sae:
        settings["d_out"] = fields["d_out"]
    if fields["activation"] == "topk":
        settings |= {"k": fields["k"], "rescale_acts_by_decoder_norm": False}
    return settings, tensors


def _metadata(name: str, fields: Mapping[str, Any], is_sae: bool) -> dict[str, Any]:
    sites = [fields["input_site"], fields["output_site"]]
    hooks = [hook_of_site(site) for site in sites]
    kind = "HookedTransformer"
    if None in hooks:
        modules = [re.fullmatch(r"module:(.+):out", site or "") for site in sites]
        if not all(modules):
            raise cannot(
                name, NAME, f"has no hook for {' and '.join(map(str, sites))}", "choose other sites in training"
            )
        hooks, kind = [module[1] for module in modules], "AutoModelForCausalLM"
    return {
        "sae_lens_version": f"{NEWEST}.0.0",
        "model_name": fields["base_model_name_or_path"],
        "model_class_name": kind,
        "model_from_pretrained_kwargs": {},
        "hook_name": hooks[0],
        **({} if is_sae else {"hook_name_out": hooks[1]}),
    }
