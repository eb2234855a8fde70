"""Cards, publishing and the command line of cross-layer transcoders."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import hf_hub_download

from hf_transcoders import CrossLayerTranscoder, CrossLayerTranscoderConfig, TranscoderConfig, TranscoderError
from hf_transcoders.cli import main
from hf_transcoders.hub import card_of_folder, make_card, push
from hf_transcoders.models.saved_files import DICTIONARY_TYPES
from tests.models.cross_layer.setups import activations, cross_layer


BASE = {"base_model_name_or_path": "owner/model"}


@pytest.fixture
def saved(tmp_path):
    model = cross_layer("jumprelu", **BASE)
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def test_the_card_says_what_it_is(saved):
    model, folder = saved
    text = str(make_card(model))
    assert "# Cross-layer transcoder of model" in text and "3 cross-layer transcoder layers" in text
    assert "CrossLayerTranscoder.from_pretrained" in text and "TranscoderSet" not in text
    assert "tanh coefficient 0.1" in text and f"{sum(p.numel() for p in model.sources[0].parameters()):,}" in text
    assert "`layers.1.mlp.branch` and `layers.2.mlp.branch`" in text
    assert str(card_of_folder(folder)) == text


def test_a_push_can_be_loaded(saved, hub):
    model, _ = saved
    push(model, "me/clt")
    loaded = CrossLayerTranscoder.from_pretrained("me/clt")
    given = activations(model)
    assert torch.equal(model(given).loss, loaded(given).loss)
    assert "Cross-layer transcoder" in Path(hf_hub_download("me/clt", "README.md")).read_text()
    with torch.no_grad():
        model.sources[0].b_dec.add_(1)
    push(model, "me/clt")
    again = CrossLayerTranscoder.from_pretrained("me/clt")
    assert torch.equal(again.sources[0].b_dec, model.sources[0].b_dec)
    with pytest.raises(TranscoderError, match="leave `remote_code` out"):
        push(model, "me/clt", remote_code=True)


def test_it_is_not_a_language_model(saved, capsys):
    assert main(["tasks", "show", "ioi", "--model", str(saved[1])]) == 2
    assert "holds a dictionary, not a language model" in capsys.readouterr().err


def test_the_types_of_dictionaries_are_those_of_their_configurations():
    assert DICTIONARY_TYPES == (TranscoderConfig.model_type, CrossLayerTranscoderConfig.model_type)


def test_info_and_convert(saved, tmp_path, capsys):
    model, folder = saved
    assert main(["info", "--transcoders", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    first = facts["layers.0.mlp.cross_layer_transcoder"]
    assert first["kind"] == "layer of a cross-layer transcoder" and first["writes"] == model.config.output_sites
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "circuit-tracer"]) == 0
    capsys.readouterr()
    assert main(["info", "--transcoders", str(tmp_path / "out"), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)["layers.0.mlp.cross_layer_transcoder"]
    assert described["format"] == "circuit-tracer" and described["parameters"] == first["parameters"]
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "back"), "--to", "native"]) == 0
    back = CrossLayerTranscoder.from_pretrained(tmp_path / "back")
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
    assert main(["convert", str(folder), str(tmp_path / "no"), "--to", "saelens"]) != 0
    assert "no format 'saelens' for cross-layer transcoders" in capsys.readouterr().err
