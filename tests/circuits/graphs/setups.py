"""Dictionaries of every kind, at every site that supports one, for the tiny models."""

import torch

from hf_transcoders import Site
from hf_transcoders.circuits.graphs.read_vectors import FINAL, ReadVectors
from hf_transcoders.circuits.graphs.recording import record
from hf_transcoders.lm.architectures import has_parallel_residual
from hf_transcoders.models.linear_parts import encoder_rows
from tests.circuits.interventions.setups import random_dictionary
from tests.tiny_models import NUM_LAYERS, tiny_tokens


LENGTHS = (12, 9)


def _transcoders(model, output, **changes):
    return [
        random_dictionary(model, f"layers.{layer}.mlp.in", f"layers.{layer}.{output}", seed=layer, **changes)
        for layer in range(NUM_LAYERS)
    ]


def mixes(model) -> dict[str, list]:
    """Name -> dictionaries of one model that are used together."""
    between = "resid_pre" if has_parallel_residual(model) else "resid_mid"

    def one(source, target, **changes):
        return random_dictionary(model, source, target, seed=7, **changes)

    return {
        "relu": _transcoders(model, "mlp.branch"),
        "topk before a post-norm": _transcoders(model, "mlp.out", activation="topk", k=5),
        "skips": _transcoders(model, "mlp.out", activation="topk", k=5, skip_connection=True, normalization="standardize"),
        "before the norm, a layer without": [
            one(f"layers.{layer}.{between}", f"layers.{layer}.mlp.branch", skip_connection=True) for layer in (0, 2)
        ],
        "jumprelu, gated": [
            one("layers.0.mlp.in", "layers.0.mlp.out", activation="jumprelu", normalization="standardize"),
            one("layers.1.mlp.in", "layers.1.mlp.branch", activation="gated"),
        ],
        "SAEs of the stream": [
            one("layers.1.resid_pre", "layers.1.resid_pre", skip_connection=True),
            one("layers.1.resid_post", "layers.1.resid_post", tied=True),
            one("layers.2.mlp.in", "layers.2.mlp.out"),
        ],
        "attention": [
            one("layers.1.attn.out", "layers.1.attn.out"),
            one("layers.2.attn.in", "layers.2.attn.out", skip_connection=True),
            one("layers.0.attn.branch", "layers.0.attn.branch"),
        ],
        "over several layers": [
            one("layers.0.mlp.in", "layers.2.mlp.branch", skip_connection=True),
            one("layers.1.mlp.out", "layers.1.mlp.out"),
        ],
        "none": [],
    }  # fmt: skip


def runs_of(model, dictionaries):
    """Two prompts of different length in one forward pass."""
    prompts = tiny_tokens(2, LENGTHS[0])
    named = {f"dictionary {number}": dictionary for number, dictionary in enumerate(dictionaries)}
    return record(model, named, [prompts[row, :length] for row, length in enumerate(LENGTHS)])


def some_functionals(run, of_features=4):
    """Directions at every kind of place, some active features of each dictionary, and their values in the model."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, (site, place) in enumerate(sorted(run.activations.items(), key=str)):
        position = (3 + 5 * number) % len(place)
        vector = torch.randn(place.shape[-1], generator=generator)
        found.append((site.layer, site.point, position, vector, 0.0, place[position] @ vector))
    for position in (3, len(run.final) - 1):
        vector = torch.randn(run.final.shape[-1], generator=generator)
        found.append((run.num_layers, FINAL, position, vector, 0.5, run.final[position] @ vector + 0.5))
    for part in (part for writer in run.writers.values() for part in writer.parts):
        dictionary = run.dictionaries[part.dictionary]
        read = Site.parse(dictionary.config.input_site)
        if read.point == "mlp.out":
            continue
        rows, biases = encoder_rows(dictionary, part.feature)
        for at in range(0, len(rows), max(1, len(rows) // of_features)):
            value = part.activation[at]
            found.append((read.layer, read.point, int(part.position[at]), rows[at], float(biases[at]), value))
    layer, point, position, vector, bias, value = zip(*found, strict=True)
    functionals = ReadVectors(
        torch.tensor(layer), list(point), torch.tensor(position), torch.stack(vector), torch.tensor(bias)
    )
    return functionals, torch.stack(value)
