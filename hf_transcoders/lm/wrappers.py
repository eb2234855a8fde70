"""From what a training loop holds to the language model inside."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from ..errors import TranscoderError
from .devices import input_device
from .hooks import hide_forward


def language_model(model: nn.Module) -> PreTrainedModel:
    """
    The Transformers model inside the wrappers of data parallelism, `torch.compile` and PEFT. Adapters that sit in its
    layers (LoRA and its kin) stay at work.

    Args:
        model (`torch.nn.Module`): What a training loop calls its model.

    Returns:
        [`~transformers.PreTrainedModel`]

    Raises:
        [`TranscoderError`]: there is none inside, or what is being learned is a prompt in front of it.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            if model.active_peft_config.is_prompt_learning:
                raise TranscoderError(
                    "A learned prompt changes no layer of the model, so there is nothing to read inside it: use LoRA, "
                    "another adapter that sits in the layers, or full fine-tuning."
                )
            model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TranscoderError(
            f"{type(model).__name__} is no Transformers model: give a causal language model, plain or wrapped by PEFT."
        )
    return model


@contextmanager
def in_own_precision(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` in the precision of its weights, also where a Trainer has put autocast around its forward."""
    with ExitStack() as stack:
        # accelerate keeps the forward that it wraps.
        if (forward := model.__dict__.get("_original_forward")) is not None:
            hide_forward(stack, model, forward)
        stack.enter_context(torch.autocast(input_device(model).type, enabled=False))
        yield
