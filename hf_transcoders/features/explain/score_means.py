"""Means of scores over features, with intervals, and what an explanation adds to a table of tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...tasks.answer_metrics import bootstrap_interval
from .scoring import FLOOR, FeatureScores


@dataclass(frozen=True)
class MeanScore:
    """The mean of a score over features.

    Args:
        explainer (`str`): Name of the explainer.
        score (`str`): Name of the score.
        mean (`float`): Mean over features.
        low, high (`float`): Ends of its interval of 95%, by a bootstrap over features.
        features (`int`): Number of features that have the score.
        above_floor (`float`, *optional*): Mean difference from the score of a table of tokens, over the same features.
        above_low, above_high (`float`, *optional*): Ends of its interval.
    """

    explainer: str
    score: str
    mean: float
    low: float
    high: float
    features: int
    above_floor: float | None = None
    above_low: float | None = None
    above_high: float | None = None


def mean_scores(results: Sequence[FeatureScores]) -> list[MeanScore]:
    """The mean of every score of every explainer over features; scores that are not defined for a feature are left out."""
    names = dict.fromkeys(
        (explainer, score) for result in results for explainer, scores in result.scores.items() for score in scores
    )
    found = []
    for explainer, score in names:
        values, differences = [], []
        for result in results:
            value = result.scores.get(explainer, {}).get(score, math.nan)
            if math.isnan(value):
                continue
            values.append(value)
            floor = result.scores.get(FLOOR, {}).get(score, math.nan)
            if explainer != FLOOR and not math.isnan(floor):
                differences.append(value - floor)
        if not values:
            continue
        mean, low, high = _estimate(values)
        above = _estimate(differences) if differences else (None, None, None)
        found.append(MeanScore(explainer, score, mean, low, high, len(values), *above))
    return found


def skip_reasons(results: Sequence[FeatureScores]) -> dict[str, int]:
    """Why features, explainers or scorers have no result -> how often."""
    found: dict[str, int] = {}
    for result in results:
        reasons = [f"{who}: {why}" for who, why in result.failed.items()]
        if result.skipped is not None:
            reasons.append("fires in too few windows of different documents")
        for reason in reasons:
            found[reason] = found.get(reason, 0) + 1
    return found


def _estimate(values):
    tensor = torch.tensor(values, dtype=torch.float64)
    return (float(tensor.mean()), *bootstrap_interval(tensor))
