"""Drift: none where nothing changed, where it was planted otherwise, and in the evaluator's own numbers."""

import copy
import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.functional import log_softmax
from transformers import PreTrainedTokenizerFast

from hf_transcoders import TranscoderConfig, TranscoderError, TranscoderEvaluator, TranscoderModel, measure_drift
from hf_transcoders.evaluation.drift import DriftProbe
from hf_transcoders.evaluation.feature_changes import FeatureChanges, _p_value, discoveries
from tests.tiny_models import NUM_LAYERS, VOCAB_SIZE, tiny_model, tiny_tokens


@pytest.fixture
def base():
    return tiny_model("llama")


@pytest.fixture
def rows():
    return [{"input_ids": row} for row in tiny_tokens(40, 24)]


@pytest.fixture
def tokenizer():
    words = {f"w{i} ": i for i in range(VOCAB_SIZE)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0 ")))


def dictionary(base, layer, **kwargs):
    torch.manual_seed(layer)
    sites = f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch"
    config = TranscoderConfig.for_model(
        base, *sites, **{"num_features": 64, "k": 4, "decoder_init": "random"} | kwargs
    )
    return TranscoderModel(config).eval()


@pytest.fixture
def dictionaries(base):
    return {f"l{layer}": dictionary(base, layer) for layer in range(NUM_LAYERS)}


def probe_of(base, dictionaries, rows, **kwargs):
    probe = DriftProbe(dictionaries, rows, **{"max_kl_tokens": 64, **kwargs})
    probe.take_baseline(base)
    return probe


def fidelity(report, name):
    return {metric: report.dictionaries[name][metric] for metric in ("fvu", "normalized_mse", "l0")}


def test_an_unchanged_model_has_no_drift(base, dictionaries, rows, tokenizer):
    probe = probe_of(base, dictionaries, rows, tokenizer=tokenizer)
    before, now = probe.baseline_report(), probe.measure(base)
    assert now.to_dict() == before.to_dict()
    assert now.changed == []
    assert now.model["kl"] == 0.0 and now.model["top1_agreement"] == 1.0
    assert [metrics["features_changed"] for metrics in now.dictionaries.values()] == [0.0] * NUM_LAYERS


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_numbers_are_the_evaluators(base, rows, activation):
    sizes = {} if activation == "jumprelu" else {"k": 4}
    dictionaries = {
        f"l{i}": dictionary(base, i, activation=activation, **{"k": None} | sizes) for i in range(NUM_LAYERS)
    }
    report = probe_of(base, dictionaries, rows, max_loss_tokens=300).measure(base)
    expected = TranscoderEvaluator(base, rows, max_loss_tokens=300, progress=False).evaluate(
        dictionaries, together=True
    )
    for name, metrics in expected.metrics.items():
        found = report.dictionaries[name]
        for metric in ("fvu", "normalized_mse", "l0", "ce_spliced"):
            assert found[metric] == pytest.approx(metrics[metric], rel=1e-6), metric
        assert found["kl_spliced"] == pytest.approx(metrics["kl"], rel=1e-6)
        assert report.model["ce"] == pytest.approx(metrics["ce_original"], rel=1e-9)
    assert report.together["ce_spliced"] == pytest.approx(expected.together["ce_spliced"], rel=1e-9)
    assert report.protocol["fidelity_tokens"] == expected.protocol["fidelity_tokens"] == 40 * 23
    assert report.protocol["loss_tokens"] == expected.protocol["loss_tokens"]


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_a_planted_change_shows_where_it_was_planted(base, dictionaries, layer):
    """The MLP of one layer writes three times as much: below nothing moves, there the output, above everything."""
    rows = [{"input_ids": row} for row in tiny_tokens(64, 48)]
    probe = probe_of(base, dictionaries, rows, num_features=1000)
    before = probe.baseline_report()
    with torch.no_grad():
        base.model.layers[layer].mlp.down_proj.weight.mul_(3)
    now = probe.measure(base)
    for below in range(layer):
        assert fidelity(now, f"l{below}") == fidelity(before, f"l{below}")
    there = f"l{layer}"
    # It reads what it read, so that its features are the same; what it should predict is not.
    assert now.dictionaries[there]["l0"] == before.dictionaries[there]["l0"]
    assert abs(now.dictionaries[there]["fvu"] - before.dictionaries[there]["fvu"]) > 0.01
    assert all(now.dictionaries[f"l{i}"]["features_changed"] == 0 for i in range(layer + 1))
    assert {change.dictionary for change in now.changed} == {f"l{i}" for i in range(layer + 1, NUM_LAYERS)}
    for above in range(layer + 1, NUM_LAYERS):
        share = now.dictionaries[f"l{above}"]["features_changed"]
        assert share * 64 == sum(change.dictionary == f"l{above}" for change in now.changed)
    assert now.model["kl"] > 0.01


def test_a_change_of_all_features_that_is_small_is_none(base, rows):
    """Paired comparisons see a scale of 1.02 on every activation without any doubt; it is not what to report."""
    reader = dictionary(base, 1, activation="relu", k=None)
    reader.b_enc.data.zero_()
    for scale, changed in ((1.02, False), (1.5, True)):
        probe = probe_of(base, {"reader": reader}, rows)
        norm = base.model.layers[1].post_attention_layernorm.weight
        with torch.no_grad():
            norm.mul_(scale)
            now = probe.measure(base)
            norm.div_(scale)
        assert bool(now.dictionaries["reader"]["features_changed"] > 0.9) == bool(now.changed) == changed
    assert {round(math.exp(change.log_mean_change), 3) for change in now.changed} == {1.5}
    assert all(change.log_odds_change == 0 for change in now.changed)


@torch.no_grad()
def test_an_ablated_direction_silences_the_feature_that_reads_it(base, rows, tokenizer):
    """One ReLU feature reads one direction of the stream; without that direction it fires no more."""
    reader = dictionary(base, 1, activation="relu", k=None, num_features=8)
    direction = torch.nn.functional.normalize(base.get_input_embeddings().weight[17], dim=0)
    reader.config.input_site = "layers.0.resid_pre"
    reader.W_enc.zero_()
    reader.W_enc[5] = direction
    reader.b_enc.fill_(-0.1)
    probe = probe_of(base, {"reader": reader}, rows, tokenizer=tokenizer)
    embeddings = base.get_input_embeddings().weight
    inputs = torch.cat([embeddings[row["input_ids"][1:]] for row in rows]) @ direction - 0.1
    embeddings -= embeddings @ direction[:, None] * direction
    (change,) = probe.measure(base).changed
    assert (change.dictionary, change.feature, change.rate_after) == ("reader", 5, 0.0)
    assert change.rate_before == pytest.approx((inputs > 0).double().mean().item())
    assert change.mean_before == pytest.approx(inputs[inputs > 0].mean().item(), rel=1e-5)
    assert change.log_odds_change < -3 and math.isnan(change.log_mean_change)
    # The token that the direction belongs to is where the feature fired most.
    assert "[[w17 ]]" in change.label and change.label.startswith("'w17 '")


def test_kl_is_that_of_two_plain_forwards(base, dictionaries, rows):
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight.mul_(1.5)
        ids = torch.stack([row["input_ids"] for row in rows[:3]])
        old, new = (log_softmax(model(ids).logits[:, 1:-1].double(), -1) for model in (base, changed))
    # 64 tokens are wanted and a block has 23 that count, so the probe keeps three; 22 of each have a successor.
    report = measure_drift(base, changed, dictionaries, rows, max_kl_tokens=64)
    assert report.protocol["kl_tokens"] == 3 * 22
    assert report.model["kl"] == pytest.approx((old.exp() * (old - new)).sum(-1).mean().item(), rel=1e-4)
    assert report.model["top1_agreement"] == pytest.approx((old.argmax(-1) == new.argmax(-1)).double().mean().item())


def test_the_model_is_left_as_it_was(base, dictionaries, rows, tokenizer):
    base.train()
    base.model.layers[1].eval()
    base(torch.stack([rows[0]["input_ids"]]), labels=torch.stack([rows[0]["input_ids"]])).loss.backward()
    for name, module in dictionaries.items():
        module.train(name == "l0")

    def state():
        return {
            "training": [m.training for root in (base, *dictionaries.values()) for m in root.modules()],
            "hooks": [
                (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in base.modules()
            ],
            "gradients": [p.grad.clone() for p in base.parameters()],
            "weights": [p.detach().clone() for p in base.parameters()],
            "random": torch.get_rng_state(),
            "grad_mode": torch.is_grad_enabled(),
        }

    before = state()
    probe_of(base, dictionaries, rows, tokenizer=tokenizer).measure(base)
    after = state()
    for key in ("training", "hooks", "grad_mode"):
        assert before[key] == after[key], key
    for key in ("gradients", "weights"):
        assert all(torch.equal(a, b) for a, b in zip(before[key], after[key], strict=True))
    assert torch.equal(before["random"], after["random"])


def test_one_forward_for_all_dictionaries(base, dictionaries, rows):
    """The first block runs as often for three dictionaries as for one."""
    counts = []
    for some in ({"l2": dictionaries["l2"]}, dictionaries):
        calls = []
        handle = base.get_input_embeddings().register_forward_hook(lambda *_, calls=calls: calls.append(1))
        probe = DriftProbe(some, rows, max_loss_tokens=1, max_kl_tokens=0)
        probe.take_baseline(base)
        handle.remove()
        counts.append(len(calls))
    # Losses take part of a forward more for each spliced model and for all of them together.
    assert counts[1] - counts[0] == 3


def test_the_jackknife_error_is_that_of_other_texts():
    """For groups of independent tokens, errors agree with the spread of the change over repetitions."""
    generator = torch.Generator().manual_seed(0)
    groups, per_group, repetitions = 32, 40, 400
    tokens = torch.full((groups,), per_group, dtype=torch.float64)
    before, after = (
        torch.binomial(
            torch.full((groups, repetitions), float(per_group)),
            torch.full((groups, repetitions), p),
            generator=generator,
        ).double()
        for p in (0.1, 0.2)
    )
    changes = FeatureChanges(tokens, before, before, after, after)
    true = math.log(0.2 / 0.8) - math.log(0.1 / 0.9)
    assert changes.log_odds.mean().item() == pytest.approx(true, abs=0.03)
    assert changes.log_odds_error.mean().item() == pytest.approx(changes.log_odds.std().item(), rel=0.1)


@pytest.mark.parametrize("rate", [0.002, 0.008, 0.05])
def test_noise_is_not_reported_as_drift(rate):
    """Features that fire in bursts, at the same rate before and after: their counts differ by chance alone."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rates = (torch.distributions.Gamma(0.5, 0.5).sample((32, 20_000)) * rate).clamp(max=1)
    before, after = (
        torch.binomial(torch.full_like(rates, 40.0), rates, generator=generator).double() for _ in ("before", "after")
    )
    changes = FeatureChanges(torch.full((32,), 40.0, dtype=torch.float64), before, before, after, after)
    p_values = changes.p_values()[0]
    # At most twice as many as the level says, far out in the tail too; features too rare to be judged have 1.
    for level in (0.05, 0.01, 0.001):
        assert (p_values <= level).double().mean().item() <= 2 * level
    # Such features in lists of a thousand: few lists name any.
    lists = [bool(discoveries({"d": part[None]})["d"].any()) for part in p_values.split(1000)]
    assert sum(lists) <= 4


def test_p_values_are_students():
    # Beyond the tolerance of 0.1, in standard errors.
    change = torch.tensor([0.0, 0.1, -1.1, 2.1, 2.142, -5.1, float("nan")], dtype=torch.float64)
    found = _p_value(change, torch.ones(7, dtype=torch.float64), groups=31)
    # Two-sided tails of Student's t with 30 degrees of freedom, from tables.
    expected = [1.0, 1.0, 0.32531, 0.05462, 0.05003, 2.329e-5, 1.0]
    assert found.tolist() == pytest.approx(expected, rel=0.01)


def testdiscoveries_are_those_of_benjamini_and_hochberg():
    p = torch.tensor([[0.001, 0.012, 0.5, 0.03, 0.9], [1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    # Thresholds 0.005, 0.01, 0.015 ...: 0.012 is over the second, and no later one is under its own.
    assert discoveries({"d": p})["d"].tolist() == [True, False, False, False, False]
    p[0, 3] = 0.013
    assert discoveries({"d": p})["d"].tolist() == [True, True, False, True, False]


def test_a_baseline_is_read_back(base, dictionaries, rows, tokenizer, tmp_path):
    probe = probe_of(base, dictionaries, rows, tokenizer=tokenizer)
    probe.save_baseline(tmp_path / "baseline")
    with torch.no_grad():
        base.model.layers[0].mlp.down_proj.weight.mul_(3)
    again = DriftProbe(dictionaries, rows, tokenizer=tokenizer, max_kl_tokens=64)
    again.load_baseline(tmp_path / "baseline")
    assert again.measure(base).to_dict() == probe.measure(base).to_dict()
    assert again.measure(base).changed[0].label is not None
    with pytest.raises(TranscoderError, match="other transcoders or on other probe text"):
        DriftProbe(dictionaries, rows[1:]).load_baseline(tmp_path / "baseline")
    (tmp_path / "baseline").write_bytes(b"nonsense")
    with pytest.raises(TranscoderError, match="cannot be read"):
        again.load_baseline(tmp_path / "baseline")


def test_wrong_pairings_are_refused(base, dictionaries, rows):
    config = dictionaries["l0"].config
    config.base_model_type = "gpt2"
    with pytest.raises(TranscoderError, match="for a model of type 'gpt2', and this is one of type 'llama'"):
        probe_of(base, dictionaries, rows)
    config.base_model_type = "llama"
    config.base_model_name_or_path, base.config.name_or_path = "some/model", "other/model"
    with pytest.raises(TranscoderError, match="is for some/model, and this is other/model"):
        probe_of(base, dictionaries, rows)
    base.config.name_or_path = "some/model"
    with pytest.raises(TranscoderError, match="width 16 at 'layers.0.mlp.in'"):
        probe_of(base, {"narrow": dictionary(base, 0, d_in=16)}, rows)
    with pytest.raises(TranscoderError, match="layers 0 to 2"):
        dictionaries["l0"].config.input_site = "layers.7.mlp.in"
        probe_of(base, dictionaries, rows)


def test_another_revision_is_refused(base, dictionaries, rows):
    dictionaries["l0"].config.base_model_revision, base.config._commit_hash = "aaa", "bbb"
    with pytest.raises(TranscoderError, match="'l0' is for revision aaa of .*, and this is bbb"):
        DriftProbe(dictionaries, rows).check(base)


def test_what_cannot_be_measured_is_refused(base, dictionaries, rows):
    with pytest.raises(TranscoderError, match="single block"):
        DriftProbe(dictionaries, rows[:1])
    with pytest.raises(TranscoderError, match="call `take_baseline`"):
        DriftProbe(dictionaries, rows).measure(base)
