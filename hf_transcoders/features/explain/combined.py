"""Choose the best explainer of a feature, or the best sum of two, on training windows alone."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .correlation import pearson
from .example_split import ExampleSplit
from .explanation import Explainer, Explanation, Predictor


# Gain in correlation from which a sum of two is taken instead of one.
_GAIN = 0.02


class CombinedExplainer:
    """The explainer, or the sum of two, that predicts best on training documents that were held out while fitting it.

    Args:
        explainers (`Sequence[Explainer]`): Explainers that predict activations.
    """

    name = "combination"

    def __init__(self, explainers: Sequence[Explainer]):
        self.explainers = list(explainers)

    def fit(self, split: ExampleSplit) -> Explanation:
        half, held_out = _halves(split.train)
        real = [activation for window in held_out for activation in window.activations]
        fitted = [explainer.fit(replace(split, train=half)).predict for explainer in self.explainers]
        predicted = [
            [value for window in held_out for value in predict(window.tokens)] for predict in fitted if predict
        ]
        scores = {(number,): _known(pearson(real, values)) for number, values in enumerate(predicted)}
        best = max(scores, key=lambda key: scores[key])
        for pair in itertools.combinations(range(len(predicted)), 2):
            values = [one + other for one, other in zip(*(predicted[number] for number in pair), strict=True)]
            score = _known(pearson(real, values))
            if score > scores[best] + (_GAIN if len(best) == 1 else 0):
                scores[pair], best = score, pair
        chosen = [self.explainers[number].fit(split) for number in best]
        predict = SumPredictor(tuple(each.predict for each in chosen if each.predict))
        return Explanation(self.name, " ".join(each.text for each in chosen), predict)


def _halves(windows):
    """Windows of every second document, and those of other documents: what is chosen is what carries over."""
    half = [window for window in windows if window.document % 2] or windows
    seen = {document for window in half for document in window.documents}
    # Where documents are so short that all windows have several, the halves share some.
    for others in ([w for w in windows if not seen & set(w.documents)], [w for w in windows if w.document % 2 == 0]):
        if others:
            return half, others
    return half, windows


def _known(score):
    """Without activations in the held-out windows, nothing is better than another."""
    return -1.0 if math.isnan(score) else score


@dataclass(frozen=True)
class SumPredictor:
    """The sum of what several predict.

    Args:
        parts (`tuple[Callable, ...]`): Predictors.
    """

    parts: tuple[Predictor, ...]

    def __call__(self, tokens):
        return [sum(values) for values in zip(*(part(tokens) for part in self.parts), strict=True)]
