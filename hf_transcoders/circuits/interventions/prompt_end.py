"""Track where the prompt ends and generated tokens begin."""

import threading
from contextlib import ExitStack
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ...lm.forwards import ForwardTokens, before_forward
from ...lm.hooks import wrap_method


class PromptTracker(threading.local):
    """Tracks the tokens of a model's forward passes, and the length of the current prompt.

    Each thread has its own state.

    A forward that begins a sequence is given the prompt, except within `generate`, whose own input is the prompt no
    matter how many tokens each forward pass gets.

    Attributes:
        tokens ([`ForwardTokens`]): Tokens of the current forward pass.
        length (`int`): Length of the prompt in tokens.
    """

    def __init__(self):
        self.tokens: ForwardTokens | None = None
        self.length: int | None = None
        self._generating = False
        # Of the prompts that `generate` got, `(prompts, seq)`.
        self._mask: torch.Tensor | None = None

    def attach(self, stack: ExitStack, model: PreTrainedModel):
        """Follow `model` until `stack` closes."""
        before_forward(stack, model, self._begin)
        if not hasattr(model, "generate"):
            return
        wrap_method(stack, model, "generate", self._generate)

    def _generate(self, generate, *args, **kwargs):
        given = (*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
        prompt = next((tensor for tensor in given if tensor is not None), None)
        self.length = None if prompt is None else prompt.shape[1]
        self._mask = kwargs.get("attention_mask")
        self._generating = True
        try:
            return generate(*args, **kwargs)
        finally:
            self._generating, self._mask = False, None

    def _begin(self, tokens: ForwardTokens):
        if self.length is None or (tokens.start == 0 and not self._generating):
            self.length = tokens.start + tokens.length
        self.tokens = tokens
        if tokens.real is None and self._mask is not None and not self._mask.all():
            # With a cache of fixed size the model gets a mask for attention, from which padding cannot be told.
            prompts = self._mask.bool().repeat_interleave(tokens.batch // len(self._mask), dim=0)
            end = tokens.start + tokens.length
            new = prompts.new_ones(tokens.batch, max(end - prompts.shape[1], 0))
            self.tokens = replace(tokens, real=torch.cat([prompts, new], dim=1)[:, :end])
