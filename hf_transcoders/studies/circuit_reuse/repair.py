"""The repair of Colored Objects: force inhibition heads to attend to the wrong colors."""

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
    """Performance of a model on a task under one edit.

    Args:
        condition (`str`): Name of the edit.
        heads (`list[Head]`): The edited heads.
        accuracy ([`Estimate`]): Accuracy in the full vocabulary, with Wilson's interval.
        candidate_accuracy ([`Estimate`]): Accuracy among the candidates, such as the listed colors, with Wilson's interval.
        confusion (`dict[str, int]`): Number of answers that are `right`, `wrong_listed` (another candidate), or `other`.
        fixed, new_mistakes (`int`): Number of prompts that are wrong without the edit and right with it, and the reverse.
    """

    condition: str
    heads: list[Head]
    accuracy: Estimate
    candidate_accuracy: Estimate
    confusion: dict[str, int]
    fixed: int
    new_mistakes: int


def forced(task: Task, heads: Sequence[Head], positions: Sequence[str] = WRONG_COLORS) -> AttentionEdit:
    """Make the edit of the paper: from `END`, heads attend only to some named tokens, equally to each.

    Args:
        task ([`Task`]): The task Colored Objects.
        heads (`Sequence[Head]`): The heads to edit.
        positions (`Sequence[str]`, *optional*): Names of the tokens. By default the two wrong colors.
    """
    at = task.tokens().positions
    missing = [name for name in positions if name not in at]
    if missing:
        raise TranscoderError(
            f"The task '{task.name}' has no position '{missing[0]}' for the edit: use colored_objects."
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
    """Measure the accuracy under the edit, under each part of it, and under controls.

    Controls: the same heads attend to the right color, or to two random other tokens; and equally many random other heads
    of the same layers attend to the wrong colors, in place of both parts and of each. All draws of heads differ; if there
    are at most `head_draws` choices of other heads, all of them are tried. The edit uses the right answer: it is a
    diagnostic of what the heads do, not a mitigation.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        task ([`Task`]): The task Colored Objects.
        inhibition, negative (`Sequence[Head]`): Inhibition heads and negative movers. One of the two may be empty.
        head_draws, token_draws (`int`, *optional*, default to 10 and 5):
            Largest number of random choices of heads, and number of random choices of tokens.
        seed (`int`, *optional*, defaults to 0): Seed for the random choices.
        settings: `batch_size` and `progress` of [`predict_at_end`].

    Returns:
        `list[Outcome]`: the outcome without an edit, and then under each edit.
    """
    both = list(dict.fromkeys([*inhibition, *negative]))
    if not both:
        raise TranscoderError("The repair needs at least one inhibition head or negative mover, but there is none.")
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
    """Compare predictions with the answers and with the predictions without the edit."""
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
    """Draw different choices of equally many other heads of the same layers, without those in `excluded`.

    If there are at most `draws` choices, all of them are returned. In a layer without enough other heads, a choice has
    all that are left.
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
    """Draw two tokens of each prompt that are not the first, the last, or a color in the list of the question."""
    at = task.tokens().positions
    keys = []
    for row, end in enumerate(at["END"].tolist()):
        taken = {int(at[f"colour_{k}"][row]) for k in (1, 2, 3)}
        keys.append(generator.sample([token for token in range(1, end) if token not in taken], 2))
    return torch.tensor(keys)
