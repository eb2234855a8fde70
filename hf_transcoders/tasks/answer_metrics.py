"""What a task is measured by, row by row, and how sure a mean is."""

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
        rows (`int`): Rows it is a mean of.
        method (`str`): `"wilson"` or `"bootstrap"`.
        confidence (`float`): Share of intervals that hold the true mean, such as 0.95.
    """

    mean: float
    low: float
    high: float
    rows: int
    method: str
    confidence: float = 0.95

    def to_dict(self) -> dict:
        """Its fields as JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def logit_difference(
    logits: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor, against: str = "mean"
) -> torch.Tensor:
    """
    Mean logit of the right answers minus that of the wrong ones, in nats.

    Args:
        logits (`torch.Tensor` of shape `(rows, vocab)`): Logits at `END`.
        right, wrong (`torch.LongTensor` of shape `(rows, most)`): Token ids, padded with -1, as [`AnswerBatch`] has them.
        against (`str`, *optional*, defaults to `"mean"`):
            `"mean"` of the wrong answers, or `"max"`, the strongest of them.

    Returns:
        `torch.Tensor` of shape `(rows,)` in fp32.
    """
    if against not in ("mean", "max"):
        raise TranscoderError(f"A logit difference is not taken against '{against}': choose mean or max.")
    _check(logits, right, wrong)
    ours, theirs = _gather(logits, right), _gather(logits, wrong)
    return _mean(ours, right) - (_mean(theirs, wrong) if against == "mean" else _max(theirs, wrong))


def probability_difference(logits: torch.Tensor, right: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    """
    Probability of all right answers together minus that of all wrong ones, between -1 and 1.

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
        logits (`torch.Tensor` of shape `(rows, vocab)`): Logits of the changed model or prompt.
        reference (`torch.Tensor` of shape `(rows, vocab)`): Those of the clean one.

    Returns:
        `torch.Tensor` of shape `(rows,)` in fp32.
    """
    if logits.shape != reference.shape:
        raise TranscoderError(
            f"KL compares logits of one shape, but these are {tuple(logits.shape)} and {tuple(reference.shape)}."
        )
    log_p, log_q = torch.log_softmax(reference.float(), -1), torch.log_softmax(logits.float(), -1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def accuracy(logits: torch.Tensor, right: torch.Tensor, candidates: torch.Tensor | None = None) -> torch.Tensor:
    """
    Whether the likeliest token is a right answer.

    Args:
        logits (`torch.Tensor` of shape `(rows, vocab)`): Logits at `END`.
        right (`torch.LongTensor` of shape `(rows, most)`): Token ids, padded with -1.
        candidates (`torch.LongTensor` of shape `(rows, most)`, *optional*):
            Token ids to choose from, padded with -1; the full vocabulary if left out.

    Returns:
        `torch.Tensor` of shape `(rows,)`: 1.0 where right, else 0.0. Among equal logits the first token counts.
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
    Place of the best right answer in the full vocabulary; 1 is the likeliest token.

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
    Interval of a share (Wilson's score interval).

    Args:
        successes (`float`): How many rows are right.
        rows (`int`): Of how many.
        confidence (`float`, *optional*, defaults to 0.95): Share of intervals that hold the true share.

    Returns:
        `tuple[float, float]`: its ends, between 0 and 1.
    """
    _check_interval(rows, confidence)
    if not 0 <= successes <= rows:
        raise TranscoderError(f"{successes} of {rows} rows cannot be right: give at most as many as there are rows.")
    z = math.sqrt(2) * torch.erfinv(torch.tensor(confidence, dtype=torch.float64)).item()
    share = successes / rows
    centre = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    # At both ends the exact bound is the end itself.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == rows else centre + half)


def bootstrap_interval(
    values: torch.Tensor, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """
    Interval of a mean: percentiles of the means of resampled rows.

    Args:
        values (`torch.Tensor` of shape `(rows,)`): One value of each row.
        confidence (`float`, *optional*, defaults to 0.95): Share of intervals that hold the true mean, for many rows.
        resamples (`int`, *optional*, defaults to 2000): How often to draw as many rows as there are, with replacement.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same interval.

    Returns:
        `tuple[float, float]`: its ends.
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
    The mean of values over rows, with its interval.

    Args:
        values (`torch.Tensor` of shape `(rows,)`): One value of each row.
        share (`bool`, *optional*, defaults to `False`):
            Whether they are zeros and ones, such as those of [`accuracy`]: then the interval is Wilson's, else a bootstrap.
        confidence, resamples, seed: As [`bootstrap_interval`] has them.

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
                f"Row {empty.nonzero()[0].item()} has no answer to compare with: give wrong answers where the task is made, "
                "or use accuracy."
            )
        if each.max() >= logits.shape[1]:
            raise TranscoderError(
                f"An answer is token {each.max().item()}, but the logits are of {logits.shape[1]} tokens: use the tokenizer "
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
