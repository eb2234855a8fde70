import json
import os
import shutil

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, modeling_utils

from hf_transcoders.errors import TranscoderError
from hf_transcoders.files import atomic_directory, atomic_file
from hf_transcoders.models import TranscoderModel, TranscoderSet

from .reference_dictionary import ACTIVATIONS, VARIANTS, make_batch, make_model


def assert_equal_models(ours, theirs):
    assert ours.config.to_diff_dict().keys() - {"_name_or_path"} == theirs.config.to_diff_dict().keys() - {
        "_name_or_path"
    }
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("variant", ["plain", "all", "tied_2023", "no_decoder_bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_round_trip_bit_for_bit(activation, variant, tmp_path):
    model = make_model(activation, **VARIANTS[variant])
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size=400)
    model.save_pretrained(tmp_path / "repo" / "inner")
    shards = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1 and not (tmp_path / "shards" / "model.safetensors").exists()
    inputs, targets = make_batch(model)
    for loaded in (
        TranscoderModel.from_pretrained(tmp_path / "whole"),
        TranscoderModel.from_pretrained(str(tmp_path / "shards")),
        TranscoderModel.from_pretrained(tmp_path / "repo", subfolder="inner"),
        AutoModel.from_pretrained(tmp_path / "whole"),
        AutoModel.from_pretrained(tmp_path / "repo", subfolder="inner"),
    ):
        assert type(loaded) is TranscoderModel and not loaded.training
        assert_equal_models(loaded, model)
        for training in (True, False):
            ours, theirs = loaded.train(training)(inputs, targets), model.train(training)(inputs, targets)
            for name in ("loss", "reconstruction", "features"):
                assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("max_shard_size", ["1GB", 400])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_few_rows_are_the_same_bits_wherever_tensors_lie_in_the_file(activation, max_shard_size, tmp_path):
    """Products of one row round as their operands lie in memory, and in a file they lie anywhere."""
    for number, variant in enumerate(("plain", "skip", "standardize", "all")):
        model = make_model(activation, **VARIANTS[variant]).eval()
        model.save_pretrained(tmp_path / str(number), max_shard_size=max_shard_size)
        loaded = TranscoderModel.from_pretrained(tmp_path / str(number))
        places = {tensor.data_ptr() % 64 for tensor in (*loaded.parameters(), *loaded.buffers())}
        assert places == {tensor.data_ptr() % 64 for tensor in model.parameters()} == {0}
        for rows in (1, 2, 3, 7):
            inputs, targets = make_batch(model, rows=rows)
            ours, theirs = loaded(inputs, targets), model(inputs, targets)
            assert torch.equal(ours.features, theirs.features), (variant, rows)
            assert torch.equal(ours.reconstruction, theirs.reconstruction), (variant, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_thresholds_and_statistics_stay_in_full_precision(activation, dtype, tmp_path):
    model = make_model(activation, normalization="standardize")
    model.save_pretrained(tmp_path / "full")
    loaded = TranscoderModel.from_pretrained(tmp_path / "full", dtype=dtype)
    loaded.save_pretrained(tmp_path / "low")
    for low in (loaded, TranscoderModel.from_pretrained(tmp_path / "low")):
        state = low.state_dict()
        kept = {"threshold", "input_mean", "input_scale", "output_mean", "output_scale"}
        assert {name for name, tensor in state.items() if tensor.dtype == torch.float32} == kept
        for name, tensor in model.state_dict().items():
            assert torch.equal(state[name], tensor if name in kept else tensor.to(dtype)), name


def test_saving_again_replaces_weights_of_another_shape(tmp_path):
    first, second = make_model("relu", seed=0), make_model("relu", seed=1)
    (tmp_path / "README.md").write_text("mine")
    for model, kwargs in (
        (first, {}),
        (second, {"max_shard_size": 400}),
        (first, {"max_shard_size": 900}),
        (second, {}),
    ):
        model.save_pretrained(tmp_path, **kwargs)
        assert_equal_models(TranscoderModel.from_pretrained(tmp_path), model)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_only_the_main_process_writes(tmp_path):
    make_model("relu").save_pretrained(tmp_path / "out", is_main_process=False)
    assert os.listdir(tmp_path) == []


def test_loading_info_is_returned_when_asked_for(tmp_path):
    make_model("relu").save_pretrained(tmp_path)
    model, info = TranscoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is TranscoderModel and not info["missing_keys"]


# ---------------------------------------------------------------------------- damaged files


def test_weights_cut_anywhere_are_refused(tmp_path):
    make_model("gated").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for length in [0, 4, 8, 100, len(content) // 4, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(TranscoderError, match="cannot be read.*damaged or cut short.*copy or download it again"):
            TranscoderModel.from_pretrained(tmp_path)
    path.write_bytes(b"\xff" * len(content))
    with pytest.raises(TranscoderError, match="damaged"):
        TranscoderModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("W_dec"), "lack W_dec.*do not belong to its config.json"),
        (lambda t: (t.pop("threshold"), t.pop("b_enc")), "lack b_enc, threshold"),
        (
            lambda t: t.update(W_enc=t["W_enc"][:7].clone()),
            r"W_enc is \(7, 6\) in the file and \(20, 6\) by the config",
        ),
        (lambda t: t.update(W_skip=torch.ones(5, 6)), "hold W_skip, which its config.json does not have"),
    ],
)
def test_weights_that_do_not_belong_to_their_config_are_refused(change, words, tmp_path):
    make_model("jumprelu").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (TranscoderModel, AutoModel):
        with pytest.raises(TranscoderError, match=words):
            load.from_pretrained(tmp_path)


def test_pickled_weights_are_not_loaded(tmp_path):
    model = make_model("relu")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    torch.save({**model.state_dict(), "bomb": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="weights_only|Weights only|safetensors"):
        TranscoderModel.from_pretrained(tmp_path)
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------------------- saves that fail half-way


def test_a_save_that_fails_leaves_the_old_folder_and_no_other(tmp_path, monkeypatch):
    old, new = make_model("relu", seed=0), make_model("relu", seed=1)
    target = tmp_path / "out"
    old.save_pretrained(target)
    written = []
    real = safetensors.torch.save_file

    def fail_at_the_second(tensors, filename, *args, **kwargs):
        written.append(filename)
        if len(written) == 2:
            with open(filename, "wb") as file:
                file.write(b"half of")
            raise OSError(28, "No space left on device")
        return real(tensors, filename, *args, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", fail_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(target, max_shard_size=400)
    assert len(written) == 2
    assert os.listdir(tmp_path) == ["out"] and sorted(os.listdir(target)) == ["config.json", "model.safetensors"]
    assert_equal_models(TranscoderModel.from_pretrained(target), old)

    written.clear()
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(tmp_path / "fresh", max_shard_size=400)
    assert os.listdir(tmp_path) == ["out"]


def test_a_set_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    old = TranscoderSet({"a": make_model("relu", seed=0), "b": make_model("topk", seed=1)})
    new = TranscoderSet({"a": make_model("relu", seed=2), "b": make_model("topk", seed=3)})
    old.save_pretrained(tmp_path / "set")
    real = safetensors.torch.save_file

    def fail_at_b(tensors, filename, *args, **kwargs):
        if "b" in str(filename).split(os.sep)[-2]:
            raise OSError(28, "No space left on device")
        return real(tensors, filename, *args, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", fail_at_b)
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(tmp_path / "set")
    assert os.listdir(tmp_path) == ["set"]
    assert sorted(os.listdir(tmp_path / "set")) == ["a", "b", "transcoder_set.json"]
    for name, model in TranscoderSet.from_pretrained(tmp_path / "set").items():
        assert_equal_models(model, old[name])


def test_atomic_directory(tmp_path):
    target = tmp_path / "deep" / "target"
    with pytest.raises(RuntimeError), atomic_directory(target) as partial:
        (partial / "file").write_text("new")
        raise RuntimeError
    assert os.listdir(tmp_path / "deep") == []
    with atomic_directory(target) as partial:
        assert partial.parent == target.parent and not target.exists()
        (partial / "w1").write_text("one")
        (partial / "inner").mkdir()
        (partial / "inner" / "w1").write_text("one")
    (target / "mine").write_text("kept")
    (target / "other").mkdir()
    (target / "other" / "w1").write_text("kept")
    with atomic_directory(target, replacing="w*") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "w2").write_text("two")
        (partial / "w3").write_text("three")
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert found == {"inner/w2": "two", "w3": "three", "mine": "kept", "other/w1": "kept"}
    assert os.listdir(tmp_path / "deep") == ["target"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask


def test_atomic_file(tmp_path):
    path = tmp_path / "deep" / "file"
    with atomic_file(path) as partial:
        partial.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]


def test_a_damaged_config_is_refused(tmp_path):
    make_model("relu").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = path.read_text()
    path.write_text(content[: len(content) // 2])
    with pytest.raises(TranscoderError, match="config.json cannot be read.*not valid JSON.*copy or download it again"):
        TranscoderModel.from_pretrained(tmp_path)
    path.write_text(json.dumps({**json.loads(content), "num_features": 21}))
    with pytest.raises(TranscoderError, match=r"W_dec is \(20, 5\) in the file and \(21, 5\) by the config"):
        TranscoderModel.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError):
        TranscoderModel.from_pretrained(tmp_path)


def test_saved_weights_are_as_readable_as_other_files(tmp_path):
    make_model("topk").save_pretrained(tmp_path / "model")
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode}
