"""`save_pretrained(..., format=...)` of dictionaries, sets and cross-layer transcoders."""

import pytest
import torch

from hf_transcoders import CrossLayerTranscoder, TranscoderError, TranscoderModel, TranscoderSet
from tests.models.cross_layer.setups import cross_layer

from .test_writing import MLP, make


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_dictionary(tmp_path):
    model = make("topk", b_pre_is_b_dec=True)
    for to in ("saelens", "sparsify", "dictionary-learning"):
        model.save_pretrained(tmp_path / to, format=to)
        same(TranscoderModel.from_pretrained(tmp_path / to), model)
    model.save_pretrained(tmp_path / "native", format="native")
    same(TranscoderModel.from_pretrained(tmp_path / "native"), model)


def test_a_set(tmp_path):
    sites = [(f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch") for layer in range(2)]
    transcoders = TranscoderSet([make("relu", pair) for pair in sites])
    transcoders.save_pretrained(tmp_path / "out", format="circuit-tracer")
    again = TranscoderSet.from_pretrained(tmp_path / "out")
    for one, other in zip(transcoders.values(), again.values(), strict=True):
        same(one, other)


def test_a_cross_layer_transcoder(tmp_path):
    model = cross_layer("relu", base_model_name_or_path="owner/model", l1_coefficient=0.0)
    model.save_pretrained(tmp_path / "out", format="circuit-tracer")
    same(CrossLayerTranscoder.from_pretrained(tmp_path / "out"), model)
    with pytest.raises(TranscoderError, match="One layer of a cross-layer transcoder cannot be saved alone"):
        model.layers[0].save_pretrained(tmp_path / "one", format="saelens")
    with pytest.raises(TranscoderError, match="no format 'saelens' for cross-layer transcoders"):
        model.save_pretrained(tmp_path / "two", format="saelens")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"format": "sparsify"}, "has no activation 'relu'"),
        ({"format": "saelen"}, "There is no format 'saelen' to write: choose from saelens, sparsify"),
        ({"format": "saelens", "push_to_hub": True}, "push_to_hub belong to the files of hf_transcoders"),
        ({"format": "saelens", "variant": "fp16", "remote_code": True}, "remote_code, variant belong to the files"),
    ],
)
def test_what_is_refused_writes_nothing(asked, words, tmp_path):
    with pytest.raises(TranscoderError, match=words):
        make("relu", MLP).save_pretrained(tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(TranscoderError, match="is not empty|no format|no activation|belong"):
        make("relu", MLP).save_pretrained(tmp_path / "full", **asked)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_other_processes_write_nothing(tmp_path):
    make("relu").save_pretrained(tmp_path / "out", format="saelens", is_main_process=False)
    assert not (tmp_path / "out").exists()
