"""Results of the greater-than study, and their tables."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ...reports.sections import Table, tables_text
from ...tasks.answer_metrics import Estimate, estimate
from ..published import PublishedStudy, published_figure, with_published


MODEL, TRANSCODER = "the model", "transcoder for the MLP"
# The k of the table of the two curves; those of the paper among them.
_SHOWN_K = (0, 1, 2, 3, 5, 10, 15, 20, 21, 22, 23, 24, 30, 50, 75)


@dataclass
class YearFeature:
    """
    What one feature does for greater-than.

    Args:
        index (`int`): Number of the feature.
        variance (`float`): Of its activation at the last position, over all prompts.
        activations (`list[float]`): Its activation at the last position, by year.
        score (`float`): The score with all features but this one.
        effect (`float`):
            What it adds to the logit of the higher minus that of the lower ending of `protocol["direction"]`, mean over
            years: activation x decoder x unembedding, with the scale of the final norm of each prompt.
        by_ending (`list[float]`):
            What a unit of it adds to the logit of each ending, beyond what it adds to all of them; in the same way.
        tokens (`list[str]`, *optional*):
            Its de-embedding: the tokens whose embeddings it reads most, through the gain of the MLP's norm. `None` where
            the transcoder does not read the MLP's input.
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
    What the case study found. Scores are probability differences between -1 and 1: later years minus earlier ones, the
    endings sharing all probability, mean over years.

    Args:
        years (`list[str]`): Years that count.
        endings (`list[str]`): Endings that compete.
        original, transcoder (`list[float]`): Score by year: of the model, and with the transcoder for the MLP.
        accuracy (`Estimate`): Share of years after which the model ranks a later ending first among the endings.
        full_accuracy (`Estimate`): The same among all tokens.
        feature_curve, neuron_curve (`list[float]`):
            Score with k features of the transcoder, or k neurons of the MLP, for k = 0, 1, ...: those of the highest
            variance. All others are zero, and biases stay.
        features (`list[YearFeature]`): The first of them, by variance.
        protocol (`dict`): How it was measured.
        published ([`PublishedStudy`], *optional*): Figures of the paper, if they are of this model and transcoder.
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
    def crossing(self) -> int | None:
        """The smallest k from 1 on at which features are no better than as many neurons; `None` if there is none."""
        pairs = list(zip(self.feature_curve, self.neuron_curve, strict=True))
        return next((k for k, (ours, theirs) in enumerate(pairs) if k and ours <= theirs), None)

    @property
    def culprits(self) -> list[YearFeature]:
        """Features without which the score is higher, the worst first."""
        whole = self.transcoder_score.mean
        worse = [feature for feature in self.features if feature.score > whole]
        return sorted(worse, key=lambda feature: -feature.score)

    def to_text(self) -> str:
        """The main numbers as text for a terminal."""
        return tables_text([scores_table(self), curve_table(self), features_table(self)])

    __str__ = to_text

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {
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
    crossing = "in no k of the curve" if study.crossing is None else f"k = {study.crossing}"
    rows += [
        ["features no better than neurons from", crossing, published_figure(paper, "crossing")],
        ["accuracy among the endings", str(study.accuracy), ""],
        ["accuracy among all tokens", str(study.full_accuracy), ""],
    ]
    note = (
        f"Probability of later years minus that of earlier ones after '{study.protocol['prompt']}', shared among "
        f"{len(study.endings)} endings; mean over {len(study.years)} years and its 95% interval (of accuracies Wilson's). "
        "Accuracy: the likeliest ending makes a later year."
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
        "Change: of the score with all features. Where it is positive, the feature works against the task. Effect: on the "
        f"logit of the ending {high} minus that of {low}, mean over years. De-embedding: the tokens whose embeddings it reads "
        "most."
    )
    return Table("Features of the highest variance", [*headers, "de-embedding"], rows, note)
