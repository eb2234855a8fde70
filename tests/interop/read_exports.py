"""
Load what `write_exports.py` has written with the libraries whose formats they are, and compare what they compute.

Run in the environment of `write_fixtures.py`:

    .venv-peers/bin/python tests/interop/read_exports.py FOLDER

It prints the largest difference of features and reconstructions, and fails where one exceeds 1e-5 of the largest value.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def load_saelens(folder):
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    return sae.encode, sae


def load_sparsify(folder):
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(next(path for path in folder.iterdir() if path.is_dir()))

    def encode(inputs):
        values, indices, _ = coder.encode(inputs)
        return torch.zeros(len(inputs), coder.num_latents).scatter_(-1, indices, values)

    return encode, lambda inputs: coder(inputs, torch.randn_like(inputs)).sae_out


def load_circuit_tracer(folder):
    from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder

    # A file for each layer, of which the last was compared.
    path = max(folder.glob("layer_*.safetensors"), key=lambda path: int(path.stem.removeprefix("layer_")))
    layer = int(path.stem.removeprefix("layer_"))
    transcoder = load_relu_transcoder(str(path), layer, torch.device("cpu"), torch.float32)
    return transcoder.encode, transcoder


def load_dictionary_learning(folder):
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(str(folder), "cpu")
    return dictionary.encode, dictionary


LOADERS = {
    "saelens": load_saelens,
    "sparsify": load_sparsify,
    "circuit-tracer": load_circuit_tracer,
    "dictionary-learning": load_dictionary_learning,
}


@torch.no_grad()
def compare(folder: Path) -> bool:
    good = True
    for path in sorted(folder.glob("*.safetensors")):
        expected = load_file(path)
        encode, forward = LOADERS[path.stem.partition("_")[0]](folder / path.name.removesuffix(".safetensors"))
        found = {"features": encode(expected["inputs"]), "reconstruction": forward(expected["inputs"])}
        errors = {name: (found[name] - expected[name]).abs().max() / expected[name].abs().max() for name in found}
        good &= all(error < 1e-5 for error in errors.values())
        print(f"{path.stem:<40} features {errors['features']:.1e}  reconstruction {errors['reconstruction']:.1e}")
    return good


if __name__ == "__main__":
    sys.exit(not compare(Path(sys.argv[1])))
