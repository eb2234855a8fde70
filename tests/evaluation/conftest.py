import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_transcoders.models import TranscoderConfig, TranscoderModel


VOCABULARY, WIDTH, LAYERS = 50, 16, 3


@pytest.fixture
def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def blocks():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (7, 12), generator=generator)
    ids[:, 0] = 1
    ids[2, 5] = 2
    return [{"input_ids": row.tolist()} for row in ids]


def random_dictionary(base, layer, activation="topk", seed=0, output="mlp.branch", **kwargs):
    torch.manual_seed(seed)
    config = TranscoderConfig.for_model(
        base,
        input_site=f"layers.{layer}.mlp.in",
        output_site=f"layers.{layer}.{output}",
        num_features=40,
        activation=activation,
        decoder_init="random",
        **kwargs,
    )
    return TranscoderModel(config).eval()


def perfect_autoencoder(base, site):
    """An identity in the form of a dictionary: one feature for each direction of each axis."""
    config = TranscoderConfig.for_model(base, input_site=site, num_features=2 * WIDTH, activation="relu")
    dictionary = TranscoderModel(config).eval()
    axes = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    dictionary.W_enc.data, dictionary.W_dec.data = axes.clone(), axes.clone()
    return dictionary
