"""Encode prompts to token ids, and label tokens."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.batches import read_text
from ..data.rows import split_rows
from ..data.special_tokens import encode_text
from ..data.token_texts import token_texts
from ..errors import TranscoderError
from ..lm.devices import input_device
from ..lm.inputs import check_tokens


#: A prompt: text, token ids, or the output of the tokenizer for a text.
Prompt = str | Sequence[int] | torch.Tensor | Mapping


def encode_prompt(
    base_model: PreTrainedModel, prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None
) -> torch.Tensor:
    """Token ids of a prompt, `(seq,)`.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): The model to which the prompt is passed.
        prompt (`str`, `Sequence[int]` or `Mapping`):
            Text, token ids, or the output of the tokenizer (`input_ids`, and `attention_mask` where it padded).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Required for text.

    Raises:
        [`TranscoderError`]: the prompt is empty, too long, has tokens outside the vocabulary, or there is no tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise TranscoderError("Give the tokenizer too, or token ids instead of text.")
        prompt = encode_text(tokenizer, prompt)
    if not isinstance(prompt, Mapping):
        if np.ndim(prompt) != 1:
            raise TranscoderError(f"A prompt is one row of at least one token, not of shape {np.shape(prompt)}.")
        prompt = {"input_ids": prompt}
    ids = read_text(prompt, "The prompt")
    if not len(ids):
        raise TranscoderError("The prompt is empty: give a text of at least one token.")
    check_tokens(base_model, [ids])
    return ids


def is_one_prompt(prompt: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt rather than several; also where the tokenizer returned a batch of one text."""
    if isinstance(prompt, Mapping):
        return prompt.get("input_ids") is None or len(split_rows(prompt)) < 2
    if isinstance(prompt, str):
        return True
    first = next(iter(prompt), None)
    return np.ndim(first) == 0 and not isinstance(first, str | Mapping)


def encode_prompts(
    base_model: PreTrainedModel,
    prompts: Sequence[Prompt] | Mapping | torch.Tensor,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[torch.Tensor]:
    """Token ids of several prompts, each `(seq,)`, given one by one or as one output of the tokenizer."""
    if isinstance(prompts, Mapping) and prompts.get("input_ids") is not None:
        prompts = split_rows(prompts)
    return [encode_prompt(base_model, prompt, tokenizer) for prompt in prompts]


def prompts_of_one_length(base_model: PreTrainedModel, prompts: torch.Tensor | Sequence | Mapping) -> torch.Tensor:
    """Token ids of one prompt or several that share every forward pass, `(prompts, seq)` on the model's device.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): The model to which the prompts are passed.
        prompts (`torch.LongTensor` of shape `(seq,)` or `(prompts, seq)`, or `Mapping`):
            Token ids, or the output of the tokenizer for one text or several.

    Raises:
        [`TranscoderError`]: the prompts differ in length without their padding, or as in [`encode_prompt`].
    """
    if not isinstance(prompts, Mapping):
        prompts = {"input_ids": torch.atleast_2d(torch.as_tensor(prompts))}
    rows = encode_prompts(base_model, prompts)
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise TranscoderError(
            f"The prompts have {lengths[0]} to {lengths[-1]} tokens, but these go through the model together: give prompts of "
            "one length, or one at a time."
        )
    return torch.stack(rows).to(input_device(base_model))


def token_labels(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """The text of each token on its own, or its number where there is no tokenizer."""
    return list(map(str, ids)) if tokenizer is None else token_texts(tokenizer, ids)
