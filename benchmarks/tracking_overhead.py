"""Measure the cost of recording a run, in percent of the time of its steps.

    python benchmarks/tracking_overhead.py                        # CPU, or CUDA where there is one
    python benchmarks/tracking_overhead.py --windows 40 --json

One training run on cached activations: 4,608 features, width 576, batches of 2,048 tokens, a log every 20 steps. In every
second window of 20 steps the tracking callback and Trackio take part, in the others they are taken out. Two figures:

- inside: the time spent within the trackers' `on_log` (and in keeping a sample of activations), over the time of all steps;
- alternating: mean time of a window with tracking over the mean of one without, minus one. It also sees what Trackio's thread
  does in the background, and the noise of the machine: the scatter of its differences is printed with it.

Histograms come every 10 logs, as by default. Evaluations, with their tables and pages, cost what they cost once each and
are not part of it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback


class Alternate(TrainerCallback):
    """Remove the trackers in every second window, and time the windows."""

    def __init__(self, window: int, warmup: int):
        self.window, self.warmup = window, warmup
        self.times = {True: [], False: []}
        self.started = None
        self.trainer = None
        self.trackers = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.window:
            return
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        number = state.global_step // self.window
        if number > self.warmup:
            self.times[number % 2 == 0].append(now - self.started)
        handler = self.trainer.callback_handler
        handler.callbacks = [c for c in handler.callbacks if c not in self.trackers]
        # Windows are counted from 0; the odd ones are tracked, and end as even numbers.
        if number % 2:
            handler.callbacks = [*self.trackers, *handler.callbacks]
        self.started = time.perf_counter()


class Clock:
    """Add up the time spent in a method."""

    def __init__(self, owner, method: str, device):
        self.seconds, self.calls, self.device = 0.0, 0, device
        self.call = getattr(owner, method)
        setattr(owner, method, self)

    def __call__(self, *args, **kwargs):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            return self.call(*args, **kwargs)
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - start
            self.calls += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--num-features", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--windows", type=int, default=20, help="of each kind")
    parser.add_argument("--logging-steps", type=int, default=20)
    parser.add_argument("--report-to", nargs="+", default=["trackio"])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRACKIO_DIR", os.path.join(folder, "trackio"))
        result = measure(args, folder)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}, torch {torch.__version__}; {args.num_features} features, d {args.width}, batch {args.batch}, ",
        end="",
    )
    print(f"log every {args.logging_steps} steps, {', '.join(args.report_to)}")
    print(f"step                 {result['step_ms']:9.2f} ms")
    print(f"a log, tracked       {result['log_ms']:9.2f} ms")
    print(f"overhead, inside     {result['inside_percent']:9.3f} %")
    print(
        f"overhead, alternating{result['alternating_percent']:9.3f} % (standard error {result['standard_error']:.3f})"
    )


def measure(args, folder):
    from hf_transcoders import TranscoderConfig, TranscoderModel, TranscoderTrainer, TranscoderTrainingArguments

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=args.width, intermediate_size=2 * args.width, num_hidden_layers=1,
        num_attention_heads=9 if args.width % 9 == 0 else 8,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    rows = [{"input_ids": row} for row in torch.randint(512, (32 * args.batch // 128, 129)).tolist()]
    model = TranscoderModel(
        TranscoderConfig.for_model(
            base, "layers.0.mlp.in", "layers.0.mlp.branch", num_features=args.num_features, k=args.k
        )
    )
    # The first windows fill the cache of activations.
    alternate = Alternate(args.logging_steps, warmup=4)
    trainer = TranscoderTrainer(
        model,
        base,
        TranscoderTrainingArguments(
            os.path.join(folder, "run"),
            max_steps=(4 + 2 * args.windows) * args.logging_steps + 1,
            per_device_train_batch_size=args.batch,
            logging_steps=args.logging_steps,
            save_strategy="no",
            report_to=args.report_to,
            project="overhead",
            disable_tqdm=True,
            use_cpu=args.device == "cpu",
        ),
        train_dataset=rows,
        callbacks=[alternate],
    )
    stock = {"trackio": "TranscoderTrackioCallback", "tensorboard": "TensorBoardCallback", "wandb": "WandbCallback"}
    names = {"TranscoderTrackingCallback", *(stock[name] for name in args.report_to if name != "none")}
    alternate.trainer = trainer
    alternate.trackers = [c for c in trainer.callback_handler.callbacks if type(c).__name__ in names]
    clocks = [Clock(tracker, "on_log", trainer.args.device) for tracker in alternate.trackers]
    trainer.train()

    with_, without = alternate.times[True], alternate.times[False]
    differences = [a / b - 1 for a, b in zip(with_, without, strict=False)]
    tracked = args.logging_steps * (args.windows + 2)
    step = statistics.mean(without) / args.logging_steps
    # The last log, of the end of the run, is not one of a window.
    log = sum(clock.seconds for clock in clocks) / clocks[0].calls
    return {
        "device": args.device,
        "steps_tracked": tracked,
        "step_ms": 1e3 * step,
        "log_ms": 1e3 * log,
        "inside_percent": 100 * log / (args.logging_steps * step),
        "alternating_percent": 100 * (statistics.mean(with_) / statistics.mean(without) - 1),
        "standard_error": 100 * statistics.stdev(differences) / len(differences) ** 0.5,
    }


if __name__ == "__main__":
    main()
