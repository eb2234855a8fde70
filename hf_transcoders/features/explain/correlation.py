"""Numbers of scores: correlation, balanced accuracy, and the area under the ROC curve."""

import math
from collections.abc import Sequence

import numpy as np


def pearson(real: Sequence[float], predicted: Sequence[float]) -> float:
    """Pearson correlation; 0 if the predictions are constant, and NaN if the real values are."""
    if not len(real) or min(real) == max(real):
        return math.nan
    if min(predicted) == max(predicted):
        return 0.0
    one, other = np.asarray(real, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    one, other = one - one.mean(), other - other.mean()
    scale = np.linalg.norm(one) * np.linalg.norm(other)
    return float(np.clip(one @ other / scale, -1, 1)) if scale else 0.0


def area_under_roc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive example has a higher value than a negative one, ties counting as a half."""
    if not len(positive) or not len(negative):
        return math.nan
    one, other = np.asarray(positive, dtype=np.float64)[:, None], np.asarray(negative, dtype=np.float64)[None]
    return float(((one > other) + 0.5 * (one == other)).mean())


def balanced_accuracy(positive: Sequence[bool], negative: Sequence[bool]) -> float:
    """Mean of the share of positive examples that were called so, and the share of negative ones that were not."""
    if not len(positive) or not len(negative):
        return math.nan
    return (sum(positive) / len(positive) + sum(not each for each in negative) / len(negative)) / 2


def best_threshold(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The value from which on an example is called positive, with the highest balanced accuracy."""
    candidates = sorted({*positive, *negative})
    if not candidates:
        return 0.0
    score = lambda at: balanced_accuracy([v >= at for v in positive], [v >= at for v in negative])  # noqa: E731
    scored = [(score(at), at) for at in candidates]
    if all(math.isnan(value) for value, _ in scored):
        return candidates[-1]
    return max(scored)[1]
