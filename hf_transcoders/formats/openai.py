"""OpenAI's SAEs of GPT-2: one torch file, with ReLU (versions 1 to 4) or with TopK of normalized tokens (5)."""

from ..errors import TranscoderError
from ..text.printable import printable
from .dictionary import ForeignDictionary, Given, setting
from .hook_names import PLAIN, place_at
from .tensor_files import Weights


NAME = "OpenAI SAE"


def fits(weights: Weights) -> bool:
    return {"pre_bias", "latent_bias"} <= weights.tensors.keys()


def read(weights: Weights, given: Given) -> ForeignDictionary:
    source = printable(weights.path)
    state = weights.extra.get("activation_state_dict") or {}
    state = state if isinstance(state, dict) else {}
    activation = weights.extra.get("activation", "TopK" if "k" in state else "ReLU")
    if activation not in ("ReLU", "TopK") or state.get("postact_fn", "ReLU") != "ReLU":
        raise TranscoderError(
            f"{source} has the activation '{printable(state.get('postact_fn', activation))[:40]}', which cannot be loaded: ReLU and TopK "
            "with ReLU can."
        )
    weights.expect_only("encoder.weight", "decoder.weight", "pre_bias", "latent_bias", "stats_last_nonzero")
    n, d = weights.matrix("encoder.weight")
    bias = weights.take("pre_bias", d)
    tensors = {
        "W_enc": weights["encoder.weight"],
        "b_enc": weights.take("latent_bias", n),
        "W_dec": weights.take("decoder.weight", d, n).T,
        "b_dec": bias,
        "b_pre": bias,
    }
    fields = {"d_in": d, "d_out": d, "num_features": n, "activation": "relu", "pre_bias": True}
    if activation == "TopK":
        # Their code normalizes the inputs of TopK, and of nothing else.
        k = setting(state, "k", int, source)
        fields |= {"activation": "topk", "k": k, "normalization": "token_standardize"}
    reads, writes = given.input_site, given.output_site or given.input_site
    return place_at(ForeignDictionary(fields, tensors), given, source, None, (reads, PLAIN), (writes, PLAIN))
