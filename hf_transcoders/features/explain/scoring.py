"""Explain features and score the explanations; what is done is kept, so that an interrupted run goes on."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import TranscoderError
from ...fingerprint import differences
from ...lm.wrappers import takes_model
from ...models.modeling_transcoder import TranscoderModel
from ...text.checked import entry
from ...text.json_lines import append_json_line, read_json_lines
from ...text.printable import printable
from ...text.strict_json import to_json
from ..collect import check_tokenizer
from ..examples import FeatureExamples
from .chat import BadAnswer, Chat, ServiceError
from .chat_explainer import ChatExplainer
from .chat_scorers import ChatDetectionScorer, ChatFuzzingScorer, ChatSimulationScorer
from .combined import CombinedExplainer
from .example_split import TooFewExamples, split_examples
from .explanation import Explainer, Scorer
from .ngrams import NGramExplainer
from .predictor_scorers import DetectionScorer, FuzzingScorer, SimulationScorer
from .token_classes import TokenClasses, TokenClassExplainer
from .token_lists import (
    DeembeddingExplainer,
    PromotedTokensExplainer,
    deembedded_token_weights,
    promoted_token_weights,
)


#: Name of the table of all tokens, below which no explanation says anything about context.
FLOOR = "token-table floor"
_SCORED = "scored.jsonl"
# Tokens of the table of tokens that is an explanation.
_TABLE = 10


@dataclass(frozen=True)
class FeatureScores:
    """The explanations of a feature and their scores.

    Args:
        feature (`int`): Number of the feature.
        texts (`dict[str, str]`): Explainer -> explanation in words.
        scores (`dict[str, dict[str, float]]`): Explainer -> name of a score, such as `simulation.top_and_random` -> score.
        skipped (`str`, *optional*): Why the feature has no scores.
        failed (`dict[str, str]`, *optional*): Explainer or scorer -> why it has no result for this feature.
    """

    feature: int
    texts: dict[str, str] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: str | None = None
    failed: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


@takes_model
def rule_explainers(
    base_model: PreTrainedModel,
    dictionary: TranscoderModel,
    tokenizer: PreTrainedTokenizerBase,
    features: Sequence[int],
) -> list[Explainer]:
    """
    The explainers that need no service: table of tokens, bigram, n-gram, token classes, promoted tokens, de-embedding, and the
    combination that is best on training windows; and the floor.

    Args:
        base_model ([`~transformers.PreTrainedModel`]): Causal language model.
        dictionary ([`TranscoderModel`]): The dictionary.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the language model.
        features (`Sequence[int]`): Features that will be explained.

    Returns:
        `list[Explainer]`: without those that read the weights where the dictionary does not read from or write to the
        residual stream.
    """
    check_tokenizer(base_model, tokenizer)
    single: list[Explainer] = [
        NGramExplainer(tokenizer, 1, _TABLE),
        NGramExplainer(tokenizer, 2),
        NGramExplainer(tokenizer, 4),
        TokenClassExplainer(TokenClasses(tokenizer)),
    ]
    if features:
        if (promoted := promoted_token_weights(base_model, dictionary, features)) is not None:
            single.append(PromotedTokensExplainer(promoted, tokenizer))
        if (read := deembedded_token_weights(base_model, dictionary, features)) is not None:
            single.append(DeembeddingExplainer(read, tokenizer))
    return [NGramExplainer(tokenizer, 1, name=FLOOR), *single, CombinedExplainer(single)]


def rule_scorers() -> list[Scorer]:
    """The scorers of explanations that predict activations."""
    return [SimulationScorer(), DetectionScorer(), FuzzingScorer()]


def chat_explainer_and_scorers(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[Explainer, list[Scorer]]:
    """The explainer that asks a chat model, and the scorers for which it reads explanations."""
    scorers = [each(chat, tokenizer) for each in (ChatDetectionScorer, ChatFuzzingScorer, ChatSimulationScorer)]
    return ChatExplainer(chat, tokenizer), scorers


def sample_features(examples: FeatureExamples, count: int, seed: int = 0) -> list[int]:
    """Features drawn at random from those that fire, in the order of their numbers."""
    firing = examples.fired.nonzero()[:, 0]
    if not len(firing):
        raise TranscoderError("No feature fires on this text: give more text, or check the dictionary's sites.")
    order = torch.randperm(len(firing), generator=torch.Generator().manual_seed(seed))[:count]
    return sorted(firing[order].tolist())


def score_explanations(
    examples: FeatureExamples,
    features: Sequence[int],
    explainers: Sequence[Explainer],
    scorers: Sequence[Scorer],
    *,
    text_scorers: Sequence[Scorer] = (),
    judged: Sequence[str] = (),
    output_dir: str | os.PathLike | None = None,
    facts: Mapping[str, Any] | None = None,
    name: str = "",
    progress: bool = True,
) -> list[FeatureScores]:
    """
    Explain features and score each explanation on windows of documents that its explainer has not seen.

    Args:
        examples ([`FeatureExamples`]): Examples of the dictionary.
        features (`Sequence[int]`): Features to explain.
        explainers (`Sequence[Explainer]`): Explainers.
        scorers (`Sequence[Scorer]`): Scorers of the explanations that predict activations.
        text_scorers (`Sequence[Scorer]`, *optional*): Scorers that read explanations, of the explainers in `judged`.
        judged (`Sequence[str]`, *optional*): Names of explainers whose texts are scored by these too.
        output_dir (`str` or `os.PathLike`, *optional*): Folder in which the scores of each feature are kept as soon as they
            are known. A run into it that was interrupted goes on after the last feature.
        facts (`Mapping[str, Any]`, *optional*): What decides about the scores. A run with others does not go on.
        name (`str`, *optional*): Name of the run in this folder, where there are several.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.

    Returns:
        `list[FeatureScores]`: in the order of `features`, also of those that were skipped.

    Raises:
        [`TranscoderError`]: a service does not answer (what is done is kept), or the folder holds another run.
    """
    facts = {"features": list(features), "explainers": [each.name for each in explainers],
             "scorers": [each.name for each in (*scorers, *text_scorers)], **dict(facts or {})}  # fmt: skip
    kept = None if output_dir is None else _Kept(Path(output_dir) / f"{name}{_SCORED}", facts)
    found = []
    for feature in tqdm(features, "explanations", disable=not progress):
        result = kept.get(feature) if kept else None
        if result is None:
            try:
                result = _score_one(examples, feature, explainers, scorers, text_scorers, judged)
            except ServiceError as error:
                where = (
                    f"the scores of {len(found)} features are kept in {printable(output_dir)}"
                    if kept
                    else "nothing is kept"
                )
                raise TranscoderError(
                    f"Explaining feature {feature} failed: {error}; {where}, so start the service and run the same command "
                    "again."
                ) from error
            if kept:
                kept.add(result)
        found.append(result)
    return found


def _score_one(examples, feature, explainers, scorers, text_scorers, judged):
    try:
        split = split_examples(examples, feature)
    except TooFewExamples as error:
        return FeatureScores(feature, skipped=str(error))
    result = FeatureScores(feature)
    for explainer in explainers:
        try:
            explanation = explainer.fit(split)
        except BadAnswer as error:
            result.failed[explainer.name] = str(error)
            continue
        result.texts[explainer.name] = explanation.text
        result.scores[explainer.name] = own = {}
        chosen = [*(scorers if explanation.predict is not None else ())]
        chosen += [*(text_scorers if explanation.predict is None or explainer.name in judged else ())]
        for scorer in chosen:
            try:
                own |= {f"{scorer.name}.{part}": value for part, value in scorer.score(explanation, split).items()}
            except BadAnswer as error:
                result.failed[f"{explainer.name}, {scorer.name}"] = str(error)
    return result


class _Kept:
    """The scores of features in a file of JSON lines, the first of which is the facts of the run."""

    def __init__(self, path: Path, facts: Mapping[str, Any]):
        self.path, self.results = path, {}
        facts = json.loads(to_json(facts))
        if not path.exists():
            append_json_line(path, {"facts": facts})
            return
        whole = read_json_lines(path)
        if not whole:
            raise TranscoderError(f"{printable(path)} is damaged: remove it to start again.")
        saved = entry(whole[0], "facts", dict, f"Line 1 of {path}")
        if differ := differences(saved, facts):
            raise TranscoderError(
                f"{printable(path)} is of a run with {'; '.join(differ[:3])}: repeat its options, or give another folder."
            )
        for number, line in enumerate(whole[1:], 2):
            where = f"Line {number} of {path}"
            result = FeatureScores(
                feature=entry(line, "feature", int, where),
                texts=entry(line, "texts", dict, where),
                scores={
                    explainer: {part: float("nan") if value is None else value for part, value in its.items()}
                    for explainer, its in entry(line, "scores", dict, where).items()
                },
                skipped=entry(line, "skipped", str, where, null=True),
                failed=entry(line, "failed", dict, where),
            )
            self.results[result.feature] = result

    def get(self, feature: int) -> FeatureScores | None:
        """The scores of a feature, if they are known."""
        return self.results.get(feature)

    def add(self, result: FeatureScores) -> None:
        """Keep the scores of a feature."""
        append_json_line(self.path, result.to_dict())
