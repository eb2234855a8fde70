"""`train` in a folder that holds a run, and what it says when it is stopped or its result means little."""

import json
import signal
import subprocess
import sys
import time

import pytest
from transformers import integrations

from hf_transcoders.cli import main
from tests.cli.setups import train_arguments


@pytest.fixture(scope="module")
def finished(workplace):
    output = workplace / "finished"
    assert main(train_arguments(workplace, output)) == 0
    return output


def test_another_run_is_refused_before_the_model_is_loaded(workplace, finished, capsys):
    arguments = train_arguments(workplace, finished)
    arguments[arguments.index("--model") + 1] = "no/such-model"
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert (
        "holds layers.1.mlp.transcoder and checkpoint-20, and a folder is for one run" in said
        and "--overwrite" in said
    )


def test_what_makes_the_result_worthless_is_said(workplace, tmp_path, capsys, caplog):
    assert main(train_arguments(workplace, tmp_path / "run")) == 0
    assert "layers.1.mlp.transcoder: trained for 20 steps only." in caplog.text
    assert "held-out tokens only: the numbers are rough." in capsys.readouterr().err
    assert "trained for 20 steps only" in (tmp_path / "run" / "README.md").read_text()
    assert main(["evaluate", "--transcoders", str(tmp_path / "run"), "--data", str(workplace / "test.txt")]) == 0
    assert "Caution: layers.1.mlp.transcoder: trained for 20 steps only." in capsys.readouterr().err


def test_a_run_that_was_stopped_names_its_checkpoint(workplace, tmp_path, capsys):
    output = tmp_path / "run"
    command = train_arguments(workplace, output, "--num-train-epochs", "100000", "--save-steps", "1000000")
    del command[command.index("--max_tokens") : command.index("--max_tokens") + 2]
    with subprocess.Popen(
        [sys.executable, "-m", "hf_transcoders", *command], stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (output / "tracking" / "scalars.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=100)
    assert process.returncode == 143
    assert "Stopped by SIGTERM: step " in said and "--resume" in said and "Traceback" not in said
    (checkpoint,) = output.glob("checkpoint-*")
    for name in ("info", "evaluate"):
        arguments = ["--data", str(workplace / "test.txt")] if name == "evaluate" else []
        assert main([name, "--transcoders", str(output), *arguments]) == 2
        assert f"give its last checkpoint, {checkpoint}" in capsys.readouterr().err


def test_a_plan_of_less_than_a_step_is_refused(workplace, capsys):
    arguments = [
        "plan",
        "--model",
        str(workplace / "model"),
        "--max-tokens",
        "40",
        "--per-device-train-batch-size",
        "32",
    ]
    assert main([*arguments, "--processes", "2", "--use-cpu"]) == 2
    assert "40 tokens, less than one step of 64" in capsys.readouterr().err


def test_a_stream_shorter_than_the_held_out_part(workplace, tmp_path, capsys):
    assert main(train_arguments(workplace, tmp_path / "run", "--streaming")) == 2
    assert "The streamed text has 60 documents, and the first 200 of a stream are held out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mistyped", "meant"), [("trackoi", "trackio"), ("wandbb", "wandb"), ("tensor-board", "tensorboard")]
)
def test_a_tracker_that_does_not_exist(workplace, tmp_path, capsys, mistyped, meant):
    assert main(train_arguments(workplace, tmp_path / "run", "--report-to", mistyped)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is '{mistyped}', but must be one of" in line and line.endswith(f": did you mean {meant}?")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed(workplace, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(integrations, "is_mlflow_available", lambda: False)
    arguments = train_arguments(workplace, tmp_path / "run", "--report-to", "mlflow")
    # Before the language model is looked for.
    assert main([*arguments, "--model", str(tmp_path / "nowhere")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "The tracker 'mlflow' of `report_to` is not available: install it (`pip install mlflow`)" in line


def test_a_run_shorter_than_a_log_has_its_tokens_in_the_list(workplace, tmp_path, capsys):
    assert main(train_arguments(workplace, tmp_path / "run", "--logging-steps", "500", "--disable-tqdm", "True")) == 0
    capsys.readouterr()
    assert main(["runs", "list", str(tmp_path), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["status"] == "finished" and entry["tokens"] == 640
