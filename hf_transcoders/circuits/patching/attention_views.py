"""Attention patterns of heads in one prompt, for a page."""

import torch
from transformers import PreTrainedModel

from ...data.token_texts import token_texts
from ...lm.attention import edit_attention
from ...lm.devices import input_device
from ...lm.inputs import check_tokens, forget_lengths_
from ...lm.wrappers import measures_model
from ...reports.sections import AttentionView
from ...tasks.task import Task
from .results import Head


@measures_model
@torch.no_grad()
def attention_views(
    model: PreTrainedModel, tokenizer, task: Task, heads: dict[Head, str], row: int = 0
) -> list[AttentionView]:
    """Record the attention patterns of some heads in one prompt.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer of the model.
        task ([`Task`]): Prompts.
        heads (`dict[tuple[int, int], str]`): Layer and head -> a label.
        row (`int`, *optional*, defaults to 0): Index of the prompt.

    Returns:
        `list[AttentionView]`: one view for each head.
    """
    ids = task.tokens("clean", [row], input_device(model)).input_ids
    check_tokens(model, list(ids))
    forget_lengths_(model)
    found = {}
    with edit_attention(model, pattern=lambda pattern, layer: found.__setitem__(layer, pattern[0].float().cpu())):
        model.get_decoder()(input_ids=ids, use_cache=False)
    tokens = token_texts(tokenizer, ids[0].tolist())
    return [
        AttentionView(f"{name} {layer}.{head}, {task.name}, prompt {row}", tokens, found[layer][head].tolist())
        for (layer, head), name in heads.items()
    ]
