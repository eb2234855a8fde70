"""Choosing among the dictionaries of a repo by the names of its folders."""

import logging

import pytest

from hf_transcoders.errors import TranscoderError
from hf_transcoders.formats.choice import choose, path_facts
from hf_transcoders.models import TranscoderModel, TranscoderSet

from .test_writing import make
from .writers import write_gemma_scope_1


NAMES = [
    f"layer_{layer}.width_{width}.average_l0_{l0}"
    for layer in (0, 12)
    for width in ("16k", "1m")
    for l0 in (8, 71, 445)
]


def test_what_names_say():
    assert path_facts("layer_12.width_16k.average_l0_71") == (12, "16k", 71)
    assert path_facts("resid_post.layer_3_width_262k_l0_small_affine") == (3, "262k", "small")
    assert path_facts("blocks.7.hook_resid_pre") == (7, None, None)
    assert path_facts("layers.7.mlp") == (7, None, None)
    assert path_facts("layer_0/width_65536/average_l0_9") == (0, "65k", 9)
    assert path_facts("anything") == (None, None, None)


def test_choose():
    assert choose(NAMES) == NAMES
    assert choose(NAMES, layers=12, width="16k", l0=60) == ["layer_12.width_16k.average_l0_71"]
    assert choose(NAMES, layers=[0, 12], width=1048576, l0=10**6) == [
        "layer_0.width_1m.average_l0_445",
        "layer_12.width_1m.average_l0_445",
    ]
    assert len(choose(NAMES, width="1m")) == 6
    words = [f"attn_out.layer_3_width_16k_l0_{word}" for word in ("small", "medium", "big")]
    assert choose(words, l0="medium") == words[1:2]
    # Two places of one layer are two choices, each with its own nearest.
    places = [f"{place}.layer_3_width_16k_l0_{l0}" for place in ("mlp_out", "attn_out") for l0 in (5, 50)]
    assert choose(places, l0=40) == [places[1], places[3]]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"layers": 5}, r"\(layers=5\): there are layer 0, 12; width 16k, 1m; l0 8, 71, 445"),
        ({"layers": [0, 5]}, "for layer 5"),
        ({"width": "32k"}, "width='32k'"),
        ({"width": "wide"}, "`width` is 'wide'"),
        ({"l0": "small"}, "l0='small'"),
    ],
)
def test_nothing_to_choose_from(asked, words):
    with pytest.raises(TranscoderError, match=words):
        choose(NAMES, **asked)


def test_repo_of_many(tmp_path, caplog):
    said = {"base_model": "google/gemma-2-2b", "input_site": "layers.1.resid_post"}
    for name in (
        "layer_1/width_16k/average_l0_20",
        "layer_1/width_16k/average_l0_90",
        "layer_2/width_16k/average_l0_70",
    ):
        write_gemma_scope_1(tmp_path / name / "params.npz")
    with caplog.at_level(logging.WARNING):
        model = TranscoderModel.from_pretrained(tmp_path, layers=1, l0=71, **said)
    assert model.name_or_path and "average_l0_90" in caplog.text
    transcoders = TranscoderSet.from_pretrained(tmp_path, width="16k", l0=10, **said)
    assert list(transcoders) == ["layer_1.width_16k.average_l0_20", "layer_2.width_16k.average_l0_70"]
    with pytest.raises(TranscoderError, match="both say which"):
        TranscoderSet.from_pretrained(tmp_path, names=list(transcoders), layers=1, **said)
    with pytest.raises(TranscoderError, match="holds one dictionary, so there is nothing to choose: leave out layers"):
        TranscoderModel.from_pretrained(tmp_path / "layer_1" / "width_16k" / "average_l0_20", layers=1, **said)


def test_native_sets_are_chosen_from_by_layer(tmp_path):
    sites = [(f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch") for layer in range(3)]
    TranscoderSet([make("relu", pair) for pair in sites]).save_pretrained(tmp_path)
    assert list(TranscoderSet.from_pretrained(tmp_path, layers=[0, 2])) == [
        "layers.0.mlp.transcoder",
        "layers.2.mlp.transcoder",
    ]
    with pytest.raises(TranscoderError, match="No dictionary has what was asked for"):
        TranscoderSet.from_pretrained(tmp_path, width="16k")
