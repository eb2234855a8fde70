"""Blind studies: hypotheses against loops, a planted feature, and what is refused."""

import json

import pytest
import torch

from hf_transcoders import TranscoderConfig, TranscoderError, TranscoderModel
from hf_transcoders.circuits import FeatureWeights
from hf_transcoders.cli import main
from hf_transcoders.data.token_blocks import TokenBlocks
from hf_transcoders.lm import Site, capture, edit_attention, locate
from hf_transcoders.lm.norms import norm_bias, norm_scale
from hf_transcoders.lm.stream import norm_after, norm_before
from hf_transcoders.models.linear_parts import encoder_rows
from hf_transcoders.studies import blind_study
from hf_transcoders.studies.blind.hypotheses import TokenHypotheses, token_hypotheses
from hf_transcoders.studies.blind.study import _scores
from tests.circuits.weights.setups import dictionary
from tests.studies.test_circuit_reuse import TOKENIZER, model_for_tasks
from tests.tiny_models import TINY_CONFIGS, VOCAB_SIZE, tiny_model


FAMILIES = sorted(TINY_CONFIGS)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_hypotheses_are_a_forward_without_text(family):
    """Token by token: attention silenced, MLPs replaced by their dictionaries, or by nothing where there is none."""
    model = tiny_model(family)
    dictionaries = {"early": dictionary(model, 0, 1), "late": dictionary(model, 2, 2, num_features=7)}
    weights = FeatureWeights(model, dictionaries)
    # One head of each feature is enough to see which, and where it reads.
    found = token_hypotheses(weights, "late", [5, 2], num_heads=1)
    assert found.mlp_layers == [0]

    stream = model.get_input_embeddings()(torch.arange(VOCAB_SIZE))
    into, rows = Site("mlp.in", 2), encoder_rows(dictionaries["late"])[0][[5, 2]]
    norm = norm_before(model, into)
    bias = norm_bias(norm)
    torch.testing.assert_close(found.embedding, ((norm(stream) - bias) @ rows.T).T, rtol=1e-3, atol=1e-4)
    streams = [stream]
    read = norm_before(model, Site("mlp.in", 0))(stream)
    added = dictionaries["early"](read).reconstruction
    if (post_norm := norm_after(model, Site("mlp.out", 0))) is not None:
        added = post_norm(added)
    streams += [stream + added] * 2
    torch.testing.assert_close(found.current, ((norm(streams[2]) - bias) @ rows.T).T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.scale, norm_scale(norm, streams[2])[:, 0], rtol=1e-3, atol=1e-4)

    norms = weights.ov_norms("late", [5, 2])
    reads = weights.reads("late", [5, 2])
    for number in range(2):
        ((layer, head),) = found.heads[number]
        assert norms[number, layer, head] == norms[number].max()
        inputs = norm_before(model, Site("attn.in", layer))(streams[layer])
        # One token attends to itself: what its attention module gives is all that the heads write.
        alone = _attention_output(model, layer, inputs, lambda z, at, head=head: _only(z, head))
        change = alone - _attention_output(model, layer, inputs, lambda z, at: torch.zeros_like(z))
        if (post_norm := norm_after(model, Site("attn.out", layer))) is not None:
            # Its gain, at the scale that it has for the whole output.
            whole = _attention_output(model, layer, inputs, None)
            change = post_norm(change) / norm_scale(post_norm, change) * norm_scale(post_norm, whole)
        brought = change @ reads[number]
        # Biases of values and norms are the same for every token.
        offset = (found.preceding[number] - brought).mean()
        torch.testing.assert_close(found.preceding[number], brought + offset, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_all_heads_together_are_attention():
    model = tiny_model("llama")
    late = dictionary(model, 2, 2, num_features=7)
    weights = FeatureWeights(model, {"late": late})
    found = token_hypotheses(weights, "late", [4], num_heads=50)
    assert len(set(found.heads[0])) == 12 and found.mlp_layers == []
    stream = model.get_input_embeddings()(torch.arange(VOCAB_SIZE))
    inputs = [norm_before(model, Site("attn.in", layer))(stream) for layer in range(3)]
    written = sum(_attention_output(model, layer, inputs[layer], None) for layer in range(3))
    torch.testing.assert_close(12 * found.preceding[0], written @ weights.reads("late", [4])[0], rtol=1e-3, atol=1e-4)
    assert token_hypotheses(weights, "late", [4], num_heads=0).preceding.count_nonzero() == 0


def _only(z, head):
    kept = torch.zeros_like(z)
    kept[:, head] = z[:, head]
    return kept


def _attention_output(model, layer, inputs, z):
    """What the attention of a layer gives for single tokens that it reads as `inputs (tokens, hidden)`."""
    site = Site("attn.out", layer)

    def put(module, args, kwargs):
        rows = inputs[:, None]
        return ((rows, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": rows})

    handle = locate(model, site).module.register_forward_pre_hook(put, with_kwargs=True)
    try:
        with edit_attention(model, z=z), capture(model, site) as activations:
            model(input_ids=torch.arange(VOCAB_SIZE)[:, None])
            return activations[site][:, 0]
    finally:
        handle.remove()


def test_a_window_holds_the_tokens_before_without_special_ones():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (3, 9), generator=generator)
    blocks = TokenBlocks(
        [{"input_ids": row.tolist()} for row in ids], max_tokens=100, skip_first=1, special_token_ids=[4, 5]
    )
    current, preceding = torch.randn(2, 4, 20, generator=generator)
    scale = torch.rand(20, generator=generator)
    hypotheses = TokenHypotheses([0, 1, 2, 3], current * 2, current, preceding, scale, [[]] * 4, [])
    scores = _scores(hypotheses, blocks, 3, [4, 5])
    expected = []
    for row in range(3):
        for token in range(1, 9):
            present = int(ids[row, token])
            if present in (4, 5):
                continue
            before = [earlier for earlier in ids[row, max(0, token - 3) : token].tolist() if earlier not in (4, 5)]
            brought = preceding[:, before].mean(-1) if before else torch.zeros(4)
            expected.append(torch.stack([current[:, present] + scale[present] * brought, current[:, present] * 2]))
    expected = torch.stack(expected, dim=-1)
    torch.testing.assert_close(scores["hypothesis"], expected[0])
    torch.testing.assert_close(scores["embedding"], expected[1])


TRIGGER, FEATURE = 40, 5


@pytest.fixture(scope="module")
def planted():
    """A model, and a dictionary at its first layer whose feature 5 fires on one token alone, and feature 6 never."""
    model = model_for_tasks()
    config = TranscoderConfig.for_model(model, "layers.0.resid_pre", num_features=30, activation="relu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        sae = TranscoderModel(config).eval()
        embeddings = torch.nn.functional.normalize(model.get_input_embeddings().weight, dim=-1)
        model.get_input_embeddings().weight.copy_(embeddings)
        sae.W_enc.normal_()
        sae.b_enc.zero_()
        closest = (embeddings @ embeddings[TRIGGER]).topk(2).values[1]
        sae.W_enc[FEATURE], sae.b_enc[FEATURE] = embeddings[TRIGGER], -(1 + closest) / 2
        sae.W_enc[FEATURE + 1], sae.b_enc[FEATURE + 1] = 0, -1
    return model, sae


def _rows():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 60, (12, 16), generator=generator)
    ids[::2, 7] = TRIGGER
    return [{"input_ids": row.tolist()} for row in ids]


def test_a_planted_feature_is_guessed(planted):
    model, sae = planted
    study = blind_study(
        model, sae, "layers.0.resid_pre.sae", _rows(), TOKENIZER, features=[FEATURE, FEATURE + 1], progress=False
    )
    found, dead = study.features
    assert found.auroc == 1 and found.interval == (1, 1) and found.parts["embedding"] == 1
    # Of 28 others, one happens to read the planted token most too.
    assert found.p_value == pytest.approx(2 / 29) and found.null_mean < 0.9
    assert found.tokens[0] == TOKENIZER.decode([TRIGGER]) and found.heads == [] == found.preceding_tokens
    assert found.firings == sum(row["input_ids"][1:].count(TRIGGER) for row in _rows())
    assert dead.firings == 0 and dead.auroc is None and study.measured == [found]
    assert study.summary()["mean_auroc"] == 1 and study.mean_interval == (1, 1)
    assert "1.000" in study.to_text() and json.loads(json.dumps(study.to_dict()))["features"][0]["auroc"] == 1


def test_a_sample_is_of_features_that_fire(planted):
    model, sae = planted
    study = blind_study(
        model, sae, "layers.0.resid_pre.sae", _rows(), TOKENIZER, num_features=4, null_features=9, progress=False
    )
    again = blind_study(
        model, sae, "layers.0.resid_pre.sae", _rows(), TOKENIZER, num_features=4, null_features=9, progress=False
    )
    assert study.to_dict() == again.to_dict() and study.protocol["null_features"] == 9
    assert len(study.features) == 4 and all(20 <= feature.firings <= 90 for feature in study.features)
    for feature in study.features:
        assert feature.interval[0] <= feature.auroc <= feature.interval[1]
        # What a dictionary on the embedding reads is all there is to know.
        assert feature.auroc == pytest.approx(1)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"features": [30]}, "has no feature 30"),
        ({"dictionary": "sea"}, "no dictionary 'sea'"),
        ({"num_features": 0}, "num_features is 0"),
        ({"window": 0}, "window is 0"),
        ({"num_heads": -1}, "num_heads is -1"),
        ({"features": range(30)}, "no other feature is left"),
        ({"max_tokens": 15}, "at least 20 and at most half"),
        ({"features": []}, "`features` is empty"),
    ],
)
def test_mistakes_are_one_sentence(planted, changes, sentence):
    model, sae = planted
    arguments = {"dictionary": "layers.0.resid_pre.sae", "progress": False, **changes}
    with pytest.raises(TranscoderError, match=sentence):
        blind_study(model, sae, dataset=_rows(), tokenizer=TOKENIZER, **arguments)


def test_the_command(planted, tmp_path, capsys):
    model, sae = planted
    for name, part in (("model", model), ("sae", sae), ("model", TOKENIZER)):
        part.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("When Mary and John went to the store, John gave a drink to Mary.\n" * 60)
    arguments = [
        "study",
        "blind",
        "--transcoders",
        str(tmp_path / "sae"),
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "text.txt"),
    ]
    arguments += ["--sequence-length", "16", "--max-features", "3", "--null-features", "5", "--bootstrap-samples", "9"]
    arguments += ["--dtype", "float32", "--device", "cpu", "--output", str(tmp_path / "study")]
    assert main([*arguments, "--json"]) == 0
    saved = json.loads((tmp_path / "study" / "results.json").read_text())
    assert json.loads(capsys.readouterr().out) == saved
    assert len(saved["features"]) == 3 and saved["summary"]["features"] == 3
