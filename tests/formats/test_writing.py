"""Dictionaries of this library written for others: read back bit for bit, or refused in a sentence."""

import pytest
import torch

from hf_transcoders.errors import TranscoderError
from hf_transcoders.models import TranscoderConfig, TranscoderModel, TranscoderSet
from hf_transcoders.models.foreign import write_foreign


D, N = 8, 24


def make(activation="relu", sites=("layers.1.resid_post",) * 2, *, b_pre_is_b_dec=False, **changes):
    """A dictionary with random tensors, thresholds positive."""
    config = TranscoderConfig(
        d_in=D,
        num_features=N,
        activation=activation,
        k=4 if activation in ("topk", "batchtopk") else None,
        input_site=sites[0],
        output_site=sites[1],
        base_model_name_or_path="EleutherAI/pythia-70m",
        base_model_type="gpt_neox",
        pre_bias=b_pre_is_b_dec or changes.pop("pre_bias", False),
        **changes,
    )
    torch.manual_seed(0)
    model = TranscoderModel(config).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.normal_(std=0.5)
            if name == "threshold" or name.endswith("scale"):
                tensor.abs_()
        if b_pre_is_b_dec:
            model.b_pre.copy_(model.b_dec)
    return model


def assert_same(one, other, tolerance):
    inputs = torch.randn(20, D)
    with torch.no_grad():
        for ours, theirs in (
            (one.encode(inputs), other.encode(inputs)),
            (one(inputs).reconstruction, other(inputs).reconstruction),
        ):
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


MLP = ("layers.1.mlp.in", "layers.1.mlp.out")


@pytest.mark.parametrize(
    ("to", "model"),
    [
        *(("saelens", make(activation, b_pre_is_b_dec=True)) for activation in ("relu", "topk", "jumprelu", "gated")),
        *(("saelens", make(activation)) for activation in ("relu", "topk", "jumprelu", "gated")),
        ("saelens", make("topk", b_pre_is_b_dec=True, normalization="token_standardize")),
        ("saelens", make("jumprelu", normalization="token_scale")),
        *(
            ("saelens", make(activation, MLP, skip_connection=skip))
            for activation in ("relu", "jumprelu")
            for skip in (False, True)
        ),
        ("sparsify", make("topk", b_pre_is_b_dec=True)),
        ("sparsify", make("topk", MLP)),
        ("sparsify", make("topk", MLP, skip_connection=True)),
        *(
            ("dictionary-learning", make(activation, b_pre_is_b_dec=True))
            for activation in ("topk", "batchtopk", "gated")
        ),
        ("dictionary-learning", make("batchtopk", b_pre_is_b_dec=True, matryoshka_sizes=[8, N])),
        *(("dictionary-learning", make(activation)) for activation in ("relu", "jumprelu")),
    ],
)
def test_what_a_format_has_comes_back_bit_for_bit(to, model, tmp_path):
    write_foreign({"one": model}, tmp_path / "out", to)
    again = TranscoderModel.from_pretrained(tmp_path / "out")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    for field in TranscoderConfig.own_fields():
        if field in (
            "d_in",
            "d_out",
            "num_features",
            "activation",
            "k",
            "skip_connection",
            "pre_bias",
            "matryoshka_sizes",
            "normalization",
        ):
            assert getattr(again.config, field) == getattr(model.config, field), field
    assert (again.config.input_site, again.config.output_site) == (model.config.input_site, model.config.output_site)
    assert again.config.base_model_name_or_path == "EleutherAI/pythia-70m"


@pytest.mark.parametrize("to", ["saelens", "sparsify", "dictionary-learning"])
@pytest.mark.parametrize("normalization", ["none", "scale", "standardize"])
@pytest.mark.parametrize("pre_bias", [False, True])
def test_normalization_and_other_biases_are_folded(to, normalization, pre_bias, tmp_path):
    model = make("topk", normalization=normalization, pre_bias=pre_bias)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_foreign({"one": model}, tmp_path / "out", to)
    assert_same(model, TranscoderModel.from_pretrained(tmp_path / "out"), 2e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "model",
    [
        make("relu", tied=True, decoder_bias=False),
        make("gated", pre_bias=True),
        make("batchtopk", pre_bias=True, normalization="standardize"),
    ],
)
@pytest.mark.parametrize("to", ["saelens", "dictionary-learning"])
def test_the_function_stays(model, to, tmp_path):
    write_foreign({"one": model}, tmp_path / "out", to)
    assert_same(model, TranscoderModel.from_pretrained(tmp_path / "out"), 2e-5)


def test_the_skip_connection_reads_what_the_peer_gives_it(tmp_path):
    model = make("topk", skip_connection=True, pre_bias=True)
    write_foreign({"one": model}, tmp_path / "out", "sparsify")
    assert_same(model, TranscoderModel.from_pretrained(tmp_path / "out"), 2e-5)


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_a_circuit_tracer_set(activation, tmp_path):
    sites = [(f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch") for layer in range(3)]
    transcoders = TranscoderSet([make(activation, pair, skip_connection=activation == "relu") for pair in sites])
    write_foreign(transcoders, tmp_path / "out", "circuit-tracer")
    again = TranscoderSet.from_pretrained(tmp_path / "out")
    for model, other, pair in zip(transcoders.values(), again.values(), sites, strict=True):
        assert_same(model, other, 0 if activation != "batchtopk" else 1e-6)
        assert (other.config.input_site, other.config.output_site) == pair


def test_several_dictionaries_become_several_folders(tmp_path):
    models = {"a": make("topk"), "b": make("jumprelu", ("layers.2.resid_post",) * 2)}
    write_foreign(models, tmp_path / "out", "saelens")
    again = TranscoderSet.from_pretrained(tmp_path / "out")
    assert list(again) == ["a", "b"]
    assert_same(again["b"], models["b"], 0)


@pytest.mark.parametrize(
    ("to", "models", "words"),
    [
        ("saelens", [make("topk", MLP)], "has no transcoder with activation 'topk'"),
        ("saelens", [make("relu", skip_connection=True)], "has no SAE with activation 'relu' and a skip connection"),
        ("saelens", [make("relu", ("layers.1.attn.in",) * 2)], "has no hook for layers.1.attn.in"),
        ("sparsify", [make("relu")], "has no activation 'relu'"),
        ("sparsify", [make("topk", ("layers.1.resid_mid", "layers.1.mlp.out"))], "reads and writes at one module"),
        ("dictionary-learning", [make("topk", MLP)], "has SAEs only"),
        ("circuit-tracer", [make("gated", MLP)], "has no activation 'gated'"),
        ("circuit-tracer", [make("relu", MLP)], "needs every layer from 0 on: this set has 1"),
        ("pickle", [make("relu", MLP)], "There is no format 'pickle'"),
        ("saelens", [make("relu", MLP, normalization="token_scale")], "does not scale the output of transcoders"),
        *(
            (to, [make("topk", MLP, normalization="token_scale")], "has no normalization 'token_scale'")
            for to in ("sparsify", "circuit-tracer")
        ),
        ("dictionary-learning", [make("topk", normalization="token_scale")], "has no normalization 'token_scale'"),
    ],
)
def test_what_a_format_cannot_express_is_said_and_nothing_is_written(to, models, words, tmp_path):
    with pytest.raises(TranscoderError, match=words) as caught:
        write_foreign({str(number): model for number, model in enumerate(models)}, tmp_path / "out", to)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_files_are_not_mixed_in(tmp_path):
    write_foreign({"one": make("topk")}, tmp_path / "out", "saelens")
    with pytest.raises(TranscoderError, match="is not empty"):
        write_foreign({"one": make("topk")}, tmp_path / "out", "dictionary-learning")
