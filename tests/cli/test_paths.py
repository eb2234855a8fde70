"""`hf-transcoders paths`: what it prints and refuses."""

import json

import pytest

from hf_transcoders.cli import main
from hf_transcoders.models import TranscoderSet
from tests.circuits.paths.setups import transcoders
from tests.studies.test_circuit_reuse import TOKENIZER, model_for_tasks


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("paths")
    model = model_for_tasks()
    model.save_pretrained(path / "model")
    TOKENIZER.save_pretrained(path / "model")
    TranscoderSet(list(transcoders(0, 2).values())).save_pretrained(path / "set")
    return path


def paths(folders, *more):
    return main(
        ["paths", PROMPT, "--model", str(folders / "model"), "--transcoders", str(folders / "set"), "--device", "cpu",
         *more]
    )  # fmt: skip


PROMPT = "When Mary and John went to the store, John gave a drink to"
TARGET = ["--target", " Mary"]


def test_paths_are_printed_as_text_and_json(folders, capsys):
    arguments = [*TARGET, "--against", " John", "--paths", "4", "--steps", "2", "--graph"]
    assert paths(folders, *arguments, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [len(level) for level in printed["levels"]] == [4, 4]
    assert printed["graph"]["nodes"][0]["total"] == printed["value"]
    assert paths(folders, *arguments) == 0
    text = capsys.readouterr().out
    for level in printed["levels"]:
        for path in level:
            assert f"{path['contribution']:+.4f}  {path['text']}" in text
    assert "merged" in text and "2 steps" in text


def test_steps_and_paths_can_be_chosen(folders, capsys):
    arguments = ["--only", "kind=head,layer>=1", "--only", "kind=feature", "--through", "kind=feature,layer=2"]
    assert paths(folders, *arguments, "--paths", "30", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    for path in (path for level in printed["levels"] for path in level):
        kinds = [(step["kind"], step["layer"]) for step in path["steps"]]
        assert ("feature", 2) in kinds
        assert all(kind == "feature" or (kind == "head" and layer >= 1) for kind, layer in kinds)


def test_a_feature_is_explained(folders, capsys):
    name = list(TranscoderSet.from_pretrained(folders / "set"))[-1]
    assert paths(folders, "--feature", name, "5", "--position", "3", "--paths", "2", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["target"]["position"] == 3 and printed["target"]["label"].endswith("feature 5")


@pytest.mark.parametrize(
    "more, sentence",
    [
        ([*TARGET, "--feature", "x", "5"], "One thing is explained"),
        (["--against", " John"], "give that too"),
        (["--feature", "x", "five"], "'five' is no number"),
        (["--feature", "nothing", "5"], "no dictionary 'nothing'"),
        (["--position", "3"], "give --target"),
        (["--only", "heads"], "'heads' cannot be read"),
        (["--only", "kind<head"], "cannot be read"),
        (["--only", "layer=top"], "`layer` is '=top'"),
        (["--only", "kind=neuron"], "no kind of step"),
        (["--through", "layer=77"], "No path is like that"),
        (["--paths", "0"], "--paths: 0 is out of range; give at least 1"),
    ],
)
def test_mistakes_end_in_one_sentence(folders, capsys, more, sentence):
    assert paths(folders, *more) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
