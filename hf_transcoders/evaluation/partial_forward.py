"""Running only those parts of a language model whose result is not known yet."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..lm import Site, locate, num_layers
from ..lm.hooks import after_call, wrap_forward


def block_of(model: PreTrainedModel, site: Site | str) -> int:
    """The first block whose output depends on a site, or 0 for a module outside the blocks."""
    site = Site.parse(site)
    if site.layer is not None:
        return site.layer
    module = locate(model, site).module
    blocks = (layer for layer in range(num_layers(model)) if module in set(_block(model, layer).modules()))
    return next(blocks, 0)


def final_hidden_states(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """What the model's head reads, `(batch, seq, hidden_size)`, without the cost of logits."""
    return model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state


def logits_of(model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """The model's logits for some final hidden states.

    The model's own forward computes them, soft-caps and scales included; only its decoder is not run.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        hidden_states (`torch.Tensor` of shape `(tokens, hidden_size)`): Rows of [`final_hidden_states`].

    Returns:
        `torch.Tensor` of shape `(tokens, vocab_size)`.
    """
    rows = hidden_states.unsqueeze(0)
    with ExitStack() as stack:
        _answer(stack, model.get_decoder(), BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=rows))
        return model(inputs_embeds=rows, use_cache=False).logits[0]


@contextmanager
def record_block_outputs(model: PreTrainedModel, layers: set[int]) -> Iterator[dict[int, Any]]:
    """Keep what some blocks return in each forward, as they return it."""
    outputs = {}
    with ExitStack() as stack:
        for layer in layers:

            def record(module, args, output, layer=layer):
                outputs[layer] = output

            after_call(stack, _block(model, layer), record)
        yield outputs


@contextmanager
def restart_at(model: PreTrainedModel, layer: int, output_below: Any) -> Iterator[None]:
    """Begin forwards at a block: those below are not run and answer what the last of them returned earlier.

    Args:
        model ([`~transformers.PreTrainedModel`]): A language model.
        layer (`int`): The first block to run.
        output_below: What block `layer - 1` returned for the same inputs.
    """
    with ExitStack() as stack:
        for below in range(layer):
            _answer(stack, _block(model, below), output_below)
        yield


def _block(model, layer) -> nn.Module:
    return locate(model, Site("resid_pre", layer)).module


def _answer(stack, module, output):
    """Let `module` return `output` instead of running, until `stack` closes."""
    wrap_forward(stack, module, lambda inner, *args, **kwargs: output)
