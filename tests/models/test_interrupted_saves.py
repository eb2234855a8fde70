"""Saves that die or run out of room, and readers meanwhile: one whole save, and nothing left."""

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from hf_transcoders import files
from hf_transcoders.errors import TranscoderError
from hf_transcoders.evaluation import EvaluationReport
from hf_transcoders.files import atomic_directory, atomic_file, read_settled, write_text
from hf_transcoders.models import TranscoderModel, TranscoderSet

from .killed_saves import KINDS, tally
from .reference_dictionary import make_model


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# What moves, makes or removes files in `files.py`.
_STEPS = [(os, "replace"), (Path, "rename"), (Path, "unlink"), (files.shutil, "rmtree"), (Path, "mkdir")]


def in_child(work):
    """Runs a function in a forked process; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def dying_at(step, work):
    """The function, in a process that is killed in the middle of it: before the `step`-th operation on files."""

    def run():
        count = 0

        def counted(real):
            def operation(*args, **kwargs):
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return operation

        for owner, name in _STEPS:
            setattr(owner, name, counted(getattr(owner, name)))
        work()

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_step(kind, tmp_path):
    """Whichever step a save dies at, what is read is the old save or the new one, and the next save tidies up."""
    subject, target = KINDS[kind](), tmp_path / "target"
    for number in (1, 0):
        subject.save(number, target)
    names = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    found, step, ended = [], 0, False
    while not ended:
        step += 1
        ended = in_child(dying_at(step, lambda: subject.save(1, target)))
        found.append(subject.read(target))
        subject.save(0, target)
        assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*")} == names
        assert subject.read(target) == 3
    assert set(found) == {3, 7} and step > 5
    # Once the new one is there, it stays.
    assert found == sorted(found)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments_while_somebody_reads(kind, tmp_path):
    found = tally(kind, tmp_path, kills=4, seed=1)
    assert found["kills"] == 4 and found["reads"] == 8
    assert found["mixed"] == found["refused"] == found["left"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_often(kind, tmp_path):
    found = tally(kind, tmp_path, kills=200, seed=2)
    assert found["mixed"] == found["refused"] == found["left"] == 0


def test_many_readers_while_it_is_saved_over_and_over(tmp_path):
    """Also through `AutoModel`, which reads the configuration before the weights are opened."""
    subject = KINDS["dictionary"]()
    subject.save(0, tmp_path / "m")
    child = os.fork()
    if child == 0:
        try:
            while True:
                for number in (1, 0):
                    subject.save(number, tmp_path / "m")
        finally:
            os._exit(1)
    try:
        marks = [
            subject.mark(load.from_pretrained(tmp_path / "m"))
            for load in (TranscoderModel, AutoModel)
            for _ in range(10)
        ]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert set(marks) <= {3, 7}


def test_an_override_is_not_lost_where_a_save_comes_in_between(tmp_path):
    """`AutoModel(..., k=5)` has changed a configuration that is no longer that of the weights."""
    subject = KINDS["dictionary"]()
    subject.save(0, tmp_path)
    config = type(subject.models[0].config).from_pretrained(tmp_path)
    config.name_or_path = str(tmp_path)
    subject.save(1, tmp_path)
    assert TranscoderModel.from_pretrained(tmp_path, config=config).config.k == 7
    config.k = 5
    with pytest.raises(TranscoderError, match="was saved again after its configuration was read: load it again"):
        TranscoderModel.from_pretrained(tmp_path, config=config)


# ---------------------------------------------------------------------------- leftovers


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path):
    target = tmp_path / "run"

    def start():
        """A process that stands in the middle of a save: itself, the folder it writes, and how to let it go on."""
        (said, saying), (waiting, go_on) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with atomic_directory(target) as partial:
                    (partial / "a").write_text("1")
                    os.write(saying, str(partial).encode())
                    os.read(waiting, 1)
                    (partial / "b").write_text("2")
                os._exit(0)
            finally:
                os._exit(1)
        return child, Path(os.read(said, 1000).decode()), go_on

    (living, kept, go_on), (dead, gone, _) = start(), start()
    os.kill(dead, signal.SIGKILL)
    os.waitpid(dead, 0)
    (tmp_path / ".other.abcd.partial").mkdir()
    assert kept.is_dir() and gone.is_dir()
    with atomic_directory(target) as partial:
        (partial / "c").write_text("3")
    assert kept.is_dir() and not gone.exists() and (tmp_path / ".other.abcd.partial").exists()
    os.write(go_on, b"x")
    assert os.waitpid(living, 0)[1] == 0
    assert sorted(os.listdir(target)) == ["a", "b", "c"]
    assert sorted(os.listdir(tmp_path)) == [".other.abcd.partial", "run"]


def test_files_of_dead_processes_are_tidied_up_too(tmp_path):
    def die():
        with atomic_file(tmp_path / "run.json") as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    in_child(die)
    assert len(os.listdir(tmp_path)) == 1
    write_text(tmp_path / "run.json", "{}")
    assert os.listdir(tmp_path) == ["run.json"]


def test_threads_that_save_to_one_place(tmp_path):
    subject = KINDS["dictionary"]()
    errors = []

    def save(number):
        try:
            for _ in range(5):
                subject.save(number, tmp_path / "m")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(number % 2,)) for number in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "m").exists():
            assert subject.read(tmp_path / "m") in (3, 7)
    assert not errors and os.listdir(tmp_path) == ["m"]
    assert not [name for name in os.listdir(tmp_path / "m") if name.startswith(".")]


def test_a_reader_waits_for_a_save_that_is_on_its_way(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    write_text(tmp_path / "m" / "a", "old")
    inside = threading.Event()
    real = files._move_into_place

    def slowly(target):
        inside.set()
        time.sleep(0.2)
        real(target)

    monkeypatch.setattr(files, "_move_into_place", slowly)

    def save():
        with atomic_directory(tmp_path / "m") as partial:
            (partial / "a").write_text("new")

    thread = threading.Thread(target=save)
    thread.start()
    assert inside.wait(5)
    assert read_settled(tmp_path / "m", lambda opening: opening(tmp_path / "m" / "a").read_text()) == "new"
    thread.join()


# ---------------------------------------------------------------------------- a folder from a stranger


def test_a_strangers_half_way_save_reaches_nothing_outside(tmp_path):
    folder, victim = tmp_path / "m", tmp_path / "victim"
    victim.mkdir()
    (victim / "config.json").write_text("mine")
    saving = folder / files._SAVING

    def plant(written, replacing=None):
        make_model("topk").save_pretrained(folder)
        saving.mkdir()
        (saving / files._SAVE).write_text(json.dumps({"written": written, "replacing": replacing}))

    for written, replacing in (
        [["../victim/config.json"], None],
        [["/etc/x"], None],
        [3, None],
        [[], 3],
        [[[]], None],
    ):
        plant(written, replacing)
        with pytest.raises(TranscoderError):
            TranscoderModel.from_pretrained(folder)
        files.shutil.rmtree(saving)
    # Links in the folder, and in the save.
    plant(["a/config.json"])
    (folder / "a").symlink_to(victim)
    (saving / "a").mkdir()
    (saving / "a" / "config.json").write_text("theirs")
    with pytest.raises(TranscoderError, match="links that lead out"):
        TranscoderModel.from_pretrained(folder)
    files.shutil.rmtree(saving)
    os.remove(folder / "a")
    plant(["a/config.json"], "*")
    (saving / "a").symlink_to(victim)
    with pytest.raises(TranscoderError, match="links that lead out"):
        TranscoderModel.from_pretrained(folder)
    files.shutil.rmtree(saving)
    plant(["config.json"], "../victim/*")
    TranscoderModel.from_pretrained(folder)
    assert (victim / "config.json").read_text() == "mine" and os.listdir(victim) == ["config.json"]


def test_nothing_is_saved_through_a_link_out_of_the_folder(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").symlink_to("../victim")
    with pytest.raises(TranscoderError, match="is a link that leads out of"):
        TranscoderSet({"a": make_model("topk")}).save_pretrained(tmp_path / "set")
    assert not os.listdir(tmp_path / "victim") and os.listdir(tmp_path / "set") == ["a"]


# ---------------------------------------------------------------------------- no room, no permission


@pytest.mark.parametrize(
    "number, advice",
    [
        (errno.ENOSPC, "make room, then save again"),
        (errno.EDQUOT, "make room, then save again"),
        (errno.EROFS, "choose a folder that you may write to"),
        (errno.EACCES, "choose a folder that you may write to"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_written_is_one_sentence(kind, number, advice, tmp_path, monkeypatch):
    subject, target = KINDS[kind](), tmp_path / "target"
    subject.save(0, target)
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    real = files._commit

    def fail(partial, final, *args):
        if final == target:
            raise OSError(number, os.strerror(number), str(partial / "x"))
        real(partial, final, *args)

    monkeypatch.setattr(files, "_commit", fail)
    with pytest.raises(
        TranscoderError, match=f"target could not be written .{os.strerror(number)}.: {advice}"
    ) as caught:
        subject.save(1, target)
    assert isinstance(caught.value, OSError) and "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert os.listdir(tmp_path) == ["target"] and subject.read(target) == 3


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(TranscoderError, match="m could not be written"):
        make_model("topk").save_pretrained(tmp_path / "m")
    make_model("topk").save_pretrained(tmp_path / "n")
    (tmp_path / "n" / "model.safetensors").unlink()
    (tmp_path / "n" / "model.safetensors").mkdir()
    with pytest.raises(TranscoderError, match="n could not be written"):
        make_model("topk").save_pretrained(tmp_path / "n")
    assert sorted(os.listdir(tmp_path)) == ["m", "n"] and sorted(os.listdir(tmp_path / "n")) == [
        "config.json",
        "model.safetensors",
    ]


# ---------------------------------------------------------------------------- numbers of an evaluation


def test_an_evaluation_does_not_go_with_weights_of_another_save(tmp_path, monkeypatch):
    TranscoderSet({"a": make_model("topk"), "b": make_model("relu")}).save_pretrained(tmp_path / "set")
    entry = {"metrics": {"l0": 1.0}, "density_histogram": {}, "config": {}}
    report = EvaluationReport({"a": entry, "b": entry}, {"x": 1})
    report.save_into(tmp_path / "set")
    loaded = TranscoderSet.from_pretrained(tmp_path / "set")
    assert [model.config.evaluation["metrics"] for model in loaded.values()] == [{"l0": 1.0}] * 2
    other = TranscoderSet({"a": make_model("topk", k=2), "b": make_model("relu", seed=3)})
    real, saved = files._commit, []

    def meanwhile(partial, target, replacing, unchanged, removing):
        if unchanged and not saved:
            saved.append(True)
            other.save_pretrained(tmp_path / "set")
        real(partial, target, replacing, unchanged, removing)

    monkeypatch.setattr(files, "_commit", meanwhile)
    with pytest.raises(TranscoderError, match="config.json was saved again meanwhile, so nothing was written"):
        report.save_into(tmp_path / "set")
    loaded = TranscoderSet.from_pretrained(tmp_path / "set")
    assert loaded["a"].config.k == 2 and loaded["a"].config.evaluation is None
    assert torch.equal(loaded["b"].W_enc, other["b"].W_enc)
    assert sorted(os.listdir(tmp_path / "set")) == ["a", "b", "transcoder_set.json"]
