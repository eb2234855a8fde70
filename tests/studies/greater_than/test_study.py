"""Greater-than: curves against one plain forward pass for each k, and what is printed beside them."""

import dataclasses
import json

import pytest
import torch

from hf_transcoders import TranscoderError
from hf_transcoders.studies import (
    GreaterThanStudy,
    YearFeature,
    greater_than_study,
    published_study,
    save_greater_than,
)
from hf_transcoders.studies.greater_than import study as greater_than_module
from hf_transcoders.studies.greater_than.year_prompts import YearPrompts
from hf_transcoders.studies.published import GREATER_THAN
from hf_transcoders.tasks.answer_metrics import Estimate
from tests.studies.greater_than.setups import transcoder_of
from tests.studies.test_circuit_reuse import TOKENIZER, model_for_tasks
from tests.tasks.conftest import unigram_with_bos, word_level
from tests.tiny_models import tiny_model


DIGITS = unigram_with_bos()


def blocks_and_downs(model):
    """Each layer's MLP, its down projection and the module whose output is added to the stream, named by hand."""
    family = model.config.model_type
    if family == "gpt2":
        return [(block.mlp, block.mlp.c_proj, block.mlp) for block in model.transformer.h]
    if family == "opt":
        return [(block.fc1, block.fc2, block.fc2) for block in model.model.decoder.layers]
    if family == "gpt_neox":
        return [(block.mlp, block.mlp.dense_4h_to_h, block.mlp) for block in model.gpt_neox.layers]
    post = "post_feedforward_layernorm" if family.startswith("gemma") else "mlp"
    return [(block.mlp, block.mlp.down_proj, getattr(block, post)) for block in model.model.layers]


@torch.no_grad()
def plain_scores(model, prompts, transcoder, layer, skip, change=None, neurons=None):
    """Scores by year with plain hooks: features through `change`, or neurons times a mask, from position `skip` on."""
    mlp, down, branch = blocks_and_downs(model)[layer]
    ids = prompts.input_ids
    seen = {}

    def shaped(value):
        return value.view(*ids.shape, -1)

    def remember(module, args):
        seen["in"] = shaped(args[0])

    def write(module, args, output):
        x = seen["in"]
        new = transcoder.decode(change(transcoder.encode(x)), x)
        return torch.cat([shaped(output)[:, :skip], new[:, skip:]], 1).view(output.shape)

    def keep(module, args):
        value = shaped(args[0]).clone()
        value[:, skip:] *= neurons
        return (value.view(args[0].shape),)

    handles = []
    if change is not None:
        handles = [mlp.register_forward_pre_hook(remember), branch.register_forward_hook(write)]
    if neurons is not None:
        handles = [down.register_forward_pre_hook(keep)]
    logits = model(ids).logits[:, -1, list(prompts.candidates.values())]
    for handle in handles:
        handle.remove()
    probabilities = logits.double().softmax(-1)
    scores = (probabilities * prompts.later).sum(-1) - (probabilities * ~prompts.later).sum(-1)
    return scores[prompts.scored]


@torch.no_grad()
def variances(model, prompts, transcoder, layer):
    """Of features and of neurons at the last position, over all prompts."""
    mlp, down, _ = blocks_and_downs(model)[layer]
    seen = {}
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0]))
        for name, module in (("in", mlp), ("neurons", down))
    ]
    model(prompts.input_ids)
    for handle in handles:
        handle.remove()
    ends = {name: value.view(*prompts.input_ids.shape, -1)[:, -1] for name, value in seen.items()}
    return transcoder.encode(ends["in"]).var(0, correction=0), ends["neurons"].var(0, correction=0)


CASES = [
    ("llama", TOKENIZER, 1, 1, {}),
    ("llama", DIGITS, 0, 0, {"activation": "topk", "k": 7, "skip_connection": True, "pre_bias": True}),
    ("gpt2", TOKENIZER, 2, 0, {"normalization": "standardize"}),
    ("gemma3_text", DIGITS, 1, 2, {}),
    ("gpt_neox", TOKENIZER, 1, 1, {}),
    ("opt", TOKENIZER, 1, 1, {"activation": "jumprelu"}),
]


@pytest.mark.parametrize("family, tokenizer, layer, skip, changes", CASES)
def test_curves_equal_one_plain_forward_for_each_k(family, tokenizer, layer, skip, changes):
    model = model_for_tasks(family)
    transcoder = transcoder_of(model, layer, **changes)
    prompts = YearPrompts.of(tokenizer)
    study = greater_than_study(model, transcoder, tokenizer, progress=False, max_k=24, num_features=3, skip_first=skip)
    by_feature, by_neuron = variances(model, prompts, transcoder, layer)

    def score(**how):
        return plain_scores(model, prompts, transcoder, layer, skip, **how)

    assert study.original == pytest.approx(score().tolist(), abs=2e-5)
    assert study.transcoder == pytest.approx(score(change=lambda features: features).tolist(), abs=2e-5)
    assert max(abs(a - b) for a, b in zip(study.original, study.transcoder, strict=True)) > 1e-3
    features, neurons = by_feature.argsort(descending=True), by_neuron.argsort(descending=True)
    assert [feature.index for feature in study.features] == features[:3].tolist()
    assert [feature.variance for feature in study.features] == pytest.approx(
        by_feature[features[:3]].tolist(), rel=1e-4
    )
    assert len(study.feature_curve) == 25 and len(study.neuron_curve) == 25
    for k in (0, 1, 2, 9, 24):
        keep = torch.zeros(24)
        keep[features[:k]] = 1
        expected = score(change=lambda each, keep=keep: each * keep).mean()
        assert study.feature_curve[k] == pytest.approx(expected.item(), abs=2e-5)
        mask = torch.zeros(len(by_neuron))
        mask[neurons[:k]] = 1
        assert study.neuron_curve[k] == pytest.approx(score(neurons=mask).mean().item(), abs=2e-5)
    for feature in study.features:
        keep = torch.ones(24)
        keep[feature.index] = 0
        expected = score(change=lambda each, keep=keep: each * keep).mean()
        assert feature.score == pytest.approx(expected.item(), abs=2e-5)


def test_all_features_are_the_transcoder_and_none_are_its_bias():
    model = model_for_tasks()
    transcoder = transcoder_of(model, 1)
    study = greater_than_study(model, transcoder, TOKENIZER, max_k=999, num_features=999)
    assert len(study.feature_curve) == 25 and len(study.features) == 24
    assert study.feature_curve[-1] == pytest.approx(study.transcoder_score.mean, abs=2e-5)
    assert study.neuron_curve[-1] == pytest.approx(study.original_score.mean, abs=2e-5)
    with torch.no_grad():
        transcoder.W_dec.zero_()
    silent = greater_than_study(model, transcoder, TOKENIZER, max_k=2, num_features=1)
    assert silent.transcoder_score.mean == pytest.approx(study.feature_curve[0], abs=2e-5)
    assert silent.feature_curve == pytest.approx([study.feature_curve[0]] * 3, abs=2e-5)


@torch.no_grad()
def test_effects_and_de_embeddings_of_planted_features():
    model = model_for_tasks()
    transcoder = transcoder_of(model, 2)
    norm = model.model.layers[2].post_attention_layernorm.weight
    norm.uniform_(0.5, 2)
    model.model.norm.weight.uniform_(0.5, 2)
    token = TOKENIZER(" war", add_special_tokens=False)["input_ids"][0]
    # Reads one embedding through the gain of the norm, and is always on, more in some years than in others.
    transcoder.W_enc[5] = 100 * model.get_input_embeddings().weight[token] / norm
    transcoder.b_enc[5] = 1e4
    study = greater_than_study(model, transcoder, TOKENIZER, max_k=1, num_features=2)
    feature = study.features[0]
    assert feature.index == 5 and feature.tokens[0] == " war"

    prompts = YearPrompts.of(TOKENIZER)
    stream, mlp_input = [], []
    handles = [
        model.model.norm.register_forward_pre_hook(lambda module, args: stream.append(args[0][:, -1])),
        model.model.layers[2].mlp.register_forward_pre_hook(lambda module, args: mlp_input.append(args[0][:, -1])),
    ]
    model(prompts.input_ids[prompts.scored])
    for handle in handles:
        handle.remove()
    activations = transcoder.encode(mlp_input[0])[:, 5]
    assert feature.activations == pytest.approx(activations.tolist(), rel=1e-4)
    scale = (stream[0].square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
    unembedding = model.get_output_embeddings().weight[list(prompts.candidates.values())]
    logits = (transcoder.W_dec[5] * scale * model.model.norm.weight) @ unembedding.T
    high, low = (list(prompts.candidates).index(ending) for ending in ("40", "20"))
    expected = ((logits[:, high] - logits[:, low]) * activations).mean()
    assert feature.effect == pytest.approx(expected.item(), rel=1e-4)
    centred = logits.mean(0) - logits.mean()
    assert feature.by_ending == pytest.approx(centred.tolist(), abs=1e-5)


def test_prompts_of_both_kinds_of_tokenizers():
    pairs = YearPrompts.of(TOKENIZER)
    assert pairs.variant == "two_token" and not pairs.beginning
    assert len(pairs.candidates) == 100 and len(pairs.years) == 100 and len(pairs.scored) == 98
    text = TOKENIZER.decode(pairs.input_ids[32])
    assert text == "The war lasted from 1732 to 17" and pairs.years[32] == "1732"
    assert pairs.later[32].tolist() == [n > 32 for n in range(100)]

    digits = YearPrompts.of(DIGITS)
    assert digits.variant == "single_digit" and digits.beginning
    assert list(digits.candidates) == list("0123456789") and len(digits.years) == 100 and len(digits.scored) == 80
    assert digits.input_ids[0, 0] == DIGITS.bos_token_id
    assert {digits.years[n][-1] for n in digits.scored.tolist()} == set("12345678")
    assert not YearPrompts.of(DIGITS, add_bos=False).beginning
    with pytest.raises(TranscoderError, match="choose another task"):
        YearPrompts.of(word_level())

    logits = torch.full((98, 100), -20.0)
    logits[:, 40] = 20.0
    differences = pairs.differences(logits)
    assert differences[:39].tolist() == pytest.approx([1.0] * 39) and differences[39:].tolist() == pytest.approx(
        [-1.0] * 59
    )


def planted_study(published=None, scores=(0.2, 0.9, 0.4, 0.7), curves=((0.0, 0.5, 0.7, 0.4), (0.1, 0.3, 0.6, 0.5))):
    sure = Estimate(0.5, 0.4, 0.6, 2, "wilson")
    return GreaterThanStudy(
        years=["1701", "1702"],
        endings=["01", "02"],
        original=[0.8, 0.6],
        transcoder=[0.5, 0.5],
        accuracy=sure,
        full_accuracy=sure,
        feature_curve=list(curves[0]),
        neuron_curve=list(curves[1]),
        features=[
            YearFeature(index, 1.0 / place, [0.0, 1.0], score, 0.1, [0.5, -0.5], ["<b>", "\x1b[2J"])
            for place, (index, score) in enumerate(zip((7, 5315, 3, 8), scores, strict=True), 1)
        ],
        protocol={"model": "gpt2", "writes": "layers.10.mlp.out", "prompt": "<i>The war", "direction": "40 - 20"},
        published=published,
    )


def test_crossing_and_culprits_of_planted_numbers():
    study = planted_study()
    assert study.crossing == 3
    assert [feature.index for feature in study.culprits] == [5315, 8]
    assert (study.original_score.mean, study.transcoder_score.mean) == pytest.approx((0.7, 0.5))
    ahead = planted_study(curves=((0.0, 0.5), (0.1, 0.3)))
    assert ahead.crossing is None and "at no k of the curve" in ahead.to_text()


def test_published_figures_are_of_one_model_only(monkeypatch):
    repo = "pchlenski/gpt2-transcoders"
    assert published_study(GREATER_THAN, "gpt2", repo) is GREATER_THAN
    assert published_study(GREATER_THAN, "openai-community/gpt2", f"/models/{repo}/") is GREATER_THAN
    for model, transcoders in (("gpt2-medium", repo), ("gpt2", "me/gpt2-transcoders"), ("gpt2", None), (None, repo)):
        assert published_study(GREATER_THAN, model, transcoders) is None

    plain, beside = (planted_study(each).to_text() for each in (None, GREATER_THAN))
    assert "paper" not in plain and "0.8829" not in plain
    for figure in ("0.8829", "0.7978", "0.8453", "24th by variance", "Dunefsky"):
        assert figure in beside
    line = next(line for line in beside.splitlines() if line.startswith("... without feature 5315"))
    assert line.split()[-2:] == ["0.900", "0.8453"]

    model = model_for_tasks("gpt2")
    model.config.name_or_path = "gpt2"
    transcoder = transcoder_of(model, 1)
    transcoder.config.name_or_path = repo
    settings = {"max_k": 2, "num_features": 1}
    # Of another layer than the paper's.
    assert greater_than_study(model, transcoder, TOKENIZER, **settings).published is None
    here = dataclasses.replace(GREATER_THAN, layer=1, add_bos=False)
    monkeypatch.setattr(greater_than_module, "GREATER_THAN", here)
    study = greater_than_study(model, transcoder, TOKENIZER, **settings)
    assert study.published is here and study.protocol["unchanged positions at the start"] == 0
    other = greater_than_study(model, transcoder, TOKENIZER, **settings, transcoders_name="me/mine")
    assert other.published is None and other.protocol["unchanged positions at the start"] == 1


def test_saved_pages_escape_what_they_show(tmp_path):
    page = save_greater_than(planted_study(GREATER_THAN), tmp_path).read_text()
    assert "&lt;b&gt;" in page and "<b>" not in page and "<i>The war" not in page and "<script" not in page
    assert "\x1b" not in planted_study().to_text()
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["crossing"] == 3 and saved["culprits"] == [5315, 8]
    assert saved["published"]["figures"]["original"] == 0.8829
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "results.json", "curves.png", "years.png"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"output_site": "layers.1.attn.out"}, "replaces an MLP"),
        ({"output_site": None}, "does not say where"),
        ({"d_in": 8}, "has width 8"),
    ],
)
def test_wrong_transcoders_are_refused(change, message):
    model = model_for_tasks()
    transcoder = transcoder_of(model, 1)
    for name, value in change.items():
        setattr(transcoder.config, name, value)
    with pytest.raises(TranscoderError, match=message):
        greater_than_study(model, transcoder, TOKENIZER)


def test_senseless_settings_are_refused():
    model = model_for_tasks()
    transcoder = transcoder_of(model, 1)
    with pytest.raises(TranscoderError, match="at least 1"):
        greater_than_study(model, transcoder, TOKENIZER, max_k=0)
    with pytest.raises(TranscoderError, match="skip fewer"):
        greater_than_study(model, transcoder, TOKENIZER, skip_first=50)


def test_a_model_without_a_plain_mlp_is_refused():
    from hf_transcoders.studies.greater_than.mlp_rows import neurons_location

    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj = torch.nn.Identity()
    with pytest.raises(TranscoderError, match="no neurons to compare with"):
        neurons_location(model, 1)
