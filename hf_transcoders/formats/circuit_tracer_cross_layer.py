"""Cross-layer transcoders of circuit-tracer: `W_enc_<layer>.safetensors` and `W_dec_<layer>.safetensors`."""

import re
from pathlib import Path

import yaml

from ..errors import TranscoderError
from ..text.printable import printable
from .cross_layer import PlainCrossLayer, all_sites, assembled, cannot, decoders, no_choice, points, whole_layers
from .dictionary import ForeignDictionary, Given, setting
from .folder import Folder
from .hook_names import hook_of_site, place
from .tensor_files import open_weights
from .writing import write_safetensors


NAME = "circuit-tracer"
CONFIG = "config.yaml"
KIND = "cross_layer_transcoder"
FILES = r"W_enc_(\d+)\.safetensors"
# What files without these settings mean.
_INPUT_HOOK, _OUTPUT_HOOK = "hook_resid_mid", "hook_mlp_out"


def detect(folder: Folder) -> bool:
    return bool(folder.matching(FILES))


def read(folder: Folder, given: Given, choice: dict) -> ForeignDictionary:
    no_choice(choice, folder.files.place)
    source, settings = folder.label(CONFIG), folder.yaml(CONFIG) if CONFIG in folder else {}
    kind = setting(settings, "model_kind", str, source, KIND)
    if kind != KIND:
        raise TranscoderError(
            f"{source} says '{printable(kind)[:60]}' where its files are those of a cross-layer transcoder: copy or download it again."
        )
    numbers = [int(re.fullmatch(FILES, name)[1]) for name in folder.matching(FILES)]  # pyright: ignore[reportOptionalSubscript]
    whole_layers(numbers, folder.files.place)
    layers = [_layer(folder, layer, len(numbers)) for layer in range(len(numbers))]
    hooks = [
        setting(settings, name, str, source, default)
        for name, default in (("feature_input_hook", _INPUT_HOOK), ("feature_output_hook", _OUTPUT_HOOK))
    ]
    name = setting(settings, "model_name", str, source, None)
    if hooks[1].endswith("normalized"):
        raise TranscoderError(
            f"{source} writes at '{printable(hooks[1])[:60]}', before the gain of a norm: it is not loaded."
        )

    def placed(layer, dictionary, given):
        reads, writes = (f"blocks.{layer}.{hook}" for hook in hooks)
        # Its language models are loaded without processing.
        return place(dictionary, given, source, name, reads, writes, False, False)

    return assembled(layers, placed, given)


def _layer(folder: Folder, layer: int, count: int) -> ForeignDictionary:
    encoder = open_weights(folder.find(f"W_enc_{layer}.safetensors"))
    decoder = open_weights(folder.find(f"W_dec_{layer}.safetensors"))
    named = {name: f"{name}_{layer}" for name in ("W_enc", "b_enc", "b_dec", "threshold")}
    encoder.expect_only(*named.values())
    decoder.expect_only(f"W_dec_{layer}")
    n, d_in = encoder.matrix(named["W_enc"])
    written = decoder[f"W_dec_{layer}"]
    d_out = written.shape[-1] if written.shape else 0
    tensors = {
        "W_enc": encoder[named["W_enc"]],
        "b_enc": encoder.take(named["b_enc"], n),
        "W_dec": decoders(written, (n, count - layer, d_out), 0, decoder.path),
        "b_dec": encoder.take(named["b_dec"], d_out),
    }
    if named["threshold"] in encoder:
        tensors["threshold"] = encoder.take(named["threshold"], n)
    activation = "jumprelu" if "threshold" in tensors else "relu"
    return ForeignDictionary({"d_in": d_in, "d_out": d_out, "num_features": n, "activation": activation}, tensors)


def write(model: PlainCrossLayer, folder: Path) -> None:
    fields, layers = model.fields, len(model.sources)
    if fields["activation"] not in ("relu", "jumprelu"):
        raise cannot(NAME, f"has no cross-layer activation '{fields['activation']}'", "it has ReLU and JumpReLU")
    if fields["skip_connection"]:
        raise cannot(NAME, "stores no skip connections of cross-layer transcoders", "train one without")
    hooks = [hook_of_site(f"layers.0.{point}") for point in points(model, NAME)]
    if None in hooks:
        raise cannot(
            NAME, "has no hook for these sites", ", ".join((fields["input_sites"][0], fields["output_sites"][0]))
        )
    for layer, source in enumerate(model.sources):
        rows = all_sites(source["W_dec"], layers, layer)[:, layer:]
        own = {f"{name}_{layer}": tensor for name, tensor in source.items() if name != "W_dec"}
        write_safetensors(own, folder / f"W_enc_{layer}.safetensors")
        write_safetensors({f"W_dec_{layer}": rows}, folder / f"W_dec_{layer}.safetensors")
    settings = {
        "model_name": fields["base_model_name_or_path"],
        "model_kind": KIND,
        "feature_input_hook": hooks[0].split(".", 2)[2],  # pyright: ignore[reportOptionalMemberAccess]
        "feature_output_hook": hooks[1].split(".", 2)[2],  # pyright: ignore[reportOptionalMemberAccess]
        "scan": None,
    }
    (folder / CONFIG).write_text(yaml.safe_dump(settings), encoding="utf-8")
