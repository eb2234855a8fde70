"""Where a head looks in a prompt, for a page."""

import torch
from transformers import PreTrainedModel

from ...lm.attention import edit_attention
from ...lm.wrappers import measures_model
from ...reports.heatmap import AttentionView
from ...tasks import Task
from .stages import Head


@measures_model
@torch.no_grad()
def attention_views(
    base: PreTrainedModel, tokenizer, task: Task, heads: dict[Head, str], row: int = 0
) -> list[AttentionView]:
    """The patterns of some heads in one prompt.

    Args:
        base ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        task ([`Task`]): Prompts.
        heads (`dict[tuple[int, int], str]`): Layer and head -> what to call it.
        row (`int`, *optional*, defaults to 0): Which prompt.

    Returns:
        `list[AttentionView]`: one for each head.
    """
    ids = task.tokens("clean", [row], base.device).input_ids
    found = {}
    with edit_attention(base, pattern=lambda pattern, layer: found.__setitem__(layer, pattern[0].float().cpu())):
        base.get_decoder()(input_ids=ids, use_cache=False)
    tokens = [tokenizer.decode([token]) for token in ids[0].tolist()]
    return [
        AttentionView(f"{name} {layer}.{head}, {task.name}, prompt {row}", tokens, found[layer][head].tolist())
        for (layer, head), name in heads.items()
    ]
