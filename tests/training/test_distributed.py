"""Training with two real processes (gloo, CPU): the same run as with one process and twice the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_transcoders import TranscoderError, TranscoderModel, TranscoderSet, TranscoderTrainingArguments
from hf_transcoders.cli import main
from hf_transcoders.training.monitor import DictionaryMonitor, share_out
from tests.cli.setups import fill_workplace, train_arguments
from tests.training.two_processes import EQUAL_KINDS, KINDS, make_trainer, train


ROOT = Path(__file__).parent.parent.parent
# Steps of Adam at a learning rate of 3e-3 are compared: what differs is the order in which numbers are added.
TOLERANCE = 2e-6


def launch(*command, timeout=240):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of two processes, all in one launch."""
    folder = tmp_path_factory.mktemp("runs")
    scenarios = {
        "ddp": {"kinds": list(KINDS)},
        "ddp_resumed": {"kinds": list(KINDS), "resume": folder / "ddp" / "checkpoint-25"},
        "fsdp": {"kinds": list(KINDS), "fsdp": True},
        "fsdp_resumed": {"kinds": list(KINDS), "fsdp": True, "resume": folder / "fsdp" / "checkpoint-25"},
        "ddp_of_fsdp": {"kinds": list(KINDS), "resume": folder / "fsdp" / "checkpoint-25"},
        "fsdp_alone": {"kinds": ["topk"], "fsdp": True, "alone": True},
        "cross_layer": {"kinds": [], "cross_layer": True},
        "cross_layer_resumed": {
            "kinds": [],
            "cross_layer": True,
            "resume": folder / "cross_layer" / "checkpoint-25",
        },
    }
    launch(
        "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "tests.training.two_processes", folder, json.dumps(scenarios, default=str),
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The same on one process with twice the batch."""
    return train(tmp_path_factory.mktemp("one"), EQUAL_KINDS)


def result(runs, name, rank=0):
    return load_file(runs / name / f"weights_{rank}.safetensors"), json.loads(
        (runs / name / f"facts_{rank}.json").read_text()
    )


def of_kinds(weights, kinds):
    return {name: value for name, value in weights.items() if name.split(".")[1] in kinds}


def assert_same_run(expected, found, kinds=EQUAL_KINDS, tolerance=TOLERANCE):
    """Weights and logs within a tolerance, counts of silent features exactly."""
    weights, facts = expected
    for name, value in of_kinds(weights, kinds).items():
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    for kind in kinds:
        assert found[1]["dead"][kind] == facts["dead"][kind], kind
    assert len(found[1]["logs"]) == len(facts["logs"]) == 4
    for log, other in zip(facts["logs"], found[1]["logs"], strict=True):
        own = {key: value for key, value in log.items() if key.split("/")[0] in kinds or key == "tokens"}
        assert {key: other[key] for key in own} == pytest.approx(own, rel=1e-4, abs=1e-5)


def assert_identical(a, b):
    assert a[0].keys() == b[0].keys()
    for name, value in a[0].items():
        assert torch.equal(value, b[0][name]), name
    assert a[1]["dead"] == b[1]["dead"]
    assert [{k: v for k, v in log.items() if k != "epoch"} for log in a[1]["logs"]] == [
        {k: v for k, v in log.items() if k != "epoch"} for log in b[1]["logs"]
    ]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_are_one_with_twice_the_batch(runs, one_process, name):
    found = result(runs, name)
    assert_same_run(one_process, found)
    logs = found[1]["logs"]
    # What had to agree took part: features died, and AuxK was trained on them.
    assert logs[-1]["topk/dead_fraction"] == 0.25
    assert logs[-1]["topk/auxk_loss"] > 0


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_processes_end_equal(runs, name):
    (weights, facts), (other, others) = (result(runs, name, rank) for rank in (0, 1))
    assert weights.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in weights.items())  # BatchTopK's threshold too.
    for shared in ("target_variance", "dead", "logs"):
        assert facts[shared] == others[shared], shared


def test_a_cross_layer_transcoder_of_two_processes_is_that_of_one(runs, tmp_path):
    alone = train(tmp_path, [], cross_layer=True)
    found, other = (result(runs, "cross_layer", rank) for rank in (0, 1))
    assert found[0].keys() == other[0].keys() == alone[0].keys()
    for name, value in found[0].items():
        assert torch.equal(value, other[0][name]), name
        torch.testing.assert_close(value, alone[0][name], rtol=0, atol=TOLERANCE)
    assert found[1]["dead"] == alone[1]["dead"] and any(map(any, alone[1]["dead"].values()))
    assert_identical(result(runs, "cross_layer_resumed"), found)


def test_every_process_reads_other_text_and_together_that_of_one(runs, one_process):
    ranks = [result(runs, "ddp", rank)[1]["batches"] for rank in (0, 1)]
    # One epoch has 1152 activations; 16 steps of 64 are less.
    seen = [{x for batch in batches[:16] for x in batch} for batches in ranks]
    assert not seen[0] & seen[1]
    for step, whole_batch in enumerate(one_process[1]["batches"]):
        assert ranks[0][step] + ranks[1][step] == pytest.approx(whole_batch)


def test_sharded_parameters_are_shared_out(runs):
    ranks = [result(runs, "fsdp", rank)[1]["local_rows"] for rank in (0, 1)]
    assert ranks == [dict.fromkeys(KINDS, 32) | {"gated": rows} for rows in (17, 16)]


def test_sharded_is_data_parallel_for_every_kind(runs):
    expected = result(runs, "ddp")
    assert_same_run(expected, result(runs, "fsdp"), list(KINDS))
    # The gradient of all dictionaries is clipped for each alone.
    assert result(runs, "fsdp")[1]["logs"][0]["tied/grad_norm"] > 0


def test_resume_on_two_processes_is_exact(runs):
    assert_identical(result(runs, "ddp"), result(runs, "ddp_resumed"))
    assert_identical(result(runs, "fsdp"), result(runs, "fsdp_resumed"))


def test_sharded_and_data_parallel_runs_continue_each_other(runs):
    assert_same_run(result(runs, "ddp"), result(runs, "ddp_of_fsdp"), list(KINDS))


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_resume_on_one_process(runs, tmp_path, name):
    resumed = train(tmp_path, list(KINDS), resume=runs / name / "checkpoint-25")
    assert_same_run(result(runs, name), resumed)


def test_resume_on_one_process_with_accumulation(runs, tmp_path):
    resumed = train(
        tmp_path, list(KINDS), resume=runs / "ddp" / "checkpoint-25",
        per_device_train_batch_size=32, gradient_accumulation_steps=2,
    )  # fmt: skip
    # AuxK and target_l0 look at each portion by itself.
    assert_same_run(result(runs, "ddp"), resumed, ["relu", "jumprelu", "gated", "tied"])


def test_sharded_dictionaries_are_saved_whole(runs):
    weights = result(runs, "fsdp")[0]
    saved = TranscoderSet.from_pretrained(runs / "fsdp")
    assert saved.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in saved.state_dict().items())
    alone = TranscoderModel.from_pretrained(runs / "fsdp_alone")
    weights = result(runs, "fsdp_alone")[0]
    assert all(torch.equal(value, weights[name]) for name, value in alone.state_dict().items())
    # The evaluation of a sharded dictionary is that of the saved one.
    assert result(runs, "fsdp_alone", 1)[1]["eval_fvu"] == pytest.approx(result(runs, "fsdp_alone")[1]["eval_fvu"])


def test_accelerate_launch_of_the_command_line(tmp_path, capsys):
    """The command that a user types, with two processes and with one and twice the batch."""
    workplace = fill_workplace(tmp_path)
    options = [
        "--max_tokens",
        "1536",
        "--data_shards",
        "2",
        "--logging_steps",
        "8",
        "--harvest_batch_size",
        "4",
        "--json",
    ]
    one = [*train_arguments(workplace, tmp_path / "one", *options), "--per_device_train_batch_size", "64"]
    two = [*train_arguments(workplace, tmp_path / "two", *options), "--per_device_train_batch_size", "32"]
    assert main(one) == 0
    expected = json.loads(capsys.readouterr().out)
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "hf_transcoders"]
    found = json.loads(launch(*launcher, *two).stdout)  # Only one of the processes prints.
    metrics, others = (report["dictionaries"]["layers.1.mlp.transcoder"]["metrics"] for report in (expected, found))
    assert others == pytest.approx(metrics, rel=1e-3, abs=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=TOLERANCE)


def test_shards_must_fit_processes_and_batch(tmp_path):
    with pytest.raises(
        TranscoderError, match="`data_shards` is 3 but every step takes equally.*multiple of the 3 shards"
    ):
        TranscoderTrainingArguments(str(tmp_path), data_shards=3, use_cpu=True, report_to="none")
    with pytest.raises(TranscoderError, match="`data_shards` is 0"):
        TranscoderTrainingArguments(str(tmp_path), data_shards=0, use_cpu=True, report_to="none")


def test_resume_with_other_shards_is_refused(runs, tmp_path):
    for shards, message in ((4, "has 2 data shards and this run has 4"), (1, "num shards 2 and this run has 1")):
        trainer = make_trainer(tmp_path, list(KINDS), data_shards=shards)
        with pytest.raises(TranscoderError, match=message):
            trainer.train(resume_from_checkpoint=str(runs / "ddp" / "checkpoint-25"))


def test_fsdp_that_cannot_be_had_is_refused(tmp_path, monkeypatch):
    with pytest.raises(TranscoderError, match="without CPU offload"):
        make_trainer(tmp_path, ["topk"], fsdp=True, fsdp_config={"cpu_offload": True})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TranscoderError, match="launch without `--use_fsdp`"):
        make_trainer(tmp_path, ["topk"], fsdp=True)


def test_monitors_share_out_what_others_counted():
    """Four monitors of a run on four processes continue as two that log what one over everything would."""
    model = make_trainer("unused", ["topk"]).dictionaries["topk"]
    torch.manual_seed(0)
    monitors = [DictionaryMonitor(model, 10) for _ in range(4)]
    together = DictionaryMonitor(model, 10)
    for monitor in monitors:
        x, y = torch.randn(16, 32), torch.randn(16, 32)
        output = model(x, y, output_features=False)
        monitor.update(y, output)
        together.update(y, output)
    two = [DictionaryMonitor(model, 10) for _ in range(2)]
    for rank, monitor in enumerate(two):
        monitor.load_state_dict(share_out([m.state_dict() for m in monitors], rank, 2))
    assert sum(m.tokens for m in two) == together.tokens == 64
    assert all(torch.equal(m.fired, together.fired) for m in two)
    two[0].features.merge(two[1].features)
    two[0].reconstruction.merge(two[1].reconstruction)
    metrics = together.pop()
    assert metrics["l0"] == 4
    assert two[0].pop() == pytest.approx(metrics, nan_ok=True)
