"""Damaged, incomplete and unknown files of the newer formats: one sentence for each, and nothing is read that might mean something else."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_transcoders import CrossLayerTranscoder, TranscoderError, TranscoderModel, TranscoderSet

from .peers import FIXTURES
from .test_cross_layer_peers import said_of


# (fixture, its weights, a tensor of it)
WITH_WEIGHTS = [
    ("clt_circuit_tracer_relu", "W_enc_1.safetensors", "b_dec_1"),
    ("clt_llamascopium_jumprelu", "sae_weights.safetensors", "b_D.1"),
    ("clt_crosslayer_transcoder_jumprelu", "checkpoint.safetensors", "decoder.b"),
    ("clt_decode_clt_jumprelu", "clt_checkpoint_latest.safetensors", "decoder_module.decoders.0->1.bias_param"),
    ("llamascopium_jumprelu", "sae_weights.safetensors", "b_D"),
]


def refused(words, folder, name):
    kind = CrossLayerTranscoder if name.startswith("clt") else TranscoderModel
    said = said_of(name) if name.startswith("clt") else {"base_model": "owner/model", "folded": False}
    with pytest.raises(TranscoderError, match=words) as caught:
        kind.from_pretrained(folder, **said)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def copied(name, tmp_path):
    return shutil.copytree(FIXTURES / name, tmp_path / name)


def rewrite(path, change):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(("name", "file", "tensor"), WITH_WEIGHTS)
@pytest.mark.parametrize("damage", ["truncated", "missing", "unknown", "shape", "nan", "whole"])
def test_weights(name, file, tensor, damage, tmp_path):
    path = copied(name, tmp_path) / file
    changes = {
        "missing": lambda tensors: tensors.pop(tensor),
        "unknown": lambda tensors: tensors.update(W_gate=torch.zeros(3)),
        "shape": lambda tensors: tensors.update({tensor: torch.zeros(3)}),
        "nan": lambda tensors: tensors[tensor].view(-1).fill_(torch.nan),
        "whole": lambda tensors: tensors.update({tensor: tensors[tensor].long()}),
    }
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        rewrite(path, changes[damage])
    words = {
        "truncated": "cannot be read .*damaged, cut short",
        "missing": f"lacks the tensor {tensor}",
        "unknown": "holds W_gate, which its format does not know",
        "shape": r"has shape \(3,\) where the other tensors ask for",
        "nan": "has NaN or infinite numbers",
        "whole": f"lacks the tensor {tensor}",
    }
    refused(words[damage], path.parent, name)


def edit(path, place, value):
    read, write = (yaml.safe_load, yaml.safe_dump) if path.suffix == ".yaml" else (json.loads, json.dumps)
    settings = read(path.read_text())
    *outer, last = place
    inner = settings
    for key in outer:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    path.write_text(write(settings))


CLX = ("model", "init_args")


@pytest.mark.parametrize(
    ("name", "file", "place", "value", "words"),
    [
        ("clt_llamascopium_jumprelu", "config.json", ["sae_type"], "lorsa", "holds a dictionary of llamascopium that is no cross-layer transcoder"),
        ("clt_llamascopium_jumprelu", "config.json", ["act_fn"], "batchlayertopk", "'batchlayertopk', by which .* other tokens or layers"),
        ("clt_llamascopium_jumprelu", "config.json", ["norm_activation"], "token-wise", "'token-wise', which scales outputs by what they are"),
        ("clt_llamascopium_jumprelu", "config.json", ["hook_points_out"], ["a"], "names 3 inputs and 1 outputs"),
        ("clt_llamascopium_jumprelu", "config.json", ["hook_points_in", 1], 7, "`hook_points_in` in .* is 7, but must be of type str"),
        ("clt_llamascopium_jumprelu", "config.json", ["hook_points_in", 1], "x", "give `scaling_factor=`"),
        ("clt_llamascopium_topk", "config.json", ["top_k"], None, "lacks `top_k`"),
        ("llamascopium_jumprelu", "config.json", ["sae_type"], "lorsa", "has the kind 'lorsa': it is not loaded"),
        ("llamascopium_jumprelu", "config.json", ["use_glu_encoder"], True, "'sae with a gated linear encoder'"),
        ("llamascopium_jumprelu", "config.json", ["act_fn"], "batchtopk", "'batchtopk', by which .* convert it to JumpReLU"),
        ("llamascopium_jumprelu", "config.json", ["act_fn"], "relu", "holds activation_function.log_jumprelu_threshold, which its format"),
        ("llamascopium_jumprelu", "config.json", ["norm_activation"], "batch-wise", "'batch-wise', which scales outputs"),
        ("llamascopium_jumprelu", "config.json", ["norm_activation"], "token-wise", "'token-wise', which scales outputs by what they are"),
        ("clt_crosslayer_transcoder_jumprelu", "config.yaml", ["model"], ..., "lacks `model`"),
        ("clt_crosslayer_transcoder_jumprelu", "config.yaml", [*CLX, "nonlinearity", "class_path"], "x.Softplus", "has the nonlinearity 'Softplus'"),
        ("clt_crosslayer_transcoder_jumprelu", "config.yaml", [*CLX, "decoder", "class_path"], "x.Tied", "has the decoder 'Tied'"),
        ("clt_crosslayer_transcoder_jumprelu", "config.yaml", [*CLX, "input_standardizer", "class_path"], "x.SamplewiseInputStandardizer", "has the input_standardizer 'SamplewiseInput"),
        ("clt_crosslayer_transcoder_topk", "config.yaml", [*CLX, "nonlinearity", "init_args", "k"], "4", "`k` in .* is '4', but must be of type int"),
        ("clt_decode_clt_jumprelu", "cfg.json", ["activation_fn"], "batchtopk", "'batchtopk', by which .* other tokens: convert it to JumpReLU"),
        ("clt_decode_clt_jumprelu", "cfg.json", ["num_layers"], 10**9, "says 1000000000 layers, and .* has the encoders of 3"),
        ("clt_decode_clt_jumprelu", "cfg.json", ["num_layers"], 2, "says 2 layers"),
        ("clt_decode_clt_jumprelu", "cfg.json", ["num_layers"], 4, "says 4 layers"),
        ("clt_decode_clt_jumprelu", "cfg.json", ["decoder_tying"], "all", "`decoder_tying` 'all', which cannot be loaded"),
        ("clt_decode_clt_jumprelu", "cfg.json", ["skip_connection"], True, "skip connections to later layers"),
        ("clt_decode_clt_per_source", "cfg.json", ["enable_feature_offset"], True, "adds another number to a feature"),
        ("clt_decode_clt_jumprelu", "cfg.json", ["normalization_method"], "rms", "`normalization_method` 'rms', which is not known"),
        ("clt_decode_clt_jumprelu", "cfg.json", ["model_name"], None, "give `base_model=`"),
        ("clt_decode_clt_jumprelu", "cfg.json", ["mlp_input_template"], None, "where it reads: give `input_site=`"),
        ("clt_decode_clt_jumprelu", "norm_stats.json", ["1", "inputs", "mean"], [1.0], "does not hold 8 numbers for the inputs of layer 1"),
        ("clt_decode_clt_jumprelu", "norm_stats.json", ["2"], ..., "lacks `2`"),
    ],
)  # fmt: skip
def test_settings(name, file, place, value, words, tmp_path):
    folder = copied(name, tmp_path)
    edit(folder / file, place, value)
    refused(words, folder, name)


def test_statistics_that_are_elsewhere(tmp_path):
    folder = copied("clt_decode_clt_jumprelu", tmp_path)
    (folder / "norm_stats.json").unlink()
    refused("copy norm_stats.json of the training data into its folder", folder, folder.name)


@pytest.mark.parametrize("name", ["llamascopium_jumprelu", "clt_llamascopium_topk"])
@pytest.mark.parametrize("archive", [False, True])
def test_a_version_from_the_future(name, archive, tmp_path):
    folder = copied(name, tmp_path)
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path)
    if archive:
        path.unlink()
        torch.save({"sae": tensors, "version": "3.1.0"}, path.with_suffix(".pt"))
    else:
        save_file(tensors, path, {"version": "3.1.0"})
    refused("was written by llamascopium 3.1.0, and files up to version 2 are known: upgrade", folder, name)


def test_torch_files_of_llamascopium(tmp_path):
    folder = copied("llamascopium_jumprelu", tmp_path)
    path = folder / "sae_weights.safetensors"
    torch.save({"sae": load_file(path), "version": "2.0.0"}, path.with_suffix(".pt"))
    refused("holds 2 dictionaries .*: name one of them", folder, folder.name)
    path.unlink()
    said = {"base_model": "owner/model", "folded": False}
    ours = TranscoderModel.from_pretrained(folder, **said)
    theirs = TranscoderModel.from_pretrained(FIXTURES / folder.name, **said)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


def test_two_formats_in_one_folder(tmp_path):
    folder = copied("clt_circuit_tracer_relu", tmp_path)
    shutil.copytree(FIXTURES / "clt_decode_clt_jumprelu", folder, dirs_exist_ok=True)
    refused(r"holds files of several formats \(circuit-tracer, decode-clt\)", folder, folder.name)


@pytest.mark.parametrize(
    "name", ["clt_llamascopium_topk", "clt_crosslayer_transcoder_topk", "clt_decode_clt_jumprelu"]
)
def test_other_loaders_name_the_right_one(name):
    for kind in (TranscoderModel, TranscoderSet):
        with pytest.raises(TranscoderError, match=r"CrossLayerTranscoder\.from_pretrained"):
            kind.from_pretrained(FIXTURES / name, **said_of(name))


def test_archives_that_unpack_to_more_than_their_size(tmp_path):
    import zipfile

    torch.save({"W_enc": torch.zeros(4, 4)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/.data/more", bytes(10**6))
    with pytest.raises(TranscoderError, match="more than the size of the file, which torch does not write"):
        TranscoderModel.from_pretrained(tmp_path / "a.pt")
