"""Weights of single attention heads, for every way in which a family stores them."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import TranscoderError
from .architectures import architecture_of
from .attention import attention_modules, num_heads
from .devices import check_one_device
from .linear_maps import LinearMap, linear_map


def output_weight(model: PreTrainedModel, layer: int) -> torch.Tensor:
    """The output projection of each head of a layer, `(heads, head_dim, hidden)`."""
    return output_map(model, layer)[0]


def output_bias(model: PreTrainedModel, layer: int) -> torch.Tensor | None:
    """Bias of the output projection of a layer, `(hidden,)`."""
    return output_map(model, layer)[1]


def output_map(model: PreTrainedModel, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output projection of a layer.

    Returns:
        `tuple`: [`output_weight`] and [`output_bias`].
    """
    architecture = architecture_of(model)
    projection = _map(model, layer, architecture, architecture.attention_output, output_projection(model, layer))
    return projection.weight.T.unflatten(0, (num_heads(model)[0], -1)), projection.bias


def query_weight(model: PreTrainedModel, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The query projection of each head, before any norm of queries and the rotary embedding.

    Returns:
        `tuple`: `(heads, head_dim, hidden)`, and the bias `(heads, head_dim)` if there is one.
    """
    return _projection(model, layer, "query")


def key_weight(model: PreTrainedModel, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As [`query_weight`], for the keys of each key-value head."""
    return _projection(model, layer, "key")


def value_weight(model: PreTrainedModel, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As [`query_weight`], for the values of each key-value head."""
    return _projection(model, layer, "value")


def output_projection(model: PreTrainedModel, layer: int) -> nn.Module:
    """The module that projects the outputs of a layer's heads to the hidden size."""
    name = architecture_of(model).attention_output
    (module,) = attention_modules(model, [layer])
    if name is None:
        raise TranscoderError(
            f"The output projection of the heads of this {model.config.model_type} model is not known: register the "
            "family with its `attention_output`."
        )
    return module.get_submodule(name)


def check_projected(model: PreTrainedModel, part: str) -> None:
    """Raises [`TranscoderError`] where `"query"`, `"key"` or `"value"` is not a linear map of the input of attention."""
    if _projection_name(architecture_of(model), part) is None:
        raise TranscoderError(
            f"The {part} of the heads of this {model.config.model_type} model is not known to be one projection of what "
            "attention reads, so heads have no linear maps: patch or edit heads, or use a model of another family."
        )


def _projection_name(architecture, part):
    return architecture.fused_qkv or getattr(architecture, part)


def _projection(model, layer, part):
    architecture = architecture_of(model)
    (module,) = attention_modules(model, [layer])
    check_projected(model, part)
    heads, kv_heads = num_heads(model)
    count = heads if part == "query" else kv_heads
    name = _projection_name(architecture, part)
    projection = _map(model, layer, architecture, name, module.get_submodule(name))
    weight, bias = projection.weight, projection.bias
    if architecture.fused_qkv is not None:
        rows = _fused_rows(part, heads, kv_heads, len(weight), architecture.fused_by_head).to(weight.device)
        weight, bias = weight[rows], None if bias is None else bias[rows]
    return weight.unflatten(0, (count, -1)), None if bias is None else bias.unflatten(0, (count, -1))


def _fused_rows(part, heads, kv_heads, width, by_head):
    """Rows of a fused projection that compute one of the three parts, head after head."""
    rows = torch.arange(width)
    number = ("query", "key", "value").index(part)
    if by_head:
        return rows.view(heads, 3, -1)[:, number].reshape(-1)
    head_dim = width // (heads + 2 * kv_heads)
    return rows.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])[number]


def _map(model, layer, architecture, name, projection) -> LinearMap:
    check_one_device(model)
    return linear_map(projection, f"layers.{layer}.{architecture.attention}.{name}")
