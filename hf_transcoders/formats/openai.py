"""OpenAI's SAEs of GPT-2: one torch file."""

from ..errors import TranscoderError
from ..text.printable import printable
from .dictionary import ForeignDictionary, Given
from .hook_names import PLAIN, place_at
from .tensor_files import Weights


NAME = "OpenAI SAE"


def fits(weights: Weights) -> bool:
    return {"pre_bias", "latent_bias"} <= weights.tensors.keys()


def read(weights: Weights, given: Given) -> ForeignDictionary:
    source = printable(weights.path)
    state = weights.extra.get("activation_state_dict") or {}
    k = state.get("k") if isinstance(state, dict) else None
    activation = weights.extra.get("activation", "ReLU" if k is None else "TopK")
    if activation != "ReLU":
        raise TranscoderError(
            f"{source} has the activation '{printable(activation)[:40]}' with inputs scaled for each token by itself: a "
            "TranscoderConfig cannot express that, so it is not loaded; its SAEs with ReLU can be."
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
    reads, writes = given.input_site, given.output_site or given.input_site
    return place_at(ForeignDictionary(fields, tensors), given, source, None, (reads, PLAIN), (writes, PLAIN))
