"""Dictionaries of every kind for tiny models, and a recorded run."""

import torch

from hf_transcoders.circuits.graphs.recording import record
from hf_transcoders.models import TranscoderConfig, TranscoderModel
from tests.tiny_models import HIDDEN_SIZE, tiny_model, tiny_tokens


def dictionary(source, target, features=12, seed=0, activation="topk", **kwargs):
    config = TranscoderConfig(
        d_in=HIDDEN_SIZE,
        num_features=features,
        activation=activation,
        k=3 if activation == "topk" else None,
        input_site=source,
        output_site=target,
        **kwargs,
    )
    model = TranscoderModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def transcoders(*layers, **kwargs):
    return {
        f"t{layer}": dictionary(f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch", seed=layer, **kwargs)
        for layer in layers
    }


#: What a model's MLPs, attention and stream are taken apart into, by name.
DICTIONARIES = {
    "transcoders": lambda: transcoders(0, 2),
    "relu with skip": lambda: transcoders(0, 1, activation="relu", skip_connection=True),
    "before the post-norm": lambda: {"a": dictionary("layers.1.mlp.in", "layers.1.mlp.out")},
    "MLP output SAE": lambda: {**transcoders(0), "sae": dictionary("layers.1.mlp.branch", "layers.1.mlp.branch")},
    "stream SAEs": lambda: {
        **transcoders(0, 2),
        "low": dictionary("layers.1.resid_pre", "layers.1.resid_pre", seed=5),
        "high": dictionary("layers.1.resid_post", "layers.1.resid_post", seed=6),
    },
    "attention SAEs": lambda: {
        **transcoders(1),
        "out": dictionary("layers.1.attn.out", "layers.1.attn.out", seed=5),
        "branch": dictionary("layers.2.attn.branch", "layers.2.attn.branch", seed=6),
        "in": dictionary("layers.0.attn.in", "layers.0.attn.branch", seed=7, skip_connection=True),
    },
}


def recorded(family, dictionaries, length=5):
    return record(tiny_model(family), dictionaries, [tiny_tokens(1, length)[0]])[0]
