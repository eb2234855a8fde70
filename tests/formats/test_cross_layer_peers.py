"""
Cross-layer transcoders and SAEs that other libraries have written compute the same here: see
`tests/interop/write_cross_layer_fixtures.py`.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from hf_transcoders import CrossLayerTranscoder, TranscoderModel

from .peers import FIXTURES, assert_same_function


SAID = {"base_model": "owner/model", "input_site": "resid_mid", "output_site": "mlp.branch"}
NAMES = sorted(path.name for path in FIXTURES.glob("clt_*") if path.is_dir())


def said_of(name):
    """What the files of a library leave out."""
    if "crosslayer_transcoder" in name:
        return SAID
    return {"base_model": "owner/model", "folded": False} if "llamascopium" in name else {}


def test_every_library_has_fixtures():
    libraries = ("circuit_tracer", "crosslayer_transcoder", "decode_clt", "llamascopium")
    assert [sum(library in name for name in NAMES) for library in libraries] == [2, 4, 3, 2]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_cross_layer(name):
    expected = load_file(FIXTURES / f"{name}.safetensors")
    model = CrossLayerTranscoder.from_pretrained(FIXTURES / name, **said_of(name)).eval()
    assert model.config.num_sources == len(expected["inputs"]) == 3
    outputs = model(dict(zip(model.config.input_sites, expected["inputs"], strict=True))).outputs.values()
    for layer, output in enumerate(outputs):
        for found, wanted in ((output.features, "features"), (output.reconstruction, "reconstruction")):
            torch.testing.assert_close(found, expected[wanted][layer], atol=1e-5, rtol=1e-5)
    # Else the comparison says little.
    assert (expected["features"] != 0).float().mean() > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_sites_and_settings(name):
    config = CrossLayerTranscoder.from_pretrained(FIXTURES / name, **said_of(name)).config
    point = ("mlp.in", "mlp.out") if "decode_clt" in name else ("resid_mid", "mlp.branch")
    assert (config.input_sites[2], config.output_sites[2]) == tuple(f"layers.2.{end}" for end in point)
    library = {"circuit": "circuit-tracer", "crosslayer": "crosslayer-transcoder", "decode": "decode-clt"}
    assert config.training_summary["converted_from"] == library.get(name.split("_")[1], "llamascopium")
    assert config.window == (0 if name.endswith("per_layer") else None)
    if name.endswith("batchtopk"):
        assert (config.activation, config.batchtopk_scope, config.k) == ("batchtopk", "all", 4)


@pytest.mark.parametrize("name", ["relu", "jumprelu", "topk"])
def test_llamascopium(name):
    name = f"llamascopium_{name}"
    model = TranscoderModel.from_pretrained(FIXTURES / name, base_model="owner/model", folded=False)
    assert_same_function(model, name)
    reads = "layers.1.resid_mid" if name.endswith("jumprelu") else "layers.1.resid_post"
    assert model.config.input_site == reads
    assert model.config.normalization == ("token_scale" if name.endswith("topk") else "none")


@torch.no_grad()
def test_the_k_largest_after_decoder_norms():
    name = "llamascopium_topk_inference"
    model = TranscoderModel.from_pretrained(FIXTURES / name, base_model="owner/model", folded=False).eval()
    expected = load_file(FIXTURES / f"{name}.safetensors")
    inputs = expected["inputs"]
    norms = load_file(FIXTURES / name / "sae_weights.safetensors")["W_D"].norm(dim=-1)
    torch.testing.assert_close(model.encode(inputs), expected["features"] * norms, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(inputs).reconstruction, expected["reconstruction"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.W_dec.norm(dim=-1), torch.ones(24))


def test_a_model_that_was_read_is_saved_as_its_own(tmp_path):
    name = "clt_decode_clt_jumprelu"
    model = CrossLayerTranscoder.from_pretrained(FIXTURES / name)
    model.save_pretrained(tmp_path)
    again = CrossLayerTranscoder.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["training_summary"]["converted_from"] == "decode-clt"
