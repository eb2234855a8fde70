"""Small cross-layer transcoders with random weights, and sets of transcoders to make them from."""

import torch

from hf_transcoders import (
    CrossLayerTranscoder,
    CrossLayerTranscoderConfig,
    TranscoderConfig,
    TranscoderModel,
    TranscoderSet,
)


# A configuration of each activation, with its penalties.
ACTIVATIONS = {
    "relu": {"activation": "relu", "l1_coefficient": 0.1},
    "tanh": {"activation": "relu", "tanh_coefficient": 0.1},
    "topk": {"activation": "topk", "k": 3},
    "batchtopk": {"activation": "batchtopk", "k": 3},
    "batchtopk over all": {"activation": "batchtopk", "k": 3, "batchtopk_scope": "all"},
    "jumprelu": {"activation": "jumprelu", "tanh_coefficient": 0.1, "threshold_init": 0.2},
}
KINDS = list(ACTIVATIONS)


def sites(layers=3):
    return {
        "input_sites": [f"layers.{layer}.mlp.in" for layer in range(layers)],
        "output_sites": [f"layers.{layer}.mlp.branch" for layer in range(layers)],
    }


def randomize_(model, seed=0):
    """Random weights of moderate size, so that some features are active and some are not."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        noise = torch.rand(value.shape, generator=generator).to(value)
        if name.endswith("threshold"):
            value.copy_(0.2 + 0.2 * noise if value.dim() else torch.tensor(0.3))
        elif name.endswith("_scale"):
            value.copy_(0.5 + noise)
        else:
            value.copy_((2 * noise - 1) * (0.2 if name.endswith(("b_enc", "b_dec")) else 0.5))
    return model


def cross_layer(kind="topk", layers=3, **changes):
    config = {"d_in": 6, "d_out": 5, "num_features": 12, **ACTIVATIONS[kind], **sites(layers), **changes}
    model = randomize_(CrossLayerTranscoder(CrossLayerTranscoderConfig(**config)))
    model.share_scales_()
    return model.eval()


def activations(model, tokens=7, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    widths = dict.fromkeys(model.config.input_sites, model.config.d_in)
    widths |= dict.fromkeys(model.config.output_sites, model.config.d_out)
    return {site: torch.randn(tokens, width, generator=generator).to(dtype) for site, width in widths.items()}


def per_layer_set(kind="topk", layers=3, **changes):
    """Transcoders of several layers with random weights, measured on random activations."""
    fields = {name: value for name, value in ACTIVATIONS[kind].items() if not name.startswith(("tanh", "batchtopk_"))}
    config = {"d_in": 6, "d_out": 5, "num_features": 12, **fields, **changes}
    models = []
    for number, (read, write) in enumerate(zip(*sites(layers).values(), strict=True)):
        model = TranscoderModel(TranscoderConfig(input_site=read, output_site=write, **config))
        models.append(randomize_(model, seed=number))
        model.config.target_variance = 1.5 + number
    return TranscoderSet(models).eval()
