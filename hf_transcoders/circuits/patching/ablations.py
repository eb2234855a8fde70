"""The activations that patches write: one function and one row of `ABLATIONS` for each ablation."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ...errors import TranscoderError
from ...lm.devices import input_device
from ...tasks.task import Task
from .budget import Budget
from .prompt_runs import PromptRuns
from .run_recording import Recording, Window


@dataclass(frozen=True)
class AblationSetup:
    """The data that an ablation can use.

    Args:
        task ([`Task`]): Clean and corrupted prompts.
        runs ([`PromptRuns`]): The base runs, which are patched.
        other (`str`): Name of the other side of each pair, `"clean"` or `"corrupted"`.
        budget ([`Budget`]): Size of a batch.
        seed (`int`): Seed for random ablations.
    """

    task: Task
    runs: PromptRuns
    other: str
    budget: Budget
    seed: int

    def counterfactual(self) -> PromptRuns:
        """The runs of the other side of each pair.

        Raises:
            [`TranscoderError`]: there is no other side, or a pair differs in length.
        """
        mine, theirs = self.runs.tokens.lengths, self.task.tokens(self.other)
        if not torch.equal(theirs.lengths, mine):
            row = int((theirs.lengths != mine).nonzero()[0])
            raise TranscoderError(
                f"The prompts of row {row} have {int(mine[row])} and {int(theirs.lengths[row])} tokens: patching needs "
                "pairs of equal length."
            )
        return PromptRuns(self.runs.model, theirs)


@dataclass(frozen=True)
class Source:
    """The activations that patches write, for any batch of prompts.

    Args:
        record (`Callable`):
            Called with the indices of some prompts, the [`Recording`] of their base runs and the names of activations.
            Returns a [`Recording`] of the same window with the activations to write, and with `final` if they are of one
            run for each prompt.
        first (`torch.LongTensor` of shape `(prompts,)`):
            First token of each prompt whose activations can differ from those of the base run.
    """

    record: Callable[[torch.Tensor, Recording, set[str]], Recording]
    first: torch.Tensor


def counterfactual(setup: AblationSetup) -> Source:
    """The activation in the run of the other prompt of the pair."""
    other = setup.counterfactual()
    same = setup.runs.tokens.input_ids == other.tokens.input_ids
    first = same.long().cumprod(1).sum(1).minimum(other.last)
    return Source(lambda prompts, base, parts: other.record(prompts, base.window, parts), first)


def zero(setup: AblationSetup) -> Source:
    """Zeros."""

    def zeros(base, part, layer):
        if part == "pattern":
            like = base.parts["query"][layer]
            shape = (*like.shape[:3], base.masks[layer].shape[-1])
        else:
            like = base.parts["resid_pre" if part == "resid_mid" else part][layer]
            shape = like.shape
        return like.new_zeros(1).expand(shape)

    def record(prompts, base, parts):
        # Residual streams have one entry more than there are layers.
        layers = {part: range(len(base.masks) + (part == "resid_pre")) for part in parts}
        return Recording(base.window, parts={part: [zeros(base, part, at) for at in layers[part]] for part in parts})

    return Source(record, torch.zeros_like(setup.runs.last))


def mean(setup: AblationSetup) -> Source:
    """The mean activation over the counterfactual prompts of the same template and length."""
    runs = setup.counterfactual() if setup.task.has_corrupted else setup.runs
    keys = list(zip(setup.task.dataset["template"], runs.tokens.lengths.tolist(), strict=True))
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    group = torch.tensor([numbers[key] for key in keys])
    means = {}

    def record(prompts, base, parts):
        if missing := parts - means.keys():
            means.update(_group_means(runs, group, missing, setup.budget))
        chosen = group[prompts].to(base.final.device)
        longest = int(runs.tokens.lengths[prompts].max())
        found = Recording(base.window, parts={})
        for part in parts:
            whole = [each[chosen][..., :longest, :].to(runs.model.dtype) for each in means[part]]
            if part == "pattern":
                whole = [each[..., :longest] for each in whole]
            found.parts[part] = whole if part in ("key", "value") else [base.window.take(each) for each in whole]
        return found

    return Source(record, torch.zeros_like(runs.last))


def resample(setup: AblationSetup) -> Source:
    """The activation in the base run of a random other prompt of the same length."""
    tokens = setup.runs.tokens
    generator = torch.Generator().manual_seed(setup.seed)
    others = torch.empty_like(tokens.lengths)
    for length in tokens.lengths.unique().tolist():
        rows = (tokens.lengths == length).nonzero()[:, 0]
        if len(rows) < 2:
            raise TranscoderError(
                f"Row {int(rows[0])} is the only prompt of {length} tokens, so it cannot be resampled: choose mean."
            )
        rows = rows[torch.randperm(len(rows), generator=generator)]
        others[rows] = rows.roll(1)
    runs = PromptRuns(setup.runs.model, replace(tokens, input_ids=tokens.input_ids[others]))

    def record(prompts, base, parts):
        return replace(runs.record(prompts, base.window, parts), final=None)

    return Source(record, torch.zeros_like(runs.last))


class Ablation(NamedTuple):
    """A row of `ABLATIONS`.

    Args:
        prepare (`Callable[[AblationSetup], Source]`): Checks the task, and returns what gives the activations of a batch.
        is_random (`bool`): Whether the activations depend on the seed.
    """

    prepare: Callable[[AblationSetup], Source]
    is_random: bool = False


ABLATIONS = {
    "counterfactual": Ablation(counterfactual),
    "zero": Ablation(zero),
    "mean": Ablation(mean),
    "resample": Ablation(resample, is_random=True),
}


@torch.no_grad()
def _group_means(runs, group, parts, budget):
    """Means of activations over groups of prompts.

    Args:
        runs ([`PromptRuns`]): The prompts.
        group (`torch.LongTensor` of shape `(prompts,)`): Number of the group of each prompt.
        parts (`set[str]`): Names of the activations.
        budget ([`Budget`]): Size of a batch.

    Returns:
        `dict[str, list[torch.Tensor]]`: for each activation and layer a tensor whose first axis is the group.
    """
    lengths, seq = runs.tokens.lengths, runs.tokens.input_ids.shape[1]
    counts = torch.bincount(group)
    sums = {}
    for prompts in runs.batches(budget.prompts(seq, len(parts), 1)):
        longest = int(lengths[prompts].max())
        start = torch.zeros_like(prompts).to(input_device(runs.model))
        recording = runs.record(prompts, Window(start, longest), parts)
        for part in parts:
            for layer, value in enumerate(recording.parts[part]):
                width = seq if part == "pattern" else value.shape[-1]
                shape = (len(counts), *value.shape[1:-2], seq, width)
                total = sums.setdefault((part, layer), torch.zeros(shape, device=value.device))
                total = total[..., :longest, : value.shape[-1]]
                total.index_add_(0, group[prompts].to(value.device), value.float())
    means = {part: [] for part in parts}
    for (part, _), total in sums.items():
        means[part].append(total / counts.to(total.device).view(-1, *[1] * (total.dim() - 1)))
    return means
