"""
Kills a small run with SIGKILL again and again, and starts it anew from what it has left.

Importing torch takes longer than the run, so every attempt is a fork of one process that has imported everything and
computed nothing: a real process, which a signal ends where it stands.
"""

import dataclasses
import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.utils import logging

from hf_transcoders import (
    TranscoderConfig,
    TranscoderModel,
    TranscoderSet,
    TranscoderTrainer,
    TranscoderTrainingArguments,
)
from hf_transcoders.training import checkpoints
from hf_transcoders.training.state_files import load_state
from tests.data.test_harvest import token_rows
from tests.tiny_models import tiny_model


READ, WRITE = "layers.1.mlp.in", "layers.1.mlp.branch"
MAX_STEPS = 60
# Where a process is, written into memory that it shares with the one that kills it.
STARTING, FIRST_BLOCK, STEPPING, WRITING, RENAMING, ROTATING, SAVING_MODEL = range(7)
MOMENTS = (
    "starting or loading",
    "before the first step",
    "between saves",
    "writing a checkpoint",
    "renaming it",
    "rotating",
    "final save",
)
# Logs hold these too; they are time, not training.
_TIMED = {"tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


@dataclasses.dataclass
class Kill:
    """One kill: what the process was doing, and how many batches of the current block it had used."""

    moment: int
    step: int
    offset: int


def make_trainer(output_dir: Path, **changes) -> TranscoderTrainer:
    """A set in which everything that a run carries along matters: thresholds, dead features, AuxK."""
    base = tiny_model("llama")
    torch.manual_seed(0)
    size = {"num_features": 64}
    dictionaries = TranscoderSet(
        {
            "topk": TranscoderModel(TranscoderConfig.for_model(base, READ, WRITE, k=4, **size)),
            "batchtopk": TranscoderModel(
                TranscoderConfig.for_model(base, READ, WRITE, activation="batchtopk", k=4, **size)
            ),
            "jumprelu": TranscoderModel(
                TranscoderConfig.for_model(base, WRITE, activation="jumprelu", l0_coefficient=1e-3, **size)
            ),
        }
    )
    settings = {
        "max_steps": MAX_STEPS,
        "per_device_train_batch_size": 32,
        "harvest_batch_size": 8,
        "buffer_tokens": 224,  # Seven batches, so that blocks and checkpoints fall together nowhere.
        "learning_rate": 3e-3,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": 2,
        "dead_after_tokens": 64,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **changes,
    }
    return TranscoderTrainer(
        dictionaries, base, TranscoderTrainingArguments(str(output_dir), **settings), token_rows(64)
    )


def run(output_dir: Path, shared: mmap.mmap) -> None:
    """The whole job, as `train --resume` does it. It notes in `shared` where it is."""

    def note(moment):
        shared[0] = moment

    def noting(moment, function, after):
        def call(*args, **kwargs):
            note(moment)
            result = function(*args, **kwargs)
            note(after)
            return result

        return call

    logging.disable_progress_bar()
    checkpoints.commit = noting(RENAMING, checkpoints.commit, WRITING)
    checkpoints.rotate = noting(ROTATING, checkpoints.rotate, STEPPING)
    trainer = make_trainer(output_dir)
    trainer._save_checkpoint = noting(WRITING, trainer._save_checkpoint, STEPPING)
    get_batches = trainer.get_batch_samples

    def get_batch_samples(*args, **kwargs):
        if shared[0] == STARTING:
            note(FIRST_BLOCK)
        result = get_batches(*args, **kwargs)
        if shared[0] == FIRST_BLOCK:
            note(STEPPING)
        shared[1], shared[2] = trainer.state.global_step, trainer.stream.shards[0].state_dict()["offset"]
        return result

    trainer.get_batch_samples = get_batch_samples
    trainer.train(resume_from_checkpoint=True)
    note(SAVING_MODEL)
    trainer.save_model()
    trainer.save_state()


def _fork(output_dir: Path, shared: mmap.mmap) -> int:
    shared[0] = STARTING
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(output_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        run(output_dir, shared)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _finish(child: int, output_dir: Path) -> bool:
    """Whether the process ended by itself; an error of its own ends everything."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status != 0:
        raise RuntimeError("The run failed:\n" + output_dir.with_suffix(".log").read_text()[-3000:])
    return True


def kill_and_resume(folder: Path, kills: int, seed: int = 0) -> tuple[list[Kill], int, int, list[str]]:
    """
    Runs once undisturbed, then as often as it takes to kill the process `kills` times: a run that comes to its end is
    compared, and another begins.

    Args:
        folder (`Path`): For the runs.
        kills (`int`): How many.
        seed (`int`, *optional*, defaults to 0): Seed of the moments at which the run is killed.

    Returns:
        The kills, how many of them were survived, how many runs came to their end, and what differed from the undisturbed
        one.
    """
    torch.set_num_threads(1)
    chance = random.Random(seed)
    shared = mmap.mmap(-1, 16)
    straight = folder / "straight"
    start = time.monotonic()
    _finish(_fork(straight, shared), straight)
    duration = time.monotonic() - start
    done, survived, ended, differences = [], 0, 0, []
    while len(done) < kills or ended == 0:
        output_dir = folder / f"run-{ended}"
        before = len(done)
        # Several attempts for each run, whatever the chances were, and one that is left alone.
        attempts = [chance.random() for _ in range(min(chance.randint(3, 8), kills - len(done)))]
        for share in [*attempts, None]:
            child = _fork(output_dir, shared)
            if share is not None:
                _wait(child, shared, chance, duration)
                moment = Kill(*shared[:3])
                os.kill(child, signal.SIGKILL)
            if _finish(child, output_dir):
                break
            done.append(moment)
        ended += 1
        wrong = compare(straight, output_dir)
        differences += [f"run {ended}: {text}" for text in wrong]
        survived += 0 if wrong else len(done) - before
        shutil.rmtree(output_dir)
    return done, survived, ended, differences


def _wait(child: int, shared: mmap.mmap, chance: random.Random, duration: float) -> None:
    """Until a random moment of the process: any, or one inside something that is soon over."""
    aim = chance.choice([None, None, WRITING, RENAMING, ROTATING, SAVING_MODEL])
    if aim is None:
        time.sleep(chance.uniform(0.0, 0.7 * duration))
        return
    deadline = time.monotonic() + duration
    for _ in range(chance.randint(1, 4)):  # The n-th time that it comes there.
        while shared[0] == aim and time.monotonic() < deadline:
            time.sleep(0.0002)
        while shared[0] != aim and time.monotonic() < deadline:
            time.sleep(0.0002)
        if aim == SAVING_MODEL:
            break
    time.sleep(chance.uniform(0.0, {WRITING: 0.02}.get(aim, 0.004)))


def compare(straight: Path, resumed: Path) -> list[str]:
    """What differs between two finished runs, time apart."""
    wrong = []
    last = f"checkpoint-{MAX_STEPS}"
    names = {p.relative_to(straight) for p in straight.rglob("*") if p.is_file() and "tracking" not in p.parts}
    found = {p.relative_to(resumed) for p in resumed.rglob("*") if p.is_file() and "tracking" not in p.parts}
    wrong += [f"{name} is only in one of the runs" for name in names ^ found]
    for name in sorted(names & found):
        a, b = straight / name, resumed / name
        if name.name == "trainer_state.json":
            same = _state(a) == _state(b)
        elif name.name == "training_args.json":
            continue  # Holds the run's folder.
        elif name.name == "checkpoint.json":
            same = json.loads(a.read_text())["files"].keys() == json.loads(b.read_text())["files"].keys()
        elif name.name.startswith(("optimizer", "scheduler", "rng_state")):
            same = _equal(load_state(a), load_state(b))
        elif name.name.startswith("monitors"):
            same = _equal(load_file(a), load_file(b))
        else:
            same = a.read_bytes() == b.read_bytes()
        if not same:
            wrong.append(f"{name} differs")
    if not (straight / last / "optimizer.safetensors").exists():
        wrong.append("nothing was compared")
    if (straight / "tracking").exists():
        a, b = (_records(run / "tracking" / "scalars.jsonl") for run in (straight, resumed))
        if a != b:
            wrong.append("tracking/scalars.jsonl differs")
    return wrong


def _equal(a, b) -> bool:
    """Bit for bit, through whatever holds the tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool((a == b).all()) if hasattr(a, "all") else a == b


def _state(path: Path):
    state = json.loads(path.read_text())
    state["log_history"] = [{k: v for k, v in log.items() if k not in _TIMED} for log in state["log_history"]]
    return state


def _records(path: Path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    timed = {"time"} | {f"train/{name}" for name in _TIMED} | _TIMED
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def main(folder: str, kills: str, seed: str = "0") -> None:
    done, survived, ended, differences = kill_and_resume(Path(folder), int(kills), int(seed))
    counts = Counter(MOMENTS[kill.moment] for kill in done)
    inside = sum(kill.moment == STEPPING and kill.offset % 7 != 0 for kill in done)
    print(
        json.dumps(
            {
                "kills": len(done),
                "survived": survived,
                "moments": counts,
                "inside_a_block": inside,
                "runs_ended": ended,
                "differences": differences,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
