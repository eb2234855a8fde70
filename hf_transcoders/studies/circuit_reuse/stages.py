"""Trace a circuit backwards by path patching: heads that act on the logits, heads that act on those heads, and so on."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...circuits.patching.patching import Patching
from ...circuits.patching.results import Head, PatchResult
from ...errors import TranscoderError
from ...lm.wrappers import measures_model
from ...tasks.task import Task


#: Name, receiving component and token of each stage; `repeated` is the repeated word.
STAGES = (
    ("logits", None, "END"),
    ("mover queries", "query", "END"),
    ("steering values", "value", "repeated"),
    ("repeat queries", "query", "repeated"),
)

#: Task -> name of the position of the repeated word.
REPEATED = {"ioi": "S2", "colored-objects": "question_object"}


@dataclass(frozen=True)
class Stage:
    """One stage of tracing.

    Args:
        name (`str`): Name of the receivers: `"logits"`, `"mover queries"`, `"steering values"` or `"repeat queries"`.
        receivers (`list[str]`): Sites of the receivers, or `["logits"]`.
        position (`str`): Token of senders and receivers.
        result ([`PatchResult`]): Effects of the paths from each head.
    """

    name: str
    receivers: list[str]
    position: str
    result: PatchResult


@measures_model
def trace_stages(
    model: PreTrainedModel,
    task: Task,
    receiver_share: float = 0.02,
    repeated: str | None = None,
    freeze_mlps: bool = False,
    depth: int = len(STAGES),
    **settings,
) -> list[Stage]:
    """Trace a task by path patching, stage by stage.

    The first stage finds heads that act on the logits at `END`. The heads with the greatest positive effects are the
    receivers of the second stage, through their queries. The strongest heads of the second stage are the receivers of the
    third, through their values at the repeated word, and those of the third are the receivers of the fourth, through
    their queries at that word. With grouped queries, the values of one head are patched without those of the heads that
    share them.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model, which runs in evaluation mode.
        task ([`Task`]):
            IOI, Colored Objects, or another task with `repeated`. Its corrupted prompts differ from the repeated word on.
        receiver_share (`float`, *optional*, defaults to 0.02):
            Number of receivers in a stage, as a share of all heads. There are at least three if as many effects are
            positive.
        repeated (`str`, *optional*):
            Name of the position of the repeated word.
        freeze_mlps (`bool`, *optional*, defaults to `False`):
            Whether the MLPs between sender and receivers keep their output of the base run.
        depth (`int`, *optional*, defaults to 4):
            Largest number of stages.
        settings:
            Settings of [`Patching`], such as `batch_size`, `metric` and `progress`.

    Returns:
        `list[Stage]`: `depth` stages, or fewer if no head of a stage has a positive effect and a layer below it.
    """
    repeated = repeated or REPEATED.get(task.name)
    if repeated is None:
        raise TranscoderError(
            f"The repeated word of the task '{task.name}' is not known: give the name of its position as `repeated`."
        )
    if not 0 < receiver_share <= 1:
        raise TranscoderError(f"receiver_share is {receiver_share}, but must be above 0 and at most 1.")
    if not 1 <= depth <= len(STAGES):
        raise TranscoderError(f"depth is {depth}, but must be between 1 and {len(STAGES)}.")
    patching = Patching(model, task, **settings)
    stages = []
    for name, component, position in STAGES[:depth]:
        if component is None:
            receivers = ["logits"]
        else:
            strongest = receiving_heads(stages[-1].result, receiver_share)
            receivers = [f"layers.{layer}.attn.head.{head}.{component}" for layer, head in strongest]
            if not receivers:
                break
        at = repeated if position == "repeated" else position
        per_query_head = component == "value"
        result = patching.paths(receivers, at, freeze_mlps=freeze_mlps, per_query_head=per_query_head)
        stages.append(Stage(name, receivers, at, result))
    return stages


def receiving_heads(result: PatchResult, share: float) -> list[Head]:
    """Choose the receivers of the next stage: the heads with the greatest positive effects, without the first layer."""
    effects = result.effects
    count = max(3, round(share * effects.numel()))
    ranked = effects.flatten().argsort(descending=True, stable=True)[:count].tolist()
    found = [divmod(index, effects.shape[1]) for index in ranked if effects.flatten()[index] > 0]
    return [(layer, head) for layer, head in found if layer > 0]


def strongest_heads(effects: torch.Tensor, count: int) -> list[Head]:
    """Choose the heads with the greatest effects by magnitude, without those that have no effect.

    Args:
        effects (`torch.Tensor` of shape `(layers, heads)`): Effect of each head.
        count (`int`): Number of heads.
    """
    chosen = top_mask(effects.flatten()[:, None], count)[:, 0].nonzero()[:, 0].tolist()
    return [divmod(index, effects.shape[1]) for index in chosen]


def top_mask(effects: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` heads of greatest magnitude in each draw, `(heads, draws)`, without effects of 0."""
    size = effects.abs()
    order = size.argsort(dim=0, descending=True, stable=True)[:count]
    return torch.zeros_like(size, dtype=torch.bool).scatter_(0, order, True) & (size > 0)


def head_count(share: float, heads: int) -> int:
    """The number of heads in a share of them, at least one."""
    return max(1, round(share * heads))
