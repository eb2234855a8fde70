"""Where the prompt ends and new tokens begin."""

import threading
from contextlib import ExitStack

from transformers import PreTrainedModel

from ...lm.forwards import ForwardTokens, before_forward
from ...lm.hooks import wrap_method


class PromptTracker(threading.local):
    """Follows the forwards of a model: their tokens, and how long the prompt of the sequences at hand is.

    Each thread has forwards of its own at hand.

    A forward that begins a sequence is given the prompt, except within `generate`, whose own input is the prompt no
    matter how many tokens each forward gets.

    Attributes:
        tokens ([`ForwardTokens`]): Those of the forward at hand.
        length (`int`): Tokens of the prompt.
    """

    def __init__(self):
        self.tokens: ForwardTokens | None = None
        self.length: int | None = None
        self._generating = False

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
        self._generating = True
        try:
            return generate(*args, **kwargs)
        finally:
            self._generating = False

    def _begin(self, tokens: ForwardTokens):
        self.tokens = tokens
        if self.length is None or (tokens.start == 0 and not self._generating):
            self.length = tokens.start + tokens.length
