"""`hf-transcoders circuits`: what it writes, prints and refuses."""

import csv
import json

import pytest

from hf_transcoders.cli import main


def patch(folder, output, *more):
    return main(
        ["circuits", "patch", "ioi", "--model", str(folder / "model"), "--prompts", "3", "--dtype", "float32", "--device", "cpu",
         "--output", str(output), *more]
    )  # fmt: skip


def test_patch_writes_page_json_and_csv_with_the_same_numbers(folder, tmp_path, capsys):
    assert patch(folder, tmp_path / "out", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert printed["effects"] == saved["effects"] and saved["protocol"]["position"] == "END"
    page = (tmp_path / "out" / "report.html").read_text()
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    strongest = printed["top"][0]
    assert f"greatest effect: {strongest['layer']}.{strongest['head']}, ioi, prompt 0" in page
    for row in rows:
        effect = saved["effects"][int(row["layer"])][int(row["head"])]
        assert float(row["effect"]) == pytest.approx(effect, rel=1e-6)
        text = f"layer {row['layer']}, head {row['head']}: {effect:.4g} [{float(row['low']):.4g}"
        assert text in page


def test_the_scores_of_the_model_stand_first(folder, tmp_path, capsys):
    assert patch(folder, tmp_path / "out") == 0
    out = capsys.readouterr().out
    first = out.splitlines()
    assert first[0].split()[0] == "prompts" and [line.split()[0] for line in first[2:4]] == ["clean", "corrupted"]
    # The model is random, and there are three prompts.
    warning = out.index("WARNING: The model does not do the task 'ioi'")
    assert warning < out.index("effect")
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["performance"]["warning"] in out and saved["performance"]["chance"] == 0.5


@pytest.mark.parametrize(
    "more, axes",
    [
        (["--component", "resid", "--position", "S2,END"], ["layer", "position"]),
        (["--component", "mlp"], ["layer", "position"]),
        (["--component", "resid_mid", "--position", "S2,END"], ["layer", "position"]),
        (["--component", "value", "--position", "S2", "--per-query-head"], ["layer", "head"]),
        (["--receivers", "layers.2.attn.head.1.query"], ["layer", "head"]),
        (["--component", "pattern", "--direction", "denoising", "--corruption", "s2_io_flip"], ["layer", "head"]),
    ],
)
def test_patch_of_every_kind(folder, tmp_path, capsys, more, axes):
    assert patch(folder, tmp_path / "out", "--json", *more) == 0
    assert list(json.loads(capsys.readouterr().out)["axes"]) == axes


def test_reuse_writes_a_folder(folder, tmp_path, capsys):
    output = tmp_path / "reuse"
    arguments = [
        "circuits",
        "reuse",
        "--model",
        str(folder / "model"),
        "--prompts",
        "3",
        "--repair-prompts",
        "3",
        "--device",
        "cpu",
    ]
    arguments += [
        "--faithfulness-prompts",
        "2",
        "--search-prompts",
        "4",
        "--dtype",
        "float32",
        "--output",
        str(output),
    ]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["search"]["protocol"]["prompts"] == 4 and printed["search"]["sets"].keys() == {"wrong_colour"}
    assert printed["overlaps"] == json.loads((output / "results.json").read_text())["overlaps"]
    assert {path.name for path in output.iterdir()} >= {"report.html", "results.json", "overlap.csv", "repair.csv"}


def repair(folder, output, *more):
    return main(
        ["circuits", "repair", "ioi", "--model", str(folder / "model"), "--prompts", "4", "--judge-prompts", "5", "--dtype",
         "float32", "--device", "cpu", "--role-prompts", "0", "--output", str(output), *more]
    )  # fmt: skip


def test_repair_writes_a_folder(folder, tmp_path, capsys):
    more = [
        "--tokens",
        "IO,first token",
        "--search-layers",
        "1",
        "2",
        "--objective",
        "candidate_accuracy",
        "--penalty",
        "0",
    ]
    assert repair(folder, tmp_path / "repair", "--json", *more) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["outcomes"] == json.loads((tmp_path / "repair" / "results.json").read_text())["outcomes"]
    assert printed["sets"] == {"IO": ["IO"], "first token": ["first token"]}
    assert set(printed["outcomes"]) == {"IO", "first token", "any tokens"}
    assert printed["protocol"]["prompts"] == 4 and printed["protocol"]["judged_prompts"] == 5
    assert printed["alone"]["accuracy"][0][0] == [None] * 4
    assert {path.name for path in (tmp_path / "repair").iterdir()} >= {"report.html", "results.json", "outcomes.csv"}


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--tokens", "S9"], "has no tokens 'S9' up to END"),
        (["--query", "S9"], "has no position 'S9'"),
        (["--query", "S1", "--tokens", "S2"], "has no tokens 'S2' up to S1"),
        (["--search-layers", "9"], "layer 9 does not exist"),
    ],
)
def test_mistakes_of_repair_are_one_sentence(folder, tmp_path, capsys, more, sentence):
    assert repair(folder, tmp_path / "out", *more) == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--position", "S9"], "has no position 'S9'"),
        (["--position", "S2,END"], "one position at a time"),
        (["--receivers", "logits", "--component", "mlp"], "leave out --component"),
        (["--receivers", "layers.9.attn.head.0.query"], "layer 9"),
        (["--metric", "beauty"], "There is no metric 'beauty'"),
    ],
)
def test_mistakes_are_one_sentence(folder, tmp_path, capsys, more, sentence):
    assert patch(folder, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in error and error.startswith("hf-transcoders circuits:")


def test_an_unknown_task_and_a_file_as_output(folder, tmp_path, capsys):
    assert main(["circuits", "patch", "ioy", "--model", str(folder / "model")]) == 2
    assert "There is no task 'ioy'" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert patch(folder, tmp_path / "file") == 2
    assert "is a file" in capsys.readouterr().err
