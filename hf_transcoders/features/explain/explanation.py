"""What an explainer and a scorer are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from .example_split import ExampleSplit


#: Maps the token ids of a window to the activation that an explanation predicts on each token.
Predictor = Callable[[Sequence[int]], list[float]]


@dataclass(frozen=True)
class Explanation:
    """An explanation of a feature.

    Args:
        explainer (`str`): Name of the explainer.
        text (`str`): The explanation in words.
        predict (`Callable`, *optional*): Maps token ids of a window to predicted activations. `None` for an explanation in
            words only, which a judge has to read.
    """

    explainer: str
    text: str
    predict: Predictor | None = None


class Explainer(Protocol):
    """Explains a feature from windows of training documents."""

    name: str

    def fit(self, split: ExampleSplit) -> Explanation:
        """Explain a feature from the training windows of a split; its test windows must not be read."""
        ...


class Scorer(Protocol):
    """Scores an explanation on windows of other documents than the explainer has seen."""

    name: str

    def score(self, explanation: Explanation, split: ExampleSplit) -> dict[str, float]:
        """Score an explanation on the test windows of a split: name of a number -> number."""
        ...
