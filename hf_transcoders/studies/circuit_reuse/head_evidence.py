"""Evidence on heads without an edit: their attention, their roles, and their effects in two tasks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...circuits.patching.head_scores import attention_between
from ...circuits.patching.results import Head
from ...lm.wrappers import measures_model
from ...tasks.task import Task
from .forced_heads import FIRST_TOKEN
from .traced_tasks import TracedTasks


@dataclass(frozen=True)
class StageEffect:
    """Effect of a head in one stage of path patching.

    Args:
        effect (`float`): Share of the way to the corrupted run.
        low, high (`float`): Bootstrap interval of the effect.
        rank (`int`): Rank by magnitude among all heads; 1 is the greatest effect.
        heads (`int`): Number of all heads.
    """

    effect: float
    low: float
    high: float
    rank: int
    heads: int


@dataclass(frozen=True)
class HeadEvidence:
    """Evidence on one head without an edit.

    Args:
        head (`Head`): Layer and number of the head.
        attention (`dict[str, dict[str, float]]`): Task -> position -> mean attention from the query token.
        roles (`list[str]`): Roles whose test the head passes.
        scores (`dict[str, float]`): Scores of all role tests.
        effects (`dict[str, StageEffect]`): Task and stage of path patching -> effect.
    """

    head: Head
    attention: dict[str, dict[str, float]]
    roles: list[str]
    scores: dict[str, float]
    effects: dict[str, StageEffect]


@measures_model
def head_evidence(
    model: PreTrainedModel,
    heads: Sequence[Head],
    tasks: dict[str, tuple[Task, str, Sequence[str]]],
    traced: TracedTasks | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> list[HeadEvidence]:
    """Collect evidence on heads without an edit.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        heads (`Sequence[Head]`): The heads.
        tasks (`dict[str, tuple[Task, str, Sequence[str]]]`): Name -> task, query position and names of the positions whose
            attention is measured, `"first token"` included.
        traced ([`TracedTasks`], *optional*): Circuits for roles and effects. Without them, both are empty.
        batch_size (`int`, *optional*, defaults to 32): Number of prompts in one forward pass.
        seed (`int`, *optional*, defaults to 0): Seed for the bootstrap resamples.

    Returns:
        `list[HeadEvidence]`: one for each head.
    """
    attention = {}
    for name, (task, query, positions) in tasks.items():
        found = attention_between(model, with_first_token(task), query, list(positions), batch_size=batch_size).mean(
            -1
        )
        attention[name] = dict(zip(positions, found.unbind(-1), strict=True))
    effects = {}
    for name, stages in ({} if traced is None else traced.stages).items():
        for stage in stages[:2]:
            table = stage.result.effects
            order = table.abs().flatten().argsort(descending=True, stable=True)
            ranks = torch.empty_like(order)
            ranks[order] = torch.arange(1, len(order) + 1)
            effects[f"{name}, {stage.name}"] = table, *stage.result.intervals(seed=seed), ranks.view(table.shape)
    evidence = {} if traced is None else traced.roles.evidence
    roles = {} if traced is None else traced.roles.heads
    return [
        HeadEvidence(
            head,
            {name: {key: table[head].item() for key, table in each.items()} for name, each in attention.items()},
            [role for role, passing in roles.items() if head in passing],
            {name: table[head].item() for name, table in evidence.items()},
            {name: _effect(*tables, head) for name, tables in effects.items()},  # pyright: ignore[reportCallIssue]
        )
        for head in heads
    ]


def _effect(effects, low, high, ranks, head):
    return StageEffect(effects[head].item(), low[head].item(), high[head].item(), int(ranks[head]), ranks.numel())


def with_first_token(task: Task) -> Task:
    """Name the token at index 0 of each prompt `"first token"`."""
    positions = [{**each, FIRST_TOKEN: 0} for each in task.dataset["positions"]]
    dataset = task.dataset.remove_columns("positions").add_column("positions", positions)
    return Task(dataset, task.name, task.description, task.metric, task.settings)
