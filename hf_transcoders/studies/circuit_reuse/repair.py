"""The repair of Colored Objects: heads that steer the movers are made to look at the wrong colours, which they inhibit."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ...circuits.patching.attention_edits import AttentionEdit
from ...circuits.patching.results import Head
from ...errors import TranscoderError
from ...lm.attention import num_heads
from ...lm.wrappers import measures_model
from ...tasks.answer_metrics import Estimate, estimate
from ...tasks.task import Task
from .end_runs import Predictions, predict_at_end


WRONG_COLORS = ("wrong_colour_1", "wrong_colour_2")
RIGHT_COLOR = "answer_colour"


@dataclass(frozen=True)
class Outcome:
    """How well a model does Colored Objects under one edit.

    Args:
        condition (`str`): The edit.
        heads (`list[Head]`): The heads it changes.
        accuracy ([`Estimate`]): Share of right answers in the full vocabulary, with Wilson's interval.
        candidate_accuracy ([`Estimate`]): The same among the three listed colours.
        confusion (`dict[str, int]`): Answers that are `right`, a `wrong_listed` colour, or `other`.
        fixed, new_mistakes (`int`): Prompts that were wrong without the edit and are right with it, and the reverse.
    """

    condition: str
    heads: list[Head]
    accuracy: Estimate
    candidate_accuracy: Estimate
    confusion: dict[str, int]
    fixed: int
    new_mistakes: int


def forced(task: Task, heads: Sequence[Head], positions: Sequence[str] = WRONG_COLORS) -> AttentionEdit:
    """The edit of the paper: from `END`, heads look at some named tokens only, at each the same.

    Args:
        task ([`Task`]): Colored Objects.
        heads (`Sequence[Head]`): Layer and head of each.
        positions (`Sequence[str]`, *optional*): Names of the tokens; those of the two wrong colours by default.
    """
    at = task.tokens().positions
    missing = [name for name in positions if name not in at]
    if missing:
        raise TranscoderError(
            f"The task '{task.name}' has no position '{missing[0]}', where heads are to look: use colored_objects."
        )
    return AttentionEdit(list(heads), "force", torch.stack([at[name] for name in positions], dim=1), at["END"])


@measures_model
def repair_outcomes(
    model: PreTrainedModel,
    task: Task,
    inhibition: Sequence[Head],
    negative: Sequence[Head],
    head_draws: int = 10,
    token_draws: int = 5,
    seed: int = 0,
    **settings,
) -> list[Outcome]:
    """Accuracy under the edit, under each part of it, and under controls.

    Controls: the same heads look at the right colour, or at two random other tokens; and random other heads of the same
    layers, as many as there are, look at the wrong colours, in place of both parts and of each. All draws of heads differ;
    of a single head, the other heads of its layer are all tried where they are no more than `head_draws`. The edit uses
    the right answer: it shows what the heads do and is no way to use a model.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        task ([`Task`]): Colored Objects.
        inhibition, negative (`Sequence[Head]`): Inhibition heads and negative movers; one of the two may be empty.
        head_draws, token_draws (`int`, *optional*, default to 10 and 5):
            The most random choices of heads, and how many of tokens.
        seed (`int`, *optional*, defaults to 0): Of the random choices.
        settings: `batch_size` and `progress` of [`predict_at_end`].

    Returns:
        `list[Outcome]`: first that without an edit.
    """
    both = list(dict.fromkeys([*inhibition, *negative]))
    if not both:
        raise TranscoderError("The repair takes at least one inhibition head or negative mover, but there is none.")
    conditions = {"none": []}
    heads = {"none": []}

    def add(name, chosen, edit):
        conditions[name], heads[name] = [edit], list(chosen)

    if inhibition and negative:
        add("inhibition + negative mover", both, forced(task, both))
    if inhibition:
        add("inhibition alone", inhibition, forced(task, inhibition))
    if negative:
        add("negative mover alone", negative, forced(task, negative))
    add("to the right colour", both, forced(task, both, [RIGHT_COLOR]))
    generator = random.Random(seed)
    per_layer = num_heads(model)[0]
    for draw, others in enumerate(control_heads(both, per_layer, head_draws, generator), 1):
        add(f"random heads {draw}", others, forced(task, others))
    for draw in range(token_draws):
        edit = AttentionEdit(both, "force", random_tokens(task, generator), task.tokens().positions["END"])
        add(f"random tokens {draw + 1}", both, edit)

    if inhibition and negative:
        for name, part in (("inhibition alone", inhibition), ("negative mover alone", negative)):
            for draw, others in enumerate(control_heads(part, per_layer, head_draws, generator, both), 1):
                add(f"{name}, random heads {draw}", others, forced(task, others))

    predictions = predict_at_end(model, task, conditions, **settings)
    return [outcome(name, heads[name], each, predictions["none"], task) for name, each in predictions.items()]


def outcome(condition: str, heads: list[Head], found: Predictions, before: Predictions, task: Task) -> Outcome:
    """Count what a model predicts, against the answers and against what it predicted without the edit."""
    answers = task.answers()
    right = (found.tokens[:, None] == answers.right).any(1)
    listed = (found.tokens[:, None] == answers.candidates).any(1) & ~right
    was_right = (before.tokens[:, None] == answers.right).any(1)
    among = (found.candidates[:, None] == answers.right).any(1)
    return Outcome(
        condition=condition,
        heads=list(heads),
        accuracy=estimate(right.float(), share=True),
        candidate_accuracy=estimate(among.float(), share=True),
        confusion={
            "right": int(right.sum()),
            "wrong_listed": int(listed.sum()),
            "other": int((~right & ~listed).sum()),
        },
        fixed=int((right & ~was_right).sum()),
        new_mistakes=int((~right & was_right).sum()),
    )


def control_heads(
    heads: Sequence[Head],
    per_layer: int,
    draws: int,
    generator: random.Random,
    excluded: Sequence[Head] | None = None,
) -> list[list[Head]]:
    """Different choices of as many other heads of the same layers, none of `excluded`: all there are, or `draws` of them.

    In a layer without enough other heads, a choice has all that are left.
    """
    excluded = set(heads if excluded is None else excluded)
    by_layer = []
    for layer in sorted({layer for layer, _ in heads}):
        count = sum(at == layer for at, _ in heads)
        others = [(layer, head) for head in range(per_layer) if (layer, head) not in excluded]
        by_layer.append((others, min(count, len(others))))
    number = math.prod(math.comb(len(others), count) for others, count in by_layer)
    if number <= draws:
        choices = itertools.product(*(itertools.combinations(others, count) for others, count in by_layer))
        found = [[head for part in choice for head in part] for choice in choices]
    else:
        found = []
        while len(found) < draws:
            choice = [head for others, count in by_layer for head in sorted(generator.sample(others, count))]
            if choice not in found:
                found.append(choice)
    return [choice for choice in found if choice]


def random_tokens(task: Task, generator: random.Random) -> torch.Tensor:
    """Two tokens of each prompt that are neither the first, nor the last, nor a colour of the question's list."""
    at = task.tokens().positions
    keys = []
    for row, end in enumerate(at["END"].tolist()):
        taken = {int(at[f"colour_{k}"][row]) for k in (1, 2, 3)}
        keys.append(generator.sample([token for token in range(1, end) if token not in taken], 2))
    return torch.tensor(keys)
