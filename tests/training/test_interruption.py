"""Ctrl-C and SIGTERM: the step is finished and saved, one sentence says how to go on, and a second signal ends the run at once."""

import os
import signal

import pytest
from transformers import TrainerCallback

from hf_transcoders.data.harvest import ActivationHarvester
from hf_transcoders.training.interruption import RunInterrupted
from tests.training.test_run_folder import files, pair
from tests.training.test_trainer import make_trainer, same_weights, weights


SAVING = {"max_steps": 20, "save_strategy": "steps", "save_steps": 15, "save_total_limit": 1}


@pytest.fixture(autouse=True)
def heeded():
    """Heeds Ctrl-C, which shells ignore in commands that they start in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Signals(TrainerCallback):
    """Sends signals to this process at a step."""

    def __init__(self, number, step, event="on_step_begin", times=1):
        self.number, self.step, self.times = number, step, times
        setattr(self, event, self._send)

    def _send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def interrupted(base, folder, number=signal.SIGINT, step=6, event="on_step_begin", times=1, **changes):
    trainer = make_trainer(base, folder, **{**SAVING, **changes})
    trainer.add_callback(Signals(number, step, event, times))
    with pytest.raises(RunInterrupted) as stop:
        trainer.train()
    return trainer, stop.value


@pytest.mark.parametrize("number, code, name", [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_the_step_is_saved_and_resumed_exactly(base, straight, tmp_path, caplog, number, code, name):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    _, stop = interrupted(base, tmp_path, number)
    assert stop.exit_code == code
    assert str(stop) == (
        f"Stopped by {name}: step 7 of 20 is saved in {tmp_path / 'checkpoint-7'}, and --resume "
        "(`resume_from_checkpoint=True` in Python) goes on from there."
    )
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    again = make_trainer(base, tmp_path, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert f"Resuming from {tmp_path / 'checkpoint-7'}: step 7 of 20." in caplog.text
    assert same_weights(weights(again.model), straight[1])


def test_while_data_is_read_the_last_step_is_saved(base, straight, tmp_path, monkeypatch):
    trainer = make_trainer(base, tmp_path, **SAVING)
    chunk = ActivationHarvester.chunk

    def read(self, *args, **kwargs):
        if trainer.state.global_step >= 8:
            os.kill(os.getpid(), signal.SIGINT)
        return chunk(self, *args, **kwargs)

    monkeypatch.setattr(ActivationHarvester, "chunk", read)
    with pytest.raises(RunInterrupted, match="is saved in"):
        trainer.train()
    monkeypatch.undo()
    step = trainer.state.global_step
    assert 8 <= step < 20 and (tmp_path / f"checkpoint-{step}").is_dir()
    again = make_trainer(base, tmp_path, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert same_weights(weights(again.model), straight[1])


def test_a_second_signal_ends_it_at_once(base, tmp_path):
    """In the middle of a step, whose state is not saved."""
    trainer, stop = interrupted(base, tmp_path, step=17, times=2)
    assert str(stop).startswith(
        f"Stopped by Ctrl-C: step 15 of 20 is saved in {tmp_path / 'checkpoint-15'}, and --resume"
    )
    assert trainer.state.global_step == 17
    assert not (tmp_path / ".partial").exists()
    _, stop = interrupted(base, tmp_path / "new", step=3, times=2)
    assert str(stop) == "Stopped by Ctrl-C at step 3 of 20: nothing was saved."


def test_nothing_is_half_written_if_the_save_is_interrupted(base, tmp_path, monkeypatch):
    trainer = make_trainer(base, tmp_path, **SAVING)
    trainer.add_callback(Signals(signal.SIGINT, 6))
    write = type(trainer)._save_optimizer_and_scheduler

    def interrupted_write(self, folder):
        write(self, folder)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(type(trainer), "_save_optimizer_and_scheduler", interrupted_write)
    with pytest.raises(RunInterrupted, match="at step 7 of 20: nothing was saved"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / ".partial").exists()


def test_without_checkpoints_nothing_is_saved(base, tmp_path):
    _, stop = interrupted(base, tmp_path, save_strategy="no")
    assert str(stop) == "Stopped by Ctrl-C at step 7 of 20: nothing was saved (`save_strategy` is 'no')."
    assert not list(tmp_path.glob("checkpoint-*"))


def test_after_a_resume_that_took_no_step_the_old_checkpoint_stays(base, tmp_path, monkeypatch):
    interrupted(base, tmp_path)
    before = files(tmp_path / "checkpoint-7")
    trainer = make_trainer(base, tmp_path, **SAVING)
    chunk = ActivationHarvester.chunk
    reading = []

    def read(self, *args, **kwargs):
        # Not the reading that checks whether the data is the same.
        if trainer._interruption.signal is None and trainer.state.global_step == 7 and trainer.is_in_train:
            reading.append(args)
            os.kill(os.getpid(), signal.SIGINT)
        return chunk(self, *args, **kwargs)

    monkeypatch.setattr(ActivationHarvester, "chunk", read)
    with pytest.raises(RunInterrupted, match="step 7 of 20 is saved"):
        trainer.train(resume_from_checkpoint=True)
    assert reading and files(tmp_path / "checkpoint-7") == before


def test_the_dictionaries_are_saved_before_the_records_are_completed(base, tmp_path):
    trainer = make_trainer(base, tmp_path, pair(base), **SAVING)
    seen = []
    trainer.tracking._record_features = lambda *args: seen.append(sorted(p.name for p in tmp_path.glob("layers*")))
    trainer.train()
    assert seen == [["layers.1", "layers.1.again"]]
