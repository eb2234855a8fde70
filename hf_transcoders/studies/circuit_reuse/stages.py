"""Tracing a circuit backwards: from the logits to the heads that write them, to those that steer these, and so on."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...circuits.patching.patching import Patching
from ...circuits.patching.results import Head, PatchResult
from ...errors import TranscoderError
from ...lm.wrappers import measures_model
from ...tasks.task import Task


#: What each stage patches into and at which token: `repeated` is the word that comes again.
STAGES = (
    ("logits", None, "END"),
    ("mover queries", "query", "END"),
    ("steering values", "value", "repeated"),
    ("repeat queries", "query", "repeated"),
)

#: Task -> the position of the word that comes again.
REPEATED = {"ioi": "S2", "colored-objects": "question_object"}


@dataclass(frozen=True)
class Stage:
    """One step of tracing.

    Args:
        name (`str`): What receives: `"logits"`, `"mover queries"`, `"steering values"` or `"repeat queries"`.
        receivers (`list[str]`): The receivers as sites, or `["logits"]`.
        position (`str`): Token of senders and receivers.
        result ([`PatchResult`]): What patching the paths from each head does.
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
    **settings,
) -> list[Stage]:
    """Path-patch a task stage by stage.

    The first stage finds heads that write to the logits at `END`. Those with the greatest effects, all of them positive,
    receive in the second stage through their queries; the strongest of the second receive in the third through their
    values at the word that comes again, and those of the third in the fourth through their queries there. With grouped
    queries a head receives alone: the others that share its values keep theirs.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model, which runs in evaluation mode.
        task ([`Task`]):
            IOI or Colored Objects; another one with `repeated`. Its corrupted prompts differ from that word on.
        receiver_share (`float`, *optional*, defaults to 0.02):
            How many heads receive in a stage, as a share of all heads; at least three, where so many are positive.
        repeated (`str`, *optional*):
            Name of the position of the word that comes again.
        freeze_mlps (`bool`, *optional*, defaults to `False`):
            Whether the MLPs between sender and receivers keep their output of the base run.
        settings:
            Settings of [`Patching`], such as `batch_size`, `metric` and `progress`.

    Returns:
        `list[Stage]`: four, or fewer where no head of a stage has a positive effect and a layer below it.
    """
    repeated = repeated or REPEATED.get(task.name)
    if repeated is None:
        raise TranscoderError(
            f"Which word comes again in the task '{task.name}' is not known: name its position as `repeated`."
        )
    if not 0 < receiver_share <= 1:
        raise TranscoderError(f"receiver_share is {receiver_share}, but a share is above 0 and at most 1.")
    patching = Patching(model, task, **settings)
    stages = []
    for name, component, position in STAGES:
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
    """The heads of a stage that receive in the next: the strongest positive ones, those of the first layer left out."""
    effects = result.effects
    count = max(3, round(share * effects.numel()))
    ranked = effects.flatten().argsort(descending=True, stable=True)[:count].tolist()
    found = [divmod(index, effects.shape[1]) for index in ranked if effects.flatten()[index] > 0]
    return [(layer, head) for layer, head in found if layer > 0]


def strongest_heads(effects: torch.Tensor, count: int) -> list[Head]:
    """The heads with the greatest effects by magnitude; those without any are left out.

    Args:
        effects (`torch.Tensor` of shape `(layers, heads)`): Effect of each head.
        count (`int`): How many.
    """
    chosen = top_mask(effects.flatten()[:, None], count)[:, 0].nonzero()[:, 0].tolist()
    return [divmod(index, effects.shape[1]) for index in chosen]


def top_mask(effects: torch.Tensor, count: int) -> torch.Tensor:
    """Which heads are among the `count` of greatest magnitude, `(heads, draws)`; effects of 0 never are."""
    size = effects.abs()
    order = size.argsort(dim=0, descending=True, stable=True)[:count]
    return torch.zeros_like(size, dtype=torch.bool).scatter_(0, order, True) & (size > 0)


def head_count(share: float, heads: int) -> int:
    """A share of heads as a number, at least one."""
    return max(1, round(share * heads))
