"""On planted features, explainers find the rule that was planted, and scorers equal a reference."""

import math

import numpy as np
import pytest
import torch

from hf_transcoders import TranscoderConfig, TranscoderModel
from hf_transcoders.features.explain import (
    CombinedExplainer,
    DeembeddingExplainer,
    DetectionScorer,
    Explanation,
    FuzzingScorer,
    NGramExplainer,
    PromotedTokensExplainer,
    SimulationScorer,
    SurprisalScorer,
    TokenClasses,
    TokenClassExplainer,
    rule_explainers,
    split_examples,
)
from hf_transcoders.features.explain.correlation import area_under_roc, balanced_accuracy, best_threshold, pearson
from hf_transcoders.features.explain.predictor_scorers import marks_of
from hf_transcoders.features.explain.token_lists import deembedded_token_weights, promoted_token_weights

from .conftest import CAPITAL, INSIDE, PAIR, SHUFFLED, TOKEN, VOCABULARY


def scores_of(explainer, examples, feature, scorer):
    split = split_examples(examples, feature)
    return scorer.score(explainer.fit(split), split)


def test_a_planted_token_table_scores_1_and_a_shuffled_one_0(examples, tokenizer):
    table = NGramExplainer(tokenizer, 1)
    planted = scores_of(table, examples, TOKEN, SimulationScorer())
    assert all(score > 0.995 for score in planted.values()), planted
    assert abs(scores_of(table, examples, SHUFFLED, SimulationScorer())["top_and_random"]) < 0.2
    text = table.fit(split_examples(examples, TOKEN)).text
    assert text == "Fires on the tokens ' w2', ' w6', ' w10'."
    assert scores_of(table, examples, TOKEN, DetectionScorer())["auroc"] == 1.0
    assert scores_of(table, examples, TOKEN, FuzzingScorer()) == {"balanced_accuracy": 1.0, "auroc": 1.0}
    shuffled = [
        scores_of(table, examples, SHUFFLED, scorer)["auroc"] for scorer in (DetectionScorer(), FuzzingScorer())
    ]
    assert all(0.2 < score < 0.8 for score in shuffled), shuffled


def test_the_number_of_tokens_is_limited(examples, tokenizer):
    explanation = NGramExplainer(tokenizer, 1, 2).fit(split_examples(examples, TOKEN))
    assert explanation.text == "Fires on the tokens ' w2', ' w6'."
    assert explanation.predict([3, 7, 11])[2] == 0 < min(explanation.predict([3, 7, 11])[:2])


def test_a_pair_of_tokens_needs_context(examples, tokenizer):
    one, two = (
        scores_of(NGramExplainer(tokenizer, length), examples, PAIR, SimulationScorer())["top_and_random"]
        for length in (1, 2)
    )
    # The first token of a window has nothing before it.
    assert two > 0.8 > one + 0.2


def test_rules_are_found(examples, tokenizer):
    rules = TokenClassExplainer(TokenClasses(tokenizer))
    explanation = rules.fit(split_examples(examples, CAPITAL))
    assert "beginning with 'w'" not in explanation.text
    assert scores_of(rules, examples, INSIDE, SimulationScorer())["top_and_random"] > 0.999
    assert rules.fit(split_examples(examples, INSIDE)).text == "Fires on tokens that are: after a quotation mark."
    floor = scores_of(NGramExplainer(tokenizer, 1), examples, INSIDE, SimulationScorer())["top_and_random"]
    assert floor < 0.5
    assert scores_of(rules, examples, SHUFFLED, SimulationScorer())["top_and_random"] < 0.3


def test_classes_of_tokens():
    class Texts:
        def of(self, texts):
            classes = TokenClasses(None)
            classes._texts = dict(enumerate(texts))
            member = classes.of(list(range(len(texts))), [("ending in", "ing"), ("beginning with", "un")])
            names = classes.names([("ending in", "ing"), ("beginning with", "un")])
            return [{name for name, holds in zip(names, row, strict=True) if holds} for row in member]

    first, second, third, fourth, fifth = Texts().of([" Hello", ' ("', "undoing", '"', "."])
    assert first == {"begins with a space", "capitalized", "the first token"}
    assert "an opening bracket" in second and "a quotation mark" in second and "after capitalized" in second
    assert {
        "continues a word",
        "inside brackets",
        "inside quotation marks",
        "beginning with 'un'",
        "ending in 'ing'",
    } <= third
    assert "inside quotation marks" in fourth
    assert "the end of a sentence" in fifth and "inside quotation marks" not in fifth and "inside brackets" in fifth


def test_the_combination_takes_the_best_on_training_windows(examples, tokenizer):
    explainers = [NGramExplainer(tokenizer, 1), TokenClassExplainer(TokenClasses(tokenizer))]
    combined = CombinedExplainer(explainers)
    assert combined.fit(split_examples(examples, TOKEN)).text.startswith("Fires on the tokens ' w2'")
    assert combined.fit(split_examples(examples, INSIDE)).text.startswith("Fires on tokens that are: after")
    # What is in the test windows does not count.
    split = split_examples(examples, INSIDE)
    changed = split_examples(examples, INSIDE)
    changed.test_top.clear()
    changed.test_random.clear()
    assert combined.fit(split).text == combined.fit(changed).text


@pytest.mark.parametrize("seed", range(5))
def test_numbers_equal_their_references(seed):
    random = np.random.default_rng(seed)
    real, predicted = random.random(60) * (random.random(60) < 0.4), random.integers(0, 4, 60).astype(float)
    assert pearson(real.tolist(), predicted.tolist()) == pytest.approx(np.corrcoef(real, predicted)[0, 1])
    labels = random.random(60) < 0.5
    roc = area_under_roc(predicted[labels].tolist(), predicted[~labels].tolist())
    # The area under the curve itself, by trapezoids over all thresholds.
    thresholds = [np.inf, *sorted(set(predicted), reverse=True)]
    true, false = ([np.mean(predicted[which] >= t) for t in thresholds] for which in (labels, ~labels))
    assert roc == pytest.approx(np.trapezoid(true, false))
    at = best_threshold(predicted[labels].tolist(), predicted[~labels].tolist())
    accuracy = lambda t: balanced_accuracy(list(predicted[labels] >= t), list(predicted[~labels] >= t))  # noqa: E731
    assert accuracy(at) == max(accuracy(t) for t in range(4))


def test_correlations_that_are_not_defined():
    assert math.isnan(pearson([1.0, 1.0], [0.0, 1.0])) and math.isnan(pearson([], []))
    assert pearson([0.0, 1.0], [2.0, 2.0]) == 0
    assert pearson([0.0, 1.0, 0.0], [0.0, 1e-20, 0.0]) == pytest.approx(1)
    assert math.isnan(area_under_roc([], [1.0])) and math.isnan(balanced_accuracy([True], []))


def test_simulation_is_over_all_tokens_together(examples):
    """Not a mean over windows: windows of different strength count by their tokens."""
    split = split_examples(examples, PAIR)
    explanation = Explanation("planted", "", lambda tokens: [float(token) for token in tokens])
    found = SimulationScorer().score(explanation, split)
    windows = split.test_top + split.test_random
    real = np.concatenate([window.activations for window in windows])
    predicted = np.concatenate([np.asarray(window.tokens, dtype=float) for window in windows])
    assert found["top_and_random"] == pytest.approx(np.corrcoef(real, predicted)[0, 1])
    each = [np.corrcoef(w.activations, np.asarray(w.tokens, dtype=float))[0, 1] for w in windows]
    assert abs(found["top_and_random"] - np.mean(each)) > 1e-3


def test_fuzzing_marks_as_many_other_tokens(examples):
    for window in split_examples(examples, TOKEN).test_active:
        right, wrong = marks_of(window, 0)
        assert right == [i for i, a in enumerate(window.activations) if a >= 0.3 * max(window.activations)]
        assert len(wrong) == min(len(right), len(window.tokens) - len(right)) and not set(right) & set(wrong)
        assert marks_of(window, 0) == (right, wrong)


def test_weights_say_what_a_feature_reads_and_writes(base, examples, tokenizer):
    config = TranscoderConfig.for_model(
        base, "layers.0.mlp.in", "layers.2.mlp.branch", num_features=7, activation="relu"
    )
    dictionary = TranscoderModel(config)
    embeddings = torch.nn.functional.normalize(base.get_input_embeddings().weight.detach(), dim=-1)
    with torch.no_grad():
        base.get_input_embeddings().weight.copy_(embeddings)
        base.model.layers[0].post_attention_layernorm.weight.fill_(1.0)
        base.model.norm.weight.fill_(1.0)
        base.lm_head.weight.copy_(torch.nn.functional.normalize(base.lm_head.weight, dim=-1))
        dictionary.W_enc.copy_(torch.randn(7, 16))
        dictionary.W_dec.copy_(torch.randn(7, 16))
        dictionary.W_enc[TOKEN] = embeddings[3]
        dictionary.W_dec[TOKEN] = 5 * base.lm_head.weight[9]
    read = deembedded_token_weights(base, dictionary, [TOKEN, PAIR])
    written = promoted_token_weights(base, dictionary, [TOKEN, PAIR])
    assert max(read[TOKEN], key=read[TOKEN].get) == 3 and max(written[TOKEN], key=written[TOKEN].get) == 9
    assert list(read) == list(written) == [TOKEN, PAIR]
    split = split_examples(examples, TOKEN)
    assert DeembeddingExplainer(read, tokenizer).fit(split).text.startswith("Reads the tokens ' w2'")
    explanation = PromotedTokensExplainer(written, tokenizer).fit(split)
    assert explanation.text.startswith("Fires before the tokens ' w8'")
    strengths = PromotedTokensExplainer({TOKEN: {9: 2.0}}, tokenizer).fit(split).predict([1, 9, 9])
    assert strengths[0] == strengths[1] and strengths[2] == 0.0
    names = [each.name for each in rule_explainers(base, dictionary, tokenizer, [TOKEN])]
    assert names == ["token-table floor", "token table", "bigram", "n-gram", "token classes", "promoted tokens", "de-embedding",
                     "combination"]  # fmt: skip


def test_surprisal_equals_the_loss_of_each_window_alone(base, examples, tokenizer):
    split = split_examples(examples, TOKEN)
    scorer = SurprisalScorer(base, tokenizer)
    losses = scorer._losses("w2 w6", [w.tokens for w in split.test_active])
    before = tokenizer("w2 w6\n\n", add_special_tokens=False)["input_ids"]
    for window, loss in zip(split.test_active, losses, strict=True):
        ids = torch.tensor([[*before, *window.tokens]])
        logits = base(ids).logits.log_softmax(-1)[0, len(before) - 1 : -1]
        expected = -logits.gather(1, torch.tensor(window.tokens)[:, None]).mean().item()
        assert loss == pytest.approx(expected, rel=1e-4)
    score = scorer.score(Explanation("planted", "w2", None), split)
    assert 0 <= score["auroc"] <= 1


def test_the_vocabulary_is_that_of_the_model(base):
    assert len(VOCABULARY) <= base.config.vocab_size
