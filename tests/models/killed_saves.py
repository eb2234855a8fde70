"""Saves that are killed with SIGKILL while somebody reads: what a folder holds must be of one save, and nothing may stay.

`python -m tests.models.killed_saves <folder> <kills> <seed>` prints a tally as JSON, for `benchmarks/kill_saves.py`.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging

from hf_transcoders.circuits.graphs import AttributionGraph
from hf_transcoders.files import _SAVING
from hf_transcoders.models import TranscoderModel, TranscoderSet
from tests.circuits.graphs.random_graph import random_graph

from .reference_dictionary import make_model


class Dictionary:
    """Two saves of a dictionary, each marked in its configuration and in its weights; the second is sharded."""

    def __init__(self):
        self.models = [self.marked(k) for k in (3, 7)]

    @staticmethod
    def marked(k):
        model = make_model("topk", k=k, normalization="scale", d_in=16, d_out=16, num_features=64)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.fill_(float(k) + len(name) / 100)
        return model

    @staticmethod
    def mark(model):
        """What the configuration says, where all weights say the same."""
        k = model.config.k
        same = all(bool((p == float(k) + torch.tensor(len(n) / 100)).all()) for n, p in model.named_parameters())
        return k if same else None

    def save(self, number, folder):
        self.models[number].save_pretrained(folder, **({"max_shard_size": 2000} if number else {}))

    def read(self, folder):
        return self.mark(TranscoderModel.from_pretrained(folder))


class Set(Dictionary):
    """Two saves of a set: one has a dictionary more."""

    def save(self, number, folder):
        model = self.models[number]
        TranscoderSet({"a": model, "b": model, **({"c": model} if number else {})}).save_pretrained(folder)

    def read(self, folder):
        transcoders = TranscoderSet.from_pretrained(folder)
        marks = {self.mark(model) for model in transcoders.values()}
        (found,) = marks if len(marks) == 1 else (None,)
        return found if len(transcoders) == {3: 2, 7: 3}.get(found) else None


class Graph:
    """Two saves of a graph, each marked in its metadata and by the number of its nodes."""

    def __init__(self):
        self.graphs = [random_graph(seed=seed, features=3, targets=2) for seed in (3, 7)]
        for mark, graph in zip((3, 7), self.graphs, strict=True):
            graph.metadata["mark"] = mark
        self.nodes = {3: self.graphs[0].num_nodes, 7: self.graphs[1].num_nodes}
        assert len(set(self.nodes.values())) == 2

    def save(self, number, folder):
        self.graphs[number].save_pretrained(folder)

    def read(self, folder):
        graph = AttributionGraph.from_pretrained(folder)
        mark = graph.metadata["mark"]
        return mark if graph.num_nodes == self.nodes[mark] else None


KINDS = {"dictionary": Dictionary, "set": Set, "graph": Graph}


def tally(kind: str, folder: Path, kills: int, seed: int) -> dict[str, int]:
    """
    Kills a process that saves over and over, at random moments, while this one reads.

    Returns:
        `dict[str, int]`: `kills`; `reads` meanwhile and afterwards; `mixed` ones; `refused` ones; `halfway`, kills while files
            were on their way; `left`, files and folders that were still there after one more save.
    """
    subject, target, moments = KINDS[kind](), folder / kind, random.Random(seed)
    for number in (1, 0):
        subject.save(number, target)
    # Files of a dictionary that the set no longer has stay, as all files do that a save has not written.
    expected = _files(target)
    found = dict.fromkeys(("kills", "reads", "mixed", "refused", "halfway", "left"), 0)

    def read():
        found["reads"] += 1
        try:
            found["mixed"] += subject.read(target) is None
        except Exception as error:
            found["refused"] += 1
            print(f"{type(error).__name__}: {error}", file=sys.stderr)

    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                for number in itertools.cycle((1, 0)):
                    subject.save(number, target)
            finally:
                os._exit(1)
        end = time.monotonic() + moments.uniform(0.002, 0.1)
        read()
        time.sleep(max(0.0, end - time.monotonic()))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found["kills"] += 1
        found["halfway"] += (target / _SAVING).exists()
        read()
    subject.save(0, target)
    found["left"] = len(_files(target) ^ expected) + sum(path != target for path in folder.glob(f".{kind}*"))
    return found


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


if __name__ == "__main__":
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps({kind: tally(kind, folder, kills, seed) for kind in KINDS}))
