"""One pass for all features of several dictionaries, which can be interrupted, and its files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_transcoders.errors import TranscoderError
from hf_transcoders.features import ExampleSizes, collect, collect_examples, load_examples, save_examples
from hf_transcoders.features.example_files import read_example_facts
from hf_transcoders.features.explain import rule_explainers
from hf_transcoders.lm import capture
from tests.same_model import WordsOfIds

from ..evaluation.conftest import VOCABULARY, random_dictionary


SIZES = ExampleSizes(
    window=5, top=4, random_tokens=6, random_windows=4, interval=2, silent=3, neighbors=2, same_token=2
)


class Words(WordsOfIds):
    eos_token_id = 2

    def get_vocab(self):
        return {f"w{i}": i for i in range(VOCABULARY)}


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCABULARY, (24, 12), generator=generator)
    return [{"input_ids": row.tolist()} for row in ids]


@pytest.fixture
def dictionaries(base):
    return {"a": random_dictionary(base, 0, "relu"), "b": random_dictionary(base, 2, "topk", k=4)}


def collected(base, dictionaries, rows, **options):
    options = {"sizes": SIZES, "batch_size": 5, "progress": False, **options}
    return collect_examples(base, dictionaries, rows, Words(), **options)


def tensors_of(examples):
    found = {name: getattr(examples, name) for name in ("bins", "exponents", "squares", "position_counts",
                                                        "position_sums", "correlated", "correlations")}  # fmt: skip
    for name, group in examples.groups.items():
        found |= {
            f"{name}.{part}": getattr(group, part) for part in ("scores", "values", "rows", "positions", "windows")
        }
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        one, other = tensors_of(found[name]), tensors_of(expected[name])
        assert one.keys() == other.keys()
        for part, tensor in one.items():
            assert torch.equal(tensor, other[part]), (name, part)
        assert torch.equal(found[name].text.tokens, expected[name].text.tokens)


@torch.no_grad()
def test_activations_are_those_of_the_model(base, dictionaries, rows):
    found = collected(base, dictionaries, rows)
    ids = torch.tensor([row["input_ids"] for row in rows])
    with capture(base, ["layers.0.mlp.in", "layers.2.mlp.in"]) as inputs:
        base(ids)
        dense = {"a": dictionaries["a"].encode(inputs["layers.0.mlp.in"])}
        dense["b"] = dictionaries["b"].encode(inputs["layers.2.mlp.in"])
    for name, activations in dense.items():
        activations[:, 0] = 0
        assert torch.equal(found[name].fired, (activations > 0).sum((0, 1)))
        for feature in range(0, 40, 7):
            for window in found[name].windows(feature, "top"):
                real = activations[window.row, window.start : window.start + 5, feature]
                torch.testing.assert_close(torch.tensor(window.activations), real, rtol=2e-3, atol=1e-5)
    alone = collected(base, {"b": dictionaries["b"]}, rows)
    assert_same(alone, {"b": found["b"]})


def test_files_hold_what_was_found(base, dictionaries, rows, tmp_path):
    found = collected(base, dictionaries, rows, output_dir=tmp_path / "out")
    names = {
        "feature_examples.json",
        "example_text.safetensors",
        "examples-000.safetensors",
        "examples-001.safetensors",
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert_same(load_examples(tmp_path / "out"), found)
    read = load_examples(tmp_path / "out", ["b"])
    assert list(read) == ["b"] and read["b"].windows(3, "top") == found["b"].windows(3, "top")
    assert read["b"].intervals(3) == found["b"].intervals(3)
    assert read["b"].num_tokens == found["b"].num_tokens and read["b"].sizes == SIZES
    assert read_example_facts(tmp_path / "out")["dictionaries"].keys() == {"a", "b"}
    with pytest.raises(TranscoderError, match="no examples of 'c': it has a, b"):
        load_examples(tmp_path / "out", ["c"])
    with pytest.raises(TranscoderError, match="has no examples of features"):
        load_examples(tmp_path)
    with pytest.raises(TranscoderError, match="no examples to save"):
        save_examples({}, tmp_path / "none")
    with pytest.raises(TranscoderError, match="Feature 40 does not exist"):
        read["b"].windows(40, "top")
    with pytest.raises(TranscoderError, match="of the kind 'best': choose from top, random_tokens"):
        read["b"].windows(4, "best")


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_pass_goes_on_with_the_same_result(base, dictionaries, rows, tmp_path, monkeypatch, after):
    expected = collected(base, dictionaries, rows)
    inputs, calls = collect.dictionary_inputs, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) > after:
            raise Interrupted
        return inputs(*args)

    options = {"output_dir": tmp_path, "save_seconds": 0}
    monkeypatch.setattr(collect, "dictionary_inputs", interrupted)
    with pytest.raises(Interrupted):
        collected(base, dictionaries, rows, **options)
    state = tmp_path / "feature_examples.partial.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == [state.name]
    # With other settings, another dictionary or another text it is refused, and the saved state stays.
    for change, what in (
        ({"seed": 1}, "settings.seed 0 and this run has 1"),
        ({"batch_size": 4}, "settings.batch_size"),
    ):
        with pytest.raises(TranscoderError, match=what):
            collected(base, dictionaries, rows, **options, **change)
    with pytest.raises(TranscoderError, match="other text"):
        collected(base, dictionaries, rows[:-1], **options)
    other = {**dictionaries, "a": random_dictionary(base, 0, "relu", seed=5)}
    with pytest.raises(TranscoderError, match=r"other dictionaries\.a"):
        collected(base, other, rows, **options)
    calls.clear()
    monkeypatch.setattr(collect, "dictionary_inputs", lambda *args: calls.append(1) or inputs(*args))
    assert_same(collected(base, dictionaries, rows, **options), expected)
    assert len(calls) == -(-len(rows) // 5) - after
    assert not state.exists()
    assert_same(load_examples(tmp_path), expected)


def test_a_damaged_state_is_refused(base, dictionaries, rows, tmp_path):
    path = tmp_path / "feature_examples.partial.safetensors"
    path.write_bytes(b"not tensors")
    with pytest.raises(TranscoderError, match="is damaged, so that the pass cannot go on: remove the file"):
        collected(base, dictionaries, rows, output_dir=tmp_path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(TranscoderError, match="is damaged"):
        collected(base, dictionaries, rows, output_dir=tmp_path)


def _drop(tensors):
    del tensors["top.values"]


def _shape(tensors):
    tensors["bins"] = tensors["bins"][:-1].contiguous()


def _type(tensors):
    tensors["top.rows"] = tensors["top.rows"].long()


def _place(tensors):
    tensors["top.rows"][0, 0] = 1000


def _position(tensors):
    tensors["silent.positions"][0, 0] = 12


def _nan(tensors):
    tensors["top.values"][0, 0] = float("nan")


def _feature(tensors):
    tensors["correlated"][0, 0] = 40


def _exponent(tensors):
    tensors["exponents"][:] = 2**19


def _negative(tensors):
    tensors["bins"][0, 0] = -1


@pytest.mark.parametrize(
    "damage, message",
    [
        (_drop, "'top.values' is missing"),
        (_shape, "'bins' is of another shape or type"),
        (_type, "'top.rows' is of another shape or type"),
        (_place, "'top' has places outside of the text"),
        (_position, "'silent' has places outside of the text"),
        (_nan, "'top.values' is not of finite numbers"),
        (_feature, "'correlated' has features that do not exist"),
        (_exponent, "'exponents' is out of its range"),
        (_negative, "'bins' has numbers below 0"),
    ],
)
def test_damaged_tensors_are_refused(base, dictionaries, rows, tmp_path, damage, message):
    collected(base, {"a": dictionaries["a"]}, rows, output_dir=tmp_path)
    path = tmp_path / "examples-000.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(TranscoderError, match=message):
        load_examples(tmp_path)


def test_damaged_files_are_refused(base, dictionaries, rows, tmp_path):
    collected(base, {"a": dictionaries["a"]}, rows, output_dir=tmp_path / "good")

    def damaged(name):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        return tmp_path / "bad" / name

    path = damaged("examples-000.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(TranscoderError, match="is damaged or of another kind"):
        load_examples(tmp_path / "bad")
    damaged("examples-000.safetensors").unlink()
    with pytest.raises(TranscoderError, match="is damaged or of another kind"):
        load_examples(tmp_path / "bad")
    for change, message in (
        ({"format": 2}, "has the format 2, and this version reads 1"),
        ({"num_tokens": "many"}, "must be a whole number"),
        ({"more": 1}, "has an entry 'more'"),
        ({"dictionaries": {"a": {"file": "../x", "num_features": 40, "sizes": {}}}}, "is not a file of examples"),
    ):
        path = damaged("feature_examples.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(TranscoderError, match=message):
            load_examples(tmp_path / "bad")
    path = damaged("example_text.safetensors")
    tensors = load_file(path)
    tensors["offsets"][1] = 10**6
    save_file(tensors, path)
    with pytest.raises(TranscoderError, match="its rows do not fit its tokens"):
        load_examples(tmp_path / "bad")


def test_bad_arguments(base, dictionaries, rows):
    with pytest.raises(TranscoderError, match="There are no dictionaries"):
        collected(base, {}, rows)
    with pytest.raises(TranscoderError, match="`batch_size` is 0"):
        collected(base, dictionaries, rows, batch_size=0)
    with pytest.raises(TranscoderError, match="`window` is 0"):
        collected(base, dictionaries, rows, sizes=ExampleSizes(window=0))
    with pytest.raises(TranscoderError, match="is empty"):
        collected(base, dictionaries, [])


def test_the_tokenizer_of_another_model(base, dictionaries, rows):
    base.config.name_or_path = "HuggingFaceTB/SmolLM2-135M"
    words = Words()
    words.name_or_path = "openai-community/gpt2"
    message = "The tokenizer is that of openai-community/gpt2, and the language model is HuggingFaceTB/SmolLM2-135M"
    with pytest.raises(TranscoderError, match=message):
        collect_examples(base, dictionaries, rows, words, progress=False)
    with pytest.raises(TranscoderError, match=message):
        rule_explainers(base, dictionaries["a"], words, [1])
