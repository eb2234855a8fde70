"""Effects of edits of attention on later heads: their attention, and their logit attribution."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...circuits.patching.attention_edits import AttentionEdit, edited_attention
from ...circuits.patching.head_scores import attention_between, logit_attribution
from ...circuits.patching.results import Head
from ...evaluation.rank_correlation import spearman_correlation
from ...lm.wrappers import measures_model
from ...tasks.task import Task
from .end_runs import edit_of_rows


@dataclass(frozen=True)
class DownstreamChange:
    """Heads before and after an edit of attention. Attention is from `END`; values are means over prompts.

    Args:
        positions (`list[str]`): Names of the tokens whose attention was measured.
        attention_before, attention_after (`torch.Tensor` of shape `(layers, heads, positions)`): Attention of each head.
        attribution_before, attribution_after (`torch.Tensor` of shape `(layers, heads)`):
            Attribution of the logit difference to each head, in nats.
        later (`torch.BoolTensor` of shape `(layers, heads)`): Heads that the edit can change: those of later layers that are
            not edited themselves.
        spearman (`float`): Rank correlation, over these heads, of the change of their logit attribution with their
            effect on the logits in path patching, NaN if that is not known.
        p_value (`float`): Two-sided p-value of the correlation, from shuffles.
    """

    positions: list[str]
    attention_before: torch.Tensor
    attention_after: torch.Tensor
    attribution_before: torch.Tensor
    attribution_after: torch.Tensor
    later: torch.Tensor
    spearman: float
    p_value: float

    @property
    def compared(self) -> int:
        """Number of heads that the edit can change."""
        return int(self.later.sum())

    def most_changed(self, count: int = 5) -> list[Head]:
        """The later heads whose logit attribution changes most, the greatest change first."""
        change = (self.attribution_after - self.attribution_before).abs().masked_fill(~self.later, -1)
        order = change.flatten().argsort(descending=True, stable=True)[: min(count, self.compared)].tolist()
        return [divmod(index, change.shape[1]) for index in order]

    def to_dict(self) -> dict:
        """All fields as JSON."""
        return {
            name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in vars(self).items()
        }


@measures_model
def downstream_change(
    model: PreTrainedModel,
    task: Task,
    edits: AttentionEdit | Iterable[AttentionEdit],
    positions: Sequence[str],
    importance: torch.Tensor | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> DownstreamChange:
    """Measure the effects of edits of attention on later heads.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        task ([`Task`]): Prompts with right and wrong answers.
        edits ([`AttentionEdit`] or an iterable of them): The edits, for all prompts of the task.
        positions (`Sequence[str]`): Names of the tokens whose attention is measured.
        importance (`torch.Tensor` of shape `(layers, heads)`, *optional*): Effect of each head on the logits in path patching.
        batch_size (`int`, *optional*, defaults to 32): Number of prompts in one forward pass.
        seed (`int`, *optional*, defaults to 0): Seed for the shuffles.

    Returns:
        [`DownstreamChange`]
    """
    edits = [edits] if isinstance(edits, AttentionEdit) else list(edits)
    attention, adds = {"before": [], "after": []}, {"before": [], "after": []}
    for rows in torch.arange(len(task)).split(batch_size):
        rows = rows.tolist()
        part = task.select(rows)
        for when, here in (("before", []), ("after", [edit_of_rows(edit, rows) for edit in edits])):
            with edited_attention(model, here):
                attention[when].append(attention_between(model, part, "END", positions, batch_size=batch_size))
                adds[when].append(logit_attribution(model, part, batch_size=batch_size).values[:, :-1])
    attention = {when: torch.cat(each, dim=-1).mean(-1) for when, each in attention.items()}
    adds = {when: torch.cat(each, dim=-1).mean(-1) for when, each in adds.items()}
    edited = {head for edit in edits for head in edit.heads}
    later = torch.ones_like(adds["before"], dtype=torch.bool)
    later[: min((layer for layer, _ in edited), default=0) + 1] = False
    for head in edited:
        later[head] = False
    spearman, p_value = float("nan"), float("nan")
    if importance is not None:
        change = (adds["after"] - adds["before"])[later]
        spearman, p_value = spearman_correlation(change, importance[later], seed=seed)
    return DownstreamChange(
        list(positions),
        attention["before"],
        attention["after"],
        adds["before"],
        adds["after"],
        later,
        spearman,
        p_value,
    )
