"""Runs read back: how they stand, what their dictionaries measured, from files and from Trackio."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from hf_transcoders import TranscoderError, TranscoderSet
from hf_transcoders.tracking import LocalTracker, Run, find_runs, trackio_run, trackio_runs
from tests.reports.test_page import make_report
from tests.tracking.conftest import NAME, READ, WRITE


def edit(folder, **facts):
    path = folder / "tracking" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def start(folder, **facts):
    tracker = LocalTracker(folder)
    tracker.start({"name": folder.name, **facts})
    return tracker


def test_status_is_what_the_run_recorded_and_running_only_while_its_process_lives(tmp_path):
    tracker = start(tmp_path / "a")
    assert Run.load(tmp_path / "a").status == "running"
    for status in ("finished", "failed", "interrupted"):
        tracker.finish(status)
        assert Run.load(tmp_path / "a").status == status
    code = (
        "import os; from hf_transcoders.tracking import LocalTracker;"
        f"LocalTracker({str(tmp_path / 'b')!r}).start({{}}); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    run = Run.load(tmp_path / "b")
    assert run.facts["status"] == "running" and run.status == "died"
    # The number of a dead process, given to a living one.
    edit(tmp_path / "b", process={**run.facts["process"], "pid": os.getpid()})
    assert Run.load(tmp_path / "b").status == "died"


def test_a_run_on_another_machine_is_silent_after_an_hour_but_never_called_dead(tmp_path):
    start(tmp_path / "a").scalars(1, {"train/loss": 1.0})
    edit(tmp_path / "a", process={"pid": 2**22 + 5, "started": 0.0, "machine": "another"})
    assert Run.load(tmp_path / "a").status == "running"
    scalars = tmp_path / "a" / "tracking" / "scalars.jsonl"
    long_ago = (datetime.now(UTC) - timedelta(hours=2)).isoformat()
    scalars.write_text(json.dumps({"step": 1, "time": long_ago, "train/loss": 1.0}) + "\n")
    assert Run.load(tmp_path / "a").status == "running"  # It has started just now.
    edit(tmp_path / "a", started=long_ago)
    assert Run.load(tmp_path / "a").status == "silent"
    assert Run.load(tmp_path / "a").last_word == datetime.fromisoformat(long_ago)


def test_records_say_nothing_of_the_machine(tmp_path):
    import platform

    start(tmp_path / "a")
    assert platform.node() not in (tmp_path / "a" / "tracking" / "run.json").read_text()


def test_damaged_and_half_written_runs_are_listed(tmp_path):
    start(tmp_path / "cut").scalars(1, {"train/loss": 1.0})
    with open(tmp_path / "cut" / "tracking" / "scalars.jsonl", "ab") as file:
        file.write(
            b'{"step": 2, "train\xff\xfe\n[1]\n{"no": "step"}\n{"step": 3, "time": "x", "train/loss": 0.5}\n{"ste'
        )
    for name, content in (
        ("empty", ""),
        ("list", "[]"),
        ("odd", '{"name": 3, "status": 7, "process": 1, "resumed": 2}'),
    ):
        (tmp_path / name / "tracking").mkdir(parents=True)
        (tmp_path / name / "tracking" / "run.json").write_text(content)
    runs = {run.folder.name: run for run in find_runs(tmp_path)}
    assert {name: run.status for name, run in runs.items()} == {
        "cut": "running", "empty": "damaged", "list": "damaged", "odd": "7",
    }  # fmt: skip
    assert runs["cut"].history("train/loss") == [(1, 1.0), (3, 0.5)]
    assert runs["cut"].problems == ["3 damaged lines in scalars.jsonl"]
    assert "run.json is damaged" in runs["empty"].problems[0]
    assert all(run.measured() == [] for run in runs.values())
    with pytest.raises(TranscoderError, match="damaged"):
        Run.load(tmp_path / "list")
    # A run goes on from a record with damaged lines.
    LocalTracker(tmp_path / "cut").start({}, resume_step=3)
    assert Run.load(tmp_path / "cut").problems == []


def report_with(metrics, dataset="wiki"):
    report = make_report(names=("d",), together=False)
    report.dictionaries["d"]["metrics"] |= metrics
    report.dictionaries["d"]["config"] = {
        "input_site": "in", "output_site": "out", "num_features": 8, "activation": "topk", "k": 2
    }  # fmt: skip
    report.protocol["dataset"] = dataset
    return report


def test_newest_evaluation_then_evaluation_json_then_training(tmp_path):
    tracker = start(tmp_path, base_model="me/base")
    tracker.scalars(5, {"train/d/l0": 2.0, "train/d/fvu": 0.9, "train/d/loss": 1.0, "train/loss": 1.0})
    tracker.scalars(6, {"train/d/l0": 2.0, "train/d/fvu": 0.8})
    (training,) = Run.load(tmp_path).measured()
    assert (training.source, training.step, training.metrics) == ("training", 6, {"l0": 2.0, "fvu": 0.8})
    assert training.protocol == {"base_model": "me/base", "dataset": "training batches"}
    report_with({"l0": 2.0, "fvu": 0.7}).save_json(tmp_path / "evaluation.json")
    (filed,) = Run.load(tmp_path).measured()
    assert (filed.source, filed.step, filed.metrics["fvu"]) == ("evaluation.json", None, 0.7)
    assert filed.protocol == report_with({}).protocol and filed.protocol["dataset"] == "wiki" and filed.reads == "in"
    tracker.scalars(6, {"eval/d/l0": 2.0, "eval/d/fvu": 0.6, "eval/loss": 0.6, "eval/probe/at/fvu": 1.0})
    tracker.scalars(8, {"eval/d/l0": 3.0, "eval/d/fvu": 0.5})
    (logged,) = Run.load(tmp_path).measured()
    assert (logged.source, logged.step, logged.metrics) == ("evaluation", 8, {"l0": 3.0, "fvu": 0.5})
    # evaluation.json has other numbers, so that its protocol is not that of the log ...
    assert logged.protocol is None
    report_with({"l0": 3.0, "fvu": 0.5, "kl": 1.0}).save_json(tmp_path / "evaluation.json")
    assert Run.load(tmp_path).measured()[0].protocol == report_with({}).protocol
    # ... and what the run recorded goes first.
    edit(tmp_path, evaluation_protocol={"dataset": "docs"}, dictionaries={"d": {"input_site": "x"}})
    (logged,) = Run.load(tmp_path).measured()
    assert logged.protocol == {"dataset": "docs"} and logged.reads == "x"
    (tmp_path / "evaluation.json").write_text('{"dictionaries": {"d": {}}, "protocol": {}}')
    assert Run.load(tmp_path).measured()[0].source == "evaluation"
    (tmp_path / "evaluation.json").write_text("{")
    run = Run.load(tmp_path)
    assert run.measured()[0].source == "evaluation" and run.problems == ["evaluation.json is damaged"]


def test_a_real_run_has_its_numbers_with_the_protocol(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    run = Run.load(tmp_path / "run")
    (measured,) = run.measured()
    assert (run.status, measured.name, measured.step, measured.source) == ("finished", NAME, 12, "evaluation")
    report = trainer.last_evaluation
    assert measured.metrics == {k: v for k, v in report.metrics[NAME].items() if v == v}
    assert measured.protocol["fidelity_tokens"] == report.protocol["fidelity_tokens"]
    assert (measured.reads, measured.writes, measured.config["num_features"]) == (READ, WRITE, 64)


def test_trackio_gives_the_same_run_as_the_files(make_trainer, tmp_path):
    pytest.importorskip("trackio")
    trainer = make_trainer(report_to="trackio", project="reading-back", run_name="one")
    trainer.train()
    local, read = Run.load(tmp_path / "run"), trackio_run("reading-back", "one")
    assert [run.name for run in trackio_runs("reading-back")] == ["one"]
    for metric in (f"train/{NAME}/fvu", f"train/{NAME}/l0", f"eval/{NAME}/fvu", "train/tokens"):
        assert read.history(metric) == local.history(metric) != []
    from_files, from_trackio = local.measured()[0], read.measured()[0]
    assert from_trackio.metrics == from_files.metrics and from_trackio.step == from_files.step
    assert (from_trackio.reads, from_trackio.writes) == (READ, WRITE)
    assert read.status == "unknown" and read.facts["arguments"]["learning_rate"] == 3e-3
    names = {histogram["name"] for histogram in local.histograms}
    assert {h["name"] for h in read.histograms} == names and len(read.histograms) == len(local.histograms)
    with pytest.raises(TranscoderError, match=r"no run 'two'.*one"):
        trackio_run("reading-back", "two")
    with pytest.raises(TranscoderError, match="no project 'nothing'"):
        list(trackio_runs("nothing"))


def test_trackio_gives_several_dictionaries(make_trainer, base, tmp_path):
    pytest.importorskip("trackio")
    from hf_transcoders import TranscoderConfig, TranscoderModel

    config = TranscoderConfig.for_model(base, READ, WRITE, num_features=64, k=4)
    models = TranscoderSet({name: TranscoderModel(config) for name in ("a", "b")})
    make_trainer(model=models, report_to="trackio", project="several", run_name="both").train()
    run = trackio_run("several", "both")
    assert [d.name for d in run.measured()] == ["a", "b"]
