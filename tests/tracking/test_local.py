"""Records of a run as files: read back as written, continued from a checkpoint, readable after a kill."""

import math

import pytest

from hf_transcoders import TranscoderError
from hf_transcoders.tracking import Alert, LocalTracker, Run, find_runs


@pytest.fixture
def run_dir(tmp_path):
    tracker = LocalTracker(tmp_path / "a")
    tracker.start({"name": "first", "base_model": "tiny"})
    for step, fvu in ((1, 0.5), (2, math.nan), (3, 0.25)):
        tracker.scalars(step, {"train/x/fvu": fvu})
        tracker.histogram(step, "train/x/density", [0.0, 0.5, 1.0], [step, 2])
        tracker.table(step, "features/x", [{"feature": 7, "text": "<b>\n"}])
        tracker.alert(step, Alert("warn", "dead features", "Many."))
    return tmp_path / "a"


def test_records_read_back_as_written(run_dir):
    run = Run.load(run_dir)
    assert run.name == "first" and run.facts["base_model"] == "tiny" and run.facts["status"] == "running"
    assert run.history("train/x/fvu") == [(1, 0.5), (3, 0.25)]
    assert run.latest() == {"train/x/fvu": 0.25}
    assert run.histograms[1] == {"step": 2, "name": "train/x/density", "edges": [0.0, 0.5, 1.0], "counts": [2, 2]}
    assert run.table("features/x") == [{"step": step, "feature": 7, "text": "<b>\n"} for step in (1, 2, 3)]
    assert [alert["level"] for alert in run.alerts] == ["warn"] * 3
    assert [found.name for found in find_runs(run_dir.parent)] == ["first"]


def test_resuming_drops_what_lies_after_the_checkpoint(run_dir):
    started = Run.load(run_dir).facts["started"]
    tracker = LocalTracker(run_dir)
    tracker.start({"name": "first"}, resume_step=2)
    tracker.scalars(3, {"train/x/fvu": 0.125})
    tracker.finish("finished")
    run = Run.load(run_dir)
    assert run.history("train/x/fvu") == [(1, 0.5), (3, 0.125)]
    assert [len(run.histograms), len(run.alerts), len(run.table("features/x"))] == [2, 2, 2]
    assert run.facts["started"] == started and run.facts["status"] == "finished"
    assert run.facts["resumed"]["step"] == 2


def test_a_run_that_was_complete_gets_no_second_closing_log(run_dir):
    tracker = LocalTracker(run_dir)
    tracker.scalars(3, {"train/train_runtime": 5.0})
    tracker.start({"name": "first"}, resume_step=3)
    assert [line["step"] for line in Run.load(run_dir).scalars] == [1, 2, 3]


def test_a_new_run_replaces_the_records_of_an_old_one(run_dir):
    LocalTracker(run_dir).start({"name": "second"})
    run = Run.load(run_dir)
    assert (run.name, run.scalars, run.table("features/x")) == ("second", [], [])


def test_a_line_cut_off_by_a_kill_is_passed_over(run_dir):
    path = run_dir / "tracking" / "scalars.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert [line["step"] for line in Run.load(run_dir).scalars] == [1, 2]
    # The next line must not be glued to the rest of the broken one.
    tracker = LocalTracker(run_dir)
    tracker.start({"name": "first"}, resume_step=2)
    tracker.scalars(3, {"train/x/fvu": 0.25})
    assert Run.load(run_dir).history("train/x/fvu") == [(1, 0.5), (3, 0.25)]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(TranscoderError, match="holds no run"):
        Run.load(tmp_path)


def test_a_run_outlives_a_full_disk_and_says_so_once(run_dir, caplog):
    resource = pytest.importorskip("resource")
    tracker = LocalTracker(run_dir)
    tracker.start({"name": "first"}, resume_step=3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = (run_dir / "tracking" / "scalars.jsonl").stat().st_size + 20
    resource.setrlimit(resource.RLIMIT_FSIZE, (full, before[1]))
    try:
        tracker.scalars(4, {"train/x/fvu": 0.2})
        tracker.scalars(5, {"train/x/fvu": 0.1})
        tracker.page(5, "report", "x" * 2 * full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caplog.text.count("the run continues without them until there is room") == 1
    tracker.scalars(6, {"train/x/fvu": 0.05})
    assert Run.load(run_dir).history("train/x/fvu") == [(1, 0.5), (3, 0.25), (6, 0.05)]
    assert not list((run_dir / "tracking").rglob("report*"))


def test_resuming_on_a_full_disk_records_no_step_twice(run_dir, caplog):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    tracker = LocalTracker(run_dir)
    try:
        tracker.start({"name": "first"}, resume_step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the run continues without them until there is room" in caplog.text
    tracker.scalars(3, {"train/x/fvu": 0.125})
    assert Run.load(run_dir).history("train/x/fvu") == [(1, 0.5), (3, 0.125)]


@pytest.mark.parametrize(
    "line", ["[" * 100_000, "9" * 5000, '{"step": 1, "step": 2}', '{"step": 4, "train/x/fvu": "low"}', '{"step": 4, "a": NaN}', "[]"]
)  # fmt: skip
def test_a_damaged_line_is_passed_over_and_counted(run_dir, line):
    path = run_dir / "tracking" / "scalars.jsonl"
    path.write_text(path.read_text() + line + "\n")
    run = Run.load(run_dir)
    assert run.history("train/x/fvu") == [(1, 0.5), (3, 0.25)]
    assert run.problems == ["1 damaged line in scalars.jsonl"]


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}", b""])
def test_a_damaged_run_ends_no_list(run_dir, content):
    LocalTracker(run_dir.parent / "b").start({"name": "second"})
    (run_dir / "tracking" / "run.json").write_bytes(content)
    runs = list(find_runs(run_dir.parent))
    assert [run.status for run in runs] == ["damaged", "running"]
    # A run that goes on there writes it anew.
    LocalTracker(run_dir).start({"name": "first"}, resume_step=2)
    assert Run.load(run_dir).history("train/x/fvu") == [(1, 0.5)]
