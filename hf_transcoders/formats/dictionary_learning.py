"""dictionary_learning: a folder with `ae.pt` and `config.json`."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import TranscoderError
from ..text.printable import printable
from .decoder_norms import decoder_norms, norms_into_encoder
from .dictionary import ForeignDictionary, Given, above_zero, setting
from .folder import Folder
from .hook_names import PLAIN, place_at
from .tensor_files import LazyTensor, Weights, open_weights
from .writing import (
    PlainDictionary,
    cannot,
    places,
    refuse_token_norm,
    with_output_bias_subtracted,
    without_pre_bias,
    write_settings,
)


NAME = "dictionary_learning"
CONFIG, WEIGHTS = "config.json", "ae.pt"

# Native name -> name in the file, where both have rows of features; `.T` after a name means the other orientation.
_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T"}
_PLAIN = {"W_enc": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
# Class -> activation, whether the decoder's bias is subtracted from the input, and the tensors.
_CLASSES = {
    "AutoEncoder": ("relu", True, {**_LINEAR, "b_dec": "bias"}),
    "AutoEncoderNew": ("relu", False, {**_LINEAR, "b_dec": "decoder.bias"}),
    "GatedAutoEncoder": (
        "gated",
        True,
        {**_LINEAR, "b_enc": "gate_bias", "b_dec": "decoder_bias", "r_mag": "r_mag", "b_mag": "mag_bias"},
    ),
    "JumpReluAutoEncoder": ("jumprelu", False, {**_PLAIN, "threshold": "threshold"}),
    "AutoEncoderTopK": ("topk", True, {**_LINEAR, "b_dec": "b_dec"}),
    "BatchTopKSAE": ("batchtopk", True, {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("batchtopk", True, {**_PLAIN, "threshold": "threshold"}),
}


def detect(folder: Folder) -> bool:
    return CONFIG in folder and WEIGHTS in folder


def read(folder: Folder, given: Given) -> ForeignDictionary:
    source = folder.label(CONFIG)
    settings = folder.json(CONFIG)
    trainer, buffer = setting(settings, "trainer", dict, source), setting(settings, "buffer", dict, source, {})
    kind = setting(trainer, "dict_class", str, source)
    if kind not in _CLASSES:
        raise TranscoderError(
            f"{source} has the class '{printable(kind)[:60]}', which cannot be loaded: {', '.join(_CLASSES)} can."
        )
    activation, subtracts, names = _CLASSES[kind]
    weights = open_weights(folder.find(WEIGHTS))
    tensors = _tensors(weights, names, activation)
    n, d_in = tensors["W_enc"].shape
    fields = {
        "d_in": d_in,
        "d_out": d_in,
        "num_features": n,
        "activation": activation,
        "k": setting(trainer, "k", int, source) if activation in ("topk", "batchtopk") else None,
        "pre_bias": subtracts,
        "matryoshka_sizes": _prefixes(weights, n) if kind.startswith("Matryoshka") else None,
    }
    if kind == "AutoEncoder":
        _to_unit_rows(tensors)
    if subtracts:
        tensors["b_pre"] = tensors["b_dec"]
    if activation == "batchtopk" and tensors["threshold"].read() < 0:
        raise TranscoderError(f"{source} is of a dictionary whose threshold was never set: train it further.")
    submodule = setting(trainer, "submodule_name", str, source, None)
    site = given.input_site or _site(submodule, trainer.get("layer"))
    facts = {"submodule_name": submodule} if submodule else {}
    facts |= {key: buffer[key] for key in ("ctx_len", "io") if isinstance(buffer.get(key), str | int)}
    base_model = setting(trainer, "lm_name", str, source, None)
    writes = given.output_site or site
    return place_at(
        ForeignDictionary(fields, tensors, facts), given, source, base_model, (site, PLAIN), (writes, PLAIN)
    )


def _tensors(weights: Weights, names: dict[str, str], activation: str) -> dict[str, LazyTensor]:
    stored = {name: theirs.removesuffix(".T") for name, theirs in names.items()}
    weights.expect_only(*stored.values(), "threshold")
    tensors = {}
    n, d = weights.matrix(stored["W_enc"])[:: -1 if names["W_enc"].endswith(".T") else 1]
    shapes = {"W_enc": (n, d), "W_dec": (n, d), "b_dec": (d,)}
    if activation == "batchtopk":
        shapes["threshold"] = ()
    for name, theirs in names.items():
        shape = shapes.get(name, (n,))
        tensor = weights.take(stored[name], *(shape[::-1] if theirs.endswith(".T") else shape))
        tensors[name] = tensor.T if theirs.endswith(".T") else tensor
    if activation == "jumprelu":
        tensors["threshold"] = above_zero(tensors["threshold"])
    return tensors


def _to_unit_rows(tensors: dict[str, LazyTensor]) -> None:
    """As the library itself loads this class: decoder rows get norm one and features the scale, if they differ from it."""
    norms = decoder_norms(tensors["W_dec"], torch.float32)

    def if_they_differ():
        found = norms()
        return torch.ones_like(found) if torch.allclose(found, torch.ones_like(found)) else found

    norms_into_encoder(tensors, if_they_differ)


def _prefixes(weights: Weights, n: int) -> list[int]:
    groups = weights.extra.get("group_sizes")
    sizes = groups.cumsum(0).tolist() if isinstance(groups, torch.Tensor) and groups.dim() == 1 else []
    if not sizes or sizes[-1] != n:
        raise TranscoderError(f"`group_sizes` in {printable(weights.path)} does not add up to its {n} features.")
    return sizes


def _site(submodule: str | None, layer: object) -> str | None:
    if submodule and re.fullmatch(r"layers\.\d+\.[\w.]+", submodule):
        return submodule
    found = re.fullmatch(r"(resid_pre|resid_post|mlp_out|attn_out)(?:_layer_?(\d+))?", submodule or "")
    number = (found and found[2]) or (layer if type(layer) is int else None)
    if not found or number is None:
        return None
    return f"layers.{number}.{found[1].replace('_out', '.out')}"


def write(dictionaries: Mapping[str, PlainDictionary], folder: Path) -> None:
    for name, dictionary, place in places(dictionaries, folder):
        if not dictionary.is_autoencoder or dictionary.fields["skip_connection"]:
            raise cannot(
                name, NAME, "has SAEs only", "it reads and writes at different sites, or has a skip connection"
            )
        refuse_token_norm(name, NAME, dictionary)
        kind = _class_of(dictionary)
        _, subtracts, names = _CLASSES[kind]
        plain = with_output_bias_subtracted(dictionary) if subtracts else without_pre_bias(dictionary)
        state = {}
        for key, theirs in names.items():
            tensor = plain.tensors[key].detach().cpu()
            state[theirs.removesuffix(".T")] = (tensor.T if theirs.endswith(".T") else tensor).clone().contiguous()
        fields = plain.fields
        if fields["k"] is not None:
            state["k"] = torch.tensor(fields["k"], dtype=torch.int)
            state.setdefault("threshold", torch.tensor(-1.0))
        if kind.startswith("Matryoshka"):
            ends = torch.tensor([0, *fields["matryoshka_sizes"]])
            state["group_sizes"] = ends.diff()
        torch.save(state, place / WEIGHTS)
        found = re.fullmatch(r"layers\.(\d+)\.(resid_pre|resid_post|mlp\.out|attn\.out)", fields["input_site"])
        trainer = {
            "dict_class": kind,
            "activation_dim": fields["d_in"],
            "dict_size": fields["num_features"],
            "layer": int(found[1]) if found else None,
            "lm_name": fields["base_model_name_or_path"],
            "submodule_name": f"{found[2].replace('.', '_')}_layer_{found[1]}" if found else fields["input_site"],
        }
        if fields["k"] is not None:
            trainer["k"] = fields["k"]
        write_settings({"trainer": trainer, "buffer": {"d_submodule": fields["d_in"], "io": "out"}}, place / CONFIG)


def _class_of(dictionary: PlainDictionary) -> str:
    """The class that computes what a dictionary does; one that is loaded with decoder rows of norm one only if it has such."""
    activation, tensors = dictionary.fields["activation"], dictionary.tensors
    if activation == "batchtopk":
        return "MatryoshkaBatchTopKSAE" if dictionary.fields["matryoshka_sizes"] else "BatchTopKSAE"
    if activation == "relu":
        norms = tensors["W_dec"].detach().float().norm(dim=-1)
        subtracted = "b_pre" in tensors and torch.equal(tensors["b_pre"], tensors["b_dec"])
        return "AutoEncoder" if subtracted and torch.allclose(norms, torch.ones_like(norms)) else "AutoEncoderNew"
    return {"gated": "GatedAutoEncoder", "jumprelu": "JumpReluAutoEncoder", "topk": "AutoEncoderTopK"}[activation]
