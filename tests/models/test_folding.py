"""Folding never changes the function, whatever the dictionary is made of and in whatever order it is done."""

import itertools

import pytest
import torch

from hf_transcoders.errors import TranscoderError
from hf_transcoders.models import TranscoderModel

from .reference_dictionary import ACTIVATIONS, D_IN, D_OUT, N, make_batch, make_model


FOLDS = ["fold_normalization_", "fold_pre_bias_", "fold_decoder_norm_"]
NORMALIZATIONS = ["none", "scale", "standardize"]
BOOLEANS = [False, True]


def same_function(model, inputs, expected):
    torch.testing.assert_close(model(inputs).reconstruction, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("fold", FOLDS[:2])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_folding_the_input_keeps_function_and_features(activation, fold, normalization, tmp_path):
    for skip, pre_bias, bias, tied in itertools.product(BOOLEANS, repeat=4):
        kwargs = {"d_out": D_IN if tied else D_OUT, "skip_connection": skip, "pre_bias": pre_bias, "tied": tied}
        model = make_model(activation, normalization=normalization, decoder_bias=bias, **kwargs).eval()
        inputs, _ = make_batch(model)
        before = model(inputs)
        folded = getattr(model, fold)()
        assert folded is model
        same_function(model, inputs, before.reconstruction)
        torch.testing.assert_close(model(inputs).features, before.features, rtol=1e-4, atol=1e-4)
        if fold == "fold_normalization_":
            assert model.config.normalization == "none" and not any("_scale" in name for name in model.state_dict())
        else:
            assert not model.config.pre_bias and model.b_pre is None
    # What was folded last is also what its files say.
    model.save_pretrained(tmp_path)
    assert torch.equal(TranscoderModel.from_pretrained(tmp_path)(inputs).reconstruction, model(inputs).reconstruction)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "topk"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_folding_the_decoder_norm_scales_the_features_instead(activation, normalization):
    for skip, pre_bias in itertools.product(BOOLEANS, repeat=2):
        model = make_model(activation, normalization=normalization, skip_connection=skip, pre_bias=pre_bias).eval()
        with torch.no_grad():
            model.W_dec[5] = 0.0
        inputs, _ = make_batch(model)
        before = model(inputs)
        norms = model.W_dec.norm(dim=-1)
        model.fold_decoder_norm_()
        same_function(model, inputs, before.reconstruction)
        rest = torch.arange(N) != 5
        torch.testing.assert_close(model.W_dec.norm(dim=-1)[rest], torch.ones(N - 1))
        expected = before.features * torch.where(norms > 0, norms, torch.ones(()))
        torch.testing.assert_close(model(inputs).features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "batchtopk", "jumprelu", "gated"])
@pytest.mark.parametrize("order", list(itertools.permutations(FOLDS)))
@pytest.mark.parametrize("tied", BOOLEANS)
def test_all_folds_in_any_order(activation, order, tied, tmp_path):
    model = make_model(
        activation,
        normalization="standardize",
        pre_bias=True,
        skip_connection=True,
        tied=tied,
        d_out=D_IN if tied else D_OUT,
    ).eval()
    inputs, _ = make_batch(model)
    expected = model(inputs).reconstruction
    for fold in order:
        getattr(model, fold)()
        same_function(model, inputs, expected)
    for fold in order:  # A second time changes nothing.
        getattr(model, fold)()
    same_function(model, inputs, expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(TranscoderModel.from_pretrained(tmp_path)(inputs).reconstruction, model(inputs).reconstruction)


def test_folding_unequal_norms_of_topk_is_refused_and_equal_ones_are_folded():
    model = make_model("topk")
    with pytest.raises(TranscoderError, match='TopK.*k largest.*decoder_norm="unit"'):
        model.fold_decoder_norm_()
    with torch.no_grad():
        model.W_dec.mul_(2.5 / model.W_dec.norm(dim=-1, keepdim=True))
    inputs, _ = make_batch(model)
    expected = model(inputs).reconstruction
    model.fold_decoder_norm_()
    same_function(model, inputs, expected)
    torch.testing.assert_close(model.W_dec.norm(dim=-1), torch.ones(N))


def test_batchtopk_becomes_the_equal_jumprelu(tmp_path):
    model = make_model("batchtopk").eval()
    inputs, _ = make_batch(model)
    expected = model(inputs).reconstruction
    model.fold_decoder_norm_()
    assert model.config.activation == "jumprelu" and model.config.k is None
    same_function(model.train(), inputs, expected)  # Its threshold now holds in training as well.
    model.save_pretrained(tmp_path)
    loaded = TranscoderModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(inputs).reconstruction, model(inputs).reconstruction)
    assert loaded.threshold.unique().numel() > 1


def test_folding_the_normalization_frees_the_decoder_norm():
    model = make_model("relu", normalization="scale", decoder_norm="unit", decoder_init="random", target_variance=2.0)
    inputs, _ = make_batch(model)
    model.constrain_()
    expected = model(inputs).reconstruction
    model.fold_normalization_()
    model.constrain_()
    same_function(model, inputs, expected)
    assert model.config.target_variance is None
