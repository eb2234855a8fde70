"""
Write dictionaries of this library in the formats of others, with what they compute, for `read_exports.py`.

    python -m tests.interop.write_exports FOLDER
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_transcoders.models import TranscoderSet
from hf_transcoders.models.foreign import write_foreign

from ..formats.test_writing import MLP, make


def cases():
    for activation in ("relu", "topk", "jumprelu", "gated", "batchtopk"):
        yield "saelens", activation, make(activation, pre_bias=True, normalization="standardize")
        yield "dictionary-learning", activation, make(activation, pre_bias=True, normalization="scale")
    for activation in ("relu", "jumprelu"):
        yield "saelens", f"{activation}_skip_transcoder", make(activation, MLP, skip_connection=True, pre_bias=True)
    for normalization, activation in (("token_standardize", "topk"), ("token_scale", "jumprelu")):
        yield "saelens", normalization, make(activation, pre_bias=True, normalization=normalization)
    yield "sparsify", "sae", make("topk", pre_bias=True, normalization="standardize")
    yield "sparsify", "sae_with_skip", make("topk", pre_bias=True, skip_connection=True)
    yield "sparsify", "skip_transcoder", make("topk", MLP, skip_connection=True, normalization="standardize")
    for activation in ("relu", "jumprelu", "batchtopk"):
        sites = [(f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch") for layer in range(2)]
        models = [make(activation, pair, skip_connection=True, normalization="scale") for pair in sites]
        yield "circuit-tracer", activation, TranscoderSet(models)


@torch.no_grad()
def write(folder: Path) -> None:
    for to, case, made in cases():
        target = folder / f"{to}_{case}"
        write_foreign(made if isinstance(made, TranscoderSet) else {"one": made}, target, to)
        model = made.values()[-1] if isinstance(made, TranscoderSet) else made
        inputs = torch.randn(32, model.config.d_in)
        found = {"inputs": inputs, "features": model.encode(inputs), "reconstruction": model(inputs).reconstruction}
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, f"{target}.safetensors")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
