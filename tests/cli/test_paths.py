"""`hf-transcoders paths`: what it prints and refuses."""

import json

import pytest

from hf_transcoders.cli import main
from hf_transcoders.models import TranscoderSet


def paths(folder, *more):
    return main(
        ["paths", PROMPT, "--model", str(folder / "model"), "--transcoders", str(folder / "set"), "--device", "cpu",
         *more]
    )  # fmt: skip


PROMPT = "When Mary and John went to the store, John gave a drink to"
TARGET = ["--target", " Mary"]


def test_paths_are_printed_as_text_and_json(folder, capsys):
    arguments = ["--target-difference", " Mary", " John", "--paths", "4", "--steps", "2", "--graph"]
    assert paths(folder, *arguments, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert [len(level) for level in printed["levels"]] == [4, 4]
    assert printed["graph"]["nodes"][0]["total"] == printed["value"]
    assert paths(folder, *arguments) == 0
    text = capsys.readouterr().out
    for level in printed["levels"]:
        for path in level:
            assert f"{path['contribution']:+.4f}  {path['text']}" in text
    assert "merged" in text and "2 steps" in text


def test_steps_and_paths_can_be_chosen(folder, capsys):
    arguments = ["--only", "kind=head,layer>=1", "--only", "kind=feature", "--through", "kind=feature,layer=2"]
    assert paths(folder, *arguments, "--paths", "30", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    for path in (path for level in printed["levels"] for path in level):
        kinds = [(step["kind"], step["layer"]) for step in path["steps"]]
        assert ("feature", 2) in kinds
        assert all(kind == "feature" or (kind == "head" and layer >= 1) for kind, layer in kinds)


def test_a_feature_is_explained(folder, capsys):
    name = list(TranscoderSet.from_pretrained(folder / "set"))[-1]
    assert paths(folder, "--feature", name, "5", "--token-position", "3", "--paths", "2", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["target"]["position"] == 3 and printed["target"]["label"].endswith("feature 5")


@pytest.mark.parametrize(
    "more, sentence",
    [
        ([*TARGET, "--feature", "x", "5"], "Only one target"),
        ([*TARGET, "--target-difference", " Mary", " John"], "Only one target"),
        (["--feature", "x", "five"], "'five' is not the number"),
        (["--feature", "nothing", "5"], "no dictionary 'nothing'"),
        (["--token-position", "3"], "give --target"),
        (["--only", "heads"], "'heads' cannot be read"),
        (["--only", "kind<head"], "cannot be read"),
        (["--only", "layer=top"], "`layer` is '=top'"),
        (["--only", "kind=neuron"], "no kind of step"),
        (["--through", "layer=77"], "No path matches"),
        (["--paths", "0"], "--paths: 0 is out of range; give at least 1"),
    ],
)
def test_mistakes_end_in_one_sentence(folder, capsys, more, sentence):
    assert paths(folder, *more) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
