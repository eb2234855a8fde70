"""Score explanations that predict activations: simulation, detection and fuzzing."""

import random
from collections.abc import Sequence

from ..examples import ExampleWindow
from .correlation import area_under_roc, balanced_accuracy, best_threshold, pearson
from .example_split import ExampleSplit
from .explanation import Explanation, Predictor


# Tokens with at least this share of the largest activation of a window are marked.
MARKED = 0.3


class SimulationScorer:
    """Correlation of real and predicted activations over all tokens of the test windows together.

    `top_and_random` is the score of the 2023 paper: five windows of the largest activations and five random ones in which the
    feature fires. `top_only` and `random_only` are its halves. Silent windows never enter these; `with_silent`, of the five
    random windows and five random silent ones, is closer to random text.
    """

    name = "simulation"

    def score(self, explanation: Explanation, split: ExampleSplit) -> dict[str, float]:
        silent = [window for window in split.test_silent if not any(window.activations)][:5]
        groups = {
            "top_and_random": split.test_active,
            "top_only": split.test_top,
            "random_only": split.test_random,
            "with_silent": split.test_random + silent,
        }
        return {name: simulated(explanation.predict, windows) for name, windows in groups.items()}


def simulated(predict: Predictor, windows: Sequence[ExampleWindow]) -> float:
    """Correlation of real and predicted activations over all tokens of windows together."""
    real = [activation for window in windows for activation in window.activations]
    return pearson(real, [value for window in windows for value in predict(window.tokens)])


class DetectionScorer:
    """Whether the largest predicted activation tells windows in which a feature fires from silent ones, half of them near misses.

    The threshold is chosen on training windows. Chance is 0.5.
    """

    name = "detection"

    def score(self, explanation: Explanation, split: ExampleSplit) -> dict[str, float]:
        strength = lambda window: max(explanation.predict(window.tokens))  # noqa: E731
        fires, silent = divided(split.train)
        threshold = best_threshold(list(map(strength, fires)), list(map(strength, silent)))
        positive, negative = list(map(strength, split.test_active)), list(map(strength, split.test_silent))
        return {
            "balanced_accuracy": balanced_accuracy(
                [value >= threshold for value in positive], [value >= threshold for value in negative]
            ),
            "auroc": area_under_roc(positive, negative),
        }


class FuzzingScorer:
    """Whether the mean predicted activation on marked tokens tells right marks from as many random ones in the same windows.

    The threshold is chosen on training windows. Chance is 0.5.
    """

    name = "fuzzing"

    def score(self, explanation: Explanation, split: ExampleSplit) -> dict[str, float]:
        def strengths(windows):
            right, wrong = [], []
            for window in windows:
                predicted = explanation.predict(window.tokens)
                for marks, values in zip(marks_of(window, split.feature), (right, wrong), strict=True):
                    if marks:
                        values.append(sum(predicted[mark] for mark in marks) / len(marks))
            return right, wrong

        threshold = best_threshold(*strengths(divided(split.train)[0]))
        right, wrong = strengths(split.test_active)
        return {
            "balanced_accuracy": balanced_accuracy(
                [value >= threshold for value in right], [value >= threshold for value in wrong]
            ),
            "auroc": area_under_roc(right, wrong),
        }


def divided(windows: Sequence[ExampleWindow]) -> tuple[list[ExampleWindow], list[ExampleWindow]]:
    """Windows in which the feature fires, and those in which it is silent."""
    fires = [window for window in windows if any(window.activations)]
    return fires, [window for window in windows if not any(window.activations)]


def marks_of(window: ExampleWindow, seed: int) -> tuple[list[int], list[int]]:
    """Places of the tokens with large activations, and as many random places of others, as far as there are."""
    least = MARKED * max(window.activations)
    right = [place for place, activation in enumerate(window.activations) if activation >= least and activation > 0]
    others = [place for place in range(len(window.tokens)) if place not in set(right)]
    chosen = random.Random(f"{seed} {window.row} {window.start}").sample(others, min(len(right), len(others)))
    return right, sorted(chosen)
