"""Dictionaries that scale each token by itself: what they compute is in `reference_dictionary.py`; here, where they go."""

import pytest
import torch

from hf_transcoders import CrossLayerTranscoderConfig, TranscoderConfig, TranscoderModel
from hf_transcoders.circuits import FeatureWeights, attribution_graph
from hf_transcoders.errors import TranscoderError
from hf_transcoders.evaluation import TranscoderEvaluator
from hf_transcoders.lm import capture, splice
from hf_transcoders.models.linear_parts import decoder_rows, encoder_rows, skip_and_bias
from hf_transcoders.models.token_norms import TOKEN_NORMS
from tests.tiny_models import tiny_model, tiny_tokens

from .reference_dictionary import D_IN, make_batch, make_model


def sae(base, normalization, input_site="layers.1.resid_post", output_site=None):
    torch.manual_seed(0)
    fields = {"num_features": 64, "k": 8, "normalization": normalization, "decoder_init": "random"}
    config = TranscoderConfig.for_model(base, input_site, output_site, **fields)
    return TranscoderModel(config).eval()


@pytest.mark.parametrize("normalization", TOKEN_NORMS)
def test_a_token_and_its_multiples_have_the_same_features(normalization):
    model = make_model("topk", normalization=normalization, d_out=D_IN).eval()
    inputs, _ = make_batch(model)
    moved = 3 * inputs + (2 if normalization == "token_standardize" else 0)
    torch.testing.assert_close(model.encode(moved), model.encode(inputs), rtol=1e-4, atol=1e-4)
    ours, expected = model(moved).reconstruction, model(inputs).reconstruction * 3
    expected = expected + (2 if normalization == "token_standardize" else 0)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_token_of_zeros_has_numbers():
    for normalization in TOKEN_NORMS:
        model = make_model("relu", normalization=normalization, d_out=D_IN)
        output = model(torch.zeros(3, D_IN, requires_grad=True), torch.ones(3, D_IN))
        assert output.reconstruction.isfinite().all() and output.features.isfinite().all()


@pytest.mark.parametrize("normalization", TOKEN_NORMS)
def test_decoding_needs_the_inputs(normalization):
    model = make_model("relu", normalization=normalization, d_out=D_IN).eval()
    inputs, _ = make_batch(model)
    features = model.encode(inputs)
    torch.testing.assert_close(model.decode(features, inputs), model(inputs).reconstruction)
    with pytest.raises(TranscoderError, match="scales each token by itself .*: give the inputs as well"):
        model.decode(features)


@pytest.mark.parametrize("normalization", TOKEN_NORMS)
@torch.no_grad()
def test_spliced_in_and_evaluated(normalization):
    base = tiny_model("llama")
    model, tokens = sae(base, normalization), tiny_tokens()
    logits = base(tokens).logits
    with splice(base, model):
        torch.testing.assert_close(base(tokens).logits, logits, rtol=0, atol=1e-4)
    with splice(base, model, error="drop"):
        assert (base(tokens).logits - logits).abs().max() > 1e-3
    with capture(base, ["layers.1.resid_post"]) as activations:
        base(tokens)
    stream = activations["layers.1.resid_post"].flatten(0, 1).double()
    missed = (stream - model(stream.float()).reconstruction).square().sum()
    fvu = missed / (stream - stream.mean(0)).square().sum()
    texts = [{"input_ids": row.tolist()} for row in tokens]
    measured = TranscoderEvaluator(base, texts, skip_first=0, special_token_ids=[]).evaluate({"sae": model})
    assert measured.dictionaries["sae"]["metrics"]["fvu"] == pytest.approx(fvu.item(), rel=1e-4)


@pytest.mark.parametrize("normalization", TOKEN_NORMS)
def test_what_needs_one_linear_map_for_all_tokens_is_refused(normalization):
    model = make_model("relu", normalization=normalization, d_out=D_IN)
    sentence = rf"`normalization='{normalization}'`\), and .* need maps that are the same for all tokens"
    for maps in (encoder_rows, decoder_rows, skip_and_bias, TranscoderModel.fold_normalization_):
        with pytest.raises(TranscoderError, match=sentence):
            maps(model)
    assert torch.equal(decoder_rows(model, up_to_scale=True), model.W_dec)
    base = tiny_model("llama")
    transcoder = sae(base, normalization, output_site="layers.1.mlp.branch", input_site="layers.1.mlp.in")
    with pytest.raises(TranscoderError, match=sentence):
        attribution_graph(base, {"one": transcoder}, tiny_tokens()[:1])
    with pytest.raises(TranscoderError, match=sentence):
        FeatureWeights(base, {"one": transcoder}).reads("one", [1])


@pytest.mark.parametrize("changes", [{"normalization": "token_standardize", "d_in": 6, "d_out": 5}])
def test_a_mean_of_the_input_needs_the_width_of_the_output(changes):
    with pytest.raises(TranscoderError, match="needs d_in = d_out, not 6 and 5"):
        TranscoderConfig(**changes)


def test_cross_layer_transcoders_have_none():
    sites = {"input_sites": ["layers.0.mlp.in"], "output_sites": ["layers.0.mlp.out"]}
    with pytest.raises(TranscoderError, match="`normalization='token_scale'` is not supported in a cross-layer"):
        CrossLayerTranscoderConfig(normalization="token_scale", **sites)
