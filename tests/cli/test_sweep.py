"""The sweep: its grid, that it trains each dictionary as it would be alone, on one forward, and goes on where it was killed."""

import copy
import json
import subprocess
import sys

import pytest
import torch

from hf_transcoders import TranscoderError, TranscoderModel, TranscoderSet, TranscoderTrainer
from hf_transcoders.cli import main
from hf_transcoders.models.model_types import count_parameters
from hf_transcoders.tracking import find_runs
from hf_transcoders.training import TranscoderTrainingArguments
from hf_transcoders.training.grid import expand_grid, mlp_sites
from hf_transcoders.training.sweep import make_models, run_sweep
from tests.data.test_harvest import token_rows
from tests.tiny_models import tiny_model


SITES = [mlp_sites(1, "transcoder"), mlp_sites(2, "sae")]


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama")


def arguments(folder, **changes):
    changes = {
        "max_steps": 10, "per_device_train_batch_size": 32, "harvest_batch_size": 8, "buffer_tokens": 128,
        "learning_rate": 3e-3, "logging_steps": 5, "save_strategy": "no", "eval_tokens": 60, "eval_loss_tokens": 40,
        "use_cpu": True, "disable_tqdm": True, "report_to": "none", "outlier_factor": 0, **changes,
    }  # fmt: skip
    return TranscoderTrainingArguments(str(folder), **changes)


def sweep(base, folder, group_size=None, resume=False, callbacks=(), k=(4, 8), seeds=(0, 1), **changes):
    grid = expand_grid(base, SITES, num_features=[48, 64], k=list(k))
    return run_sweep(
        grid.configs, base, arguments(folder, **changes), token_rows(64, seed=seeds[0]), token_rows(10, seed=seeds[1]),
        group_size=group_size, resume=resume, callbacks=callbacks,
    )  # fmt: skip


def weights(path):
    return {name: model.state_dict() for name, model in TranscoderSet.from_pretrained(path).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Forwards:
    """Counts how often the base model read each training row."""

    def __init__(self, base):
        self.base, self.counts = base, {tuple(row["input_ids"]): 0 for row in token_rows(64)}

    def __enter__(self):
        def count(module, args):
            for row in args[0].tolist():
                if tuple(row) in self.counts:
                    self.counts[tuple(row)] += 1

        self.handle = self.base.get_input_embeddings().register_forward_pre_hook(count)
        return self.counts

    def __exit__(self, *_):
        self.handle.remove()


# ------------------------------------------------------------------------------------------------ the grid


def test_options_apply_where_they_mean_something(base):
    grid = expand_grid(
        base,
        [mlp_sites(1, "transcoder"), mlp_sites(1, "sae")],
        activation=["topk", "relu", "jumprelu"],
        k=[4, 8],
        l1_coefficient=[1e-3, 1.5e-3],
        l0_coefficient=2e-4,
        skip_connection=[False, True],
        num_features=64,
    )
    ends = ["topk4", "topk8", "relu-l1-1e-3", "relu-l1-15e-4", "jumprelu-l0-2e-4"]
    kinds = ("transcoder", "skip_transcoder", "branch.sae")
    assert set(grid.configs) == {f"layers.1.mlp.{kind}.{end}.n64" for kind in kinds for end in ends}
    assert grid.left_out == {}
    config = grid.configs["layers.1.mlp.skip_transcoder.relu-l1-15e-4.n64"]
    assert (config.k, config.l1_coefficient, config.skip_connection) == (None, 1.5e-3, True)


def test_impossible_combinations_are_named(base):
    grid = expand_grid(base, SITES[:1], num_features=[16, 64], k=[8, 32], normalization=["none", "scale"])
    assert list(grid.left_out) == [f"layers.1.mlp.transcoder.topk32.n16.{word}" for word in ("none", "scale")]
    assert all("k is 32" in reason for reason in grid.left_out.values())
    assert "layers.1.mlp.transcoder.topk32.n64.scale" in grid.configs and len(grid.configs) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu", "k": [4, 8]}, "`k` has no meaning"),
        ({"k": 99, "num_features": 16}, "k is 99"),
        ({"numfeatures": 3}, "numfeatures"),
    ],
)
def test_grids_of_nothing(base, options, message):
    with pytest.raises(TranscoderError, match=message):
        expand_grid(base, SITES, **options)


def test_parameters_are_counted_without_making_them(base):
    for config in expand_grid(base, SITES, num_features=[48, 64], activation=["topk", "gated"]).configs.values():
        assert count_parameters(config) == sum(p.numel() for p in TranscoderModel(config).parameters())


# ------------------------------------------------------------------------------------------------ training


def test_a_sweep_trains_each_dictionary_as_alone_on_one_forward(base, tmp_path):
    with Forwards(base) as counts:
        result = sweep(base, tmp_path / "sweep", max_steps=16)
    # 16 steps of 32 tokens take 8 chunks of 8 rows with 9 kept tokens each: all of the 64.
    assert set(counts.values()) == {1}
    swept = weights(tmp_path / "sweep")
    assert len(swept) == 8 and list(swept) == list(result.report.dictionaries)
    grid = expand_grid(base, SITES, num_features=[48, 64], k=[4, 8])
    for name, config in grid.configs.items():
        trainer = TranscoderTrainer(
            make_models({name: config}, 42)[name], base, arguments(tmp_path / name, max_steps=16), token_rows(64)
        )
        trainer.train()
        assert same(trainer.model.state_dict(), swept[name]), name
    assert {file.name for file in result.files} >= {"pareto.html", "pareto.csv", "report.html"}
    assert all(file.exists() for file in result.files)


def test_groups_give_the_same_bits_from_one_forward(base, tmp_path):
    sweep(base, tmp_path / "together")
    with Forwards(base) as counts:
        result = sweep(base, tmp_path / "groups", group_size=3)
    # 10 steps come from 40 of the 64 rows; no group reads one a second time.
    assert set(counts.values()) <= {0, 1} and sum(counts.values()) >= 36
    together, groups = weights(tmp_path / "together"), weights(tmp_path / "groups")
    assert list(together) == list(groups) and all(same(together[name], groups[name]) for name in groups)
    assert sorted(p.name for p in (tmp_path / "groups").iterdir() if p.is_dir()) == ["group-1", "group-2", "group-3"]
    report = json.loads((tmp_path / "groups" / "evaluation.json").read_text())
    assert (
        report["dictionaries"] == json.loads((tmp_path / "together" / "evaluation.json").read_text())["dictionaries"]
    )
    assert len(result.fronts) == 1 and len(result.fronts[0].dictionaries) == 8
    runs = list(find_runs(tmp_path / "groups"))
    assert [run.name for run in runs] == [f"groups-group-{i}" for i in (1, 2, 3)]
    assert [len(run.measured()) for run in runs] == [3, 3, 2] and {run.status for run in runs} == {"finished"}


def test_a_killed_sweep_resumes_without_repeating(base, tmp_path):
    """Killed for good in the middle of its second group of three, after a checkpoint."""
    saving = {"save_strategy": "steps", "save_steps": 4}
    sweep(base, tmp_path / "straight", group_size=3, **saving)
    code = f"""
import os, signal
from pathlib import Path
import torch
from transformers import TrainerCallback
from tests.cli.test_sweep import sweep
from tests.tiny_models import tiny_model
# Products are divided among threads: other bits for another number of them.
torch.set_num_threads({torch.get_num_threads()})
class Killer(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith("group-2") and state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
sweep(tiny_model("llama"), Path({str(tmp_path / "killed")!r}), 3, callbacks=[Killer()], **{saving!r})
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    folder = tmp_path / "killed"
    assert (folder / "group-1" / "evaluation.json").exists() and not (folder / "group-3").exists()
    assert (folder / "group-2" / "checkpoint-4").exists() and not (folder / "transcoder_set.json").exists()
    done = {path: path.stat().st_mtime_ns for path in (folder / "group-1").rglob("*") if path.is_file()}
    with Forwards(base) as counts:
        sweep(base, folder, group_size=3, resume=True, **saving)
    assert set(counts.values()) == {0}
    assert {path: path.stat().st_mtime_ns for path in done} == done
    state = json.loads((folder / "group-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 10
    straight, resumed = weights(tmp_path / "straight"), weights(folder)
    assert list(straight) == list(resumed) and all(same(straight[name], resumed[name]) for name in straight)
    reports = [json.loads((tmp_path / run / "evaluation.json").read_text()) for run in ("straight", "killed")]
    assert reports[0] == reports[1]
    assert not (folder / "activations").exists()


def test_a_folder_keeps_one_sweep(base, tmp_path):
    with pytest.raises(TranscoderError, match="holds no sweep to resume"):
        sweep(base, tmp_path, resume=True)
    sweep(base, tmp_path, k=(4,), max_steps=4)
    with pytest.raises(TranscoderError, match="holds a sweep"):
        sweep(base, tmp_path, k=(4,), max_steps=4)
    with pytest.raises(TranscoderError, match=r"other settings \(groups, dictionaries, max_steps, learning_rate\)|"
                       r"other settings \(groups, dictionaries, learning_rate, max_steps\)"):  # fmt: skip
        sweep(base, tmp_path, k=(8,), max_steps=6, learning_rate=1e-3, resume=True)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(TranscoderError, match=r"other settings \(base_model\)"):
        sweep(other, tmp_path, k=(4,), max_steps=4, resume=True)
    for name, seeds in (("text", (3, 1)), ("held-out text", (0, 3))):
        with pytest.raises(TranscoderError, match=rf"other settings \({name}\)"):
            sweep(base, tmp_path, k=(4,), max_steps=4, resume=True, seeds=seeds)
    # Where the results go may change; nothing is trained again.
    result = sweep(base, tmp_path, k=(4,), max_steps=4, logging_steps=1, resume=True)
    assert len(result.report.dictionaries) == 4


# ------------------------------------------------------------------------------------------------ the command


def command(workplace, output, *more):
    config = workplace / "sweep.yaml"
    config.write_text(
        f"model: {workplace / 'model'}\ndata: {workplace / 'train.txt'}\nlayers: [1, 2]\nkind: [transcoder, sae]\n"
        "num_features: 64\nk: [4, 8, 80]\nmax_tokens: 320\nper_device_train_batch_size: 32\nsequence_length: 16\n"
        "use_cpu: true\ndtype: float32\neval_tokens: 200\neval_loss_tokens: 100\nreport_to: none\ndisable_tqdm: true\n"
    )
    return ["sweep", str(config), "--output_dir", str(output), *more]


def test_dry_run_says_what_would_be_trained(workplace, tmp_path, capsys):
    assert main(command(workplace, tmp_path / "out", "--dry-run", "--group-size", "3")) == 0
    printed = capsys.readouterr()
    assert "layers.2.mlp.branch.sae.topk8.n64" in printed.out and "8 dictionaries" in printed.out
    # 64 x 32 x 2 weights, 64 + 32 biases, 16 bytes each; three of them.
    assert "4,192" in printed.out and "67.1 kB" in printed.out and "201 kB for the largest group" in printed.out
    assert "Left out: layers.1.mlp.transcoder.topk80.n64: k is 80" in printed.err
    assert not (tmp_path / "out").exists()
    assert main(command(workplace, tmp_path / "out", "--dry-run", "--json", "--k", "2", "--layers", "1")) == 0
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert [entry["name"] for entry in group] == [
        "layers.1.mlp.transcoder.topk2.n64",
        "layers.1.mlp.branch.sae.topk2.n64",
    ]


def test_sweep_from_the_command_line(workplace, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(command(workplace, output, "--json")) == 0
    printed = json.loads(capsys.readouterr().out)
    (group,) = printed["fronts"]
    assert len(group["dictionaries"]) == 8 and len(TranscoderSet.from_pretrained(output)) == 8
    assert group["protocol"]["dataset"] == "train.txt" and len(printed["notes"]) == 4
    assert (output / "pareto.html").exists() and (output / "report.html").exists()
    assert main(command(workplace, output)) == 2
    assert "holds a sweep" in capsys.readouterr().err
    assert main(command(workplace, output, "--resume")) == 0
    assert "front" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--k", "999"), "No combination of these options can be trained"),
        (("--layers", "9"), "layer"),
        (("--group-size", "0"), "--group-size: 0 is out of range; give at least 1"),
        (("--resume", "checkpoint-3"), "takes no value"),
        (("--output_site", "layers.1.mlp.out"), "--output-site needs --input-site"),
    ],
)
def test_mistakes_are_one_sentence(workplace, tmp_path, capsys, more, message):
    assert main(command(workplace, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-transcoders sweep: ") and message in error
    assert not (tmp_path / "out").exists()


def test_a_list_where_one_value_belongs(workplace, tmp_path, capsys):
    config = tmp_path / "list.yaml"
    config.write_text("learning_rate: [1e-3, 3e-3]\n")
    assert main(["sweep", str(config)]) == 2
    assert "'learning_rate' several values" in capsys.readouterr().err
    config.write_text("k: [16, 32]\n")
    assert main(["train", "--config", str(config)]) == 2
    assert "hf-transcoders sweep" in capsys.readouterr().err
