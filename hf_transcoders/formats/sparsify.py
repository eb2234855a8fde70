"""Sparsify: a folder for each hookpoint with `cfg.json` and `sae.safetensors`, under one `config.json` of the run."""

import re

from ..errors import TranscoderError
from ..text.printable import printable
from .dictionary import ForeignDictionary, Given, setting
from .folder import Folder
from .hook_names import PLAIN, place_at
from .tensor_files import open_weights


NAME = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


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
