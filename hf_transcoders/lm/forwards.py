"""Which tokens a forward gets, also within `generate`."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from .hooks import before_call


@dataclass(frozen=True)
class ForwardTokens:
    """The tokens of one forward.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Missing where embeddings were given.
        batch (`int`): Rows.
        start (`int`): How many tokens of each row a cache holds already: the position of the first one given.
        length (`int`): Tokens given for each row.
    """

    input_ids: torch.Tensor | None
    batch: int
    start: int
    length: int


def before_forward(stack: ExitStack, model: PreTrainedModel, function: Callable[[ForwardTokens], None]):
    """Call `function` with its [`ForwardTokens`] before each forward of `model`'s decoder, until `stack` closes."""
    decoder = model.get_decoder()

    def announce(module, args, kwargs):
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        input_ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        cache = given.get("past_key_values")
        batch, length = (embeddings if input_ids is None else input_ids).shape[:2]
        start = 0 if cache is None else int(cache.get_seq_length())
        function(ForwardTokens(input_ids, batch, start, length))

    before_call(stack, decoder, announce)
