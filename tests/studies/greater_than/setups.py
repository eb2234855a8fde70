"""Transcoders for tests of studies."""

import torch

from hf_transcoders import TranscoderConfig, TranscoderModel


def transcoder_of(model, layer, seed=0, num_features=24, output="mlp.branch", **changes):
    config = TranscoderConfig.for_model(
        model,
        f"layers.{layer}.mlp.in",
        f"layers.{layer}.{output}",
        num_features=num_features,
        decoder_init="random",
        decoder_norm="free",
        **{"activation": "relu", **changes},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transcoder = TranscoderModel(config)
        with torch.no_grad():
            for parameter in transcoder.parameters():
                parameter.normal_(std=0.4)
            if config.normalization != "none":
                transcoder.input_scale.uniform_(0.5, 2)
                transcoder.output_scale.uniform_(0.5, 2)
                transcoder.input_mean.normal_()
                transcoder.output_mean.normal_()
    return transcoder.eval()
