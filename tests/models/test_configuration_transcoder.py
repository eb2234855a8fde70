import re

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, LlamaConfig

from hf_transcoders.errors import TranscoderError
from hf_transcoders.models import TranscoderConfig, TranscoderModel


SMALL = {"d_in": 8, "num_features": 24}


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"k": 25}, "k is 25.*number of features \\(24\\).*lower `k`"),
        ({"k": 0}, "k is 0"),
        ({"num_features": 16}, "k is 32.*\\(16\\)"),
        ({"activation": "relu", "k": 3}, "`k` has no meaning for activation 'relu'"),
        ({"k": 2, "d_in": 0}, "`d_in` is 0.*at least 1"),
        ({"k": 2, "d_out": -1}, "`d_out` is -1"),
        ({"k": 2, "num_features": 0}, "`num_features` is 0"),
        ({"k": 2, "auxk": 0}, "`auxk` is 0"),
        ({"k": 2, "tied": True, "d_out": 9}, "tied dictionary needs d_in = d_out, not 8 and 9"),
        ({"k": 2, "matryoshka_sizes": [4, 8]}, "`matryoshka_sizes` is \\[4, 8\\].*\\(24\\)"),
        ({"k": 2, "matryoshka_sizes": [8, 4, 24]}, "ascending"),
        ({"k": 2, "matryoshka_sizes": [4, 4, 24]}, "ascending"),
        ({"k": 2, "matryoshka_sizes": [0, 24]}, "matryoshka_sizes"),
        ({"k": 2, "matryoshka_sizes": []}, "matryoshka_sizes"),
        ({"k": 2, "l1_coefficient": 1e-3}, "`l1_coefficient` does nothing for activation 'topk'"),
        ({"activation": "relu", "l0_coefficient": 1e-3}, "`l0_coefficient` does nothing for activation 'relu'"),
        ({"activation": "jumprelu", "target_l0": 5}, "`target_l0` does nothing without an L0 penalty"),
        ({"activation": "jumprelu", "l0_coefficient": 1, "target_l0": 0}, "`target_l0` is 0"),
        ({"activation": "jumprelu", "jumprelu_bandwidth": 0}, "`jumprelu_bandwidth` is 0"),
        ({"k": 2, "decoder_norm": "unit", "decoder_init": "zero"}, "cannot start at zero"),
    ],
)
def test_settings_that_do_not_fit_are_refused(kwargs, words):
    with pytest.raises(TranscoderError, match=words):
        TranscoderConfig(**{**SMALL, **kwargs})


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"activation": "swish"}, "activation.*expected one of.*relu.*topk.*got swish"),
        ({"num_features": "many"}, "num_features.*expected int, got str"),
        ({"d_in": None}, "d_in.*expected int"),
        ({"skip_connection": "yes"}, "skip_connection.*expected bool"),
    ],
)
def test_wrong_types_are_refused_by_name(kwargs, words):
    with pytest.raises(StrictDataclassFieldValidationError) as error:
        TranscoderConfig(**{**SMALL, **kwargs})
    assert re.search(words, str(error.value), flags=re.DOTALL)


def test_a_setting_spoilt_later_is_not_saved(tmp_path):
    config = TranscoderConfig(**SMALL, k=2)
    config.k = 99
    with pytest.raises(StrictDataclassClassValidationError, match="k is 99"):
        config.save_pretrained(tmp_path)


def test_defaults_follow_from_what_is_given():
    config = TranscoderConfig(d_in=10)
    assert (config.d_out, config.k, config.auxk) == (10, 32, 5)
    assert config.decoder_init == "zero" and config.center_encoder and not config.is_autoencoder and config.is_sparse
    assert TranscoderConfig(d_in=10, activation="relu").k is None
    assert not TranscoderConfig(pre_bias=True).center_encoder and not TranscoderConfig(tied=True).center_encoder
    assert TranscoderConfig(decoder_norm="unit").decoder_init == "random"
    autoencoder = TranscoderConfig(input_site="layers.1.mlp.out", output_site="layers.1.mlp.out")
    assert autoencoder.is_autoencoder and autoencoder.decoder_init == "transpose"


def test_for_model_fills_in_what_the_base_model_knows():
    base = LlamaConfig(hidden_size=48, num_attention_heads=4, num_hidden_layers=2, vocab_size=64)
    base._name_or_path = "someone/model"
    config = TranscoderConfig.for_model(base, "layers.1.mlp.in", "layers.1.mlp.branch", num_features=96, k=4)
    assert (config.d_in, config.d_out, config.num_features, config.k) == (48, 48, 96, 4)
    assert (config.base_model_name_or_path, config.base_model_type) == ("someone/model", "llama")
    assert (config.input_site, config.output_site) == ("layers.1.mlp.in", "layers.1.mlp.branch")
    assert TranscoderConfig.for_model(base, "layers.1.mlp.out", num_features=96).is_autoencoder
    wide = TranscoderConfig.for_model(base, "module:model.layers.0.mlp.up_proj:out", num_features=96, d_in=7, d_out=9)
    assert (wide.d_in, wide.d_out) == (7, 9)
    with pytest.raises(TranscoderError, match="no argument n_features"):
        TranscoderConfig.for_model(base, "layers.1.mlp.out", n_features=96)


def test_a_folder_of_the_base_model_is_stored_with_its_whole_path(tmp_path, monkeypatch):
    """A relative path would be another folder, or a repo on the Hub, elsewhere."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "models")
    base = LlamaConfig(hidden_size=48, num_attention_heads=4, num_hidden_layers=2, vocab_size=64)
    for given in ("tiny", "./tiny", "../models/tiny"):
        base._name_or_path = given
        config = TranscoderConfig.for_model(base, "layers.1.mlp.out")
        assert config.base_model_name_or_path == str(tmp_path / "models" / "tiny")


def test_weights_that_are_not_those_of_the_name_are_recorded():
    base = LlamaConfig(hidden_size=48, num_attention_heads=4, num_hidden_layers=2, vocab_size=64)
    assert TranscoderConfig.for_model(base, "layers.1.mlp.out").base_model_weights is None
    base.weights_origin = "a 4-bit copy in the package x"
    assert TranscoderConfig.for_model(base, "layers.1.mlp.out").base_model_weights == "a 4-bit copy in the package x"
    del base.weights_origin
    base.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert TranscoderConfig.for_model(base, "layers.1.mlp.out").base_model_weights == "a copy quantized by gptq"


def test_a_newer_format_says_what_to_do(tmp_path):
    config = TranscoderConfig(**SMALL, k=2)
    config.format_version = 2
    config.save_pretrained(tmp_path)
    for load in (TranscoderConfig, AutoConfig, TranscoderModel):
        with pytest.raises(TranscoderError, match="format 2.*up to format 1.*pip install -U"):
            load.from_pretrained(tmp_path)


def test_round_trip_keeps_every_field(tmp_path):
    config = TranscoderConfig(
        d_in=8,
        d_out=6,
        num_features=24,
        activation="batchtopk",
        k=3,
        skip_connection=True,
        pre_bias=True,
        matryoshka_sizes=[6, 24],
        normalization="standardize",
        loss_reduction="sum",
        target_variance=2,
        input_site="layers.0.mlp.in",
        output_site="layers.0.mlp.branch",
        training_summary={"tokens": 100, "data": ["a", "b"]},
    )
    config.save_pretrained(tmp_path)
    for load in (TranscoderConfig, AutoConfig):
        loaded = load.from_pretrained(tmp_path)
        assert type(loaded) is TranscoderConfig
        expected = {**config.to_dict(), "_name_or_path": None, "transformers_version": None}
        assert {**loaded.to_dict(), "_name_or_path": None, "transformers_version": None} == expected


# 8.6e-4 in code that takes the mean over dimensions is 0.44 in Eq. 4 of arXiv 2309.08600 at d = 512.
@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({"loss_reduction": "mean", "l1_coefficient": 8.6e-4}, 0.44032),
        ({"loss_reduction": "sum", "l1_coefficient": 0.44}, 0.44),
        ({"loss_reduction": "normalized", "l1_coefficient": 1e-3, "target_variance": 300.0}, 0.3),
        ({"loss_reduction": "normalized", "l1_coefficient": 1e-3}, None),
        ({"loss_reduction": "target_norm", "l1_coefficient": 1e-3}, None),
    ],
)
def test_effective_l1_coefficient(kwargs, expected):
    config = TranscoderConfig(d_in=512, num_features=4, activation="relu", tied=True, decoder_bias=False, **kwargs)
    found = TranscoderModel(config).effective_l1_coefficient()
    assert found == (expected if expected is None else pytest.approx(expected, rel=1e-9))
