"""Sections of the page of explanations: mean scores beside their controls, and the explanation of each feature."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..features.explain.score_means import mean_scores, skip_reasons
from ..features.explain.scoring import FLOOR, FeatureScores
from .sections import Section, Table


_CHANCE = {
    "detection.balanced_accuracy",
    "detection.auroc",
    "fuzzing.balanced_accuracy",
    "fuzzing.auroc",
    "surprisal.auroc",
}
_DEFINITIONS = (
    "simulation: Pearson correlation of real and predicted activations over all tokens of the test windows together, for five "
    "windows with the largest activations and five random ones in which the feature fires (top_and_random, the score of the 2023 "
    "paper), each half of these, and the random ones with five silent windows (with_silent). detection: windows in which the "
    "feature fires against silent ones, half of them near misses; chance is 0.5. fuzzing: right marks against random ones in the "
    "same windows; chance is 0.5. surprisal: whether text is less surprising after the explanation; chance is 0.5. Intervals are of "
    "95%, by a bootstrap over features. 'above floor' is the mean difference from a table of all tokens of the training windows: what "
    "an explanation adds by context. No training and test window share a document."
)


def explanation_sections(
    results: Sequence[FeatureScores],
    control: Sequence[FeatureScores] | None,
    facts: Mapping[int, Mapping[str, Any]] | None = None,
) -> list[Section]:
    """
    Sections for [`~hf_transcoders.reports.results_folder.write_results`].

    Args:
        results (`Sequence[FeatureScores]`): Scores of features.
        control (`Sequence[FeatureScores]`, *optional*): Scores of features of a language model with random weights.
        facts (`Mapping[int, Mapping[str, Any]]`, *optional*): Feature -> further facts for its row, such as its density.
    """
    scored = [result for result in results if result.skipped is None]
    sections = [
        Section(
            "Scores",
            f"{len(scored)} of {len(results)} features were scored.",
            tables=[score_table("Mean scores", results, control)],
        )
    ]
    skipped = [["this dictionary", why, count] for why, count in skip_reasons(results).items()]
    skipped += [["random weights", why, count] for why, count in skip_reasons(control or ()).items()]
    if skipped:
        sections.append(Section("Skipped", tables=[Table("Without scores", ["of", "why", "features"], skipped)]))
    sections.append(Section("Explanations", tables=[explanation_table(scored, facts or {})]))
    return sections


def score_table(title: str, results: Sequence[FeatureScores], control: Sequence[FeatureScores] | None) -> Table:
    """The mean of each score of each explainer, its difference from the floor, and the same with random weights."""
    controls = {(mean.explainer, mean.score): mean for mean in mean_scores(control or ())}
    headers = [
        "explainer",
        "score",
        "mean",
        "95%",
        "above floor",
        "95%",
        "features",
        "random weights",
        "95%",
        "chance",
    ]
    rows = []
    for mean in mean_scores(results):
        other = controls.get((mean.explainer, mean.score))
        rows.append(
            [
                mean.explainer,
                mean.score,
                _number(mean.mean),
                _interval(mean.low, mean.high),
                _number(mean.above_floor),
                _interval(mean.above_low, mean.above_high),
                mean.features,
                _number(other and other.mean),
                _interval(other and other.low, other and other.high),
                "0.5" if mean.score in _CHANCE or mean.score.endswith("balanced_accuracy") else "0",
            ]
        )
    return Table(title, headers, rows, _DEFINITIONS)


def explanation_table(results: Sequence[FeatureScores], facts: Mapping[int, Mapping[str, Any]]) -> Table:
    """The explanations of each feature, those that explain most first."""
    own = lambda result, name: result.scores.get(name, {}).get("simulation.top_and_random")  # noqa: E731
    ranked = sorted(results, key=lambda result: -(own(result, "combination") or 0.0))
    more = list(dict.fromkeys(name for its in facts.values() for name in its))
    with_chat = any("chat model" in result.texts for result in results)
    headers = ["feature", *more, "score", "floor", "explanation", *(["chat model"] if with_chat else [])]
    rows = [
        [
            result.feature,
            *(facts.get(result.feature, {}).get(name) for name in more),
            _number(own(result, "combination")),
            _number(own(result, FLOOR)),
            result.texts.get("combination", ""),
            *([result.texts.get("chat model", "")] if with_chat else []),
        ]
        for result in ranked
    ]
    return Table("Explanations of the combination, with simulation.top_and_random", headers, rows)


def _number(value):
    return None if value is None else f"{value:.3f}"


def _interval(low, high):
    return None if low is None or high is None else f"{low:.3f} to {high:.3f}"
