"""Divide the examples of a feature into those that explainers see and those that scores are measured on."""

from dataclasses import dataclass

from ...errors import TranscoderError
from ..examples import ExampleWindow, FeatureExamples


# Examples of each kind that the protocol of 2023 draws, and ranks that its explainer sees and its score is measured on.
_DRAWN = 20
_TRAIN_TOP = range(0, _DRAWN, 4)
# Then those that take the place of windows that share a document with the explainer's.
_TEST_TOP = (*range(2, _DRAWN, 4), *range(3, _DRAWN, 4), *range(1, _DRAWN, 4))
_TEST_RANDOM = (*range(1, 14, 3), *(rank for rank in range(_DRAWN) if rank not in range(1, 14, 3)))
_TESTED = 5
# Silent windows of the test: random ones, and near misses.
_TEST_SILENT, _TEST_NEAR = 5, 5


class TooFewExamples(TranscoderError):
    """A feature fires in too few documents to be scored."""


@dataclass(frozen=True)
class ExampleSplit:
    """The examples of a feature, divided by documents: none has tokens in training and in test windows.

    Args:
        feature (`int`): Number of the feature.
        train (`list[ExampleWindow]`): All windows that explainers may see.
        train_top (`list[ExampleWindow]`): The five of them that the explainer of the 2023 paper sees: ranks 1, 5, 9, 13 and
            17 of the 20 largest activations.
        test_top (`list[ExampleWindow]`): Ranks 3, 7, 11, 15 and 19; where one shares a document with those, another rank.
        test_random (`list[ExampleWindow]`): Five random windows in which the feature fires.
        test_silent (`list[ExampleWindow]`): Windows in which it is silent: five random ones, and five in which the token of its
            top activation is there or features with similar encoder rows fire.
    """

    feature: int
    train: list[ExampleWindow]
    train_top: list[ExampleWindow]
    test_top: list[ExampleWindow]
    test_random: list[ExampleWindow]
    test_silent: list[ExampleWindow]

    @property
    def test_active(self) -> list[ExampleWindow]:
        """The test windows in which the feature fires."""
        return self.test_top + self.test_random

    @property
    def largest(self) -> float:
        """Largest activation in the training windows."""
        return max((max(window.activations) for window in self.train), default=0.0)


def split_examples(examples: FeatureExamples, feature: int) -> ExampleSplit:
    """
    Divide the examples of a feature as the 2023 paper does, with training and test windows of different documents.

    The paper takes 20 windows with the largest activations and 20 random ones in which the feature fires, each from another
    document, and interleaves them. Its explainer sees five of the largest; its score is measured on five other large ones and
    five random ones. Here, random windows that share a document with the explainer's are left out first, and explainers that
    fit rules see, besides, every other window that shares no document with a test window.

    Args:
        examples ([`FeatureExamples`]): Examples of the dictionary.
        feature (`int`): Number of the feature.

    Returns:
        [`ExampleSplit`]

    Raises:
        [`TooFewExamples`]: the feature fires in too few documents.
    """
    top = examples.windows(feature, "top")[:_DRAWN]
    if len(top) < _DRAWN:
        raise TooFewExamples(
            f"feature {feature} fires in {len(top)} windows of different documents, and a score needs {_DRAWN}"
        )
    train_top = [top[rank] for rank in _TRAIN_TOP]
    # A window that runs over the end of a document has tokens of two.
    taken = _documents(train_top)
    others = [top[rank] for rank in _TEST_TOP]
    test_top = [window for window in others if not taken & set(window.documents)][:_TESTED]
    shown = {(window.row, window.position) for window in test_top}
    drawn = examples.windows(feature, "random_windows", as_drawn=True)
    drawn = [w for w in drawn if not taken & set(w.documents) and (w.row, w.position) not in shown]
    test_random = [drawn[rank] for rank in _TEST_RANDOM if rank < len(drawn)][:_TESTED]
    if min(len(test_top), len(test_random)) < _TESTED:
        raise TooFewExamples(
            f"feature {feature} fires in {len(test_top)} large and {len(test_random)} random windows of documents that the "
            f"explainer has not seen, and a score needs {_TESTED} of each"
        )
    silent = [w for w in examples.windows(feature, "silent") if not taken & set(w.documents)][:_TEST_SILENT]
    near = examples.windows(feature, "same_token") + examples.windows(feature, "neighbors")
    places = {(window.row, window.start) for window in silent}
    near = [w for w in near if not taken & set(w.documents) and (w.row, w.start) not in places][:_TEST_NEAR]
    test = test_top + test_random + silent + near
    tested = _documents(test)
    every = [window for group in examples.groups if group != "interval" for window in examples.windows(feature, group)]
    every += [window for interval in examples.intervals(feature) for window in interval.windows]
    distinct = {(window.row, window.start): window for window in every if not tested & set(window.documents)}
    return ExampleSplit(feature, list(distinct.values()), train_top, test_top, test_random, silent + near)


def _documents(windows):
    return {document for window in windows for document in window.documents}
