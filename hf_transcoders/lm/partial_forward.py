"""Run only the parts of a language model whose results are not known yet."""

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..errors import TranscoderError
from .architectures import decoder_blocks, is_registered, locate
from .forwards import forward_logits, named_outputs
from .hooks import after_call, wrap_forward
from .linear_maps import map_size
from .sites import Site


# Tokens on which it is tried whether a model's head can be run apart from its decoder.
_TRIED_TOKENS = 4

# Model -> whether its head can be run apart: see `runs_head_apart`.
_apart: "weakref.WeakKeyDictionary[PreTrainedModel, bool]" = weakref.WeakKeyDictionary()


def block_of(model: PreTrainedModel, site: Site | str) -> int:
    """The first block whose output depends on a site, or 0 if that is unknown (outside blocks, or in unknown families)."""
    site = Site.parse(site)
    if site.layer is not None:
        return site.layer
    module = locate(model, site).module
    try:
        blocks = decoder_blocks(model)
    except TranscoderError:
        return 0
    return next((layer for layer, block in enumerate(blocks) if module in set(block.modules())), 0)


def runs_head_apart(model: PreTrainedModel, input_ids: torch.Tensor) -> bool:
    """
    Whether the logits of a model are a function of the output of its decoder, so that they can be computed for some
    positions, and later.

    Models of registered families are so. Others are tried once, on the first tokens of `input_ids (batch, seq)`.
    """
    if is_registered(model):
        return True
    if model not in _apart:
        ids = input_ids[:1, :_TRIED_TOKENS]
        whole = forward_logits(model, input_ids=ids, use_cache=False)[0].float()
        try:
            found = _head_logits(model, _decoder_states(model, ids)[0]).float()
        except Exception:
            # The model does something unknown, so it has to run as a whole.
            _apart[model] = False
        else:
            _apart[model] = found.shape == whole.shape and bool((found - whole).norm() <= 1e-2 * whole.norm())
    return _apart[model]


def final_hidden_states(model: PreTrainedModel, input_ids: torch.Tensor, **inputs) -> torch.Tensor:
    """
    Inputs of the model's head, `(batch, seq, hidden_size)`, without the cost of logits; of a model whose head cannot be
    run apart from its decoder, the logits. `inputs` are what else the model takes.
    """
    if not runs_head_apart(model, input_ids):
        return forward_logits(model, input_ids=input_ids, use_cache=False, **inputs)
    return _decoder_states(model, input_ids, **inputs)


def logits_of(model: PreTrainedModel, hidden_states: torch.Tensor) -> torch.Tensor:
    """The model's logits for some final hidden states.

    The model's own forward pass computes them, soft-caps and scales included; only its decoder is not run.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        hidden_states (`torch.Tensor` of shape `(tokens, hidden_size)`): Rows of [`final_hidden_states`].

    Returns:
        `torch.Tensor` of shape `(tokens, vocab_size)`.
    """
    return _head_logits(model, hidden_states) if _apart.get(model, True) else hidden_states


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of logits of a token."""
    head = model.get_output_embeddings()
    return model.config.get_text_config().vocab_size if head is None else map_size(head)[0]


@contextmanager
def record_block_outputs(model: PreTrainedModel, layers: set[int]) -> Iterator[dict[int, Any]]:
    """Keep the outputs of some blocks in each forward pass."""
    outputs = {}
    with ExitStack() as stack:
        # A model of an unknown family has no blocks to look up, and none are asked for.
        blocks = decoder_blocks(model) if layers else ()
        for layer in layers:

            def record(module, args, output, layer=layer):
                outputs[layer] = output

            after_call(stack, blocks[layer], record)
        yield outputs


@contextmanager
def restart_at(model: PreTrainedModel, layer: int, output_below: Any) -> Iterator[None]:
    """Begin forward passes at a block: the blocks below do not run and return the earlier output of the last of them.

    Args:
        model ([`~transformers.PreTrainedModel`]): A language model.
        layer (`int`): The first block to run.
        output_below: Output of block `layer - 1` for the same inputs.
    """
    with ExitStack() as stack:
        for block in decoder_blocks(model)[:layer]:
            _answer(stack, block, output_below)
        yield


@dataclass
class _DecoderOutput(BaseModelOutput):
    """Final hidden states, without the other outputs that a family's decoder may return."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _decoder_states(model, input_ids, **inputs):
    with named_outputs(model):
        return model.get_decoder()(input_ids=input_ids, use_cache=False, **inputs)[0]


def _head_logits(model, hidden_states):
    rows = hidden_states.unsqueeze(0)
    with ExitStack() as stack:
        _answer(stack, model.get_decoder(), _DecoderOutput(last_hidden_state=rows))
        # Only the number of ids matters.
        ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
        return forward_logits(model, input_ids=ids, use_cache=False)[0]


def _answer(stack, module, output):
    """Replace the output of `module`, which does not run, until `stack` closes."""
    wrap_forward(stack, module, lambda inner, *args, **kwargs: output)
