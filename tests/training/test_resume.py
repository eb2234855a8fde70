"""What is left of a run that was ended by something else than its last step, and how it goes on from there."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_transcoders import (
    TranscoderError,
    TranscoderModel,
    TranscoderSet,
    TranscoderTrainer,
    TranscoderTrainingArguments,
)
from hf_transcoders.training.checkpoint_files import MANIFEST, commit, recover, why_unusable
from hf_transcoders.training.state_files import load_state
from tests.data.test_harvest import token_rows
from tests.tiny_models import tiny_model
from tests.training.test_trainer import WRITE, make_model, make_trainer, same_weights, weights


SAVING = {"save_strategy": "steps", "save_steps": 5, "max_steps": 20}


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith((".", "checkpoint")))


class TestFindingACheckpoint:
    @pytest.fixture
    def run(self, straight, tmp_path):
        shutil.copytree(straight[0], tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "checkpoint-20")
        return tmp_path / "run"

    def cut(path):
        path.write_bytes(path.read_bytes()[:-1])

    def garble(path):
        path.write_bytes(b"x" * path.stat().st_size)

    @pytest.mark.parametrize(
        ("file", "damage", "reason"),
        [
            ("model.safetensors", cut, "model.safetensors has .* bytes instead of"),
            ("optimizer.safetensors", Path.unlink, "optimizer.safetensors is missing"),
            ("monitors_0.safetensors", garble, "monitors_0.safetensors is damaged"),
            ("rng_state_0.safetensors", garble, "rng_state_0.safetensors is damaged"),
            ("trainer_state.json", garble, "trainer_state.json is damaged"),
            (MANIFEST, Path.unlink, "no readable checkpoint.json"),
            (MANIFEST, garble, "no readable checkpoint.json"),
        ],
    )
    def test_a_broken_one_is_passed_over_and_named(self, base, run, straight, caplog, file, damage, reason):
        damage(run / "checkpoint-15" / file)
        again = make_trainer(base, run, **SAVING)
        again.train(resume_from_checkpoint=True)
        assert same_weights(weights(again.model), straight[1])
        (record,) = [r.getMessage() for r in caplog.records if "cannot be used" in r.getMessage()]
        assert record.startswith(f"checkpoint-15 in {run} cannot be used (") and "checkpoint-10 is used" in record
        assert re.search(reason, record)
        assert why_unusable(run / "checkpoint-15") is None  # Written anew on the way.

    def test_all_broken(self, base, run):
        for folder in run.glob("checkpoint-*"):
            (folder / "scheduler.safetensors").unlink()
        with pytest.raises(
            TranscoderError, match=r"(?s)No checkpoint in .*checkpoint-15: scheduler.safetensors is missing.*-5:"
        ):
            make_trainer(base, run, **SAVING).train(resume_from_checkpoint=True)

    def test_a_broken_one_that_is_asked_for(self, base, run):
        (run / "checkpoint-10" / "scheduler.safetensors").unlink()
        with pytest.raises(
            TranscoderError, match="checkpoint-10 cannot be resumed from .scheduler.safetensors is missing"
        ):
            make_trainer(base, run, **SAVING).train(resume_from_checkpoint=str(run / "checkpoint-10"))

    def test_weights_alone_are_not_enough(self, base, tmp_path):
        make_trainer(base, tmp_path, save_only_model=True, **SAVING).train()
        with pytest.raises(TranscoderError, match="weights only"):
            make_trainer(base, tmp_path, **SAVING).train(resume_from_checkpoint=True)

    def test_none_yet(self, base, tmp_path, straight, caplog):
        trainer = make_trainer(base, tmp_path / "new", **SAVING)
        trainer.train(resume_from_checkpoint=True)
        assert f"There is no checkpoint in {tmp_path / 'new'} yet: the run starts from the beginning." in caplog.text
        assert same_weights(weights(trainer.model), straight[1])

    def test_a_complete_run_takes_no_step_more(self, base, straight, tmp_path):
        shutil.copytree(straight[0], tmp_path / "run")
        again = make_trainer(base, tmp_path / "run", **SAVING)
        result = again.train(resume_from_checkpoint=True)
        assert again.state.global_step == result.global_step == 20
        assert same_weights(weights(again.model), straight[1])
        losses = [log["loss"] for log in again.state.log_history if "loss" in log]
        assert result.training_loss == pytest.approx(sum(losses) / len(losses))


class TestInterruptedSaves:
    def test_what_a_save_has_left_is_removed_and_said(self, base, straight, tmp_path, caplog):
        run = tmp_path / "run"
        shutil.copytree(straight[0], run)
        shutil.copytree(run / "checkpoint-20", run / ".partial" / "checkpoint-25")
        shutil.move(run / "checkpoint-5", run / ".checkpoint-5.removed")
        (tmp_path / ".run.abcd.partial").mkdir()
        (run / ".model.safetensors.77.partial").write_text("half")
        make_trainer(base, run, **SAVING).train(resume_from_checkpoint=True)
        assert f"A save of step 25 into {run} was interrupted: its leftovers are removed." in caplog.text
        assert names(run) == ["checkpoint-10", "checkpoint-15", "checkpoint-20"]
        assert names(tmp_path) == []

    def test_a_checkpoint_is_replaced_without_a_moment_of_none(self, straight, tmp_path):
        """The process dies between the two renames: the older one comes back."""
        old, new = tmp_path / "checkpoint-20", tmp_path / ".partial" / "checkpoint-20"
        shutil.copytree(straight[0] / "checkpoint-20", old)
        shutil.copytree(old, new)
        os.replace(old, tmp_path / ".checkpoint-20.replaced")
        recover(tmp_path)
        assert names(tmp_path) == ["checkpoint-20"] and why_unusable(old) is None
        # And here it lives.
        shutil.copytree(old, new)
        (new / "extra").write_text("new")
        (new / MANIFEST).unlink()
        commit(new, old)
        assert (old / "extra").exists() and why_unusable(old) is None
        shutil.copytree(old, tmp_path / ".checkpoint-20.replaced")
        recover(tmp_path)
        assert (old / "extra").exists() and not (tmp_path / ".checkpoint-20.replaced").exists()

    def test_rotation_keeps_the_newest_and_what_was_written_last(self, base, straight, tmp_path):
        """A run that goes back to step 5 must not lose what it writes to the older run's later checkpoints."""
        run = tmp_path / "run"
        shutil.copytree(straight[0], run)
        for path in run.glob("checkpoint-*"):
            os.utime(path, (1e9, 1e9))
        again = make_trainer(base, run, **{**SAVING, "max_steps": 12, "save_total_limit": 2})
        again.train(resume_from_checkpoint=str(run / "checkpoint-5"))
        assert names(run) == ["checkpoint-10", "checkpoint-12"]

    def test_the_best_checkpoint_is_kept_and_loaded(self, base, tmp_path):
        class Planted(TranscoderTrainer):
            def evaluate(self, *args, **kwargs):
                return {"eval_planted": abs(self.state.global_step - 10)}

        args = TranscoderTrainingArguments(
            str(tmp_path), **SAVING, per_device_train_batch_size=32, harvest_batch_size=8, use_cpu=True, report_to="none",
            disable_tqdm=True, save_total_limit=1, eval_strategy="steps", eval_steps=5, load_best_model_at_end=True,
            metric_for_best_model="planted", greater_is_better=False,
        )  # fmt: skip
        trainer = Planted(TranscoderSet({"one": make_model(base)}), base, args, token_rows(64), token_rows(9))
        trainer.train()
        best = tmp_path / "checkpoint-10"
        assert trainer.state.best_model_checkpoint == str(best)
        assert same_weights(weights(trainer.model), weights(TranscoderSet.from_pretrained(best)))

    @pytest.mark.parametrize("limit", [1000, 20_000])
    def test_files_that_cannot_grow(self, base, straight, tmp_path, limit):
        """The first limit stops the safetensors of the monitors, the second torch's file of the optimizer."""
        pytest.importorskip("resource")
        root = Path(__file__).parent.parent.parent
        command = [sys.executable, "-m", "tests.training.full_disk", str(tmp_path / "run"), str(limit)]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr[-2000:]
        (sentence,) = result.stdout.strip().splitlines()
        assert sentence.startswith(f"The checkpoint of step 10 could not be written into {tmp_path / 'run'} (")
        assert sentence.endswith(
            f"): make room, then resume from {tmp_path / 'run' / 'checkpoint-5'}, the last whole checkpoint."
        )
        assert names(tmp_path / "run") == ["checkpoint-5"]
        again = make_trainer(base, tmp_path / "run", **SAVING)
        again.train(resume_from_checkpoint=True)
        assert same_weights(weights(again.model), straight[1])

    def test_a_full_disk(self, base, straight, tmp_path):
        disk = tmp_path / "disk"
        disk.mkdir()
        size = sum(path.stat().st_size for path in (straight[0] / "checkpoint-5").rglob("*"))
        mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.6 * size)}", "none", str(disk)]
        if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("only root can mount a small disk")
        try:
            trainer = make_trainer(base, disk / "run", **SAVING)
            with pytest.raises(
                TranscoderError, match=r"step 10 could not.*No space left.*checkpoint-5, the last whole"
            ):
                trainer.train()
            assert names(disk / "run") == ["checkpoint-5"]
            subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
            again = make_trainer(base, disk / "run", **SAVING)
            again.train(resume_from_checkpoint=True)
            assert same_weights(weights(again.model), straight[1])
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def test_two_runs_into_one_folder(base, tmp_path):
    first = make_trainer(base, tmp_path, max_steps=4)

    class Second(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            make_trainer(base, tmp_path).train()

    first.add_callback(Second())
    with pytest.raises(TranscoderError, match=r"^Another run is writing into .*: wait until it ends"):
        first.train()
    make_trainer(base, tmp_path, max_steps=4).train()  # The lock went with the run.


class TestNumbersThatAreNone:
    def settings(self, **changes):
        return {"save_strategy": "no", "max_steps": 20, "gradient_accumulation_steps": 2, "rows": 128, **changes}

    def test_nan_activations_leave_a_checkpoint_of_the_last_step(self, base, tmp_path):
        """In the second batch of a step: what the first has taken from the data is not lost to the resumed run."""
        straight = make_trainer(base, tmp_path / "straight", **self.settings(buffer_tokens=96))
        straight.train()
        broken = tiny_model("llama")
        trainer = make_trainer(broken, tmp_path / "run", **self.settings(buffer_tokens=96))

        class Break(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 7:
                    with torch.no_grad():
                        broken.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan

        trainer.add_callback(Break())
        with pytest.raises(TranscoderError, match="NaN or infinity") as error:
            trainer.train()
        step = trainer.state.global_step
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        assert 7 <= step < 20
        assert str(error.value).endswith(f"the state after step {step} is in {checkpoint}, to resume from.")
        again = make_trainer(base, tmp_path / "run", **self.settings(buffer_tokens=96))
        again.train(resume_from_checkpoint=True)
        assert same_weights(weights(again.model), weights(straight.model))
        assert again.state.epoch == straight.state.epoch

    def test_a_diverged_run_stops_at_the_next_log_and_keeps_its_last_good_checkpoint(self, base, tmp_path, straight):
        def plant(trainer, step):
            class Plant(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    if state.global_step == step:
                        with torch.no_grad():
                            trainer.model.b_dec[0] = math.nan

            trainer.add_callback(Plant())
            return trainer

        # At step 10 a checkpoint is due before the next log.
        for logging_steps, step, message in (
            (
                4,
                6,
                r"^The run has diverged at step 8 \(the loss of layers.1.mlp.transcoder was nan; weights .*checkpoint-5,",
            ),
            (
                7,
                9,
                r"^The weights of layers.1.mlp.transcoder are NaN or infinite at step 10, so .*checkpoint-5, the last",
            ),
        ):
            run = tmp_path / str(step)
            trainer = plant(make_trainer(base, run, logging_steps=logging_steps, **SAVING), step)
            with pytest.raises(TranscoderError, match=message):
                trainer.train()
            assert names(run) == ["checkpoint-5"]
            assert TranscoderModel.from_pretrained(run / "checkpoint-5").b_dec.isfinite().all()
            again = make_trainer(base, run, **SAVING)
            again.train(resume_from_checkpoint=True)
            assert same_weights(weights(again.model), straight[1])


class Overflow(TrainerCallback):
    """Makes the gradient of step 6, or the activations of step 7, too large for fp16."""

    def __init__(self, trainer):
        self.trainer, self.seen = trainer, {}
        trainer.add_callback(self)
        for dictionary in trainer.dictionaries.values():
            dictionary.W_enc.register_hook(lambda g: g * math.inf if trainer.state.global_step == 5 else g)
        compute_loss = trainer.compute_loss

        def overflowing(model, inputs, *args, **kwargs):
            factor = 1e30 if trainer.state.global_step == 6 else 1.0
            return compute_loss(model, {site: value * factor for site, value in inputs.items()}, *args, **kwargs)

        trainer.compute_loss = overflowing

    def on_step_end(self, args, state, control, **kwargs):
        self.seen[state.global_step] = {
            "weights": weights(self.trainer.model),
            "scale": self.trainer.accelerator.scaler.get_scale(),
            "schedule": self.trainer.lr_scheduler.last_epoch,
            "optimizer": [s["step"].item() for s in self.trainer.optimizer.state.values()],
        }


class TestFp16:
    """accelerate wants a GPU for fp16, so on a CPU its scaler and its autocast are put where it would have put them."""

    @pytest.fixture(params=["cpu", "cuda"])
    def device(self, request, monkeypatch):
        if request.param == "cuda" and not torch.cuda.is_available():
            pytest.skip("no GPU")
        yield request.param
        monkeypatch.undo()

    def trainer(self, tmp_path, device, monkeypatch, **changes):
        base = tiny_model("llama")
        torch.manual_seed(0)
        model = TranscoderSet(
            {
                "unit": make_model(base, 1, read=WRITE, decoder_norm="unit"),
                "batch": make_model(base, 2, activation="batchtopk"),
                "jump": make_model(base, 3, activation="jumprelu", k=None, l0_coefficient=1e-3),
            }
        )
        settings = {**SAVING, "max_steps": 12, "save_steps": 4, "logging_steps": 2, "dead_after_tokens": 64, **changes}
        settings |= {"use_cpu": True} if device == "cpu" else {"use_cpu": False, "fp16": True}
        trainer = make_trainer(base, tmp_path, model, **settings)
        if device == "cpu":
            monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "fp16")
            trainer.accelerator.native_amp = True
        # Small enough that nothing overflows but what is planted; it grows once on the way.
        trainer.accelerator.scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=9)
        return trainer

    def test_planted_overflows_skip_exactly_their_steps(self, tmp_path, device, monkeypatch):
        trainer = self.trainer(tmp_path, device, monkeypatch)
        seen = Overflow(trainer).seen
        trainer.train()
        for step in range(2, 13):
            before, after = seen[step - 1], seen[step]
            skipped = step in (6, 7)
            trained = [name for name, _ in trainer.model.named_parameters()]
            unchanged = all(torch.equal(before["weights"][name], after["weights"][name]) for name in trained)
            assert unchanged == skipped, step
            assert after["schedule"] - before["schedule"] == (0 if skipped else 1), step
            assert {b - a for a, b in zip(before["optimizer"], after["optimizer"], strict=True)} == {
                0 if skipped else 1
            }
            assert after["scale"] == (before["scale"] / 2 if skipped else before["scale"]), step
        assert seen[12]["scale"] == 256
        assert all(math.isfinite(v) for log in trainer.state.log_history for v in log.values())
        logs = {log["step"]: log for log in trainer.state.log_history if "unit/grad_norm" in log}
        assert logs.keys() == {2, 4, 6, 8, 10, 12}
        # The mean of the step beside the one that was left out, not half of it.
        assert logs[6]["unit/grad_norm"] > 0.7 * logs[4]["unit/grad_norm"]
        assert all(value.isfinite().all() for value in trainer.model.state_dict().values())

    @pytest.mark.parametrize("stop", [4, 8])
    def test_resumes_bit_for_bit(self, tmp_path, device, monkeypatch, stop):
        if device == "cuda":
            torch.use_deterministic_algorithms(True, warn_only=True)
        finals = []
        for start in (None, str(tmp_path / "a" / f"checkpoint-{stop}")):
            folder = tmp_path / ("a" if start is None else "b")
            trainer = self.trainer(folder, device, monkeypatch)
            Overflow(trainer)
            trainer.train(resume_from_checkpoint=start)
            scaler = load_state(folder / "checkpoint-12" / "scaler.safetensors")
            losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
            monitors = load_file(folder / "checkpoint-12" / "monitors_0.safetensors")
            finals.append((weights(trainer.model), scaler, losses, monitors))
        (a, scaler_a, losses_a, monitors_a), (b, scaler_b, losses_b, monitors_b) = finals
        assert scaler_a == scaler_b and scaler_a["scale"] == 256
        if device == "cpu":
            assert same_weights(a, b) and losses_a == losses_b and same_weights(monitors_a, monitors_b)
        else:
            assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)

    def test_a_run_that_overflows_for_ever_is_stopped(self, tmp_path, device, monkeypatch):
        trainer = self.trainer(tmp_path, device, monkeypatch, max_steps=40)
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda model, inputs, *args, **kwargs: compute_loss(
            model, {site: value * 1e30 for site, value in inputs.items()}, *args, **kwargs
        )
        with pytest.raises(TranscoderError, match="every step since the last log overflowed in fp16"):
            trainer.train()
        assert trainer.state.global_step < 20


def test_manifest_lists_every_file_with_its_size(straight):
    folder = straight[0] / "checkpoint-5"
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert files == {
        path.name: path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name != MANIFEST
    }
    assert {
        "model.safetensors",
        "optimizer.safetensors",
        "scheduler.safetensors",
        "rng_state_0.safetensors",
        "monitors_0.safetensors",
    } < files.keys()
