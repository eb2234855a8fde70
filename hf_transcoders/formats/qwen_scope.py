"""Qwen Scope: a torch file with the TopK SAE of one layer, which does not say how many features are active."""

from ..errors import TranscoderError
from ..text.printable import printable
from .dictionary import ForeignDictionary, Given
from .hook_names import PLAIN, place_at
from .tensor_files import Weights


NAME = "Qwen Scope"


def fits(weights: Weights) -> bool:
    """Whether the file holds these four tensors alone, with rows of features in the encoder and columns in the decoder."""
    if weights.tensors.keys() != {"W_enc", "W_dec", "b_enc", "b_dec"}:
        return False
    shape = weights["W_enc"].shape
    return weights["W_dec"].shape == shape[::-1] and weights["b_enc"].shape == shape[:1]


def read(weights: Weights, given: Given) -> ForeignDictionary:
    source = printable(weights.path)
    n, d = weights.matrix("W_enc")
    if given.k is None and given.complete:
        raise TranscoderError(
            f"{source} does not say how many features are active for each token: give `k=`, which the authors write after 'L0' in the "
            "name of the repo."
        )
    tensors = {
        "W_enc": weights["W_enc"],
        "b_enc": weights["b_enc"],
        "W_dec": weights["W_dec"].T,
        "b_dec": weights.take("b_dec", d),
    }
    fields = {"d_in": d, "d_out": d, "num_features": n, "activation": "topk", "k": given.k or 1}
    reads, writes = given.input_site, given.output_site or given.input_site
    return place_at(ForeignDictionary(fields, tensors), given, source, None, (reads, PLAIN), (writes, PLAIN))
