"""Cross-layer transcoders of llamascopium: the folder of its SAEs, with the decoders of each target layer in one tensor."""

from ..errors import TranscoderError
from ..text.printable import printable
from .cross_layer import assembled, no_choice
from .dictionary import ForeignDictionary, Given, setting
from .folder import Folder
from .hook_names import place
from .llamascopium import (
    CONFIG,
    FILES,
    LOG_THRESHOLD,
    NAME,
    NEWEST,
    activation_of,
    exponential,
    gate_by_decoder_norm,
    norm_factor,
    norm_names,
    scale,
)
from .llamascopium import (
    detect as is_llamascopium,
)
from .tensor_files import Weights, filled, open_weights, stacked


def detect(folder: Folder) -> bool:
    return is_llamascopium(folder) and folder.json(CONFIG).get("sae_type") == "clt"


def read(folder: Folder, given: Given, choice: dict) -> ForeignDictionary:
    no_choice(choice, folder.files.place)
    settings, source = folder.json(CONFIG), folder.label(CONFIG)
    weights = open_weights(folder.find(folder.only(FILES)))
    weights.refuse_newer(NEWEST, NAME)
    hooks = [_hooks(settings, name, source) for name in ("hook_points_in", "hook_points_out")]
    count = len(hooks[0])
    if not count or len(hooks[1]) != count:
        raise TranscoderError(
            f"{source} names {count} inputs and {len(hooks[1])} outputs, but must name one of each for every layer: copy or download "
            "it again."
        )
    if any(hook.endswith("normalized") for hook in hooks[1]):
        raise TranscoderError(
            f"{source} writes before the gain of a norm, at '{printable(hooks[1][0])[:60]}': it is not loaded."
        )
    layers = [_layer(weights, settings, source, given, hooks, layer) for layer in range(count)]
    weights.expect_only(*_names(count, layers[0].fields["activation"], weights), *norm_names(weights))

    def placed(layer, dictionary, given):
        return place(dictionary, given, source, None, hooks[0][layer], hooks[1][layer], False)

    return assembled(layers, placed, given)


def _hooks(settings: dict, name: str, source: str) -> list[str]:
    hooks = setting(settings, name, list, source)
    return [setting({name: hook}, name, str, source) for hook in hooks]


def _names(count: int, activation: str, weights: Weights) -> list[str]:
    threshold = [LOG_THRESHOLD] if activation == "jumprelu" else []
    biases = [f"b_D.{layer}" for layer in range(count) if f"b_D.{layer}" in weights]
    return ["W_E", "b_E", *(f"W_D.{layer}" for layer in range(count)), *biases, *threshold]


def _layer(
    weights: Weights, settings: dict, source: str, given: Given, hooks: list[list[str]], layer: int
) -> ForeignDictionary:
    activation, count = activation_of(settings, source), len(hooks[0])
    shape = weights["W_E"].shape
    d, n = shape[1:] if len(shape) == 3 else (0, 0)
    encoder = weights.take("W_E", count, d, n).at(layer)
    rows = [weights.take(f"W_D.{target}", target + 1, n, d).at(layer) for target in range(layer, count)]
    has_bias = setting(settings, "use_decoder_bias", bool, source, True)
    tensors = {
        "W_enc": encoder.T,
        "b_enc": weights.take("b_E", count, n).at(layer),
        "W_dec": stacked(rows),
        "b_dec": weights.take(f"b_D.{layer}", d) if has_bias else filled(0.0, d),
    }
    if activation == "jumprelu":
        tensors["threshold"] = exponential(weights.take(LOG_THRESHOLD, count, n).at(layer))
    if setting(settings, "sparsity_include_decoder_norm", bool, source, True):
        gate_by_decoder_norm(tensors, activation)
    factor = norm_factor(weights, settings, source, given, d, hooks[0][layer], "in")
    scale(
        tensors, factor, [norm_factor(weights, settings, source, given, d, hook, "out") for hook in hooks[1][layer:]]
    )
    k = setting(settings, "top_k", int, source) if activation == "topk" else None
    return ForeignDictionary({"d_in": d, "d_out": d, "num_features": n, "activation": activation, "k": k}, tensors)
