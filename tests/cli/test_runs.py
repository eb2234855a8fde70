"""`hf-transcoders runs`: what it prints, what it writes, how it fails."""

import csv
import json

import pytest

from hf_transcoders.cli import main
from hf_transcoders.tracking import LocalTracker


NAME = "layers.8.mlp.transcoder"


def record(folder, k, fvu, dataset="docs", status="finished", **arguments):
    tracker = LocalTracker(folder)
    config = {"input_site": "layers.8.mlp.in", "output_site": "layers.8.mlp.branch", "num_features": 64, "k": k}
    tracker.start(
        {
            "name": folder.name,
            "base_model": "me/base",
            "dictionaries": {NAME: config},
            "arguments": {"output_dir": str(folder), "learning_rate": 1e-3, **arguments},
            "evaluation_protocol": {"base_model": "me/base", "dataset": dataset, "fidelity_tokens": 1000},
        }
    )
    tracker.scalars(4, {f"train/{NAME}/l0": float(k), f"train/{NAME}/fvu": 0.9, "train/tokens": 4096})
    values = {"l0": float(k), "fvu": fvu, "ce_recovered_zero": 1 - fvu / 4}
    tracker.scalars(8, {f"eval/{NAME}/{metric}": value for metric, value in values.items()})
    tracker.finish(status)


@pytest.fixture
def runs(tmp_path):
    record(tmp_path / "runs" / "k16", 16, 0.4)
    record(tmp_path / "runs" / "k32", 32, 0.3, learning_rate=3e-3)
    record(tmp_path / "runs" / "k64", 64, 0.35, status="failed")
    (tmp_path / "runs" / "broken" / "tracking").mkdir(parents=True)
    (tmp_path / "runs" / "broken" / "tracking" / "run.json").write_text("{")
    return tmp_path / "runs"


def rows(text):
    return [line.split() for line in text.splitlines()]


def test_list(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs)
    assert main(["runs", "list"]) == 0
    text = capsys.readouterr().out
    table = {row[0]: row for row in rows(text) if row}
    assert table["k32"][:8] == ["k32", "finished", "1", "4,096", "32.00", "0.3000", "0.9250", "evaluation"]
    assert table["k64"][1] == "failed" and table["broken"][1] == "damaged"
    assert "run.json is damaged" in text
    assert main(["runs", "list", str(runs), "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["k16"]["dictionaries"][0]["metrics"] == {"l0": 16.0, "fvu": 0.4, "ce_recovered_zero": 0.9}
    assert entries["k16"]["last_word"] is not None and entries["broken"]["problems"]


def test_names_do_not_command_the_terminal(tmp_path, capsys):
    record(tmp_path / "\x1b[31mred", 4, 0.5)
    assert main(["runs", "list", str(tmp_path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_compare(runs, capsys):
    assert main(["runs", "compare", str(runs / "k16"), str(runs / "k32")]) == 0
    printed = capsys.readouterr()
    table = rows(printed.out)
    assert ["FVU", "0.4000", "0.3000"] in table and ["learning_rate", "0.001", "0.003"] in table
    assert "output_dir" not in printed.out and printed.err == ""
    assert main(["runs", "compare", str(runs / "k16"), str(runs / "k32"), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["metrics"][NAME]["l0"] == {"k16": 16.0, "k32": 32.0} and compared["protocols"] == {}
    record(runs / "other", 32, 0.2, dataset="wiki")
    assert main(["runs", "compare", str(runs / "k16"), str(runs / "other")]) == 0
    assert "measured in different ways: data (docs / wiki)" in capsys.readouterr().err


def test_pareto_writes_page_picture_and_table(runs, tmp_path, capsys):
    assert main(["runs", "pareto", str(runs), "--output", str(tmp_path / "out"), "--csv"]) == 0
    printed = capsys.readouterr()
    standing = {row[1]: row[2] for row in rows(printed.out) if row and row[0] == NAME}
    assert standing == {"k16": "front", "k32": "front", "k64": "dominated"}
    assert "Left out: broken (damaged)" in printed.err
    assert "Left out: broken (damaged)" in (tmp_path / "out" / "pareto.html").read_text()
    assert (tmp_path / "out" / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    with open(tmp_path / "out" / "pareto.csv", newline="") as file:
        found = {row["run"]: (float(row["fvu"]), row["on_front_fvu"]) for row in csv.DictReader(file)}
    assert found == {"k16": (0.4, "True"), "k32": (0.3, "True"), "k64": (0.35, "False")}


def test_pareto_has_a_folder_of_its_own(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {*tmp_path.iterdir()}
    assert main(["runs", "pareto", "runs"]) == 0
    assert {*tmp_path.iterdir()} == before
    assert {path.name for path in (tmp_path / "runs" / "pareto").iterdir()} == {"pareto.html", "pareto.png"}


def test_pareto_says_when_protocols_differ(runs, tmp_path, capsys):
    record(runs / "k64", 64, 0.35, dataset="wiki")
    out = ("--output", str(tmp_path / "fronts"))
    assert main(["runs", "pareto", str(runs / "k32"), str(runs / "k64"), *out]) == 0
    printed = capsys.readouterr()
    said = "Measured in 2 different ways, each with separate fronts: data (docs / wiki)."
    assert said in printed.err and said in (tmp_path / "fronts" / "pareto.html").read_text()
    assert "dominated" not in printed.out
    assert main(["runs", "pareto", str(runs / "k32"), str(runs / "k64"), *out, "--allow-mixed", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (group,) = printed["fronts"]
    assert [d["on_front"]["fvu"] for d in group["dictionaries"]] == [True, False]
    assert "put on one front" in printed["notes"][0]
    assert "put on one front" in (tmp_path / "fronts" / "pareto.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "nowhere"], "There is no folder nowhere"),
        (["list", "."], "no recorded run in the current folder"),
        (["compare", "runs/k16"], "only one run"),
        (["pareto", "runs/broken"], "nothing to draw"),
        (["list", "--trackio", "nothing"], "no project 'nothing'"),
    ],
)
def test_mistakes_are_one_sentence(runs, tmp_path, capsys, monkeypatch, arguments, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty if arguments[-1] == "." else tmp_path)
    assert main(["runs", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("hf-transcoders runs: ") and message in error[0]
    assert not list(empty.iterdir())


def test_trackio_as_a_source(tmp_path, capsys):
    trackio = pytest.importorskip("trackio")
    for name, fvu in (("a", 0.5), ("b", 0.25)):
        trackio.init(project="from-trackio", name=name, config={"learning_rate": fvu}, embed=False)
        trackio.log({f"eval/{NAME}/l0": 8.0, f"eval/{NAME}/fvu": fvu, "train/global_step": 7})
        trackio.finish()
    capsys.readouterr()
    assert main(["runs", "list", "--trackio", "from-trackio", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in entries] == ["a", "b"]
    assert entries[0]["dictionaries"][0] == {
        "name": NAME, "source": "evaluation", "step": 7, "metrics": {"l0": 8.0, "fvu": 0.5}, "config": {},
    }  # fmt: skip
    assert main(["runs", "compare", "a", "b", "--trackio", "from-trackio"]) == 0
    assert ["learning_rate", "0.5", "0.25"] in rows(capsys.readouterr().out)
