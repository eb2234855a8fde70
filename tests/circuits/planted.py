"""A model with one circuit, put there by hand."""

import torch

from hf_transcoders import TranscoderConfig, TranscoderModel
from tests.tiny_models import HIDDEN_SIZE, tiny_model


ANSWER, START, OTHER = 9, 7, 5


def planted():
    """An OPT whose only circuit is: token 7, feature 3 of layer 0, head 1 of layer 1, feature 5 of layer 1, token 9."""
    model = tiny_model("opt")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1.0)
        # Read directions have no mean, so that norms leave them as they are.
        directions = torch.eye(HIDDEN_SIZE)[:8] - torch.eye(HIDDEN_SIZE)[8:16]
        start, first, moved, answer, other = directions[:5]
        embeddings = model.get_input_embeddings().weight
        embeddings[START], embeddings[OTHER], embeddings[ANSWER] = start, other, answer
        layers = model.model.decoder.layers
        layers[0].fc1.weight[3], layers[0].fc2.weight[:, 3] = start, first
        layers[1].self_attn.v_proj.weight[8] = first
        layers[1].self_attn.out_proj.weight[:, 8] = moved
        layers[1].fc1.weight[5], layers[1].fc2.weight[:, 5] = moved, answer
    dictionaries = {}
    for layer in (0, 1):
        config = TranscoderConfig(
            d_in=HIDDEN_SIZE, num_features=48, activation="relu",
            input_site=f"layers.{layer}.mlp.in", output_site=f"layers.{layer}.mlp.out",
        )  # fmt: skip
        dictionary = dictionaries[f"t{layer}"] = TranscoderModel(config).eval()
        with torch.no_grad():
            for parameter in dictionary.parameters():
                parameter.zero_()
            dictionary.W_enc.copy_(layers[layer].fc1.weight)
            dictionary.W_dec.copy_(layers[layer].fc2.weight.T)
    return model, dictionaries
