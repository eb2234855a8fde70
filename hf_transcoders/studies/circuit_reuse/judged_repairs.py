"""Judge repairs on prompts that the search has not seen, and compare them with controls."""

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ...circuits.patching.engine import PatchEngine
from ...lm.attention import num_heads
from ...lm.wrappers import measures_model
from ...tasks.answer_metrics import accuracy
from ...tasks.task import Task
from .end_runs import Predictions
from .forced_heads import ForcedAttention, ForcedHead
from .repair import Outcome, control_heads, outcome


@measures_model
def forced_predictions(
    model: PreTrainedModel,
    task: Task,
    attention: ForcedAttention,
    conditions: dict[str, Sequence[ForcedHead]],
    batch_size: int | None = None,
    progress: bool = False,
) -> dict[str, Predictions]:
    """Predict the token after each prompt with forced heads, with all conditions as rows of one forward pass.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        task ([`Task`]): The prompts.
        attention ([`ForcedAttention`]): The tokens to attend to, on the same prompts.
        conditions (`dict[str, Sequence[ForcedHead]]`): Name of each condition -> its forced heads; none for the unchanged model.
        batch_size (`int`, *optional*): Number of conditions times prompts in one forward pass.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Returns:
        `dict[str, Predictions]`: the predictions under each condition. `candidates` is -1 where the most likely candidate is
        wrong.
    """
    engine = PatchEngine(model, task, ablation="zero", metric=_predicted, batch_size=batch_size, progress=progress)
    values = engine.run(attention.plan(list(conditions.values()))).values.long()
    right = task.answers().right[:, 0]
    return {
        name: Predictions(each // 2, torch.where(each % 2 == 1, right, -1))
        for name, each in zip(conditions, values, strict=True)
    }


def _predicted(logits, answers):
    # Token ids and whether the likeliest candidate is right in one number, which fp32 holds exactly up to 2^24.
    return 2 * logits.argmax(-1) + accuracy(logits, answers.right, answers.candidates)


def judge_conditions(
    model: PreTrainedModel,
    attention: ForcedAttention,
    heads: Sequence[ForcedHead],
    sets: Sequence[str],
    head_draws: int,
    token_draws: int,
    generator: random.Random,
) -> dict[str, list[ForcedHead]]:
    """Make the conditions of a repair: the whole, the first heads of it, and controls.

    Controls: equally many random other heads of the same layers attend to the same tokens; the same heads attend to each
    other set of tokens; and the same heads attend to random tokens before the query token, as many as they attend to in the
    repair.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        attention ([`ForcedAttention`]): The tokens, to which the random ones are added.
        heads (`Sequence[ForcedHead]`): The repair.
        sets (`Sequence[str]`): Names of the sets of tokens.
        head_draws, token_draws (`int`): Largest number of random choices of heads, and number of random choices of tokens.
        generator (`random.Random`): Generator of the random choices.

    Returns:
        `dict[str, list[ForcedHead]]`: name of each condition -> its forced heads.
    """
    conditions = {"repair": list(heads)}
    for count in range(1, len(heads)):
        conditions[f"first {count} of {len(heads)} heads"] = list(heads[:count])
    own = {each.tokens for each in heads}
    for name in sets:
        if own != {name}:
            conditions[f"same heads to {name}"] = [ForcedHead(each.head, name) for each in heads]
    edited = [each.head for each in heads]
    tokens_of_layer = {}
    for each in sorted(heads, key=lambda each: each.head):
        tokens_of_layer.setdefault(each.head[0], []).append(each.tokens)
    for draw, others in enumerate(control_heads(edited, num_heads(model)[0], head_draws, generator), 1):
        left = {layer: list(tokens) for layer, tokens in tokens_of_layer.items()}
        conditions[f"random heads {draw}"] = [ForcedHead(head, left[head[0]].pop(0)) for head in others]
    for draw in range(1, token_draws + 1):
        random_sets = {}
        for name in sorted(own):
            random_sets[name] = f"random tokens {draw} for {', '.join(map(str, heads))}, {name}"
            keys = attention.keys[name]
            attention.add(random_sets[name], _random_keys(keys, attention.query, generator))
        conditions[f"random tokens {draw}"] = [ForcedHead(each.head, random_sets[each.tokens]) for each in heads]
    return conditions


def _random_keys(keys, query, generator):
    """Draw tokens before the query token other than the first one and those in `keys`, as many in each prompt."""
    drawn = []
    for row, last in zip(keys.tolist(), query.tolist(), strict=True):
        others = [token for token in range(1, last) if token not in row] or [0]
        drawn.append(
            generator.choices(others, k=len(row)) if len(others) < len(row) else generator.sample(others, len(row))
        )
    return torch.tensor(drawn)


def outcomes_of(
    conditions: dict[str, Sequence[ForcedHead]], found: dict[str, Predictions], before: Predictions, task: Task
) -> list[Outcome]:
    """Compare the predictions of each condition with the answers and with those of the unchanged model."""
    return [
        outcome(name, [each.head for each in conditions[name]], predictions, before, task)
        for name, predictions in found.items()
    ]
