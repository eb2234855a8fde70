"""Dictionaries that other libraries have written compute the same here: see `tests/interop/write_fixtures.py`."""

import pytest

from hf_transcoders.models import TranscoderModel, TranscoderSet

from .peers import FIXTURES, assert_same_function


SAELENS = sorted(path.name for path in FIXTURES.glob("saelens_*") if path.is_dir())
DICTIONARY_LEARNING = sorted(path.name for path in FIXTURES.glob("dictionary_learning_*") if path.is_dir())


@pytest.mark.parametrize("name", SAELENS)
def test_saelens(name):
    model = TranscoderModel.from_pretrained(FIXTURES / name)
    assert_same_function(model, name)
    config = model.config
    assert config.base_model_name_or_path == "openai-community/gpt2"
    if "transcoder" in name:
        assert (config.input_site, config.output_site) == ("layers.1.resid_mid", "layers.1.mlp.branch")
    else:
        assert config.input_site == config.output_site == "layers.1.resid_post"
    assert config.training_summary["converted_from"] == "SAELens"


def test_every_saelens_architecture_has_a_fixture():
    assert len(SAELENS) == 8 + 2
    norms = {"saelens_layer_norm": "token_standardize", "saelens_constant_norm_rescale": "token_scale"}
    for name, normalization in norms.items():
        assert TranscoderModel.from_pretrained(FIXTURES / name).config.normalization == normalization


@pytest.mark.parametrize("name", DICTIONARY_LEARNING)
def test_dictionary_learning(name):
    model = TranscoderModel.from_pretrained(FIXTURES / name)
    assert_same_function(model, name)
    assert model.config.input_site == model.config.output_site == "layers.1.resid_post"
    if "Matryoshka" in name:
        assert model.config.matryoshka_sizes == [8, 24]


def test_every_class_of_dictionary_learning_has_a_fixture():
    assert len(DICTIONARY_LEARNING) == 7


@pytest.mark.parametrize(
    ("case", "hookpoint", "reads", "writes"),
    [
        ("sae", "layers.1", "layers.1.resid_post", "layers.1.resid_post"),
        ("transcoder", "layers.1.mlp", "layers.1.mlp.in", "layers.1.mlp.out"),
        ("skip_transcoder", "layers.0.mlp", "layers.0.mlp.in", "layers.0.mlp.out"),
    ],
)
def test_sparsify(case, hookpoint, reads, writes):
    name = f"sparsify_{case}"
    for model in (
        TranscoderModel.from_pretrained(FIXTURES / name / hookpoint),
        TranscoderModel.from_pretrained(FIXTURES / name, subfolder=hookpoint),
        TranscoderSet.from_pretrained(FIXTURES / name)[hookpoint],
    ):
        assert_same_function(model, name)
        assert (model.config.input_site, model.config.output_site) == (reads, writes)
        assert model.config.base_model_name_or_path == "EleutherAI/pythia-14m"


@pytest.mark.parametrize("case", ["relu", "jumprelu"])
def test_circuit_tracer(case):
    name = f"circuit_tracer_{case}"
    transcoders = TranscoderSet.from_pretrained(FIXTURES / name)
    assert list(transcoders) == ["layer_0", "layer_1"]
    for model in (transcoders["layer_1"], TranscoderModel.from_pretrained(FIXTURES / name / "layer_1.safetensors")):
        assert_same_function(model, name)
        assert (model.config.input_site, model.config.output_site) == ("layers.1.mlp.in", "layers.1.mlp.branch")
        assert model.config.base_model_name_or_path == "meta-llama/Llama-3.2-1B"
