"""Tokens and outputs of forward passes, inside `generate` too."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..errors import TranscoderError
from .hooks import before_call


@dataclass(frozen=True)
class ForwardTokens:
    """The tokens of one forward pass.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Missing where embeddings were given.
        batch (`int`): Rows.
        start (`int`): How many tokens of each row a cache holds already: the position of the first one given.
        length (`int`): Tokens given for each row.
        real (`torch.BoolTensor` of shape `(batch, start + length)`, *optional*):
            Tokens that the attention mask does not mark as padding; missing if there is no padding.
    """

    input_ids: torch.Tensor | None
    batch: int
    start: int
    length: int
    real: torch.Tensor | None = None


def before_forward(stack: ExitStack, model: PreTrainedModel, function: Callable[[ForwardTokens], None]):
    """Call `function` with its [`ForwardTokens`] before each forward pass of `model`'s decoder, until `stack` closes."""
    decoder = model.get_decoder()

    def announce(module, args, kwargs):
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        input_ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        cache = given.get("past_key_values")
        batch, length = (embeddings if input_ids is None else input_ids).shape[:2]
        start = 0 if cache is None else int(cache.get_seq_length())
        mask = given.get("attention_mask")
        real = None
        if isinstance(mask, torch.Tensor) and mask.shape == (batch, start + length) and not mask.all():
            real = mask.bool()
        function(ForwardTokens(input_ids, batch, start, length, real))

    before_call(stack, decoder, announce)


# Named outputs, and no loss over routers, of which not all may run.
_PLAIN = {"return_dict": True, "output_router_logits": False}


@contextmanager
def named_outputs(model: PreTrainedModel) -> Iterator[None]:
    """Let forward passes of a model return named outputs and compute nothing extra, whatever its config says."""
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    earlier = [
        (config, name, getattr(config, name))
        for config in configs
        for name, plain in _PLAIN.items()
        if getattr(config, name, plain) != plain
    ]
    try:
        for config, name, _ in earlier:
            setattr(config, name, _PLAIN[name])
        yield
    finally:
        for config, name, value in earlier:
            setattr(config, name, value)


def has_head(model: PreTrainedModel) -> bool:
    """Whether a model computes logits of tokens."""
    return model.get_output_embeddings() is not None or model.can_generate()


def check_head(model: PreTrainedModel) -> None:
    """Raise [`TranscoderError`] where a model computes no logits of tokens."""
    if not has_head(model):
        raise TranscoderError(
            f"{type(model).__name__} has no language-model head, so it has no logits: load the model with "
            "AutoModelForCausalLM."
        )


def forward_logits(model: PreTrainedModel, **inputs) -> torch.Tensor:
    """
    Run a causal language model and return its logits.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        inputs: Arguments of its forward method.

    Returns:
        `torch.Tensor` of shape `(batch, seq, vocab)`.

    Raises:
        [`TranscoderError`]: the model has no language-model head.
    """
    check_head(model)
    with named_outputs(model):
        return model(**inputs).logits
