"""Dictionaries and sets from strangers: refused in one sentence, at once, and without a look outside their folder."""

import json
import os
import resource
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_transcoders.cli.main import main
from hf_transcoders.errors import TranscoderError
from hf_transcoders.models import TranscoderConfig, TranscoderModel, TranscoderSet

from .reference_dictionary import make_model


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder, change, name="model.safetensors"):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


def refused(load, words):
    with pytest.raises(TranscoderError, match=words) as caught:
        load()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.fixture
def folder(tmp_path):
    make_model("topk", normalization="standardize", skip_connection=True).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


# ---------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("field", ["num_features", "d_in", "d_out"])
@pytest.mark.parametrize("size", [10**9, 10**12, 2**63, 10**30])
def test_sizes_that_the_weights_do_not_have_cost_nothing(field, size, folder, capsys):
    edit(folder / "config.json", **{field: size})
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for load in (TranscoderModel, AutoModel):
        refused(lambda load=load: load.from_pretrained(folder), f"by the config.*{size}|{size}.*by the config")
    assert main(["info", "--transcoders", str(folder)]) == 2
    assert str(size) in capsys.readouterr().err
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    assert time.process_time() - start < 2


def test_every_field_of_the_format_is_required(folder):
    content = json.loads((folder / "config.json").read_text())
    for name in TranscoderConfig.own_fields():
        (folder / "config.json").write_text(json.dumps({key: v for key, v in content.items() if key != name}))
        if name in ("evaluation", "base_model_weights"):  # Later than the format.
            TranscoderModel.from_pretrained(folder)
        else:
            refused(lambda: TranscoderModel.from_pretrained(folder), f"lacks {name}")


@pytest.mark.parametrize("field", ["k", "d_out", "auxk", "decoder_init", "center_encoder"])
def test_null_is_no_default(field, folder):
    edit(folder / "config.json", **{field: None})
    refused(lambda: TranscoderModel.from_pretrained(folder), f"{field} in config.json is null")


@pytest.mark.parametrize("value", [True, "4", 4.0, [4], {"a": 4}, -4, 10**400, "x\x1b[31m"])
@pytest.mark.parametrize("field", TranscoderConfig.own_fields())
def test_values_of_other_types(field, value, folder):
    """Each is refused, or is a value of the field's type and survives a round trip."""
    edit(folder / "config.json", **{field: value})
    try:
        loaded = TranscoderModel.from_pretrained(folder)
    except TranscoderError as error:
        assert "\n" not in str(error) and "\x1b" not in str(error)
        return
    found = getattr(loaded.config, field)
    assert type(found) is type(value) and found == value


@pytest.mark.parametrize(
    "field, value",
    [
        ("l1_coefficient", -1.0),
        ("l0_coefficient", -0.1),
        ("auxk_coefficient", 1e39),
        ("threshold_init", -1),
        ("target_variance", 0),
        ("target_variance", -2.5),
        ("jumprelu_bandwidth", 10**39),
    ],
)
def test_penalties_out_of_range(field, value, folder):
    edit(folder / "config.json", **{field: value})
    refused(lambda: TranscoderModel.from_pretrained(folder), field)
    with pytest.raises(TranscoderError, match=field):
        TranscoderConfig(**{field: value})
    with pytest.raises(TranscoderError, match=field):
        TranscoderConfig(**{field: float("nan")})


@pytest.mark.parametrize("name", ["is_sparse", "to_dict", "from_dict", "__class__", "validate_fields", "name_or_path"])
def test_names_of_methods_and_instructions_are_no_fields(name, folder):
    edit(folder / "config.json", **{name: "x"})
    refused(lambda: TranscoderModel.from_pretrained(folder), f"fields {name}, which no dictionary has")


@pytest.mark.parametrize("value", [3, {"load_in_8bit": True}])
@pytest.mark.parametrize(
    "name", ["quantization_config", "attn_implementation", "transformers_weights", "fusion_config"]
)
def test_instructions_to_transformers_are_refused(name, value, folder):
    edit(folder / "config.json", **{name: value})
    refused(lambda: TranscoderModel.from_pretrained(folder), name)


def test_other_fields_are_left_out(folder):
    edit(folder / "config.json", note="mine", id2label={"0": 3}, return_dict=False)
    config = TranscoderModel.from_pretrained(folder).config
    assert not hasattr(config, "note") and config.return_dict


@pytest.mark.parametrize(
    "text", [b"", b"3", b"[]", b"null", b"\xff{}", b"{" * 5000, b'{"k": ' + b"1" * 5000 + b"}", b'{"k": NaN}']
)
def test_a_configuration_that_is_no_object(text, folder):
    (folder / "config.json").write_bytes(text)
    refused(lambda: TranscoderModel.from_pretrained(folder), "config.json cannot be read .*copy or download it again")
    with pytest.raises(TranscoderError):
        TranscoderConfig.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [0.5, "FLOAT32", "int8", ["a"], "float8_e4m3fn", "load", True])
def test_odd_precisions(dtype, folder):
    edit(folder / "config.json", dtype=dtype)
    refused(lambda: TranscoderModel.from_pretrained(folder), "`dtype` in config.json is .* must be one of float32")


@pytest.mark.parametrize("depth", [60, 400, 900])
def test_what_is_nested_deeply_does_not_load_to_crash_later(depth, folder):
    content = json.loads((folder / "config.json").read_text())
    deep = "[" * depth + "]" * depth
    text = json.dumps({**content, "training_summary": {"dtype": [None]}}).replace("[null]", deep)
    (folder / "config.json").write_text(text)
    refused(lambda: TranscoderModel.from_pretrained(folder), "nested too deeply")


def test_a_summary_with_any_keys_can_be_saved_again(folder, tmp_path):
    summary = {"dtype": [None], "to_dict": 3, "torch_dtype": {"a": 1}}
    edit(folder / "config.json", training_summary=summary)
    TranscoderModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert TranscoderModel.from_pretrained(tmp_path / "again").config.training_summary == summary


# ---------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("name", ["W_enc", "b_dec", "input_scale"])
def test_only_floating_point_weights(name, dtype, folder):
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(tensors[name].shape).to(dtype)}))
    refused(lambda: TranscoderModel.from_pretrained(folder), f"have {name} in .* which is not a type of dictionaries")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_floating_point_type_loads(dtype, folder):
    rewrite(folder, lambda tensors: tensors.update({name: value.to(dtype) for name, value in tensors.items()}))
    assert TranscoderModel.from_pretrained(folder).W_enc.dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "input_mean", "output_scale"])
def test_weights_that_are_no_numbers(name, value, folder):
    def change(tensors):
        tensors[name].view(-1)[-1] = value

    rewrite(folder, change)
    for load in (TranscoderModel, AutoModel):
        refused(lambda load=load: load.from_pretrained(folder), f"{name} in .* has NaN or infinite numbers")


@pytest.mark.parametrize("value", [0.0, -1.0])
@pytest.mark.parametrize("name", ["input_scale", "output_scale"])
def test_scales_that_cannot_be_divided_by(name, value, folder):
    def change(tensors):
        tensors[name][0] = value

    rewrite(folder, change)
    refused(lambda: TranscoderModel.from_pretrained(folder), f"{name} in .* goes down to {value:g}")


def test_numbers_that_do_not_fit_another_precision(folder):
    rewrite(folder, lambda tensors: tensors["W_dec"].fill_(1e30))
    TranscoderModel.from_pretrained(folder)
    refused(
        lambda: TranscoderModel.from_pretrained(folder, dtype=torch.float16), "W_dec in .* as float16 has NaN or inf"
    )
    rewrite(folder, lambda tensors: tensors.update(input_scale=torch.full((6,), 1e-300, dtype=torch.float64)))
    refused(lambda: TranscoderModel.from_pretrained(folder), "input_scale in .* as float32 goes down to 0")


def test_a_dictionary_in_memory_that_is_no_number_is_announced_when_it_is_saved(tmp_path, caplog, monkeypatch):
    model = make_model("relu")
    with torch.no_grad():
        model.b_enc[3] = torch.nan
    said = []
    monkeypatch.setattr("hf_transcoders.models.saved_model._logger.warning", said.append)
    model.save_pretrained(tmp_path)
    assert len(said) == 1 and said[0].startswith("b_enc of the saved dictionary")


def test_an_adapter_in_the_folder_is_refused_before_peft_starts(folder, monkeypatch):
    monkeypatch.setattr("transformers.modeling_utils.maybe_load_adapters", lambda *args, **kwargs: pytest.fail())
    for content in ("[]", json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/somewhere"})):
        (folder / "adapter_config.json").write_text(content)
        refused(lambda: TranscoderModel.from_pretrained(folder), "adapter_config.json")


# ---------------------------------------------------------------------------- shards


@pytest.fixture
def shards(tmp_path):
    make_model("gated").save_pretrained(tmp_path / "m", max_shard_size=400)
    make_model("gated", seed=7).save_pretrained(tmp_path / "other")
    return tmp_path / "m"


@pytest.mark.parametrize(
    "name, words",
    [
        ("../other/model.safetensors", "without '..'"),
        ("/etc/passwd", "without '..'"),
        ("", "without '..'"),
        (["model.safetensors"], "names a list"),
        (None, "names a NoneType"),
        ("inner/model.safetensors", "must be a safetensors file in the same folder"),
        ("config.json", "must be a safetensors file in the same folder"),
        ("model-00009-of-00009.safetensors", "lacks a shard"),
    ],
)
def test_shards_are_files_beside_their_index(name, words, shards):
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["W_dec"] = name
    index.write_text(json.dumps(content))
    refused(lambda: TranscoderModel.from_pretrained(shards), words)


@pytest.mark.parametrize(
    "content", ["[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a"}}']
)
def test_a_damaged_index(content, shards):
    (shards / "model.safetensors.index.json").write_text(content)
    refused(lambda: TranscoderModel.from_pretrained(shards), "index.json cannot be read .*copy or download it again")


def test_an_index_that_does_not_say_what_the_shards_hold(shards):
    index = shards / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    says = "do not hold what model.safetensors.index.json says"
    for change, words in (
        (lambda names: names.pop("b_enc"), "lack b_enc"),
        (lambda names: names.update(W_skip=names["W_enc"]), says),
        (lambda names: names.update(b_enc=names["W_enc"]), says),
    ):
        changed = json.loads(json.dumps(content))
        change(changed["weight_map"])
        index.write_text(json.dumps(changed))
        refused(lambda: TranscoderModel.from_pretrained(shards), words)


# ---------------------------------------------------------------------------- sets


@pytest.fixture
def set_folder(tmp_path):
    TranscoderSet({"a": make_model("topk"), "b": make_model("relu")}).save_pretrained(tmp_path / "set")
    make_model("topk", seed=3).save_pretrained(tmp_path / "victim")
    return tmp_path / "set"


@pytest.mark.parametrize(
    "subfolder",
    ["../victim", "a/../../victim", "/etc", "", ".", "a/./b", "C:\\x", "..\\victim", 3, None, ["a"], "a\n"],
)
def test_dictionaries_lie_inside_their_set(subfolder, set_folder):
    for place in (subfolder, str(set_folder.parent / "victim")):
        edit(set_folder / "transcoder_set.json", dictionaries={"a": {"subfolder": place}})
        refused(lambda: TranscoderSet.from_pretrained(set_folder), "transcoder_set.json names")


def test_a_link_out_of_a_set_is_not_followed(set_folder):
    (set_folder / "link").symlink_to("../victim")
    edit(set_folder / "transcoder_set.json", dictionaries={"a": {"subfolder": "link"}})
    refused(lambda: TranscoderSet.from_pretrained(set_folder), "'link' in .* leads out of that folder")
    os.remove(set_folder / "link")
    (set_folder / "link").symlink_to("a")
    assert list(TranscoderSet.from_pretrained(set_folder)) == ["a"]


def test_two_dictionaries_in_one_folder(set_folder):
    edit(set_folder / "transcoder_set.json", dictionaries={"a": {"subfolder": "a"}, "b": {"subfolder": "a"}})
    refused(lambda: TranscoderSet.from_pretrained(set_folder), "several dictionaries in one folder")
