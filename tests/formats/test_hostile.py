"""Files of other libraries that are damaged, made to deceive or not complete: one sentence, and no code of theirs runs."""

import json
import os
import resource
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_transcoders.errors import TranscoderError
from hf_transcoders.models import TranscoderModel, TranscoderSet

from .peers import FIXTURES
from .test_writing import make
from .writers import D, N, pickled, write_gemma_scope_1, write_gpt2_transcoder, write_linear_pair, write_openai


SITES = {"input_site": "layers.1.resid_post", "base_model": "openai-community/gpt2"}


def refused(words, folder, load=TranscoderModel, **said):
    with pytest.raises(TranscoderError, match=words) as caught:
        load.from_pretrained(folder, **said)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def copied(name, tmp_path):
    return shutil.copytree(FIXTURES / name, tmp_path / name)


def edit(path, **changes):
    settings = json.loads(path.read_text())
    for name, value in changes.items():
        place = settings
        *outer, last = name.split("__")
        for key in outer:
            place = place[key]
        place[last] = value
    path.write_text(json.dumps(settings))


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# (fixture, its weights)
WITH_SAFETENSORS = [
    ("saelens_jumprelu", "sae_weights.safetensors"),
    ("sparsify_sae/layers.1", "sae.safetensors"),
    ("circuit_tracer_relu", "layer_1.safetensors"),
]


@pytest.fixture(params=WITH_SAFETENSORS, ids=lambda case: case[0])
def weights(request, tmp_path):
    name, file = request.param
    return copied(name, tmp_path) / file


def test_truncated(weights):
    weights.write_bytes(weights.read_bytes()[:-10])
    refused("cannot be read .*damaged, cut short", weights)


def test_missing_tensor(weights):
    edit_tensors(weights, lambda tensors: tensors.pop("b_dec"))
    refused("lacks the tensor b_dec", weights)


def test_unknown_tensor(weights):
    edit_tensors(weights, lambda tensors: tensors.update(W_gate=torch.zeros(3)))
    refused("holds W_gate, which its format does not know", weights)


def test_wrong_shape(weights):
    edit_tensors(weights, lambda tensors: tensors.update(b_dec=torch.zeros(3)))
    refused(r"b_dec in .* has shape \(3,\) where the other tensors ask for \(8,\)", weights)


def test_not_a_matrix(weights):
    edit_tensors(weights, lambda tensors: tensors.update(W_dec=torch.zeros(3)))
    refused(r"has shape \(3,\)", weights)


def test_numbers_that_are_none(weights):
    edit_tensors(weights, lambda tensors: tensors["W_dec"].fill_(torch.nan))
    refused("has NaN or infinite numbers", weights, base_model="EleutherAI/pythia-14m")


def test_whole_numbers_in_place_of_weights(weights):
    edit_tensors(weights, lambda tensors: tensors.update(W_dec=tensors["W_dec"].long()))
    refused("lacks the tensor W_dec", weights)


@pytest.mark.parametrize(
    ("name", "file", "changes", "words"),
    [
        (
            "saelens_standard",
            "cfg.json",
            {"architecture": "temporal"},
            "has the architecture 'temporal', which cannot be loaded",
        ),
        (
            "saelens_standard",
            "cfg.json",
            {"metadata__sae_lens_version": "7.1.0"},
            "written by SAELens 7.1.0, .* upgrade",
        ),
        (
            "saelens_standard",
            "cfg.json",
            {"normalize_activations": "covariance_whitening"},
            "`normalize_activations` 'covariance_whitening', which is not known",
        ),
        (
            "saelens_transcoder",
            "cfg.json",
            {"normalize_activations": "layer_norm"},
            "'layer_norm', which for a transcoder scales each token of the input and not the output",
        ),
        (
            "saelens_standard",
            "cfg.json",
            {"normalize_activations": "expected_average_only_in"},
            "give `scaling_factor=`",
        ),
        ("saelens_standard", "cfg.json", {"metadata__model_name": None}, "give `base_model=` with its Hub id"),
        ("saelens_standard", "cfg.json", {"metadata__model_name": "my-model"}, "'my-model' is not an id on the Hub"),
        ("saelens_standard", "cfg.json", {"metadata__hook_name": "blocks.1.attn.hook_z"}, "give `input_site=`"),
        ("saelens_transcoder", "cfg.json", {"metadata__hook_name_out": None}, "give `output_site=`"),
        ("saelens_topk", "cfg.json", {"k": "4"}, "`k` in .* is '4', but must be of type int"),
        ("saelens_topk", "cfg.json", {"k": None}, "lacks `k`"),
        (
            "sparsify_sae/layers.1",
            "cfg.json",
            {"activation": "groupmax"},
            "'groupmax', which a TranscoderConfig cannot express",
        ),
        (
            "dictionary_learning_AutoEncoder",
            "config.json",
            {"trainer__dict_class": "CrossCoder"},
            "has the class 'CrossCoder'",
        ),
        ("dictionary_learning_AutoEncoder", "config.json", {"trainer__submodule_name": "x"}, "give `input_site=`"),
    ],
)
def test_settings(name, file, changes, words, tmp_path):
    folder = copied(name, tmp_path)
    edit(folder / file, **changes)
    refused(words, folder)


def test_centered_models_are_asked_for(tmp_path):
    folder = copied("saelens_standard", tmp_path)
    edit(folder / "cfg.json", metadata__sae_lens_version="5.0.0")
    settings = json.loads((folder / "cfg.json").read_text())
    settings["metadata"].pop("sae_lens_version")
    (folder / "cfg.json").write_text(json.dumps(settings))
    refused("whether its language model had folded norms .*: give `folded=True` or `folded=False`", folder)
    assert TranscoderModel.from_pretrained(folder, folded=False).config.d_in == 8
    refused("give `base_model=` the loaded model", folder, folded=True)


def test_two_formats_in_one_folder(tmp_path):
    folder = copied("saelens_standard", tmp_path)
    shutil.copytree(FIXTURES / "dictionary_learning_AutoEncoder", folder, dirs_exist_ok=True)
    refused(r"holds files of several formats \(SAELens, dictionary_learning\)", folder)
    shutil.rmtree(folder)
    make().save_pretrained(folder)
    shutil.copytree(FIXTURES / "saelens_standard", folder, dirs_exist_ok=True)
    refused(r"holds files of several formats \(SAELens, hf_transcoders\)", folder)


def test_what_only_other_libraries_leave_out_is_not_ignored(tmp_path):
    make().save_pretrained(tmp_path)
    refused("`folded=` gives information that the files of another library leave out", tmp_path, folded=True)
    refused("`base_model=` gives information", tmp_path, base_model="gpt2")
    refused("`variant=` is a part", FIXTURES / "saelens_standard", variant="fp16")


@pytest.mark.parametrize("kind", ["cross_layer_transcoder", "other"])
def test_other_kinds_of_circuit_tracer_sets(kind, tmp_path):
    folder = copied("circuit_tracer_relu", tmp_path)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("transcoder_set", kind))
    words = "cross-layer transcoder" if kind.startswith("cross") else "has the kind 'other'"
    refused(words, folder, TranscoderSet)


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/passwd", "hf://owner/name/../../x", "hf://owner/name", 7]
)
def test_sets_name_files_in_their_own_folder_only(place, tmp_path):
    folder = copied("circuit_tracer_relu", tmp_path)
    shutil.copy(folder / "layer_0.safetensors", tmp_path / "secret.safetensors")
    with open(folder / "config.yaml", "a") as file:
        file.write(f"transcoders: [{json.dumps(place)}]\n")
    refused("names", folder, TranscoderSet)


def test_yaml_makes_no_objects(tmp_path):
    folder = copied("circuit_tracer_relu", tmp_path)
    with open(folder / "config.yaml", "a") as file:
        file.write("scan2: !!python/object/apply:os.system ['touch /tmp/owned']\n")
    refused("is not valid YAML", folder, TranscoderSet)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("name", ["sae.pt", "sae.pkl", "ae.pt"])
@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_torch_files_run_no_code(name, archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if archive:
        torch.save({"encoder.weight": torch.zeros(N, D), "attack": Attack()}, name)
    else:
        (tmp_path / name).write_bytes(pickled({"attack": Attack()}))
    if name == "ae.pt":
        shutil.copy(FIXTURES / "dictionary_learning_AutoEncoder" / "config.json", tmp_path)
    refused("cannot be read .*holds more than numbers", tmp_path, **SITES)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("write", [write_openai, write_linear_pair, write_gpt2_transcoder])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_torch_files(write, share, tmp_path):
    path = tmp_path / "sae.pt"
    write(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused("cannot be read .*damaged, cut short", path, **SITES)


def test_gzip_bombs_are_not_unpacked(tmp_path):
    import gzip

    path = tmp_path / "sae.pkl.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(200):
            file.write(bytes(10**6))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused("unpacks to more than 64 times its size", path, **SITES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_numpy_files_hold_numbers_of_the_size_they_say(tmp_path):
    path = tmp_path / "params.npz"
    write_gemma_scope_1(path)
    path.write_bytes(path.read_bytes()[:-30])
    refused("cannot be read", path, **SITES)
    np.savez(path, W_enc=np.array([{"a": 1}], dtype=object))
    refused("of type object, which no weight has", path, **SITES)
    content = b"\x93NUMPY\x01\x00" + b"\x76\x00"
    content += b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }".ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", content + bytes(100))
    refused("has another size than its header says", path, **SITES)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("W_enc.npy", b"no numbers")
    refused("cannot be read", path, **SITES)


def test_compressed_numpy_files_by_column(tmp_path):
    path = tmp_path / "params.npz"
    compute = write_gemma_scope_1(path)
    with np.load(path) as archive:
        arrays = {name: np.asfortranarray(values) for name, values in archive.items()}
    np.savez_compressed(path, **arrays)
    model, inputs = TranscoderModel.from_pretrained(path, **SITES), torch.randn(5, D)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs).reconstruction, compute(inputs)[1].float(), atol=1e-5, rtol=1e-5)
