"""Effects of the edit of the paper on the movers after it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...circuits.patching.attention_edits import AttentionEdit
from ...circuits.patching.results import Head
from ...lm.wrappers import measures_model
from ...tasks.task import Task
from .downstream import downstream_change
from .repair import RIGHT_COLOR, WRONG_COLORS


@dataclass(frozen=True)
class MoverChange:
    """Movers before and after an edit. Attention is from `END`, means over prompts and movers.

    Args:
        movers (`list[Head]`): The movers after the edited heads.
        right_before, right_after (`float`): Attention to the right color.
        wrong_before, wrong_after (`float`): Attention to the two wrong colors together.
        attribution_before, attribution_after (`float`): Attribution of the logit difference to all movers, in nats.
        spearman (`float`): Rank correlation, over all heads after the edited ones, of the change of their logit
            attribution with their effect on the logits in path patching.
        p_value (`float`): Two-sided p-value of the correlation, from shuffles.
        compared (`int`): Number of heads in the correlation.
        by_head (`list[dict]`): Attention and attribution of each mover.
    """

    movers: list[Head]
    right_before: float
    right_after: float
    wrong_before: float
    wrong_after: float
    attribution_before: float
    attribution_after: float
    spearman: float
    p_value: float
    compared: int
    by_head: list[dict]


@measures_model
def mover_change(
    model: PreTrainedModel,
    task: Task,
    edit: AttentionEdit,
    movers: Sequence[Head],
    importance: torch.Tensor,
    batch_size: int = 32,
    seed: int = 0,
) -> MoverChange | None:
    """Measure the effects of an edit on movers.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        task ([`Task`]): The task Colored Objects.
        edit ([`AttentionEdit`]): The edit, for all prompts of the task.
        movers (`Sequence[Head]`): The movers. Those that are not after all edited heads are left out.
        importance (`torch.Tensor` of shape `(layers, heads)`): Effect of each head on the logits in path patching.
        batch_size (`int`, *optional*, defaults to 32): Number of prompts in one forward pass.
        seed (`int`, *optional*, defaults to 0): Seed for the shuffles.

    Returns:
        [`MoverChange`], or `None` if no mover is after the edited heads.
    """
    first = min(layer for layer, _ in edit.heads) + 1
    edited = set(edit.heads)
    movers = [head for head in movers if head[0] >= first and head not in edited]
    if not movers:
        return None
    change = downstream_change(model, task, edit, [RIGHT_COLOR, *WRONG_COLORS], importance, batch_size, seed)
    attention = {"before": change.attention_before, "after": change.attention_after}
    adds = {"before": change.attribution_before, "after": change.attribution_after}
    by_head = [
        {
            "head": list(head),
            **{f"right_{when}": attention[when][head][0].item() for when in attention},
            **{f"wrong_{when}": attention[when][head][1:].sum().item() for when in attention},
            **{f"attribution_{when}": adds[when][head].item() for when in adds},
        }
        for head in movers
    ]

    def mean(name):
        return sum(each[name] for each in by_head) / len(by_head)

    return MoverChange(
        movers=movers,
        right_before=mean("right_before"),
        right_after=mean("right_after"),
        wrong_before=mean("wrong_before"),
        wrong_after=mean("wrong_after"),
        attribution_before=sum(each["attribution_before"] for each in by_head),
        attribution_after=sum(each["attribution_after"] for each in by_head),
        spearman=change.spearman,
        p_value=change.p_value,
        compared=change.compared,
        by_head=by_head,
    )
