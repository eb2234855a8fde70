"""Compare batched patching with one hooked forward pass per head (two per sender for paths).

    python benchmarks/patching.py                       # CPU, or CUDA where there is one
    python benchmarks/patching.py --sample 144 --rounds 3 --json

A model of GPT-2-small's shape (12 layers of 12 heads, width 768, 50,257 tokens) with random weights, 16 prompts of 16
tokens; corrupted prompts are other random tokens throughout, which gives the fast paths no shared beginning. One hooked
forward pass sets a head's z, as it goes into the output projection, to that of the corrupted run, computes all logits, and
reads the logit difference at the last token; attention is SDPA. For a path there are two, as published code has them.
The activations of the corrupted run are recorded before brute force is timed; the fast paths are measured with a fresh
engine, which runs the prompts itself ("alone"), and with one that has run them before ("again").

Both sides run in one process, in turn; figures are medians of rounds and ratios are between medians. Brute force takes
minutes, so it runs on `--sample` heads spread over all layers and its time is that for all heads; with `--sample 144`
all run. Every fast result is compared with the brute-force one. Peak memory is what a process of its own takes for each
row, above the model and what was recorded for both sides.
"""

import argparse
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from hf_transcoders.circuits import Patching
from hf_transcoders.tasks import Task, logit_difference


LAYERS, HEADS, HEAD_DIM = 12, 12, 64


def make_model(device):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval().to(device)
    with torch.no_grad():
        # As far from uniform as a trained model's.
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(3)
            block.attn.c_proj.weight.mul_(3)
    return model


def make_task(prompts, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randint(100, 50_000, (prompts, length), generator=generator).tolist()  # noqa: E731
    clean, corrupted, answers = draw(), draw(), torch.randint(100, 50_000, (prompts, 2), generator=generator).tolist()
    rows = [
        {
            "clean": str(row), "clean_ids": clean[row], "corrupted": str(row), "corrupted_ids": corrupted[row],
            "answer_ids": answers[row][:1], "wrong_ids": answers[row][1:], "candidate_ids": answers[row],
            "positions": {"END": length - 1}, "template": 0,
        }
        for row in range(prompts)
    ]  # fmt: skip
    return Task(Dataset.from_list(rows), "random")


class BruteForce:
    """Run one hooked forward pass for each head; two for paths."""

    def __init__(self, model, task):
        self.model = model
        self.blocks = model.transformer.h
        self.clean = task.tokens("clean", device=model.device)
        self.corrupted = task.tokens("corrupted", device=model.device)
        self.answers = task.answers(device=model.device)
        self.z = [self._z(batch) for batch in (self.clean, self.corrupted)]

    def _z(self, batch):
        found = {}
        handles = [
            block.attn.c_proj.register_forward_pre_hook(
                lambda module, args, layer=layer: found.__setitem__(layer, args[0].clone())
            )
            for layer, block in enumerate(self.blocks)
        ]
        self._forward(batch)
        for handle in handles:
            handle.remove()
        return found

    @torch.no_grad()
    def _forward(self, batch=None):
        batch = self.clean if batch is None else batch
        logits = self.model(input_ids=batch.input_ids, use_cache=False).logits
        return logit_difference(logits[:, -1], self.answers.right, self.answers.wrong).cpu()

    def head(self, layer, head, positions):
        def hook(module, args):
            z = args[0].clone()
            columns = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            z[:, positions, columns] = self.z[1][layer][:, positions, columns]
            return (z,)

        handle = self.blocks[layer].attn.c_proj.register_forward_pre_hook(hook)
        values = self._forward()
        handle.remove()
        return values

    def residual(self, layer, position, streams):
        def hook(module, args):
            hidden = args[0].clone()
            hidden[:, position] = streams[layer][:, position]
            return (hidden, *args[1:])

        handle = self.blocks[layer].register_forward_pre_hook(hook)
        values = self._forward()
        handle.remove()
        return values

    def streams(self):
        found = {}
        handles = [
            block.register_forward_pre_hook(lambda m, args, layer=layer: found.__setitem__(layer, args[0].clone()))
            for layer, block in enumerate(self.blocks)
        ]
        self._forward(self.corrupted)
        for handle in handles:
            handle.remove()
        return found

    def path(self, layer, head, receiver):
        at, receiving = receiver
        columns = slice(receiving * HEAD_DIM, (receiving + 1) * HEAD_DIM)
        query = {}

        def freeze(of):
            def hook(module, args):
                z = args[0].clone()
                z[:, -1] = self.z[0][of][:, -1]
                if of == layer:
                    own = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                    z[:, -1, own] = self.z[1][of][:, -1, own]
                return (z,)

            return hook

        handles = [block.attn.c_proj.register_forward_pre_hook(freeze(of)) for of, block in enumerate(self.blocks)]
        reader = self.blocks[at].attn.c_attn
        handles.append(reader.register_forward_hook(lambda m, args, out: query.update(q=out[:, -1, columns].clone())))
        self._forward()
        for handle in handles:
            handle.remove()

        def put(module, args, out):
            out = out.clone()
            out[:, -1, columns] = query["q"]
            return out

        handle = reader.register_forward_hook(put)
        values = self._forward()
        handle.remove()
        return values


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function, args):
    clock = time.process_time if args.cpu_time else time.perf_counter
    synchronize(args.device)
    start = clock()
    result = function()
    synchronize(args.device)
    return clock() - start, result


def rows_of(args, brute, model, task):
    """Name -> (fast, with a new object or a given one, brute force on some cells, those cells, how many there are)."""
    length = args.length
    heads = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    low, high = (6, 4), (10, 7)

    def spread(cells):
        sample = max(1, min(args.sample, len(cells)))
        return [cells[len(cells) * number // sample] for number in range(sample)]

    def path(receiver):
        site = f"layers.{receiver[0]}.attn.head.{receiver[1]}.query"
        return (
            lambda patching=None: (patching or Patching(model, task)).paths([site]),
            lambda cell: brute.path(*cell, receiver),
            spread([cell for cell in heads if cell[0] < receiver[0]]),
            receiver[0] * HEADS,
        )

    points = [(layer, position) for layer in range(LAYERS) for position in range(length)]
    streams = brute.streams() if brute is not None else None
    return {
        "every head at END": (
            lambda patching=None: (patching or Patching(model, task)).heads("END"),
            lambda cell: brute.head(*cell, slice(length - 1, length)),
            spread(heads),
            len(heads),
        ),
        "paths to the query of 6.4": path(low),
        "paths to the query of 10.7": path(high),
        "every head at all positions": (
            lambda patching=None: (patching or Patching(model, task)).heads("all"),
            lambda cell: brute.head(*cell, slice(None)),
            spread(heads),
            len(heads),
        ),
        "residual stream, layer x position": (
            lambda patching=None: (patching or Patching(model, task)).residual(),
            lambda cell: brute.residual(*cell, streams),
            spread(points),
            len(points),
        ),
    }


def peak_memory(args, device, number):
    """Peak MiB of a row above the loaded model, fast and brute force, each in its own process."""
    found = []
    for side in ("fast", "brute"):
        command = [sys.executable, __file__, "--memory-of", f"{number}:{side}", "--prompts", str(args.prompts)]
        command += ["--length", str(args.length), "--device", device, "--threads", str(torch.get_num_threads())]
        found.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]))
    return found


def measure_memory(args):
    number, side = args.memory_of.split(":")
    model, task = make_model(args.device), make_task(args.prompts, args.length)
    args.sample = 1
    brute = BruteForce(model, task)

    fast, slow, cells, _ = list(rows_of(args, brute, model, task).values())[int(number)]
    before = in_use(args.device)
    fast() if side == "fast" else slow(cells[0])
    print(peak(args.device) - before)


def in_use(device):
    """MiB in use now; resets `peak`."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    # Loading took more than is in use, so the highest mark so far would hide what follows.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return status_mib("VmRSS")


def peak(device):
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else status_mib("VmHWM")


def status_mib(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--sample", type=int, default=12, help="cells that brute force runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, for a machine that others use too")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        return measure_memory(args)

    model, task = make_model(args.device), make_task(args.prompts, args.length)
    brute = BruteForce(model, task)
    results = []
    for number, (name, (fast, slow, cells, total)) in enumerate(rows_of(args, brute, model, task).items()):
        slow(cells[0])
        patching = Patching(model, task)
        found = fast(patching)
        times, again, per_cell, difference = [], [], [], 0.0
        for _ in range(args.rounds):
            times.append(timed(fast, args)[0])
            again.append(timed(functools.partial(fast, patching), args)[0])
            for cell in cells:
                seconds, expected = timed(functools.partial(slow, cell), args)
                per_cell.append(seconds)
                difference = max(difference, (found.values[cell] - expected).abs().max().item())
        row = {
            "row": name,
            "cells": total,
            "seconds": statistics.median(times),
            "seconds_again": statistics.median(again),
            "brute_force_seconds": statistics.median(per_cell) * total,
            "relative_difference": difference / found.values.abs().max().item(),
        }
        row["ratio"] = row["brute_force_seconds"] / row["seconds"]
        row["ratio_again"] = row["brute_force_seconds"] / row["seconds_again"]
        if not args.no_memory:
            row["peak_mib"], row["brute_force_peak_mib"] = peak_memory(args, args.device, number)
        results.append(row)
        if not args.json:
            print_row(row, first=number == 0)
    if args.json:
        print(json.dumps({"device": args.device, "threads": torch.get_num_threads(), "rows": results}))


def print_row(row, first):
    if first:
        print(
            f"{'':36}{'cells':>6}{'brute force':>13}{'alone':>10}{'ratio':>9}{'again':>10}{'ratio':>9}"
            f"{'difference':>12}{'peak MiB':>18}"
        )
    memory = f"{row['brute_force_peak_mib']:8.0f} ->{row['peak_mib']:6.0f}" if "peak_mib" in row else ""
    print(
        f"{row['row']:36}{row['cells']:6}{row['brute_force_seconds']:11.2f} s{row['seconds']:8.3f} s"
        f"{row['ratio']:8.1f}x{row['seconds_again']:8.3f} s{row['ratio_again']:8.1f}x"
        f"{row['relative_difference']:12.1e}{memory:>18}",
        flush=True,
    )


if __name__ == "__main__":
    main()
