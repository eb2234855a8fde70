"""Weights of heads reproduce the queries, keys, values and outputs of attention."""

import pytest
import torch

from hf_transcoders.lm import Site, capture, edit_attention
from hf_transcoders.lm.architectures import num_layers
from hf_transcoders.lm.heads import key_weight, output_bias, output_weight, query_weight, value_weight

from ..tiny_models import TINY_CONFIGS, tiny_model, tiny_tokens


def _project(inputs, weight, bias):
    projected = torch.einsum("bsi,hdi->bhsd", inputs, weight)
    return projected if bias is None else projected + bias[:, None]


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_values_and_outputs(family):
    model = tiny_model(family)
    seen = {}
    sites = [Site(point, layer) for layer in range(num_layers(model)) for point in ("attn.in", "attn.out")]
    with torch.no_grad(), capture(model, sites, stop=False) as activations:
        keep = lambda part: lambda tensor, layer: seen.__setitem__((part, layer), tensor.clone())  # noqa: E731
        with edit_attention(model, value=keep("value"), z=keep("z")):
            model(input_ids=tiny_tokens())
        for layer in range(num_layers(model)):
            values = _project(activations[Site("attn.in", layer)], *value_weight(model, layer))
            torch.testing.assert_close(values, seen["value", layer], rtol=1e-4, atol=1e-4)
            written = torch.einsum("bhsd,hdo->bso", seen["z", layer], output_weight(model, layer))
            bias = output_bias(model, layer)
            written = written if bias is None else written + bias
            torch.testing.assert_close(written, activations[Site("attn.out", layer)], rtol=1e-4, atol=1e-4)


# Families without a norm on queries; the first token is not turned by rotary embeddings.
@pytest.mark.parametrize("family", [family for family in TINY_CONFIGS if family not in ("qwen3", "gemma3_text")])
def test_queries_and_keys_of_the_first_token(family):
    model = tiny_model(family)
    seen = {}
    keep = lambda part: lambda tensor, layer: seen.__setitem__((part, layer), tensor.clone())  # noqa: E731
    with torch.no_grad(), capture(model, "layers.1.attn.in", stop=False) as activations:
        with edit_attention(model, query=keep("query"), key=keep("key")):
            model(input_ids=tiny_tokens())
        inputs = activations["layers.1.attn.in"]
        queries = _project(inputs, *query_weight(model, 1))
        keys = _project(inputs, *key_weight(model, 1))
    scale = model.config.hidden_size // 4 if family == "opt" else 1
    torch.testing.assert_close(queries[:, :, 0] / scale**0.5, seen["query", 1][:, :, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(keys[:, :, 0], seen["key", 1][:, :, 0], rtol=1e-4, atol=1e-4)
