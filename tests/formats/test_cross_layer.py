"""Cross-layer transcoders in the formats of other libraries: both ways, and against arithmetic of their own."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hf_transcoders import CrossLayerTranscoder, TranscoderError, TranscoderModel, TranscoderSet
from hf_transcoders.models.foreign import write_foreign
from tests.models.cross_layer.setups import activations, cross_layer


BASE = {"base_model_name_or_path": "owner/model"}


def written_circuit_tracer(folder, jumprelu, layers=3, n=7, d=4):
    """Files as circuit-tracer's layout says, by other code than the writer, and a function that computes them."""
    generator = torch.Generator().manual_seed(3)
    encoders, decoders = [], []
    for layer in range(layers):
        names = {"W_enc": (n, d), "b_enc": (n,), "b_dec": (d,)} | ({"threshold": (n,)} if jumprelu else {})
        encoders.append({f"{k}_{layer}": torch.rand(*shape, generator=generator) - 0.3 for k, shape in names.items()})
        decoders.append({f"W_dec_{layer}": torch.rand(n, layers - layer, d, generator=generator) - 0.5})
        save_file(encoders[-1], folder / f"W_enc_{layer}.safetensors")
        save_file(decoders[-1], folder / f"W_dec_{layer}.safetensors")
    settings = {"model_name": "owner/model", "model_kind": "cross_layer_transcoder"}
    settings |= {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))

    def compute(inputs):
        features, sites = [], []
        for layer, x in enumerate(inputs):
            pre = (
                x.double() @ encoders[layer][f"W_enc_{layer}"].double().T + encoders[layer][f"b_enc_{layer}"].double()
            )
            least = encoders[layer][f"threshold_{layer}"].double() if jumprelu else torch.zeros(())
            features.append(torch.where(pre > least, pre, 0))
        for later in range(layers):
            total = encoders[later][f"b_dec_{later}"].double()
            for layer in range(later + 1):
                total = total + features[layer] @ decoders[layer][f"W_dec_{layer}"][:, later - layer].double()
            sites.append(total)
        return features, sites

    return compute


@pytest.mark.parametrize("jumprelu", [False, True])
def test_circuit_tracer_files_compute_what_their_layout_says(jumprelu, tmp_path):
    compute = written_circuit_tracer(tmp_path, jumprelu)
    model = CrossLayerTranscoder.from_pretrained(tmp_path)
    assert model.config.output_sites[2] == "layers.2.mlp.out" and model.config.base_model_name_or_path == "owner/model"
    given = activations(model)
    features, sites = compute([given[site] for site in model.config.input_sites])
    for number, output in enumerate(model(given).outputs.values()):
        torch.testing.assert_close(output.features, features[number].float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output.reconstruction, sites[number].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("to", "kind", "changes"),
    [
        ("circuit-tracer", "relu", {"l1_coefficient": 0.0}),
        ("circuit-tracer", "jumprelu", {"tanh_coefficient": 0.0}),
        ("gemma-scope", "jumprelu", {"tanh_coefficient": 0.0, "skip_connection": True}),
    ],
)
def test_a_round_trip_gives_every_bit_back(to, kind, changes, tmp_path):
    model = cross_layer(kind, **BASE, **changes)
    write_foreign(model, tmp_path / "out", to)
    back = CrossLayerTranscoder.from_pretrained(tmp_path / "out")
    ours, theirs = model.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for field in ("input_sites", "output_sites", "activation", "num_features", "skip_connection", "d_in", "d_out"):
        assert getattr(model.config, field) == getattr(back.config, field)
    assert back.config.training_summary["converted_from"]


def test_what_is_folded_and_padded_computes_the_same(tmp_path):
    model = cross_layer("batchtopk", **BASE, window=1, normalization="standardize")
    write_foreign(model, tmp_path / "out", "circuit-tracer")
    back = CrossLayerTranscoder.from_pretrained(tmp_path / "out")
    assert back.config.activation == "jumprelu" and back.config.window is None
    given = activations(model)
    for one, other in zip(model(given).outputs.values(), back(given).outputs.values(), strict=True):
        torch.testing.assert_close(one.reconstruction, other.reconstruction, rtol=1e-5, atol=1e-5)
    assert model.config.normalization == "standardize"


def test_gemma_scope_rows_for_earlier_layers_mean_nothing(tmp_path):
    model = cross_layer("jumprelu", **BASE, tanh_coefficient=0.0)
    write_foreign(model, tmp_path / "clt", "gemma-scope")
    path = tmp_path / "clt" / "layer_2_width_12" / "params.safetensors"
    tensors = load_file(path)
    assert tensors["w_dec"].shape == (12, 3, 5) and tensors["w_enc"].shape == (6, 12)
    tensors["w_dec"][:, :2] = 7.0
    save_file(tensors, path)
    given = activations(model)
    for place in (tmp_path / "clt", tmp_path):
        back = CrossLayerTranscoder.from_pretrained(place)
        ours, theirs = (list(each(given).outputs.values())[2].reconstruction for each in (model, back))
        torch.testing.assert_close(ours, theirs)


def test_one_of_several_is_chosen(tmp_path):
    for l0 in ("small", "big"):
        model = cross_layer("jumprelu", **BASE, tanh_coefficient=0.0)
        write_foreign(model, tmp_path / l0, "gemma-scope")
        for layer in range(3):
            place = tmp_path / "clt" / f"layer_{layer}_width_16k_l0_{l0}"
            place.parent.mkdir(exist_ok=True)
            (tmp_path / l0 / f"layer_{layer}_width_12").rename(place)
        (tmp_path / l0).rmdir()
    with pytest.raises(TranscoderError, match=r"several cross-layer transcoders \(.*choose one by `width` and `l0`"):
        CrossLayerTranscoder.from_pretrained(tmp_path)
    assert CrossLayerTranscoder.from_pretrained(tmp_path, l0="big").config.num_sources == 3


def cut(folder):
    path = folder / "W_dec_1.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def reshape(folder):
    save_file({"W_dec_1": torch.zeros(7, 3, 4)}, folder / "W_dec_1.safetensors")


def other_kind(folder):
    (folder / "config.yaml").write_text("model_kind: transcoder_set\n")


def unnamed(folder):
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, "model_name": None}))


def broken(folder):
    tensors = load_file(folder / "W_enc_0.safetensors")
    save_file({**tensors, "b_enc_0": torch.full((7,), torch.nan)}, folder / "W_enc_0.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "W_enc_1.safetensors").unlink(), "layers 0, 2 of a cross-layer transcoder, and all"),
        (lambda folder: (folder / "W_dec_1.safetensors").unlink(), "holds no W_dec_1.safetensors"),
        (cut, "W_dec_1.safetensors cannot be read"),
        (reshape, r"have shape \(7, 3, 4\) where the other tensors ask for \(7, 2, 4\)"),
        (other_kind, "says 'transcoder_set' where its files are those of a cross-layer"),
        (unnamed, "does not say which language model it belongs to.*`base_model=`"),
        (broken, "b_enc in .* has NaN"),
    ],
)
def test_files_that_cannot_be_read_are_refused(damage, message, tmp_path):
    written_circuit_tracer(tmp_path, jumprelu=True)
    damage(tmp_path)
    with pytest.raises(TranscoderError, match=message):
        CrossLayerTranscoder.from_pretrained(tmp_path)


def test_other_loaders_name_this_one(tmp_path):
    written_circuit_tracer(tmp_path, jumprelu=False)
    for kind in (TranscoderSet, TranscoderModel):
        with pytest.raises(TranscoderError, match=r"CrossLayerTranscoder\.from_pretrained"):
            kind.from_pretrained(tmp_path)
    with pytest.raises(TranscoderError, match="is a site of one layer"):
        CrossLayerTranscoder.from_pretrained(tmp_path, input_site="layers.0.mlp.in")
    moved = CrossLayerTranscoder.from_pretrained(tmp_path, input_site="resid_mid", output_site="mlp.branch")
    assert moved.config.input_sites == [f"layers.{layer}.resid_mid" for layer in range(3)]


@pytest.mark.parametrize(
    ("to", "kind", "changes", "message"),
    [
        ("circuit-tracer", "topk", {}, "has no cross-layer activation 'topk'"),
        ("circuit-tracer", "relu", {"skip_connection": True}, "stores no skip connections"),
        ("gemma-scope", "relu", {}, "has no activation 'relu'"),
        (
            "saelens",
            "relu",
            {},
            "no format 'saelens' for cross-layer transcoders: choose from circuit-tracer, gemma-scope",
        ),
    ],
)
def test_what_a_format_cannot_express_is_refused(to, kind, changes, message, tmp_path):
    with pytest.raises(TranscoderError, match=message):
        write_foreign(cross_layer(kind, **BASE, **changes), tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_some_layers_are_not_a_whole(tmp_path):
    model = cross_layer("relu", **BASE)
    model.config.input_sites = [site.replace("layers.0", "layers.7") for site in model.config.input_sites]
    with pytest.raises(TranscoderError, match="needs every layer from 0 on"):
        write_foreign(model, tmp_path / "out", "circuit-tracer")
    assert json.dumps(model.config.input_sites)
