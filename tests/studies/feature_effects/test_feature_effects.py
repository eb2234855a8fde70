"""Effects of features: against whole forward passes with plain hooks."""

import json

import pytest
import torch

from hf_transcoders import TranscoderError, capture
from hf_transcoders.lm.architectures import locate
from hf_transcoders.studies.feature_effects.effects_report import save_feature_effects
from hf_transcoders.studies.feature_effects.study import feature_effects_study, removed_until_off
from tests.studies.feature_patching.test_feature_patching import STREAM, sae_of
from tests.studies.greater_than.setups import transcoder_of
from tests.studies.test_circuit_reuse import TOKENIZER, model_for_tasks


ROWS = [
    {"input_ids": row.tolist()} for row in torch.randint(3, 128, (12, 10), generator=torch.Generator().manual_seed(0))
]


@pytest.fixture(scope="module")
def model():
    return model_for_tasks("llama").eval()


@torch.no_grad()
def removed_alone(dictionary, x, feature):
    """Subtract one feature from one input until it is off."""
    total, rounds = 0.0, 0
    while (activation := dictionary.encode(x[None])[0, feature].item()) > 1e-5 * total and rounds < 20:
        total, rounds = total + activation, rounds + 1
        x = x - activation * dictionary.W_dec[feature]
    return total, rounds


@torch.no_grad()
def test_features_are_taken_away_until_they_are_off(model):
    dictionary = sae_of(model)
    # Decoder rows that take away a third of the pre-activation need several rounds.
    dictionary.W_dec.copy_(dictionary.W_enc / dictionary.W_enc.square().sum(1, keepdim=True) / 3)
    inputs = torch.randn(30, dictionary.config.d_in, generator=torch.Generator().manual_seed(0))
    features = torch.arange(30) % 7
    removed, rounds, active = removed_until_off(dictionary, inputs, features, 20)
    for place in range(30):
        total, count = removed_alone(dictionary, inputs[place], int(features[place]))
        assert (
            removed[place].item() == pytest.approx(total, rel=1e-4, abs=1e-6) and abs(int(rounds[place]) - count) <= 1
        )
    assert rounds.max() > 3
    few = removed_until_off(dictionary, inputs, features, 2)
    assert few[1].max() == 2 and few[2].any() and (few[0] <= removed + 1e-6).all()


@pytest.mark.parametrize("make", [sae_of, lambda model: transcoder_of(model, 1)])
def test_changes_equal_whole_forward_passes(model, make):
    dictionary = make(model)
    study = feature_effects_study(
        model, dictionary, ROWS, TOKENIZER, [2, 5, 2], num_contexts=50, num_tokens=3, max_tokens=1000
    )
    assert [effect.feature for effect in study.features] == [2, 5]
    for effect in study.features:
        changes, kls, removed = [], [], []
        with torch.no_grad():
            for row in ROWS:
                ids = torch.tensor([row["input_ids"]])
                with capture(model, [dictionary.config.input_site]) as captured:
                    model(ids)
                    x = captured[dictionary.config.input_site][0]
                activations = dictionary.encode(x)[:, effect.feature]
                activations[0] = 0
                place = int(activations.argmax())
                changes.append((activations[place].item(), ids[:, : place + 1], x[place]))
            strongest = max(value for value, _, _ in changes)
            chosen = [each for each in changes if each[0] >= strongest / 2]
            logits = []
            for value, ids, x in chosen:
                amount = removed_alone(dictionary, x, effect.feature)[0] if dictionary.config.is_autoencoder else value
                removed.append(amount)
                plain = model(ids).logits[0, -1]
                edit = torch.zeros(ids.shape[1], x.shape[-1])
                edit[-1] = amount * dictionary.W_dec[effect.feature]
                handle = locate(model, dictionary.config.output_site).module.register_forward_hook(
                    lambda module, args, output, edit=edit: output - edit
                )
                ablated = model(ids).logits[0, -1]
                handle.remove()
                logits.append(ablated - plain - (ablated - plain).mean())
                log_p, log_q = plain.log_softmax(-1), ablated.log_softmax(-1)
                kls.append((log_p.exp() * (log_p - log_q)).sum().item())
        assert effect.contexts == len(chosen)
        assert effect.removed == pytest.approx(sum(removed) / len(removed), rel=1e-4)
        assert effect.kl == pytest.approx(sum(kls) / len(kls), rel=1e-3, abs=1e-6)
        change = torch.stack(logits).mean(0)
        assert effect.raised[0][1] == pytest.approx(change.max().item(), rel=1e-3, abs=1e-5)
        assert effect.lowered[0][1] == pytest.approx(change.min().item(), rel=1e-3, abs=1e-5)


def test_a_dictionary_before_the_unembedding_acts_by_its_direct_path_alone(model):
    last = model.config.num_hidden_layers - 1
    dictionary = sae_of(model, f"layers.{last}.resid_post")
    with torch.no_grad():
        dictionary.W_dec.mul_(1e-3)
    study = feature_effects_study(model, dictionary, ROWS, TOKENIZER, [1, 2, 3], max_tokens=1000, max_rounds=1)
    assert all(effect.spearman > 0.9 for effect in study.features)
    early = feature_effects_study(model, transcoder_of(model, 0), ROWS, TOKENIZER, [1, 2, 3], max_tokens=1000)
    assert min(effect.spearman for effect in early.features) < 0.9


def test_text_page_and_silent_features(model, tmp_path):
    dictionary = sae_of(model, STREAM)
    with torch.no_grad():
        dictionary.b_enc[4] = -1e6
    study = feature_effects_study(model, dictionary, ROWS, TOKENIZER, [1, 4], max_tokens=1000)
    assert study.silent == [4] and len(study.features) == 1
    assert "Never active in the text: 4" in study.to_text()
    page = save_feature_effects(study, tmp_path / "out").read_text()
    assert "ablation raises" in page
    assert json.loads((tmp_path / "out" / "results.json").read_text())["features"][0]["feature"] == 1
    with pytest.raises(TranscoderError, match="Feature 99 does not exist: this dictionary has the features 0 to 39"):
        feature_effects_study(model, dictionary, ROWS, TOKENIZER, [99])
