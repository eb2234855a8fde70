"""
Kill a training run with SIGKILL many times, and measure the cost of resuming.

```
python benchmarks/kill_and_resume.py                       # 120 kills of a tiny run
python benchmarks/kill_and_resume.py --model smollm2-135m-instruct  # and the seconds that resuming takes on a real model
```

Every run that was killed and resumed is compared with an uninterrupted one: weights byte for byte, optimizer,
scheduler, random numbers, dead-feature counts, running metrics and logs. A kill counts as survived when its run
ended without any difference.

The overhead is the time from the start of the process to the end of its first optimizer step, resumed against fresh: same
model, same text, same block of activations to be read before that step. On a shared machine, processor time
is steadier than wall time.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
# Trains, and says on its last line when each optimizer step was over.
_TIMED_RUN = """
import json, sys, time
from transformers import TrainerCallback
from hf_transcoders import TranscoderConfig, TranscoderModel, TranscoderTrainer, TranscoderTrainingArguments
from hf_transcoders import load_texts, pack_tokens
from hf_transcoders.cli.common import load_base_model

options = json.loads(sys.argv[1])
base, tokenizer = load_base_model(options["model"], dtype="float32")
rows = pack_tokens(load_texts("docstrings", limit=2000), tokenizer, 128)
config = TranscoderConfig.for_model(base, "layers.8.mlp.in", "layers.8.mlp.branch", num_features=4608, k=32)
args = TranscoderTrainingArguments(
    options["output_dir"], max_steps=options["max_steps"], per_device_train_batch_size=2048,
    buffer_tokens=options["buffer_tokens"], logging_steps=1, save_strategy="steps", save_steps=options["save_steps"],
    disable_tqdm=True, report_to="none", use_cpu=True,
)
trainer = TranscoderTrainer(TranscoderModel(config), base, args, rows, processing_class=tokenizer)
times = {}

class Clock(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        times[state.global_step] = time.time(), time.process_time()

trainer.add_callback(Clock())
trainer.train(resume_from_checkpoint=options["resume"])
print(json.dumps(times))
"""


def tally(kills: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.training.killed_run", folder, str(kills), str(seed)]
        start = time.perf_counter()
        result = subprocess.run(command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.perf_counter() - start
    found = json.loads(result.stdout.splitlines()[-1])
    print(f"survived {found['survived']} / {found['kills']} kills, in {found['runs_ended']} runs, {seconds:.0f} s")
    for moment, count in sorted(found["moments"].items(), key=lambda item: -item[1]):
        print(f"  {count:4d}  {moment}")
    print(f"  {found['inside_a_block']:4d}  (of those between saves: in the middle of a block of activations)")
    for difference in found["differences"]:
        print(f"  differs: {difference}")


def overhead(model: str, rounds: int, buffer_tokens: int) -> None:
    fresh, resumed = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            # The checkpoint lies three steps into the first block, so that both runs read one block before their first step.
            options = {
                "model": model, "output_dir": folder, "buffer_tokens": buffer_tokens, "max_steps": 4, "save_steps": 3,
            }  # fmt: skip
            start, times = _timed({**options, "resume": None})
            fresh.append((times["1"][0] - start, times["1"][1]))
            shutil.rmtree(Path(folder, "checkpoint-4"))
            start, times = _timed({**options, "resume": str(Path(folder, "checkpoint-3"))})
            resumed.append((times["4"][0] - start, times["4"][1]))
            size = sum(path.stat().st_size for path in Path(folder, "checkpoint-3").rglob("*")) / 2**20
    print(f"layer 8, 4,608 features, blocks of {buffer_tokens} tokens, checkpoint of {size:.0f} MiB, {rounds} rounds")
    for number, clock in enumerate(("on the clock", "of the processor")):
        one, other = ([pair[number] for pair in pairs] for pairs in (fresh, resumed))
        print(f"seconds {clock}, from the start of the process to the end of its first step")
        print(f"  fresh    {statistics.median(one):6.1f}  {_all(one)}")
        print(f"  resumed  {statistics.median(other):6.1f}  {_all(other)}")
        print(f"  overhead {statistics.median(other) - statistics.median(one):+6.1f}")


def _timed(options: dict) -> tuple[float, dict[str, tuple[float, float]]]:
    start = time.time()
    command = [sys.executable, "-c", _TIMED_RUN, json.dumps(options)]
    result = subprocess.run(command, env=_environment(), stdout=subprocess.PIPE, text=True, check=True)
    return start, json.loads(result.stdout.splitlines()[-1])


def _all(seconds: list[float]) -> str:
    return "(" + ", ".join(f"{value:.1f}" for value in seconds) + ")"


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", help="Also measure the overhead on this model.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--buffer-tokens", type=int, default=16384)
    options = parser.parse_args()
    if options.kills:
        tally(options.kills, options.seed)
    if options.model:
        overhead(options.model, options.rounds, options.buffer_tokens)
