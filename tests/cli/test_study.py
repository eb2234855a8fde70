"""`hf-transcoders study`: what it writes, prints and refuses."""

import json

import pytest
from transformers import AutoModelForCausalLM

from hf_transcoders.cli import main
from tests.studies.greater_than.setups import transcoder_of


def study(folder, action, path, output, *more):
    return main(
        ["study", action, "--transcoders", str(folder / path), "--model", str(folder / "model"), "--dtype", "float32", "--device", "cpu",
         "--output", str(output), *more]
    )  # fmt: skip


def test_greater_than_writes_page_json_and_pictures_with_the_same_numbers(folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert study(folder, "greater-than", "one", output, "--max-k", "5", "--max-features", "3", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    saved = json.loads((output / "results.json").read_text())
    assert printed["feature_curve"] == saved["feature_curve"] and len(saved["feature_curve"]) == 6
    assert saved["protocol"]["variant"] == "two_token" and saved["published"] is None
    page = (output / "report.html").read_text()
    assert f"{saved['original_score']['mean']:.3f}" in page and f"{saved['features'][0]['score']:.4f}" in page
    assert {path.name for path in output.iterdir()} == {"report.html", "results.json", "curves.png", "years.png"}


def test_greater_than_with_more_features_than_neurons(folder, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    neurons = model.config.intermediate_size
    transcoder_of(model, 1, num_features=neurons + 30).save_pretrained(tmp_path / "wide")
    wide = ("--max-k", str(neurons + 20), "--max-features", "2", "--json")
    assert study(folder, "greater-than", tmp_path / "wide", tmp_path / "out", *wide) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["feature_curve"]) == neurons + 21 and len(printed["neuron_curve"]) == neurons + 1
    assert (tmp_path / "out" / "report.html").exists()


def test_greater_than_of_one_layer_of_a_set(folder, tmp_path, capsys):
    chosen = ("--dictionary", "layers.2.mlp.transcoder", "--max-k", "2", "--max-features", "1", "--skip-first", "0")
    assert study(folder, "greater-than", "set", tmp_path, *chosen, "--no-add-bos") == 0
    text = capsys.readouterr().out
    assert "transcoder for the MLP" in text and text.strip().endswith("report.html")
    assert json.loads((tmp_path / "results.json").read_text())["protocol"]["reads"] == "layers.2.mlp.in"


def test_replacement_prints_and_writes_the_table(folder, tmp_path, capsys):
    text = (
        "--data",
        str(folder / "text.txt"),
        "--sequence-length",
        "16",
        "--max-tokens",
        "200",
        "--loss-tokens",
        "100",
    )
    assert study(folder, "replacement", "set", tmp_path, *text, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert printed["groups"] == saved["groups"]
    assert [row["name"] for row in saved["groups"]] == ["all layers", "all but the last layer"]
    assert study(folder, "replacement", "set", tmp_path, *text) == 0
    table = capsys.readouterr().out
    assert f"{saved['groups'][0]['replaced']['ce']:.4f}" in table and "text.txt" in table


def test_feature_patching_compares_folders(folder, tmp_path, capsys):
    output = tmp_path / "out"
    few = ("--prompts", "3", "--thresholds", "0.1", "--random-orders", "0", "--max-patched", "100")
    assert study(folder, "feature-patching", "set", output, *few, "--against", str(folder / "one"), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    saved = json.loads((output / "results.json").read_text())
    assert printed["dictionaries"] == saved["dictionaries"]
    names = [each["name"] for each in saved["dictionaries"]]
    assert names == [f"layers.{layer}.mlp.transcoder" for layer in range(3)] + ["one"]
    assert {path.name for path in output.iterdir()} == {"report.html", "results.json", "features.png", "edit_size.png"}
    assert study(folder, "feature-patching", "one", output, *few, "--against", str(folder / "one")) == 2
    assert "Two dictionaries are called 'one'" in capsys.readouterr().err


def test_effects_and_a_tree_of_features(folder, tmp_path, capsys):
    text = ("--data", str(folder / "text.txt"), "--sequence-length", "16", "--max-tokens", "300", "--contexts", "3")
    assert study(folder, "feature-effects", "one", tmp_path / "effects", "--features", "1", "2", *text) == 0
    assert "direct path raises" in capsys.readouterr().out
    one = ("--dictionary", "layers.2.mlp.transcoder", "--root", "1")
    assert study(folder, "feature-tree", "set", tmp_path / "tree", *one, *text, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["root"]["dictionary"] == "layers.2.mlp.transcoder" and printed["root"]["children"]
    assert {path.name for path in (tmp_path / "tree").iterdir()} == {"report.html", "results.json"}


@pytest.mark.parametrize(
    "action, path, more, sentence",
    [
        ("greater-than", "set", [], "choose one with --dictionary"),
        ("greater-than", "set", ["--dictionary", "layers.9"], "There is no dictionary 'layers.9'"),
        ("greater-than", "one", ["--max-k", "0"], "at least 1"),
        ("greater-than", "one", ["--skip-first", "99"], "skip fewer"),
        ("greater-than", "nowhere", [], "There is no folder"),
        ("replacement", "set", ["--data", "no.txt"], "no.txt"),
        ("feature-patching", "one", ["--against", "nowhere"], "There is no folder"),
        ("feature-patching", "one", ["--thresholds", "1", "0.1"], "ascending"),
        (
            "feature-effects",
            "one",
            ["--features", "99", "--data", "TEXT"],
            "Feature 99 does not exist: this dictionary has the features 0 to",
        ),
        ("feature-tree", "one", ["--root", "1", "--data", "TEXT"], "dictionaries of earlier layers"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing_behind(folder, tmp_path, capsys, action, path, more, sentence):
    output = tmp_path / "out"
    more = [str(folder / "text.txt") if word == "TEXT" else word for word in more]
    assert study(folder, action, path, output, *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-transcoders study: ") and sentence in error
    assert not output.exists()


def test_a_file_as_output_and_an_unknown_study(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert study(folder, "replacement", "set", tmp_path / "file") == 2
    assert "is a file" in capsys.readouterr().err
    assert main(["study", "smaller-than"]) == 2
    assert "did you mean greater-than?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["study", "--help"])
    shown = capsys.readouterr().out
    assert all(action in shown for action in ("greater-than", "replacement", "blind"))
