"""Files and configurations of cross-layer transcoders: what is saved loads, and everything else is one sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from hf_transcoders import (
    CrossLayerTranscoder,
    CrossLayerTranscoderConfig,
    TranscoderError,
    TranscoderModel,
    TranscoderSet,
)
from hf_transcoders.hub.push_files import check_weights, dictionary_files
from tests.models.cross_layer.setups import KINDS, activations, cross_layer, per_layer_set, sites


@pytest.mark.parametrize("kind", KINDS)
def test_saved_is_loaded(kind, tmp_path):
    model = cross_layer(kind, window=1, skip_connection=True, normalization="scale")
    for number, source in enumerate(model.sources):
        source.config.target_variance = 1.5 + number
    model.save_pretrained(tmp_path)
    given = activations(model)
    for loaded in (CrossLayerTranscoder.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is CrossLayerTranscoder and loaded.config.window == 1
        assert [s.config.target_variance for s in loaded.sources] == [1.5, 2.5, 3.5]
        ours, theirs = model(given), loaded(given)
        assert torch.equal(ours.loss, theirs.loss)
        for one, other in zip(ours.outputs.values(), theirs.outputs.values(), strict=True):
            assert torch.equal(one.reconstruction, other.reconstruction)
    assert AutoConfig.from_pretrained(tmp_path).num_sources == 3


def test_low_precision_and_shards(tmp_path):
    model = cross_layer("jumprelu")
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.sources[0].W_dec.dtype == torch.bfloat16 and loaded.sources[0].threshold.dtype == torch.float32
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_weights(dictionary_files(tmp_path))


def damage(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("sources.1.b_enc"), "lack sources.1.b_enc"),
        (lambda t: t.update(extra=torch.zeros(2)), "hold extra, which its config.json does not have"),
        (
            lambda t: t.update({"sources.0.W_dec": torch.zeros(12, 2, 5)}),
            r"sources.0.W_dec is \(12, 2, 5\) in the file",
        ),
        (lambda t: t["sources.2.W_dec"].fill_(torch.nan), "sources.2.W_dec in .* has NaN"),
        (lambda t: t.update({"sources.0.b_dec": torch.zeros(5, dtype=torch.int32)}), "in I32, which is not a type"),
    ],
)
def test_files_that_do_not_match_are_refused(change, message, tmp_path):
    cross_layer().save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(TranscoderError, match=message):
        CrossLayerTranscoder.from_pretrained(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    cross_layer().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TranscoderError, match="damaged or cut short"):
        CrossLayerTranscoder.from_pretrained(tmp_path)


def test_scales_that_differ_between_layers_are_refused(tmp_path):
    cross_layer(normalization="scale").save_pretrained(tmp_path)
    damage(tmp_path, lambda tensors: tensors["sources.0.output_scale"][1].mul_(2))
    with pytest.raises(TranscoderError, match="layers disagree about the scale of layers.1.mlp.branch"):
        CrossLayerTranscoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "reads up to format 1"),
        ({"activation": "gated", "k": None}, "`activation='gated'` is not supported"),
        ({"output_sites": ["layers.0.mlp.branch"]}, "these are 3 and 1"),
        (
            {"output_sites": "layers.0.mlp.branch"},
            "`output_sites` in config.json is .* must be a list of texts or null",
        ),
        ({"window": -1}, "`window` is -1"),
        ({"tied": True}, "`tied=True` is not supported"),
        ({"target_variances": [1.0, 2.0]}, "one positive number for each of the 3 output sites"),
        ({"tanh_coefficient": 1.0}, "`tanh_coefficient` does nothing for activation 'topk'"),
        ({"batchtopk_scope": "all"}, "`batchtopk_scope='all'` does nothing"),
        ({"model_type": "transcoder"}, "not of a 'cross_layer_transcoder'"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(change, message, tmp_path):
    cross_layer().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(TranscoderError, match=message):
        CrossLayerTranscoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_sites": None}, "these are 0 and 3"),
        ({"input_sites": ["layers.2.mlp.in", "layers.1.mlp.in", "layers.0.mlp.in"]}, "from the first up"),
        ({"input_sites": sites()["output_sites"]}, "is both read and written"),
        ({"output_site": "layers.0.mlp.branch"}, "instead of `input_site` and `output_site`"),
        ({"target_variance": 1.0}, "give `target_variances`"),
    ],
)
def test_sites_that_mean_nothing_are_refused(change, message):
    with pytest.raises(TranscoderError, match=message):
        CrossLayerTranscoderConfig(**{**sites(), "num_features": 12, **change})


def test_another_kind_of_model_is_named(tmp_path):
    cross_layer().save_pretrained(tmp_path / "clt")
    per_layer_set().save_pretrained(tmp_path / "set")
    for kind in (TranscoderModel, TranscoderSet):
        with pytest.raises(TranscoderError, match="CrossLayerTranscoder.from_pretrained"):
            kind.from_pretrained(tmp_path / "clt")
    with pytest.raises(TranscoderError, match="TranscoderSet.from_pretrained"):
        CrossLayerTranscoder.from_pretrained(tmp_path / "set")


def test_sets_that_cannot_be_padded_are_refused():
    transcoders = per_layer_set()
    with pytest.raises(TranscoderError, match="are the layers of a cross-layer transcoder already"):
        CrossLayerTranscoder.from_set(cross_layer())
    other = per_layer_set(num_features=8)
    names = list(transcoders)
    mixed = {names[0]: transcoders[names[0]], names[1]: other[names[1]]}
    with pytest.raises(TranscoderError, match=f"'{names[1]}' has another `num_features` than the others"):
        CrossLayerTranscoder.from_set(mixed)
    with pytest.raises(TranscoderError, match="at least one transcoder"):
        CrossLayerTranscoder.from_set({})
