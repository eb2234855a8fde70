"""Predict the token at `END` under many edits of attention, with one forward pass for the tokens before it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from ...circuits.patching.attention_edits import AttentionEdit, edited_attention
from ...errors import TranscoderError
from ...lm.devices import input_device
from ...lm.forwards import forward_logits, named_outputs
from ...lm.inputs import check_tokens, forget_lengths_, same_positions
from ...lm.wrappers import measures_model
from ...tasks.task import Task
from ...text.printable import printable


@dataclass(frozen=True)
class Predictions:
    """Predictions of a model at `END`.

    Args:
        tokens (`torch.LongTensor` of shape `(prompts,)`): The most likely token in the full vocabulary.
        candidates (`torch.LongTensor` of shape `(prompts,)`): The most likely candidate.
    """

    tokens: torch.Tensor
    candidates: torch.Tensor


@measures_model
@torch.no_grad()
def predict_at_end(
    model: PreTrainedModel,
    task: Task,
    conditions: dict[str, Sequence[AttentionEdit]],
    batch_size: int = 32,
    progress: bool = False,
) -> dict[str, Predictions]:
    """Predict the token after each prompt, under edits of the attention from `END`.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        task ([`Task`]): The prompts.
        conditions (`dict[str, Sequence[AttentionEdit]]`):
            Name of each condition -> edits for all prompts of the task, with `END` as their `query`; no edits for the
            unchanged model.
        batch_size (`int`, *optional*, defaults to 32): Number of prompts in one forward pass.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Returns:
        `dict[str, Predictions]`: the predictions under each condition.
    """
    from tqdm import tqdm

    end = task.tokens().positions["END"]
    for edit in (edit for edits in conditions.values() for edit in edits):
        if edit.query is None or not torch.equal(edit.query.cpu(), end):
            raise TranscoderError("Edits must be of attention from END: give the positions of END as their query.")
    tokens = {name: torch.empty(len(task), dtype=torch.long) for name in conditions}
    candidates = {name: torch.empty(len(task), dtype=torch.long) for name in conditions}
    batches = [
        rows[start : start + batch_size]
        for rows in task.rows_by_length().values()
        for start in range(0, len(rows), batch_size)
    ]
    for rows in tqdm(batches, desc=f"predicting {printable(task.name)}", disable=not progress):
        ids = task.tokens("clean", rows, input_device(model)).input_ids
        check_tokens(model, list(ids), "Prompt", rows)
        among = task.answers(rows, input_device(model)).candidates
        length = ids.shape[1]
        forget_lengths_(model)
        before = None
        # If the last token changes the positions of all tokens before it, their cache belongs to another run.
        if length > 1 and same_positions(model, length - 1, length):
            with named_outputs(model):
                before = model.get_decoder()(input_ids=ids[:, :-1], use_cache=True).past_key_values
        for name, edits in conditions.items():
            with edited_attention(model, [edit_of_rows(edit, rows) for edit in edits]):
                if before is None:
                    logits = forward_logits(model, input_ids=ids, use_cache=False, logits_to_keep=1)
                else:
                    # A forward pass adds to the cache, and the next condition needs it unchanged.
                    cache = copy.deepcopy(before)
                    logits = forward_logits(model, input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
                logits = logits[:, -1].float()
            tokens[name][rows] = logits.argmax(-1).cpu()
            scores = logits.gather(1, among.clamp(min=0)).masked_fill(among < 0, -torch.inf)
            candidates[name][rows] = among.gather(1, scores.argmax(1, keepdim=True))[:, 0].cpu()
    return {name: Predictions(tokens[name], candidates[name]) for name in conditions}


def edit_of_rows(edit: AttentionEdit, rows: Sequence[int]) -> AttentionEdit:
    """Select an edit for some of its prompts."""
    return replace(edit, keys=edit.keys[rows], query=edit.query[rows])
