"""Cross-layer transcoders of Gemma Scope 2: a folder for each layer, whose decoders have rows for all layers."""

import re
from pathlib import Path

from ..errors import TranscoderError
from ..text.printable import printable
from .choice import choose
from .cross_layer import PlainCrossLayer, all_sites, assembled, cannot, decoders, points, whole_layers
from .dictionary import ForeignDictionary, Given, above_zero, setting
from .folder import Folder, natural_order
from .gemma_scope import CONFIG, POINTS, site_of_module
from .hook_names import PLAIN, place_at
from .tensor_files import open_weights
from .writing import write_safetensors, write_settings


NAME = "Gemma Scope"
WEIGHTS = "params.safetensors"
_LAYER = r"(?:.*/)?layer_(\d+)_?([^/]*)"


def detect(folder: Folder) -> bool:
    """Whether folders of layers lie in a folder `clt`, or have decoders with a row for each layer."""
    places = _places(folder)
    if not places:
        return False
    if any("clt" in place.split("/") for place in places) or "clt" in str(folder.files.subfolder).split("/"):
        return True
    if not folder.files.is_local:
        return False
    weights = open_weights(folder.find(f"{places[0]}/{WEIGHTS}"))
    return "w_dec" in weights and len(weights["w_dec"].shape) == 3


def _places(folder: Folder) -> list[str]:
    found = [name.removesuffix(f"/{WEIGHTS}") for name in folder.names if name.endswith(f"/{WEIGHTS}")]
    return sorted((place for place in found if re.fullmatch(_LAYER, place)), key=natural_order)


def read(folder: Folder, given: Given, choice: dict) -> ForeignDictionary:
    places = [place for place in _places(folder) if not _of_other_kind(place)]
    if choice:
        places = choose(places, **choice)
    kinds = {re.fullmatch(_LAYER, place)[2] for place in places}  # pyright: ignore[reportOptionalSubscript]
    if len(kinds) > 1:
        raise TranscoderError(
            f"{printable(folder.files.place)} holds several cross-layer transcoders ({printable(', '.join(sorted(kinds)))[:200]}): "
            "choose one by `width` and `l0`."
        )
    numbers = [int(re.fullmatch(_LAYER, place)[1]) for place in places]  # pyright: ignore[reportOptionalSubscript]
    whole_layers(numbers, folder.files.place)
    by_layer = dict(zip(numbers, places, strict=True))
    settings = {}
    layers = []
    for layer in range(len(numbers)):
        config = f"{by_layer[layer]}/{CONFIG}"
        settings[layer] = (folder.json(config) if config in folder else {}, folder.label(config))
        layers.append(_layer(folder, by_layer[layer], layer, len(numbers), *settings[layer]))

    def placed(layer, dictionary, given):
        values, source = settings[layer]
        hooks = (values.get(name) for name in ("hf_hook_point_in", "hf_hook_point_out"))
        reads, writes = (site_of_module(hook) if isinstance(hook, str) else None for hook in hooks)
        sites = (given.input_site or reads, PLAIN), (given.output_site or writes, PLAIN)
        return place_at(dictionary, given, source, setting(values, "model_name", str, source, None), *sites)

    return assembled(layers, placed, given)


def _of_other_kind(place: str) -> bool:
    parts = place.split("/")[:-1]
    return bool(parts) and "clt" not in parts


def _layer(folder: Folder, place: str, layer: int, count: int, settings: dict, source: str) -> ForeignDictionary:
    architecture = setting(settings, "architecture", str, source, "jump_relu")
    if architecture != "jump_relu":
        raise TranscoderError(
            f"{source} has the architecture '{printable(architecture)[:60]}', which cannot be loaded: 'jump_relu' can."
        )
    weights = open_weights(folder.find(f"{place}/{WEIGHTS}"))
    skip = "affine_skip_connection"
    weights.expect_only("w_enc", "w_dec", "b_enc", "b_dec", "threshold", skip)
    d_in, n = weights.matrix("w_enc")
    written = weights["w_dec"]
    d_out = written.shape[-1] if written.shape else 0
    tensors = {
        "W_enc": weights["w_enc"].T,
        "b_enc": weights.take("b_enc", n),
        # Rows for layers before its own are stored too, and mean nothing.
        "W_dec": decoders(written, (n, count, d_out), layer, weights.path),
        "b_dec": weights.take("b_dec", d_out),
        "threshold": above_zero(weights.take("threshold", n)),
    }
    if skip in weights:
        tensors["W_skip"] = weights.take(skip, d_in, d_out).T
    fields = {
        "d_in": d_in,
        "d_out": d_out,
        "num_features": n,
        "activation": "jumprelu",
        "skip_connection": skip in weights,
    }
    return ForeignDictionary(fields, tensors)


def write(model: PlainCrossLayer, folder: Path) -> None:
    fields, layers = model.fields, len(model.sources)
    if fields["activation"] != "jumprelu":
        raise cannot(NAME, f"has no activation '{fields['activation']}'", "it has JumpReLU")
    modules = {point: module for module, point in POINTS.items()} | {"mlp.in": "pre_feedforward_layernorm.output"}
    ends = points(model, NAME)
    if unknown := [point for point in ends if point not in modules]:
        raise cannot(NAME, "has no module for these sites", ", ".join(unknown))
    for layer, source in enumerate(model.sources):
        place = folder / f"layer_{layer}_width_{fields['num_features']}"
        place.mkdir()
        tensors = {
            "w_enc": source["W_enc"].T,
            "b_enc": source["b_enc"],
            "w_dec": all_sites(source["W_dec"], layers, layer),
            "b_dec": source["b_dec"],
            "threshold": source["threshold"],
        }
        if fields["skip_connection"]:
            tensors["affine_skip_connection"] = source["W_skip"].T
        write_safetensors(tensors, place / WEIGHTS)
        settings = {
            "architecture": "jump_relu",
            "model_name": fields["base_model_name_or_path"],
            "hf_hook_point_in": f"model.layers.{layer}.{modules[ends[0]]}",
            "hf_hook_point_out": f"model.layers.{layer}.{modules[ends[1]]}",
            "affine_connection": fields["skip_connection"],
        }
        write_settings(settings, place / CONFIG)
