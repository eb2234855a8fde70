"""Baselines: against the singular value decomposition, planted sources, and the activations themselves."""

import numpy as np
import pytest
import torch

from hf_transcoders import TranscoderError, TranscoderEvaluator, TranscoderModel, TranscoderSet, capture, splice
from hf_transcoders.circuits import FeatureEdit, measure_effect
from hf_transcoders.data import ActivationHarvester
from hf_transcoders.data.activation_moments import ActivationMoments
from hf_transcoders.models.direction_dictionary import num_signed_directions
from hf_transcoders.training import baseline_dictionaries, fit_baselines
from tests.tiny_models import HIDDEN_SIZE, tiny_model


SITE = "layers.1.resid_post"
ROWS = [
    {"input_ids": row.tolist()} for row in torch.randint(3, 128, (24, 16), generator=torch.Generator().manual_seed(0))
]
KINDS = ["pca", "random", "rotation", "identity"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").eval()


@pytest.fixture(scope="module")
def activations(model):
    harvester = ActivationHarvester(model, ROWS, [SITE], rows_per_chunk=24, outlier_factor=10.0)
    return harvester.chunk(0)[SITE]


@pytest.fixture(scope="module")
def baselines(model):
    return {
        kind: next(iter(its.values()))
        for kind, its in fit_baselines(model, ROWS, [SITE], KINDS, progress=False).items()
    }


def test_principal_components_are_those_of_the_singular_value_decomposition(baselines, activations):
    values = activations.double().numpy()
    centered = values - values.mean(0)
    _, _, rows = np.linalg.svd(centered)
    found = baselines["pca"].W_dec[:HIDDEN_SIZE].detach().double().numpy()
    cosines = (found * rows).sum(1)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-5)
    np.testing.assert_allclose(baselines["pca"].b_pre.detach().numpy(), values.mean(0), atol=1e-6)
    # The k directions of most variance leave the variance that no other k directions undercut.
    coordinates = baselines["pca"].encode(activations)
    coordinates = coordinates[:, :HIDDEN_SIZE] - coordinates[:, HIDDEN_SIZE:]
    variances = coordinates.var(0, correction=0)
    assert (variances[:-1] >= variances[1:] * 0.999).all()
    np.testing.assert_allclose(variances.numpy(), np.linalg.svd(centered)[1] ** 2 / len(values), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["pca", "rotation", "identity"])
def test_a_basis_reconstructs_exactly(baselines, activations, kind):
    assert num_signed_directions(baselines[kind]) == HIDDEN_SIZE
    torch.testing.assert_close(baselines[kind](activations).reconstruction, activations, rtol=1e-4, atol=1e-5)


def test_identity_features_are_the_activations(baselines, activations):
    features = baselines["identity"].encode(activations)
    assert torch.equal(features[:, :HIDDEN_SIZE], activations.relu())
    assert torch.equal(features[:, :HIDDEN_SIZE] - features[:, HIDDEN_SIZE:], activations)


def test_random_directions_have_unit_norm_and_the_rotation_is_orthonormal(baselines):
    rows = baselines["random"].W_enc
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(HIDDEN_SIZE))
    assert (rows @ rows.T).fill_diagonal_(0).abs().mean() > 0.05
    rotation = baselines["rotation"].W_enc[:HIDDEN_SIZE]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(HIDDEN_SIZE), atol=1e-5, rtol=0)


def test_seeds_and_sites_decide_about_random_directions(model):
    def rows(seed, sites=(SITE,), **options):
        found = fit_baselines(model, ROWS, sites, ["random"], seed=seed, progress=False, **options)["random"]
        return {dictionary.config.input_site: dictionary.W_enc for dictionary in found.values()}

    one, other = rows(0)[SITE], rows(0, ("layers.0.resid_post", SITE))
    assert torch.equal(one, other[SITE]) and not torch.equal(one, other["layers.0.resid_post"])
    assert not torch.equal(one, rows(1)[SITE])
    assert rows(0, num_features=50)[SITE].shape == (50, HIDDEN_SIZE)


def test_independent_components_separate_a_planted_mixture():
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(0)
    # Heavy tails, as sparse features have; a normal distribution could not be separated.
    sources = torch.randn(6000, 5, generator=generator) ** 3
    mixing = torch.randn(5, 5, generator=generator) * torch.tensor([1, 1, 1, 1, 100.0])
    values = sources @ mixing + 50
    moments = ActivationMoments(5)
    moments.update(values)
    measured = baseline_dictionaries._Measured(moments, values)
    settings = baseline_dictionaries._Settings(None, 500, 0)
    directions = baseline_dictionaries.BASELINES["ica"].make(measured, settings, SITE)
    found = (values.double() - directions.mean) @ directions.reads.T
    correlations = torch.cat([found, sources.double()], 1).T.corrcoef()[:5, 5:].abs()
    assert (correlations.max(0).values > 0.99).all() and (correlations.max(1).values > 0.99).all()
    torch.testing.assert_close(found @ directions.writes + directions.mean, values.double(), rtol=1e-3, atol=1e-2)
    # Principal components do not.
    principal = baseline_dictionaries.BASELINES["pca"].make(measured, settings, SITE)
    mixed = torch.cat([values.double() @ principal.writes.T, sources.double()], 1).T.corrcoef()[:5, 5:].abs()
    assert mixed.max(0).values.min() < 0.9


def test_independent_components_of_activations_without_variance_in_one_direction():
    pytest.importorskip("sklearn")
    values = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0)) ** 3
    values = torch.cat([values, -values.sum(1, keepdim=True)], 1)
    moments = ActivationMoments(5)
    moments.update(values)
    measured = baseline_dictionaries._Measured(moments, values)
    directions = baseline_dictionaries.BASELINES["ica"].make(
        measured, baseline_dictionaries._Settings(None, 500, 0), SITE
    )
    assert len(directions.writes) == 4
    found = (values.double() - directions.mean) @ directions.reads.T
    torch.testing.assert_close(found @ directions.writes + directions.mean, values.double(), rtol=1e-3, atol=1e-3)


def test_everything_else_runs_on_them(model, baselines, activations, tmp_path):
    for kind, dictionary in baselines.items():
        TranscoderSet([dictionary]).save_pretrained(tmp_path / kind)
        loaded = TranscoderSet.from_pretrained(tmp_path / kind)
        (name,) = loaded
        again = loaded[name].eval()
        assert isinstance(again, TranscoderModel) and again.config.training_summary["method"] == kind
        assert torch.equal(again.encode(activations), dictionary.encode(activations))
    ids = torch.tensor([ROWS[0]["input_ids"]])
    with torch.no_grad():
        plain = model(ids).logits
        with splice(model, baselines["pca"], error="drop"):
            torch.testing.assert_close(model(ids).logits, plain, rtol=1e-3, atol=1e-4)
        with capture(model, [SITE]) as captured:
            model(ids)
            before = captured[SITE][0, 5]
    edit = FeatureEdit(SITE, 3, position=5)
    effect = measure_effect(model, baselines["identity"], ids, [edit], read=[(SITE, 3, 5)])
    assert effect.activations_before[0, 0] == before[3].relu()
    report = TranscoderEvaluator(model, ROWS, max_tokens=200, progress=False).evaluate({"pca": baselines["pca"]})
    assert report.metrics["pca"]["fvu"] < 1e-6 and report.metrics["pca"]["l0"] == HIDDEN_SIZE


def test_memory_does_not_grow_with_the_text(model, monkeypatch):
    longest = []
    update = ActivationMoments.update
    monkeypatch.setattr(
        ActivationMoments, "update", lambda self, values: (longest.append(len(values)), update(self, values))
    )
    fit_baselines(model, ROWS * 4, [SITE], ["pca"], batch_size=2, progress=False, max_tokens=301)
    assert max(longest) <= 30 and sum(longest) == 301


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"kinds": ["lda"]}, "no kind of baseline 'lda': choose from pca, ica"),
        ({"kinds": []}, "choose from"),
        ({"kinds": ["pca"], "max_tokens": 20}, "20 tokens do not determine the components of 'layers.1.resid_post'"),
        ({"kinds": ["random"], "skip_first": 99}, "no activations"),
        ({"sites": ["layers.9.resid_post"]}, "layers.9"),
    ],
)
def test_what_cannot_be_made_is_refused(model, options, sentence):
    with pytest.raises(TranscoderError, match=sentence):
        fit_baselines(**{"base_model": model, "dataset": ROWS, "sites": [SITE], "progress": False, **options})


def test_a_missing_scikit_learn_is_one_sentence(model, monkeypatch):
    monkeypatch.setattr(baseline_dictionaries, "find_spec", lambda name: None)
    with pytest.raises(TranscoderError, match=r"hf_transcoders\[ica\]"):
        fit_baselines(model, ROWS, [SITE], ["ica"], progress=False)
