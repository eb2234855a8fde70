"""Damaged files are read, or refused in a sentence; and the fuzzer that says so sees every kind of fault."""

import ctypes
import random
import time
from pathlib import Path

import pytest
import torch

from hf_transcoders import TranscoderError

from . import runner
from .mutations import damage_file
from .outcomes import FAULTS, table
from .runner import Fuzzer
from .setup import quiet
from .target import Target
from .targets import TARGETS


def fuzz(folder, seed, cases):
    with quiet(folder):
        fuzzer = Fuzzer(folder, seed)
        records = fuzzer.run_all(fuzzer.cases(cases))
    return records, [record for record in records if record["outcome"] in FAULTS]


def test_a_few_hundred_damaged_files(tmp_path):
    records, faults = fuzz(tmp_path, seed=1, cases=300)
    assert len(records) >= 300 and {record["target"] for record in records} == TARGETS.keys()
    # The damage reaches what is read: neither is everything refused nor does nothing matter.
    assert sum(record["outcome"] == "refused" for record in records) > 60
    assert sum(record["outcome"] == "changed" for record in records) > 20
    assert not faults, "\n" + table(records)


@pytest.mark.slow
def test_ten_thousand_damaged_files(tmp_path):
    records, faults = fuzz(tmp_path, seed=2, cases=10_000)
    assert not faults, "\n" + table(records)


# ---------------------------------------------------------------------------------------------------- the fuzzer itself


class Planted(Target):
    """A reader that does what its file says."""

    def make(self, folder):
        (folder / "sample").mkdir()
        (folder / "sample" / "a.txt").write_text("fine")

    def damage(self, rng, sample, outside):
        (sample / "a.txt").write_text(self.behavior)
        return self.behavior

    def load(self, sample):
        behavior = (sample / "a.txt").read_text()
        if behavior == "refuse":
            raise TranscoderError("a.txt says no: say yes.")
        if behavior == "many lines":
            raise TranscoderError("a.txt\nsays no.")
        if behavior == "escape":
            raise TranscoderError("a.txt says \x1b[31mno.")
        if behavior == "raise":
            raise KeyError("a.txt")
        if behavior == "hub":
            raise OSError("a.txt is not there")
        if behavior == "system":
            raise OSError("no space")
        if behavior == "hang":
            start = time.process_time()
            while time.process_time() < start + 60:
                pass
        if behavior == "die":
            ctypes.string_at(0)
        if behavior == "allocate":
            return torch.ones(100_000_000).sum().item()
        if behavior == "allocate more":
            return torch.ones(10**12)
        if behavior == "read outside":
            return (sample / "../outside/a.txt").read_text()
        if behavior == "write outside":
            Path(sample, "../outside/b.txt").write_text("x")
        if behavior == "leave":
            Path(sample.parent, ".sample.partial").mkdir()
        if behavior == "rewrite":
            (sample / "a.txt").write_text("rewritten")
        return behavior

    def use(self, loaded, work):
        if loaded == "raise later":
            raise KeyError("b")
        if loaded == "refuse later":
            raise TranscoderError("a.txt is not of use: give another.")
        return [loaded, torch.tensor([1.0, float("nan") if loaded == "nan" else 2.0])]


@pytest.mark.parametrize(
    ("behavior", "outcome"),
    [
        ("fine", "equal"), ("other", "changed"), ("refuse", "refused"), ("refuse later", "refused"), ("hub", "refused"),
        ("many lines", "unclear"), ("escape", "unclear"), ("raise", "unclear"), ("system", "unclear"), ("raise later", "crash"),
        ("nan", "nan"), ("hang", "hang"), ("allocate", "memory"), ("allocate more", "memory"), ("die", "death"),
        ("read outside", "outside"), ("write outside", "outside"), ("leave", "left"), ("rewrite", "left"),
    ],
)  # fmt: skip
def test_every_kind_of_fault_is_seen(tmp_path, monkeypatch, behavior, outcome):
    target = Planted()
    target.behavior = behavior
    monkeypatch.setitem(TARGETS, "planted", target)
    monkeypatch.setattr(runner, "_CPU_SECONDS", 0.5)
    with quiet(tmp_path):
        (first, second) = Fuzzer(tmp_path, 1, ["planted"]).run_all([("planted", 1), ("planted", 2)])
    # What a case does to its process is not the next one's.
    assert first["outcome"] == second["outcome"] == outcome, first
    assert f"planted: {outcome}" in table([first]) or outcome not in FAULTS


def test_a_case_is_the_same_in_every_run(tmp_path):
    found = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        with quiet(folder):
            fuzzer = Fuzzer(folder, 7, ["yaml", "patch"])
            records = fuzzer.run_all(fuzzer.cases(12))
        found.append([(r["target"], r["number"], r["what"].replace(str(folder), ""), r["outcome"]) for r in records])
    assert found[0] == found[1] and len({what for _, _, what, _ in found[0]}) > 6


def test_every_kind_of_damage_can_be_done(tmp_path):
    """Mutations are random, so that a broken one would show rarely."""
    sources = {}
    for name in ("dictionary", "report", "runs", "yaml", "texts"):
        (tmp_path / name).mkdir()
        TARGETS[name].make(tmp_path / name)
        sources |= {path.suffix: path.read_bytes() for path in (tmp_path / name).rglob("*.*") if path.is_file()}
    assert {".json", ".jsonl", ".safetensors", ".yaml", ".csv", ".txt", ".parquet"} <= sources.keys()
    for suffix, content in sources.items():
        done = set()
        for seed in range(100):
            path = tmp_path / f"file{suffix}"
            path.write_bytes(content)
            done.add(damage_file(random.Random(seed), path, tmp_path / "outside"))
            if path.is_dir():
                path.rmdir()
        assert len(done) > 20, suffix
