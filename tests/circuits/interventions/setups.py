"""Random dictionaries of every kind for the tiny models."""

import torch

from hf_transcoders import TranscoderConfig, TranscoderModel, TranscoderSet
from tests.tiny_models import NUM_LAYERS


FEATURES = 24


def random_dictionary(model, input_site, output_site=None, seed=0, **changes):
    """A dictionary with random weights, normalisation included, about a third of whose features are active."""
    changes = {"activation": "relu", "num_features": FEATURES, "decoder_init": "random", **changes}
    if changes.get("tied"):
        changes.pop("decoder_init")
    config = TranscoderConfig.for_model(model, input_site, output_site, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dictionary = TranscoderModel(config).eval()
        with torch.no_grad():
            for tensor in (*dictionary.parameters(), *dictionary.buffers()):
                tensor.normal_(std=0.3)
            if config.normalization != "none":
                dictionary.input_scale.abs_().add_(0.5)
                dictionary.output_scale.abs_().add_(0.5)
            if config.activation in ("jumprelu", "batchtopk"):
                dictionary.threshold.fill_(0.1)
    return dictionary


def transcoder_set(model, output="mlp.branch", **changes):
    """A transcoder for each layer, named `layers.<layer>.mlp.transcoder`."""
    return TranscoderSet(
        {
            f"layers.{layer}.mlp.transcoder": random_dictionary(
                model, f"layers.{layer}.mlp.in", f"layers.{layer}.{output}", seed=layer, **changes
            )
            for layer in range(NUM_LAYERS)
        }
    )
