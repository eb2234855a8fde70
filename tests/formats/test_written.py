"""Formats whose files an independent writer makes, against what their libraries compute, in float64."""

import pytest
import torch

from hf_transcoders.errors import TranscoderError
from hf_transcoders.lm.capture import capture
from hf_transcoders.models import TranscoderModel, TranscoderSet
from tests.tiny_models import tiny_model

from .writers import (
    D,
    write_gemma_scope_1,
    write_gemma_scope_2,
    write_gpt2_transcoder,
    write_linear_pair,
    write_llama_scope,
    write_llama_scope_r1,
    write_old_saelens,
    write_openai,
    write_qwen_scope,
)


SITES = {"input_site": "layers.1.resid_post", "base_model": "google/gemma-2-2b"}


@torch.no_grad()
def assert_computes(model, inputs, expected, tolerance=1e-5):
    features, output = expected
    torch.testing.assert_close(model.encode(inputs), features.float(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(model(inputs).reconstruction, output.float(), atol=tolerance, rtol=tolerance)
    assert (features != 0).double().mean() > 0.05


@pytest.fixture
def inputs():
    return torch.randn(20, D, generator=torch.Generator().manual_seed(1))


def model_and_activations(family, *sites):
    """A tiny model whose norms have gains and biases of their own, and what it computes at some sites."""
    model = tiny_model(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(0.4 * torch.randn_like(parameter))
    tokens = torch.arange(1, 25)[None]
    with torch.no_grad(), capture(model, sites) as activations:
        model(tokens)
    return model, [activations[site][0] for site in sites]


def normalized(stream, centre, eps):
    """What a norm gives before its gain and bias, in float64."""
    stream = stream.double()
    stream = stream - stream.mean(-1, keepdim=True) if centre else stream
    return stream / (stream.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("lower", [False, True])
def test_gemma_scope_1_sae(lower, tmp_path, inputs):
    path = tmp_path / "layer_1" / "width_16k" / "average_l0_71" / "params.npz"
    compute = write_gemma_scope_1(path, lower)
    for place, subfolder in ((path, ""), (path.parent, ""), (tmp_path, "layer_1/width_16k/average_l0_71")):
        model = TranscoderModel.from_pretrained(place, subfolder=subfolder, **SITES)
        assert_computes(model, inputs, compute(inputs))
        assert model.config.input_site == model.config.output_site == "layers.1.resid_post"
    with pytest.raises(TranscoderError, match="which language model it belongs to: give `base_model=`"):
        TranscoderModel.from_pretrained(path)
    with pytest.raises(TranscoderError, match="where it reads: give `input_site=`"):
        TranscoderModel.from_pretrained(path, base_model="google/gemma-2-2b")


def test_gemma_scope_1_transcoder_reads_before_the_gain_of_the_norm(tmp_path):
    compute = write_gemma_scope_1(tmp_path / "params.npz")
    base, (stream, reads) = model_and_activations("gemma2", "layers.1.resid_mid", "layers.1.mlp.in")
    sites = {"input_site": "layers.1.mlp.in", "output_site": "layers.1.mlp.branch"}
    model = TranscoderModel.from_pretrained(tmp_path, base_model=base, **sites)
    assert_computes(model, reads, compute(normalized(stream, False, base.config.rms_norm_eps)))
    with pytest.raises(
        TranscoderError, match="the gain of the norm at layers.1.mlp.in.*`base_model=` the loaded model"
    ):
        TranscoderModel.from_pretrained(tmp_path, base_model="google/gemma-2-2b", **sites)
    with pytest.raises(TranscoderError, match="where it writes: give `output_site=`"):
        TranscoderModel.from_pretrained(tmp_path, base_model=base, input_site="layers.1.mlp.in")


def test_gemma_scope_2(tmp_path, inputs):
    settings = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-270m",
        "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
    }
    compute = write_gemma_scope_2(tmp_path / "with", settings)
    model = TranscoderModel.from_pretrained(tmp_path / "with")
    assert_computes(model, inputs, compute(inputs))
    assert (model.config.input_site, model.config.output_site) == ("layers.5.mlp.in", "layers.5.mlp.branch")
    write_gemma_scope_2(tmp_path / "without", None)
    said = {"base_model": "google/gemma-3-270m", "input_site": "layers.5.mlp.in", "output_site": "layers.5.mlp.branch"}
    assert_computes(TranscoderModel.from_pretrained(tmp_path / "without", **said), inputs, compute(inputs))


@pytest.mark.parametrize("name", ["final_sparse_autoencoder_gpt2-small_blocks.1.pt", "layer_1.pkl.gz"])
def test_gpt2_transcoder_on_the_plain_model(name, tmp_path):
    compute = write_gpt2_transcoder(tmp_path / name)
    base, (stream, reads) = model_and_activations("gpt2", "layers.1.resid_mid", "layers.1.mlp.in")
    model = TranscoderModel.from_pretrained(tmp_path / name, base_model=base)
    assert_computes(model, reads, compute(normalized(stream, True, base.config.layer_norm_epsilon)), 2e-5)
    assert (model.config.input_site, model.config.output_site) == ("layers.1.mlp.in", "layers.1.mlp.branch")
    assert model.config.l1_coefficient == 0.00014
    with pytest.raises(TranscoderError, match="give `base_model=` the loaded model"):
        TranscoderModel.from_pretrained(tmp_path / name)


def test_one_of_several_files_is_named(tmp_path):
    for layer in (1, 10):
        write_gpt2_transcoder(tmp_path / f"layer_{layer}.pt", layer)
    base = tiny_model("gpt2")
    with pytest.raises(TranscoderError, match=r"holds 2 dictionaries \(layer_1.pt, layer_10.pt\): name one"):
        TranscoderModel.from_pretrained(tmp_path, base_model=base)
    assert TranscoderModel.from_pretrained(tmp_path / "layer_1.pt", base_model=base).config.d_in == D


@pytest.mark.parametrize("activation", ["ReLU", "TopK"])
def test_openai(activation, tmp_path, inputs):
    compute = write_openai(tmp_path / "8.pt", activation)
    model = TranscoderModel.from_pretrained(
        tmp_path, input_site="layers.1.resid_post", base_model="openai-community/gpt2"
    )
    assert_computes(model, 3 * inputs + 1, compute(3 * inputs + 1))
    assert model.config.normalization == ("token_standardize" if activation == "TopK" else "none")


@pytest.mark.parametrize(
    "state", [{"activation": "Softplus"}, {"activation_state_dict": {"k": 4, "postact_fn": "Identity"}}]
)
def test_openai_activations_that_are_not_known(state, tmp_path):
    write_openai(tmp_path / "8.pt", "TopK")
    torch.save(torch.load(tmp_path / "8.pt") | state, tmp_path / "8.pt")
    with pytest.raises(TranscoderError, match="has the activation '(Softplus|Identity)', which cannot be loaded"):
        TranscoderModel.from_pretrained(tmp_path, **SITES)


@pytest.mark.parametrize("names", [("encoder_linear", "decoder_linear"), ("encoder", "decoder")])
def test_two_linear_layers(names, tmp_path, inputs):
    compute = write_linear_pair(tmp_path / "sae.pth", *names)
    assert_computes(TranscoderModel.from_pretrained(tmp_path, **SITES), inputs, compute(inputs))


@pytest.mark.parametrize(
    ("hooks", "sites"),
    [
        (("blocks.8.hook_resid_post",) * 2, ("layers.8.resid_post",) * 2),
        (("blocks.8.hook_resid_mid", "blocks.8.hook_mlp_out"), ("layers.8.resid_mid", "layers.8.mlp.branch")),
    ],
)
def test_llama_scope(hooks, sites, tmp_path, inputs):
    compute = write_llama_scope(tmp_path, *hooks)
    model = TranscoderModel.from_pretrained(tmp_path, base_model="meta-llama/Llama-3.1-8B")
    assert_computes(model, inputs, compute(inputs))
    assert (model.config.input_site, model.config.output_site) == sites


def test_qwen_scope(tmp_path, inputs):
    for layer in (0, 11):
        compute = write_qwen_scope(tmp_path / f"layer{layer}.sae.pt")
    model = TranscoderModel.from_pretrained(tmp_path / "layer11.sae.pt", k=5, **SITES)
    assert_computes(model, inputs, compute(inputs))
    assert TranscoderModel.from_pretrained(tmp_path / "layer0.sae.pt", k=9, **SITES).config.k == 9
    with pytest.raises(TranscoderError, match="does not say how many features are active for each token: give `k=`"):
        TranscoderModel.from_pretrained(tmp_path / "layer0.sae.pt", **SITES)
    with pytest.raises(TranscoderError, match="where it reads: give `input_site=`"):
        TranscoderModel.from_pretrained(tmp_path / "layer0.sae.pt", k=5, base_model="Qwen/Qwen3-1.7B-Base")
    # Elsewhere, the number in the files is replaced, or has no meaning.
    write_gemma_scope_1(tmp_path / "params.npz")
    with pytest.raises(TranscoderError, match="`k` has no meaning for activation 'jumprelu'"):
        TranscoderModel.from_pretrained(tmp_path / "params.npz", k=5, **SITES)


def test_other_orientations_of_four_tensors_are_not_taken_for_qwen_scope(tmp_path):
    write_qwen_scope(tmp_path / "a.pt")
    tensors = torch.load(tmp_path / "a.pt")
    torch.save(
        {name: tensor.T if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}, tmp_path / "a.pt"
    )
    with pytest.raises(TranscoderError, match="fits none of the known formats"):
        TranscoderModel.from_pretrained(tmp_path / "a.pt", k=5, **SITES)


def test_llama_scope_r1(tmp_path, inputs):
    compute = write_llama_scope_r1(tmp_path)
    said = {"base_model": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "folded": False}
    model = TranscoderModel.from_pretrained(tmp_path, scaling_factor=1.7, **said)
    assert_computes(model, inputs, compute(inputs, 1.7))
    assert model.config.input_site == model.config.output_site == "layers.8.resid_post"
    with pytest.raises(TranscoderError, match="average norm of the activations at .*: give `scaling_factor=`"):
        TranscoderModel.from_pretrained(tmp_path, **said)
    norms = {"dataset_average_activation_norm": {"in": 4.0, "out": 4.0}}
    compute = write_llama_scope_r1(tmp_path, dtype=torch.bfloat16, **norms)
    model = TranscoderModel.from_pretrained(tmp_path, **said)
    assert model.dtype == torch.bfloat16
    features, output = compute(inputs, D**0.5 / 4)
    found = model(inputs)
    assert (found.features - features).abs().mean() < 0.02 * features.abs().mean()
    assert (found.reconstruction - output).norm() < 0.05 * output.norm()


@torch.no_grad()
def test_gemma_scope_of_embeddings_reads_what_the_first_layer_does(tmp_path):
    place = tmp_path / "embedding" / "width_4k" / "average_l0_44"
    compute = write_gemma_scope_1(place / "params.npz")
    base, (stream,) = model_and_activations("gemma2", "layers.0.resid_pre")
    rows = base.get_input_embeddings().weight[1:25].detach()
    model = TranscoderModel.from_pretrained(tmp_path, subfolder="embedding/width_4k/average_l0_44", base_model=base)
    features, output = compute(rows)
    assert_computes(model, stream, (features, output * D**0.5))
    assert model.config.output_site == "layers.0.resid_pre"
    # At the embedding itself, the rows are read as they are.
    plain = TranscoderModel.from_pretrained(place, base_model=base, input_site="module:model.embed_tokens:out")
    assert_computes(plain, rows, (features, output))


def test_a_whole_repo_of_dictionaries_is_a_set(tmp_path, inputs):
    for layer in (2, 10):
        write_gemma_scope_2(
            tmp_path / f"layer_{layer}" / "width_64",
            {"model_name": "google/gemma-3-270m", "hf_hook_point_in": f"model.layers.{layer}.output",
             "hf_hook_point_out": f"model.layers.{layer}.output"},
        )  # fmt: skip
    transcoders = TranscoderSet.from_pretrained(tmp_path)
    assert list(transcoders) == ["layer_2.width_64", "layer_10.width_64"]
    assert transcoders["layer_10.width_64"].config.input_site == "layers.10.resid_post"
    assert list(TranscoderSet.from_pretrained(tmp_path, names=["layer_2.width_64"])) == ["layer_2.width_64"]
    with pytest.raises(TranscoderError, match="holds 2 dictionaries .layer_2.width_64, layer_10.width_64."):
        TranscoderModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
def test_saelens_before_version_6(activation, tmp_path, inputs):
    compute = write_old_saelens(tmp_path, "blocks.1.hook_resid_pre", activation)
    model = TranscoderModel.from_pretrained(tmp_path, folded=False)
    assert_computes(model, inputs, compute(inputs))
    assert model.config.input_site == "layers.1.resid_pre"


@pytest.mark.parametrize("how", [True, "expected_average_only_in"])
def test_the_factor_that_saelens_keeps_elsewhere(how, tmp_path, inputs):
    compute = write_old_saelens(tmp_path, "blocks.1.hook_resid_pre", normalize_activations=how)
    model = TranscoderModel.from_pretrained(tmp_path, folded=False, scaling_factor=0.7)
    assert_computes(model, inputs, compute(inputs, 0.7))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_sae_of_a_centered_stream(family, tmp_path):
    compute = write_old_saelens(tmp_path, "blocks.1.hook_resid_post")
    base, (stream,) = model_and_activations(family, "layers.1.resid_post")
    model = TranscoderModel.from_pretrained(tmp_path, folded=True, base_model=base)
    # TransformerLens centers the weights of models with LayerNorm alone.
    centred = stream.double() - stream.double().mean(-1, keepdim=True)
    assert_computes(model, stream, compute(centred if family == "gpt2" else stream), 3e-5)


def test_tokens_that_are_normalized_read_a_centered_stream_as_it_is(tmp_path):
    base, (stream,) = model_and_activations("gpt2", "layers.1.resid_post")
    centred = stream.double() - stream.double().mean(-1, keepdim=True)
    normalized = centred / (stream.double().std(-1, keepdim=True) + 1e-5)
    compute = write_old_saelens(tmp_path, "blocks.1.hook_resid_post", normalize_activations="layer_norm")
    model = TranscoderModel.from_pretrained(tmp_path, folded=True, base_model=base)
    features, output = compute(normalized)
    mean, deviation = stream.mean(-1, keepdim=True), stream.std(-1, keepdim=True)
    assert_computes(model, stream, (features, output * deviation + mean), 3e-5)
    with pytest.raises(TranscoderError, match="give `base_model=` the loaded model"):
        TranscoderModel.from_pretrained(tmp_path, folded=True)


@pytest.mark.parametrize(
    ("how", "hook"), [("layer_norm", "ln2.hook_normalized"), ("constant_norm_rescale", "hook_resid_post")]
)
def test_what_no_weights_can_undo_is_refused(how, hook, tmp_path):
    write_old_saelens(tmp_path, f"blocks.1.{hook}", normalize_activations=how)
    base, _ = model_and_activations("gpt2", "layers.1.resid_post")
    with pytest.raises(
        TranscoderError, match="(before the gain of a norm|centered), which cannot be undone in the weights"
    ):
        TranscoderModel.from_pretrained(tmp_path, folded=True, base_model=base)


def test_an_sae_of_what_a_norm_gives_before_its_gain(tmp_path):
    compute = write_old_saelens(tmp_path, "blocks.1.ln2.hook_normalized")
    base, (stream, site) = model_and_activations("gpt2", "layers.1.resid_mid", "layers.1.mlp.in")
    model = TranscoderModel.from_pretrained(tmp_path, base_model=base)
    features, output = compute(normalized(stream, True, base.config.layer_norm_epsilon))
    norm = base.transformer.h[1].ln_2
    # At the site, the reconstruction has gain and bias as the input there has.
    assert_computes(model, site, (features, output * norm.weight.double() + norm.bias.double()), 3e-5)
    assert model.config.base_model_type == "gpt2"


def test_a_site_that_the_user_names_is_read_as_it_is(tmp_path, inputs):
    compute = write_old_saelens(tmp_path, "blocks.1.ln2.hook_normalized")
    model = TranscoderModel.from_pretrained(tmp_path, input_site="layers.1.resid_mid")
    assert_computes(model, inputs, compute(inputs))
    assert model.config.input_site == model.config.output_site == "layers.1.resid_mid"
