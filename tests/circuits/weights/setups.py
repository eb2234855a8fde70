"""Small dictionaries with every kind of weight, for the tiny models."""

import torch

from hf_transcoders import TranscoderConfig, TranscoderModel


def dictionary(model, layer, seed, *, read="mlp.in", write="mlp.out", num_features=10, **kwargs):
    """A random dictionary in whose units nothing is one: norms, offsets and scales all matter."""
    config = TranscoderConfig.for_model(
        model,
        f"layers.{layer}.{read}",
        f"layers.{layer}.{write}",
        num_features=num_features,
        activation="relu",
        normalization="standardize",
        pre_bias=True,
        **kwargs,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = TranscoderModel(config)
        with torch.no_grad():
            for tensor in (*made.parameters(), made.input_mean, made.output_mean):
                tensor.normal_(std=0.4)
            made.input_scale.uniform_(0.5, 2)
            made.output_scale.uniform_(0.5, 2)
    return made.eval()


def pair(model, **kwargs):
    return {"early": dictionary(model, 0, 1, **kwargs), "late": dictionary(model, 2, 2, num_features=7)}
