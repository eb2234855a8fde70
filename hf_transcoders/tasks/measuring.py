"""Measure all metrics of a task on a language model, with intervals."""

import torch

from ..errors import TranscoderError
from ..lm.devices import input_device
from ..lm.forwards import forward_logits
from ..lm.wrappers import measures_model
from ..text.printable import printable
from .answer_metrics import (
    Estimate,
    accuracy,
    estimate,
    kl_divergence,
    logit_difference,
    probability_difference,
    rank,
)
from .task import AnswerBatch, Task


def row_metrics(logits: torch.Tensor, answers: AnswerBatch) -> dict[str, torch.Tensor]:
    """
    Compute all metrics of each row.

    Args:
        logits (`torch.Tensor` of shape `(rows, vocab)`): Logits at `END`.
        answers ([`AnswerBatch`]): The answers of the same rows.

    Returns:
        `dict[str, torch.Tensor]`: `accuracy` in the full vocabulary, `candidate_accuracy`, `rank`, and, for tasks with wrong
        answers, `logit_difference` and `probability_difference`; each of shape `(rows,)` in fp32.
    """
    values = {
        "accuracy": accuracy(logits, answers.right),
        "candidate_accuracy": accuracy(logits, answers.right, answers.candidates),
        "rank": rank(logits, answers.right),
    }
    if answers.wrong.shape[1]:
        values["logit_difference"] = logit_difference(logits, answers.right, answers.wrong)
        values["probability_difference"] = probability_difference(logits, answers.right, answers.wrong)
    return values


@measures_model
@torch.no_grad()
def end_logits(model, task: Task, which: str = "clean", rows: list[int] | None = None) -> torch.Tensor:
    """
    Compute the logits of a language model at `END`, in one forward pass for prompts that can share it.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        task ([`Task`]): The prompts.
        which (`str`, *optional*, defaults to `"clean"`): The side of each pair, `"clean"` or `"corrupted"`.
        rows (`list[int]`, *optional*): Indices of the rows. By default all rows.

    Returns:
        `torch.Tensor` of shape `(rows, vocab)` on the model's device, in its dtype.
    """
    logits = {}
    for places, batch in task.tokens(which, rows, input_device(model)).forward_batches(model, rows):
        # Only the last tokens go through the output matrix.
        ends, index = batch.positions["END"].unique(return_inverse=True)
        found = forward_logits(
            model,
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            logits_to_keep=ends,
            use_cache=False,
        )
        found = found[torch.arange(len(index), device=found.device), index]
        logits.update(zip(places, found, strict=True))
    return torch.stack([logits[place] for place in sorted(logits)])


@measures_model
def measure(
    model, task: Task, batch_size: int = 32, confidence: float = 0.95, seed: int = 0, progress: bool = False
) -> dict[str, dict[str, Estimate]]:
    """
    Measure a language model on the clean and corrupted prompts of a task.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model, which runs in evaluation mode.
        task ([`Task`]): Prompts and answers. The answers are those of the clean prompts, for corrupted prompts too.
        batch_size (`int`, *optional*, defaults to 32): Number of rows in one forward pass.
        confidence (`float`, *optional*, defaults to 0.95): Confidence level of the intervals.
        seed (`int`, *optional*, defaults to 0): Seed for the bootstrap resamples.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a progress bar.

    Returns:
        `dict[str, dict[str, Estimate]]`: for `"clean"` and, if the task has them, `"corrupted"` prompts, each metric of
        [`row_metrics`]. Corrupted prompts also have `kl`, the KL divergence from the clean prediction in nats.
    """
    from tqdm import tqdm

    if batch_size < 1:
        raise TranscoderError(f"batch_size is {batch_size}, but a forward pass needs at least one row.")
    # Batches of equally long rows need no padding.
    order = [row for rows in task.rows_by_length().values() for row in rows]
    values: dict[str, dict[str, list]] = {}
    for start in tqdm(range(0, len(order), batch_size), desc=printable(task.name), disable=not progress):
        rows = order[start : start + batch_size]
        answers = task.answers(rows, input_device(model))
        clean = end_logits(model, task, "clean", rows)
        batches = {"clean": row_metrics(clean, answers)}
        if task.has_corrupted:
            corrupted = end_logits(model, task, "corrupted", rows)
            batches["corrupted"] = row_metrics(corrupted, answers) | {"kl": kl_divergence(corrupted, clean)}
        for which, metrics in batches.items():
            for name, batch in metrics.items():
                values.setdefault(which, {}).setdefault(name, []).append(batch.cpu())
    back = torch.tensor(order).argsort()
    return {
        which: {
            name: estimate(torch.cat(batches)[back], name.endswith("accuracy"), confidence, seed=seed)
            for name, batches in metrics.items()
        }
        for which, metrics in values.items()
    }
