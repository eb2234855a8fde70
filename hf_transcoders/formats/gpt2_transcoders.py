"""The 2024 transcoders of GPT-2: one torch file with settings and weights, some of them gzip-compressed."""

from ..errors import TranscoderError
from ..text.printable import printable
from .dictionary import ForeignDictionary, Given, setting
from .hook_names import place
from .tensor_files import Weights


NAME = "GPT-2 transcoders"


def fits(weights: Weights) -> bool:
    return {"W_enc", "b_dec_out"} <= weights.tensors.keys()


def read(weights: Weights, given: Given) -> ForeignDictionary:
    weights.expect_only("W_enc", "W_dec", "b_enc", "b_dec", "b_dec_out")
    settings = vars(weights.extra.get("cfg")) if hasattr(weights.extra.get("cfg"), "__dict__") else {}
    source = printable(weights.path)
    if settings.get("is_transcoder") is False:
        raise TranscoderError(f"{source} calls itself no transcoder, but has the tensors of one: it is not loaded.")
    d_in, n = weights.matrix("W_enc")
    d_out = weights.matrix("W_dec")[1]
    tensors = {
        "W_enc": weights["W_enc"].T,
        "b_enc": weights.take("b_enc", n),
        "W_dec": weights.take("W_dec", n, d_out),
        "b_dec": weights.take("b_dec_out", d_out),
        "b_pre": weights.take("b_dec", d_in),
    }
    fields = {
        "d_in": d_in,
        "d_out": d_out,
        "num_features": n,
        "activation": "relu",
        "pre_bias": True,
        "l1_coefficient": setting(settings, "l1_coefficient", float, source, 0.0),
    }
    names = ("hook_point", "out_hook_point", "dataset_path", "context_size")
    facts = {name: settings[name] for name in names if isinstance(settings.get(name), str | int)}
    hooks = [setting(settings, name, str, source, None) for name in names[:2]]
    base_model = setting(settings, "model_name", str, source, None)
    # Models were loaded with folded norms and centered weights then.
    return place(ForeignDictionary(fields, tensors, facts), given, source, base_model, *hooks, False, True)  # pyright: ignore[reportCallIssue]
