"""
Write dictionaries of this library in the formats of others, with what they compute, for `read_exports.py`.

    python -m tests.interop.write_exports FOLDER
    python -m tests.interop.write_exports FOLDER --transcoders runs/set --model smollm2-135m-instruct --text FILE

The second line writes a trained set of transcoders for SAELens and circuit-tracer, with what it computes on a text.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_transcoders import capture
from hf_transcoders.lm.offline_models import load_language_model
from hf_transcoders.models import TranscoderSet

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


def trained_cases(path: str):
    trained = TranscoderSet.from_pretrained(path).eval()
    yield "circuit-tracer", "trained", trained
    for name, dictionary in trained.items():
        yield "saelens", f"trained_{name}", dictionary


@torch.no_grad()
def activations(model_name: str, text: str, sites) -> dict[str, torch.Tensor]:
    """Activations of the first 512 tokens of a text, without the first, by site."""
    model, tokenizer = load_language_model(model_name, dtype=torch.float32)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :512]
    with capture(model, sites) as found:
        model(ids)
    return {str(site): values[0, 1:] for site, values in found.items()}


@torch.no_grad()
def write(folder: Path, cases, inputs=None) -> None:
    for to, case, made in cases:
        target = folder / f"{to}_{case}"
        made.save_pretrained(target, format=to)
        model = list(made.values())[-1] if isinstance(made, TranscoderSet) else made
        rows = torch.randn(32, model.config.d_in) if inputs is None else inputs[model.config.input_site]
        found = {"inputs": rows, "features": model.encode(rows), "reconstruction": model(rows).reconstruction}
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, f"{target}.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--transcoders", help="trained set of transcoders; by default, new dictionaries of every kind")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="language model of the set")
    parser.add_argument("--text", type=Path, help="text file that the model reads")
    args = parser.parse_args()
    if args.transcoders is None:
        write(args.folder, cases())
        return
    sites = [dictionary.config.input_site for dictionary in TranscoderSet.from_pretrained(args.transcoders).values()]
    inputs = activations(args.model, args.text.read_text(encoding="utf-8")[:20_000], sites)
    write(args.folder, trained_cases(args.transcoders), inputs)


if __name__ == "__main__":
    main()
