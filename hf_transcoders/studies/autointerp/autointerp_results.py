"""Results of the comparison of explanations and their table."""

from dataclasses import dataclass, field
from typing import Any

from ...features.explain.score_means import MeanScore, mean_scores
from ...features.explain.scoring import FeatureScores
from ...reports.sections import Table, tables_text


#: The scores of Figure 2 of the 2023 paper.
SCORES = ("simulation.top_and_random", "simulation.random_only")
_PAPER = (
    "Cunningham et al. (2023), Figure 2, Pythia-70M, 150 features each, GPT-4: SAE > ICA > PCA, random and default basis in early "
    "layers, about as good as ICA in layer 4, little gain in the last layer; the axes end at 0.35 (top and random) and 0.2 (random "
    "only). The paper prints no means. Explanations here are rules, so that the order can be compared and the level cannot."
)


@dataclass(frozen=True)
class ExplainedDictionary:
    """The scores of the features of one dictionary.

    Args:
        method (`str`): Name of the kind of dictionary.
        dictionary (`str`): Name of the dictionary.
        site (`str`): Site that it reads.
        layer (`int`, *optional*): Layer of this site.
        num_features (`int`): Number of its features.
        l0 (`float`): Mean number of active features on a token.
        results (`list[FeatureScores]`): Explanations and scores of the features that were drawn.
    """

    method: str
    dictionary: str
    site: str
    layer: int | None
    num_features: int
    l0: float
    results: list[FeatureScores]

    @property
    def scored(self) -> int:
        """Number of features with scores."""
        return sum(result.skipped is None for result in self.results)

    def mean(self, score: str, explainer: str = "combination") -> MeanScore | None:
        """The mean of a score over features, with its interval; `None` if no feature has it."""
        return next((m for m in mean_scores(self.results) if (m.explainer, m.score) == (explainer, score)), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        means = [vars(mean) for mean in mean_scores(self.results)]
        features = [result.to_dict() for result in self.results]
        return {**vars(self), "results": features, "scored": self.scored, "means": means}


@dataclass(frozen=True)
class AutointerpStudy:
    """The scores of several kinds of dictionaries.

    Args:
        dictionaries (`list[ExplainedDictionary]`): Scores of each dictionary.
        protocol (`dict[str, Any]`): Measurement protocol.
    """

    dictionaries: list[ExplainedDictionary]
    protocol: dict[str, Any] = field(default_factory=dict)

    def to_text(self) -> str:
        """Format the table as text for a terminal."""
        return tables_text([autointerp_table(self)])

    __str__ = to_text

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"protocol": self.protocol, "dictionaries": [each.to_dict() for each in self.dictionaries]}


def autointerp_table(study: AutointerpStudy) -> Table:
    """Mean scores of each dictionary with intervals, and what they add to a table of tokens."""
    headers = ["method", "site", "features", "L0", "scored", "of"]
    for score in SCORES:
        headers += [score.partition(".")[2], "95%", "above floor", "95%"]
    rows = []
    for each in study.dictionaries:
        row = [each.method, each.site, each.num_features, f"{each.l0:.1f}", each.scored, len(each.results)]
        for score in SCORES:
            mean = each.mean(score)
            row += [None] * 4 if mean is None else [
                f"{mean.mean:.3f}", f"{mean.low:.3f} to {mean.high:.3f}",
                None if mean.above_floor is None else f"{mean.above_floor:.3f}",
                None if mean.above_low is None else f"{mean.above_low:.3f} to {mean.above_high:.3f}",
            ]  # fmt: skip
        rows.append(row)
    return Table("Explanations of each kind of dictionary", headers, rows, _PAPER)
