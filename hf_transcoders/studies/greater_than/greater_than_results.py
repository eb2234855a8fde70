"""Results of the greater-than study and their tables."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ...reports.sections import Table, tables_text
from ...tasks.answer_metrics import Estimate, estimate
from ...tasks.performance import ability_warning
from ...text.printable import printable
from ..published import PublishedStudy, published_figure, with_published


MODEL, TRANSCODER = "the model", "transcoder for the MLP"
# Numbers of features in the table of the curves, including those of the paper.
_SHOWN_K = (0, 1, 2, 3, 5, 10, 15, 20, 21, 22, 23, 24, 30, 50, 75)


@dataclass
class YearFeature:
    """
    Effect of one feature on greater-than.

    Args:
        index (`int`): Number of the feature.
        variance (`float`): Variance of its activation at the last position over all prompts.
        activations (`list[float]`): Activation at the last position, by year.
        score (`float`): Score with all features except this one.
        effect (`float`):
            Mean over years of its direct effect on the difference of the logits of the two endings of
            `protocol["direction"]`: activation x decoder x unembedding, with the final norm scale of each prompt.
        by_ending (`list[float]`):
            Direct effect of one unit of activation on the logit of each ending, minus the mean over endings.
        tokens (`list[str]`, *optional*):
            De-embedding: the tokens whose embeddings activate it most, through the gain of the norm before the MLP. `None`
            if the transcoder does not read the input of the MLP.
    """

    index: int
    variance: float
    activations: list[float]
    score: float
    effect: float
    by_ending: list[float]
    tokens: list[str] | None = None


@dataclass
class GreaterThanStudy:
    """
    Results of the case study. Scores are differences between the probabilities of later and of earlier years, between -1
    and 1, normalized over the endings and averaged over years.

    Args:
        years (`list[str]`): Scored years.
        endings (`list[str]`): Candidate endings.
        original, transcoder (`list[float]`): Score by year of the model, and with the transcoder in place of the MLP.
        accuracy (`Estimate`): Share of years for which the most likely ending makes a later year.
        full_accuracy (`Estimate`): Share of years for which the most likely token of the vocabulary makes a later year.
        feature_curve, neuron_curve (`list[float]`):
            Score with the k features of the transcoder, or k neurons of the MLP, of the highest variance, for k = 0, 1, ...
            All others are set to zero; biases are kept.
        features (`list[YearFeature]`): Features of the highest variance.
        protocol (`dict`): Measurement protocol.
        published ([`PublishedStudy`], *optional*): Published figures, if they apply to this model and transcoder.
    """

    years: list[str]
    endings: list[str]
    original: list[float]
    transcoder: list[float]
    accuracy: Estimate
    full_accuracy: Estimate
    feature_curve: list[float]
    neuron_curve: list[float]
    features: list[YearFeature]
    protocol: dict[str, Any] = field(default_factory=dict)
    published: PublishedStudy | None = None

    @property
    def original_score(self) -> Estimate:
        """Score of the unchanged model, with an interval over years."""
        return estimate(torch.tensor(self.original))

    @property
    def transcoder_score(self) -> Estimate:
        """Score with the transcoder for the MLP, with an interval over years."""
        return estimate(torch.tensor(self.transcoder))

    @property
    def warning(self) -> str | None:
        """A warning if the model does not do the task; otherwise `None`."""
        later = [sum(int(ending) > int(year[-2:]) for ending in self.endings) for year in self.years]
        guessing = sum(later) / (len(self.years) * len(self.endings))
        return ability_warning(
            "greater-than",
            ("probability difference", self.original_score),
            ("accuracy among the endings", self.accuracy),
            guessing,
        )

    @property
    def crossing(self) -> int | None:
        """Smallest k >= 1 at which features are no better than as many neurons, or `None`."""
        # An MLP may have fewer neurons than the dictionary has features, and then its curve is shorter.
        pairs = zip(self.feature_curve, self.neuron_curve, strict=False)
        return next((k for k, (ours, theirs) in enumerate(pairs) if k and ours <= theirs), None)

    @property
    def culprits(self) -> list[YearFeature]:
        """Features whose removal increases the score, the most harmful first."""
        whole = self.transcoder_score.mean
        worse = [feature for feature in self.features if feature.score > whole]
        return sorted(worse, key=lambda feature: -feature.score)

    def to_text(self) -> str:
        """Format the main results as text for a terminal."""
        text = tables_text([scores_table(self), curve_table(self), features_table(self)])
        return text if self.warning is None else f"WARNING: {printable(self.warning)}\n\n{text}"

    __str__ = to_text

    def to_dict(self) -> dict[str, Any]:
        """Return all results as JSON values."""
        return {
            "warning": self.warning,
            **asdict(self),
            "original_score": self.original_score.to_dict(),
            "transcoder_score": self.transcoder_score.to_dict(),
            "crossing": self.crossing,
            "culprits": [feature.index for feature in self.culprits],
        }


def scores_table(study: GreaterThanStudy) -> Table:
    paper = study.published
    rows = [
        [MODEL, str(study.original_score), published_figure(paper, "original")],
        [TRANSCODER, str(study.transcoder_score), published_figure(paper, "transcoder")],
    ]
    shown = study.culprits[:3]
    if paper is not None:
        named = [feature for feature in study.features if f"without {feature.index}" in paper.figures]
        shown = [*shown, *(feature for feature in named if feature not in shown)]
    rows += [
        [f"... without feature {f.index}", f"{f.score:.3f}", published_figure(paper, f"without {f.index}")]
        for f in shown
    ]
    crossing = "at no k of the curve" if study.crossing is None else f"k = {study.crossing}"
    rows += [
        ["features no better than neurons from", crossing, published_figure(paper, "crossing")],
        ["accuracy among the endings", str(study.accuracy), ""],
        ["accuracy among all tokens", str(study.full_accuracy), ""],
    ]
    note = (
        f"Probability of later years minus probability of earlier years after '{study.protocol['prompt']}', normalized over "
        f"{len(study.endings)} endings; mean over {len(study.years)} years with 95% interval (Wilson intervals for accuracies). "
        "Accuracy: the most likely ending makes a later year."
    )
    return with_published("Greater-than", ["", "probability difference"], rows, note, paper)


def curve_table(study: GreaterThanStudy) -> Table:
    length = max(len(study.feature_curve), len(study.neuron_curve))
    shown = sorted({k for k in _SHOWN_K if k < length} | {length - 1})
    rows = [
        [
            k,
            *(f"{curve[k]:.3f}" if k < len(curve) else "" for curve in (study.feature_curve, study.neuron_curve)),
            published_figure(study.published, f"{k} features"),
        ]
        for k in shown
    ]
    pairs = list(zip(study.feature_curve, study.neuron_curve, strict=False))[1:]
    better = sum(ours > theirs for ours, theirs in pairs)
    note = f"Features are better at {better} of the {len(pairs)} k from 1 to {len(pairs)}."
    return with_published(
        "With the k of the highest variance", ["k", "features", "neurons"], rows, note, study.published
    )


def features_table(study: GreaterThanStudy) -> Table:
    whole = study.transcoder_score.mean
    high, low = study.protocol["direction"].split(" - ")
    rows = [
        [
            place,
            feature.index,
            feature.variance,
            f"{feature.score:.4f}",
            f"{feature.score - whole:+.4f}",
            f"{feature.effect:+.3f}",
            "" if feature.tokens is None else " ".join(map(repr, feature.tokens)),
        ]
        for place, feature in enumerate(study.features, 1)
    ]
    headers = ["by variance", "feature", "variance", "score without it", "change", f"effect on {high} - {low}"]
    note = (
        "Change: difference to the score with all features; if it is positive, the feature works against the task. Effect: mean "
        f"direct effect on the difference of the logits of {high} and {low}. De-embedding: tokens whose embeddings activate the "
        "feature most."
    )
    return Table("Features of the highest variance", [*headers, "de-embedding"], rows, note)
