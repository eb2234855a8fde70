"""Metrics of answers for each row, and intervals of their means."""

import math
from dataclasses import asdict, dataclass

import torch

from ..errors import TranscoderError


@dataclass(frozen=True)
class Estimate:
    """
    A mean over rows and its interval.

    Args:
        mean (`float`): The mean.
        low, high (`float`): Ends of the interval.
        rows (`int`): Number of rows.
        method (`str`): `"wilson"` or `"bootstrap"`.
        confidence (`float`): Share of intervals that contain the true mean, such as 0.95.
    """

    mean: float
    low: float
    high: float
    rows: int
    method: str
    confidence: float = 0.95

    def to_dict(self) -> dict:
        """All fields as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def logit_difference(
    logits: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor, against: str = "mean"
) -> torch.Tensor:
    """
    Mean logit of the right answers minus that of the wrong answers, in nats.

    Args:
        logits (`torch.Tensor` of shape `(rows, vocab)`): Logits at `END`.
        right, wrong (`torch.LongTensor` of shape `(rows, most)`): Token ids, padded with -1, as in [`AnswerBatch`].
        against (`str`, *optional*, defaults to `"mean"`):
            The compared logit of the wrong answers, their `"mean"` or their `"max"`.

    Returns:
        `torch.Tensor` of shape `(rows,)` in fp32.
    """
    if against not in ("mean", "max"):
        raise TranscoderError(f"A logit difference cannot be taken against '{against}': choose mean or max.")
    _check(logits, right, wrong)
    ours, theirs = _gather(logits, right), _gather(logits, wrong)
    return _mean(ours, right) - (_mean(theirs, wrong) if against == "mean" else _max(theirs, wrong))


def probability_difference(logits: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    """
    Total probability of the right answers minus that of the wrong answers, between -1 and 1.

    Args:
        logits (`torch.Tensor` of shape `(rows, vocab)`): Logits at `END`.
        right, wrong (`torch.LongTensor` of shape `(rows, most)`): Token ids, padded with -1.

    Returns:
        `torch.Tensor` of shape `(rows,)` in fp32.
    """
    _check(logits, right, wrong)
    probabilities = torch.softmax(logits.float(), dim=-1)
    sums = [(_gather(probabilities, ids) * (ids >= 0)).sum(1) for ids in (right, wrong)]
    return sums[0] - sums[1]


def kl_divergence(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """
    KL(reference || logits) over the whole vocabulary, in nats.

    Args:
        logits (`torch.Tensor` of shape `(rows, vocab)`): Logits of the patched model or corrupted prompt.
        reference (`torch.Tensor` of shape `(rows, vocab)`): Logits of the clean run.

    Returns:
        `torch.Tensor` of shape `(rows,)` in fp32.
    """
    if logits.shape != reference.shape:
        raise TranscoderError(
            f"KL compares logits of the same shape, but these are {tuple(logits.shape)} and {tuple(reference.shape)}."
        )
    log_p, log_q = torch.log_softmax(reference.float(), -1), torch.log_softmax(logits.float(), -1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def accuracy(logits: torch.Tensor, right: torch.Tensor, candidates: torch.Tensor | None = None) -> torch.Tensor:
    """
    Whether the most likely token is a right answer.

    Args:
        logits (`torch.Tensor` of shape `(rows, vocab)`): Logits at `END`.
        right (`torch.LongTensor` of shape `(rows, most)`): Token ids, padded with -1.
        candidates (`torch.LongTensor` of shape `(rows, most)`, *optional*):
            Token ids to choose from, padded with -1. By default the full vocabulary.

    Returns:
        `torch.Tensor` of shape `(rows,)`: 1.0 for right, 0.0 for wrong. Among equal logits the first token counts.
    """
    _check(logits, right)
    if candidates is None:
        chosen = logits.argmax(-1)
    else:
        _check(logits, candidates)
        scores = _gather(logits, candidates).masked_fill(candidates < 0, -math.inf)
        chosen = candidates.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
    return (chosen[:, None] == right).any(1).float()


def rank(logits: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """
    Rank of the best right answer in the full vocabulary; 1 is the most likely token.

    Args:
        logits (`torch.Tensor` of shape `(rows, vocab)`): Logits at `END`.
        right (`torch.LongTensor` of shape `(rows, most)`): Token ids, padded with -1.

    Returns:
        `torch.Tensor` of shape `(rows,)` in fp32.
    """
    _check(logits, right)
    best = _max(_gather(logits, right), right)
    return (logits.float() > best[:, None]).sum(-1).float() + 1


def wilson_interval(successes: float, rows: int, confidence: float = 0.95) -> tuple[float, float]:
    """
    Compute Wilson's score interval of a share.

    Args:
        successes (`float`): Number of right rows.
        rows (`int`): Number of all rows.
        confidence (`float`, *optional*, defaults to 0.95): Share of intervals that contain the true share.

    Returns:
        `tuple[float, float]`: the ends of the interval, between 0 and 1.
    """
    _check_interval(rows, confidence)
    if not 0 <= successes <= rows:
        raise TranscoderError(f"{successes} of {rows} rows cannot be right: give a number from 0 to {rows}.")
    z = math.sqrt(2) * torch.erfinv(torch.tensor(confidence, dtype=torch.float64)).item()
    share = successes / rows
    center = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    # With no or all rows right, the exact bound is 0 or 1.
    return (0.0 if successes == 0 else center - half), (1.0 if successes == rows else center + half)


def bootstrap_interval(
    values: torch.Tensor, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """
    Compute the bootstrap interval of a mean, from percentiles of the means of resampled rows.

    Args:
        values (`torch.Tensor` of shape `(rows,)`): The value of each row.
        confidence (`float`, *optional*, defaults to 0.95): Share of intervals that contain the true mean, for many rows.
        resamples (`int`, *optional*, defaults to 2000): Number of resamples, drawn with replacement.
        seed (`int`, *optional*, defaults to 0): Seed for the resamples.

    Returns:
        `tuple[float, float]`: the ends of the interval.
    """
    _check_interval(len(values), confidence)
    values = values.detach().to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(seed)
    # At most a few million numbers at a time.
    step = max(1, 4_000_000 // len(values))
    means = torch.cat(
        [
            values[torch.randint(len(values), (min(step, resamples - done), len(values)), generator=generator)].mean(1)
            for done in range(0, resamples, step)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64))
    return low.item(), high.item()


def estimate(
    values: torch.Tensor, share: bool = False, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """
    Estimate the mean of values over rows, with its interval.

    Args:
        values (`torch.Tensor` of shape `(rows,)`): The value of each row.
        share (`bool`, *optional*, defaults to `False`):
            Whether the values are zeros and ones, such as those of [`accuracy`]. Their interval is Wilson's, and that of
            other values is a bootstrap.
        confidence, resamples, seed: The arguments of [`bootstrap_interval`].

    Returns:
        [`Estimate`]
    """
    rows = len(values)
    if share:
        low, high = wilson_interval(values.sum().item(), rows, confidence)
    else:
        low, high = bootstrap_interval(values, confidence, resamples, seed)
    return Estimate(values.double().mean().item(), low, high, rows, "wilson" if share else "bootstrap", confidence)


def _check(logits, *ids):
    for each in ids:
        if logits.dim() != 2 or each.dim() != 2 or len(logits) != len(each):
            raise TranscoderError(
                f"Logits of shape (rows, vocab) and ids of shape (rows, most) are needed, but these are "
                f"{tuple(logits.shape)} and {tuple(each.shape)}."
            )
        empty = (each < 0).all(1)
        if empty.any():
            raise TranscoderError(
                f"Row {empty.nonzero()[0].item()} has no answer to compare with: give wrong answers when making the task, or "
                "use accuracy."
            )
        if each.max() >= logits.shape[1]:
            raise TranscoderError(
                f"An answer is token {each.max().item()}, but there are logits of {logits.shape[1]} tokens: use the tokenizer "
                "of the model."
            )


def _gather(values, ids):
    return values.gather(1, ids.clamp(min=0)).float()


def _mean(values, ids):
    real = ids >= 0
    return (values * real).sum(1) / real.sum(1)


def _max(values, ids):
    return values.masked_fill(ids < 0, -math.inf).amax(1)


def _check_interval(rows, confidence):
    if rows < 1 or not 0 < confidence < 1:
        raise TranscoderError(
            f"An interval needs at least one row and a confidence between 0 and 1, not {rows} and {confidence}."
        )
