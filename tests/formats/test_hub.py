"""Formats of other libraries on the Hub, on a Hub of the tests' own."""

import pytest
import torch
from huggingface_hub import HfApi

from hf_transcoders.cli.main import main
from hf_transcoders.errors import TranscoderError
from hf_transcoders.models import CrossLayerTranscoder, TranscoderModel, TranscoderSet
from hf_transcoders.testing import local_hub
from hf_transcoders.testing.local_hub import Account

from .peers import FIXTURES, assert_same_function
from .test_writing import assert_same, make


@pytest.fixture
def hub():
    with local_hub(token="hf_writer", accounts={"hf_writer": Account("me")}) as server:
        yield server


def upload(folder, repo="me/x", inside=""):
    HfApi().create_repo(repo, exist_ok=True)
    return HfApi().upload_folder(repo_id=repo, folder_path=folder, path_in_repo=inside).oid


def weights_asked_for(hub):
    """Paths of the weights that were downloaded so far."""
    asked = (
        request.path for request in hub.requests if request.method in ("GET", "HEAD") and "/resolve/" in request.path
    )
    return {path.split("/resolve/")[1].partition("/")[2] for path in asked if path.endswith(".safetensors")}


def test_repo_subfolder_file_and_revision(hub):
    first = upload(FIXTURES / "saelens_topk", inside="layer_1/width_24")
    upload(FIXTURES / "saelens_jumprelu", inside="layer_2/width_24")
    model = TranscoderModel.from_pretrained("me/x", subfolder="layer_1/width_24")
    assert_same_function(model, "saelens_topk")
    assert model.config.training_summary["source"] == "me/x"
    assert len(model.config.training_summary["source_revision"]) == 40
    assert_same_function(TranscoderModel.from_pretrained("me/x/layer_2/width_24"), "saelens_jumprelu")
    path = "me/x/layer_1/width_24/sae_weights.safetensors"
    assert_same_function(TranscoderModel.from_pretrained(path), "saelens_topk")
    assert_same_function(TranscoderModel.from_pretrained("me/x", revision=first), "saelens_topk")
    assert list(TranscoderSet.from_pretrained("me/x")) == ["layer_1.width_24", "layer_2.width_24"]
    with pytest.raises(TranscoderError, match="holds 2 dictionaries"):
        TranscoderModel.from_pretrained("me/x")


def test_only_the_wanted_dictionary_is_downloaded(hub):
    upload(FIXTURES / "sparsify_sae")
    upload(FIXTURES / "sparsify_skip_transcoder")
    transcoders = TranscoderSet.from_pretrained("me/x", names=["layers.0.mlp"])
    assert weights_asked_for(hub) == {"layers.0.mlp/sae.safetensors"}
    assert_same_function(transcoders["layers.0.mlp"], "sparsify_skip_transcoder")
    assert transcoders["layers.0.mlp"].config.base_model_name_or_path == "EleutherAI/pythia-14m"


def test_a_set_that_names_files_in_other_repos(hub, tmp_path):
    upload(FIXTURES / "circuit_tracer_relu", "me/files", "deep/inside")
    settings = (FIXTURES / "circuit_tracer_relu" / "config.yaml").read_text()
    listed = "".join(f"- hf://me/files/deep/inside/layer_{layer}.safetensors?revision=main\n" for layer in range(2))
    (tmp_path / "config.yaml").write_text(f"{settings}transcoders:\n{listed}")
    upload(tmp_path, "me/set")
    for place in ("me/set", tmp_path):
        transcoders = TranscoderSet.from_pretrained(place)
        assert_same_function(transcoders["layer_1"], "circuit_tracer_relu")
        assert transcoders["layer_1"].config.input_site == "layers.1.mlp.in"


def test_convert(tmp_path, capsys):
    sites = [(f"layers.{layer}.mlp.in", f"layers.{layer}.mlp.branch") for layer in range(2)]
    original = TranscoderSet([make("jumprelu", pair, normalization="scale") for pair in sites])
    original.save_pretrained(tmp_path / "native")
    assert main(["convert", str(tmp_path / "native"), str(tmp_path / "ct"), "--to", "circuit-tracer"]) == 0
    assert "2 dictionaries in" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "ct"), str(tmp_path / "again"), "--to", "native", "--json"]) == 0
    assert '"dictionaries": [' in capsys.readouterr().out
    again = TranscoderSet.from_pretrained(tmp_path / "again")
    for one, other in zip(original.values(), again.values(), strict=True):
        assert_same(one, other, 1e-5)
    assert main(["convert", str(tmp_path / "ct"), str(tmp_path / "sparsify"), "--to", "sparsify"]) == 2
    assert "has no activation 'jumprelu'" in capsys.readouterr().err
    assert not (tmp_path / "sparsify").exists()
    assert main(["convert", str(tmp_path / "ct"), str(tmp_path / "again"), "--to", "native"]) == 2
    assert "is not empty" in capsys.readouterr().err
    one = FIXTURES / "dictionary_learning_JumpReluAutoEncoder"
    assert main(["convert", str(one), str(tmp_path / "one"), "--to", "native"]) == 0
    assert_same_function(TranscoderModel.from_pretrained(tmp_path / "one"), one.name)


def test_info_reads_no_weights(tmp_path, capsys, monkeypatch):
    import shutil

    folder = shutil.copytree(FIXTURES / "circuit_tracer_relu", tmp_path / "set")
    (folder / "layer_1.safetensors").write_bytes(b"nothing")
    monkeypatch.setattr(torch, "aminmax", None)  # What every tensor goes through when it is loaded.
    assert main(["info", "--transcoders", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "layer_0" in text and "layers.0.mlp.in" in text and "480" in text
    assert "cannot be loaded" in text and "damaged" in text
    assert main(["info", "--transcoders", str(FIXTURES / "sparsify_sae")]) == 0
    assert "top 4 of each token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("clt_llamascopium_topk", "layers.1.mlp.branch, layers.2.mlp.branch"),
        ("clt_crosslayer_transcoder_topk", "layer_2"),
        ("clt_decode_clt_per_source", "layers.2.mlp.in"),
        ("llamascopium_topk", "token_scale"),
    ],
)
def test_info_on_newer_formats(name, words, capsys, monkeypatch):
    monkeypatch.setattr(torch, "aminmax", None)  # What every tensor goes through when it is loaded.
    assert main(["info", "--transcoders", str(FIXTURES / name)]) == 0
    assert words in capsys.readouterr().out


def test_newer_formats_from_the_hub(hub, capsys):
    said = {"base_model": "owner/model", "folded": False}
    upload(FIXTURES / "clt_llamascopium_topk", "me/clt")
    assert CrossLayerTranscoder.from_pretrained("me/clt", **said).config.num_sources == 3
    for layer in (1, 2):
        upload(FIXTURES / "llamascopium_relu", "me/saes", inside=f"L{layer}R")
    hub.requests.clear()
    assert main(["info", "--transcoders", "me/saes"]) == 0
    assert "L2R" in capsys.readouterr().out and not any("R/config.json" in asked.path for asked in hub.requests)
    assert_same_function(TranscoderModel.from_pretrained("me/saes", subfolder="L2R", **said), "llamascopium_relu")


def test_info_on_a_repo_of_many_downloads_nothing(hub, capsys):
    for layer, width in ((1, "16k"), (2, "65k")):
        upload(FIXTURES / "saelens_topk", inside=f"layer_{layer}/width_{width}/l0_{layer}0")
    assert main(["info", "--transcoders", "me/x"]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["dictionary", "format", "layer", "width", "L0"]
    assert [row.split() for row in rows] == [
        ["layer_1.width_16k.l0_10", "SAELens", "1", "16k", "10"],
        ["layer_2.width_65k.l0_20", "SAELens", "2", "65k", "20"],
    ]
    assert not weights_asked_for(hub)
    assert_same_function(TranscoderModel.from_pretrained("me/x", layers=2), "saelens_topk")
    assert weights_asked_for(hub) == {"layer_2/width_65k/l0_20/sae_weights.safetensors"}
