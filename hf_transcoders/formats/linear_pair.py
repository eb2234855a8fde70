"""SAEs as two linear layers in one torch file: Goodfire's and those of DeepSeek-R1."""

from ..text.printable import printable
from .dictionary import ForeignDictionary, Given
from .folder import Folder
from .hook_names import PLAIN, place_at


NAME = "two linear layers"

# What the layers are called.
_NAMES = (("encoder_linear", "decoder_linear"), ("encoder", "decoder"))


def detect(folder: Folder) -> bool:
    return _layers(folder.torch_weights()) is not None


def read(folder: Folder, given: Given) -> ForeignDictionary:
    weights = folder.torch_weights()
    encoder, decoder = _layers(weights)
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


def _layers(weights) -> tuple[str, str] | None:
    """The names of the two layers, where the file holds them and nothing else."""
    if weights is None:
        return None
    for encoder, decoder in _NAMES:
        if weights.tensors.keys() == {
            f"{layer}.{kind}" for layer in (encoder, decoder) for kind in ("weight", "bias")
        }:
            return encoder, decoder
    return None
