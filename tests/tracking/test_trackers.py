"""Real Trackio, TensorBoard and offline W&B runs of a tiny training, read back with their own readers."""

import json
import math
import time

import pytest
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_transcoders import TranscoderTrackingCallback
from hf_transcoders.tracking import Alert, LocalTracker, Run, TrackioTracker, trackers_for
from hf_transcoders.tracking.tensorboard import markdown_table

from .conftest import EVIL, NAME


DENSITY, PRE = f"train/{NAME}/log10_feature_density", f"train/{NAME}/pre_activations"


def frequent():
    return TranscoderTrackingCallback(histogram_logs=5, num_features=4)


def local_run(trainer):
    return Run.load(trainer.args.output_dir)


# --------------------------------------------------------------------------------------------------------- trackio


def trackio_lines(project, name):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = [run for run in trackio.Api().runs(project) if run.name == name]
    return run, SQLiteStorage.get_logs(project, name, run_id=run.id)


def of(lines, metric):
    return [(line["step"], line[metric]) for line in lines if metric in line]


class _Alarm(TrainerCallback):
    """Any alert will do: this dictionary's weights are no numbers from one step on."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 10:
            model.W_dec.data.fill_(math.nan)


def test_trackio_has_the_run_at_optimizer_steps(make_trainer, capfd):
    trainer = make_trainer(callbacks=[frequent(), _Alarm()], report_to="trackio", project="whole")
    trainer.train()
    run, lines = trackio_lines("whole", "run")
    local = local_run(trainer)
    assert of(lines, f"train/{NAME}/l0") == local.history(f"train/{NAME}/l0")
    assert of(lines, f"eval/{NAME}/l0") == local.history(f"eval/{NAME}/l0")
    assert all(line["train/global_step"] == line["step"] for line in lines)
    # Rich records lie at the steps of the numbers they belong to, and are the same as in the files.
    for name in (DENSITY, PRE):
        found = [(step, value["bins"], value["values"]) for step, value in of(lines, name)]
        assert found == [(h["step"], h["edges"], h["counts"]) for h in local.histograms if h["name"] == name]
    tables = of(lines, f"features/{NAME}")
    assert [{"step": step, **row} for step, table in tables for row in table["_value"]] == local.table(
        f"features/{NAME}"
    )
    assert [step for step, _ in of(lines, "report")] == [step for step, _ in of(lines, "sparsity_fidelity")] == [6, 12]
    assert [(a["title"], a["level"], a["step"]) for a in run.alerts()] == [("Not a finite number", "error", 11)] * 2
    # stdout is for results.
    assert capfd.readouterr().out == ""


def test_resuming_stays_one_trackio_run_without_doubled_steps(make_trainer):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise KeyboardInterrupt

    changes = {"report_to": "trackio", "project": "resumed", "save_strategy": "steps", "save_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[frequent(), Stop()], **changes).train()
    _, before = trackio_lines("resumed", "run")
    assert max(line["step"] for line in before) == 6
    trainer = make_trainer(callbacks=[frequent()], **changes)
    trainer.train(resume_from_checkpoint=True)
    _, lines = trackio_lines("resumed", "run")
    for metric in (f"train/{NAME}/fvu", f"eval/{NAME}/fvu"):
        assert of(lines, metric) == local_run(trainer).history(metric)
    assert [step for step, _ in of(lines, f"train/{NAME}/fvu")] == list(range(1, 13))
    assert [step for step, _ in of(lines, DENSITY)] == [1, 6, 11]
    assert [step for step, _ in of(lines, f"features/{NAME}")] == [6, 12]


def test_a_second_run_of_the_same_name_gets_a_number(make_trainer):
    import trackio

    names = []
    for _ in range(2):
        trainer = make_trainer(report_to="trackio", project="twice", run_name="mine", max_steps=2, eval_strategy="no")
        trainer.train()
        names.append(local_run(trainer).name)
    assert names == ["mine", "mine-2"]
    assert sorted(run.name for run in trackio.Api().runs("twice")) == names


def test_a_later_evaluation_joins_the_run(make_trainer):
    trainer = make_trainer(report_to="trackio", project="later", max_steps=3, eval_strategy="no")
    trainer.train()
    trainer.evaluate()
    import trackio

    trackio.finish()
    _, lines = trackio_lines("later", "run")
    assert [step for step, _ in of(lines, f"eval/{NAME}/fvu")] == [3]
    assert local_run(trainer).history(f"eval/{NAME}/fvu") == of(lines, f"eval/{NAME}/fvu")


def test_other_trainers_keep_their_count_of_logs():
    """Transformers' own callback counts logs; a record in between counts as one of them and says its optimizer step."""
    import trackio

    trackio.init(project="stock", name="run")
    trackio.log({"train/loss": 1.0, "train/global_step": 100})
    TrackioTracker().scalars(100, {"probe/drift": 0.5})
    trackio.log({"train/loss": 0.5, "train/global_step": 200})
    trackio.finish()
    _, lines = trackio_lines("stock", "run")
    assert [(line["step"], line["train/global_step"]) for line in lines] == [(0, 100), (1, 100), (2, 200)]
    TrackioTracker().scalars(300, {"probe/drift": 0.5})  # No run is open any more: nothing to add to.
    assert len(trackio_lines("stock", "run")[1]) == 3


# ----------------------------------------------------------------------------------------------------- tensorboard


def test_tensorboard_has_one_run_with_the_rich_records(make_trainer):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(callbacks=[frequent(), _Alarm()], report_to="tensorboard")
    trainer.train()
    (folder,) = (local_run(trainer).folder / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "tensors": 0, "images": 0})
    events.Reload()
    local = local_run(trainer)
    found = [(event.step, event.value) for event in events.Scalars(f"train/{NAME}/l0")]
    assert found == [(step, pytest.approx(value)) for step, value in local.history(f"train/{NAME}/l0")]
    histograms = events.Histograms(DENSITY)
    expected = [h for h in local.histograms if h["name"] == DENSITY]
    assert [event.step for event in histograms] == [h["step"] for h in expected] == [1, 6, 11]
    for event, histogram in zip(histograms, expected, strict=True):
        value = event.histogram_value
        assert list(value.bucket_limit) == histogram["edges"] and list(value.bucket) == [0, *histogram["counts"]]
        assert value.num == sum(histogram["counts"])
    (image, *_) = events.Images("sparsity_fidelity")
    assert image.step == 6 and image.width > image.height > 300
    text = events.Tensors(f"features/{NAME}/text_summary")
    # Not at 12: the weights are no numbers by then.
    assert [event.step for event in text] == [6]
    table = text[0].tensor_proto.string_val[0].decode()
    assert "<script" not in table and "&lt;script&gt;" in table
    alerts = events.Tensors("alerts/Not a finite number/text_summary")
    assert alerts[0].step == 11


def test_a_markdown_table_survives_any_text():
    row = {"a": "x | y\n*z*", "b": None, "c": 0.123456, "d": "<b>"}
    assert markdown_table([row]).split("\n") == [
        "| a | b | c | d |",
        "| --- | --- | --- | --- |",
        r"| x \| y⏎\*z\* |  | 0.1235 | &lt;b&gt; |",
    ]


# ----------------------------------------------------------------------------------------------------------- wandb


def wandb_records(data):
    """The records of an offline run's file: a LevelDB log of 32 KiB blocks, after a header of 7 bytes."""
    position, record = 7, b""
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield record
            record = b""


def test_wandb_offline_has_the_rich_records(make_trainer, tmp_path, monkeypatch):
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = make_trainer(callbacks=[frequent()], report_to="wandb", max_steps=6)
    trainer.train()
    folder = wandb.run.dir
    wandb.finish()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # The process that writes the file may still be at it.
    for _ in range(100):
        records = [Record.FromString(data) for data in wandb_records(path.read_bytes())]
        if records[-1].WhichOneof("record_type") == "exit":
            break
        time.sleep(0.1)
    lines = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            line = {}
            for item in record.history.item:
                name, *inner = item.nested_key or [item.key]
                value = json.loads(item.value_json)
                if inner:
                    line.setdefault(name, {})[inner[0]] = value
                else:
                    line[name] = value
            lines.append(line)
    local = local_run(trainer)
    found = [(line["train/global_step"], line[f"train/{NAME}/l0"]) for line in lines if f"train/{NAME}/l0" in line]
    assert found == local.history(f"train/{NAME}/l0")
    histograms = [(line["train/global_step"], line[DENSITY]) for line in lines if DENSITY in line]
    assert [(step, h["bins"], h["values"]) for step, h in histograms] == [
        (h["step"], h["edges"], h["counts"]) for h in local.histograms if h["name"] == DENSITY
    ]
    (table,) = [line[f"features/{NAME}"] for line in lines if f"features/{NAME}" in line]
    content = json.loads((tmp_path / folder / table["path"]).read_text())
    assert content["data"] == [[row[c] for c in content["columns"]] for row in local.table(f"features/{NAME}")]
    (page,) = [line["report"] for line in lines if "report" in line]
    html = (tmp_path / folder / page["path"]).read_text()
    assert "<script" not in html and "&lt;script&gt;" in html and EVIL not in html


# ------------------------------------------------------------------------------------------------------ the choice


def test_trackers_follow_report_to_and_only_the_first_process_writes(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to=["wandb", "trackio", "mlflow"], use_cpu=True)
    state = TrainerState(is_world_process_zero=True)
    assert [type(t).__name__ for t in trackers_for(args, state)] == ["LocalTracker", "TrackioTracker", "WandbTracker"]
    state.is_world_process_zero = False
    assert trackers_for(args, state) == []


def test_a_plain_accelerate_loop_writes_the_same_records(tmp_path):
    from accelerate import Accelerator

    import hf_transcoders.tracking.accelerate_tracker  # noqa: F401 - makes the name known

    accelerator = Accelerator(log_with="hf_transcoders", project_dir=str(tmp_path), cpu=True)
    accelerator.init_trackers("loop", config={"learning_rate": 0.5})
    for step in (1, 2, 3):
        accelerator.log({"train/x/fvu": 1 / step}, step=step)
    tracker = accelerator.get_tracker("hf_transcoders", unwrap=True)
    assert isinstance(tracker, LocalTracker)
    tracker.histogram(3, "train/x/density", [0.0, 1.0], [5])
    tracker.alert(3, Alert("info", "done", "It is."))
    accelerator.end_training()
    run = Run.load(tmp_path)
    assert (
        run.name == "loop" and run.facts["status"] == "finished" and run.facts["arguments"] == {"learning_rate": 0.5}
    )
    assert run.history("train/x/fvu") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert run.histograms[0]["counts"] == [5] and run.alerts[0]["title"] == "done"
