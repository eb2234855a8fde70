"""SAEs as two linear layers in one torch file: Goodfire's and those of DeepSeek-R1."""

from ..text.printable import printable
from .dictionary import ForeignDictionary, Given
from .hook_names import PLAIN, place_at
from .tensor_files import Weights


NAME = "two linear layers"

# What the layers are called.
_NAMES = (("encoder_linear", "decoder_linear"), ("encoder", "decoder"))


def fits(weights: Weights) -> bool:
    return _layers(weights) is not None


def read(weights: Weights, given: Given) -> ForeignDictionary:
    encoder, decoder = _layers(weights)  # pyright: ignore[reportGeneralTypeIssues]
    n, d = weights.matrix(f"{encoder}.weight")
    tensors = {
        "W_enc": weights[f"{encoder}.weight"],
        "b_enc": weights.take(f"{encoder}.bias", n),
        "W_dec": weights.take(f"{decoder}.weight", d, n).T,
        "b_dec": weights.take(f"{decoder}.bias", d),
    }
    fields = {"d_in": d, "d_out": d, "num_features": n, "activation": "relu"}
    reads, writes = given.input_site, given.output_site or given.input_site
    source = printable(weights.path)
    return place_at(ForeignDictionary(fields, tensors), given, source, None, (reads, PLAIN), (writes, PLAIN))


def _layers(weights: Weights) -> tuple[str, str] | None:
    """The names of the two layers, where the file holds them and nothing else."""
    for encoder, decoder in _NAMES:
        if weights.tensors.keys() == {
            f"{layer}.{kind}" for layer in (encoder, decoder) for kind in ("weight", "bias")
        }:
            return encoder, decoder
    return None
