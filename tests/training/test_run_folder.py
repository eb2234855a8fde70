"""One folder, one run: another run is refused before anything is written, or deleted when asked for."""

import json
import shutil

import pytest

from hf_transcoders import TranscoderError, TranscoderModel, TranscoderSet
from hf_transcoders.training.run_folder import check_run_folder
from tests.training.test_trainer import make_model, make_trainer


SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}


def pair(base):
    return TranscoderSet({"layers.1": make_model(base), "layers.1.again": make_model(base, seed=1)})


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """The folder of a finished run of a set, with a checkpoint."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trainer = make_trainer(base, folder, pair(base), **SAVING)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_is_refused_and_left_as_it_is(base, run):
    before = files(run)
    with pytest.raises(
        TranscoderError,
        match="holds layers.1, layers.1.again and checkpoint-6, and a folder is for one run.*overwrite",
    ):
        make_trainer(base, run, **SAVING).train()
    assert files(run) == before


def test_checkpoints_of_other_dictionaries_are_refused(base, run):
    for name in ("transcoder_set.json", "layers.1/config.json", "layers.1.again/config.json"):
        (run / name).unlink()
    before = files(run)
    with pytest.raises(TranscoderError, match="holds checkpoint-6 of a run of layers.1, layers.1.again, and a folder"):
        make_trainer(base, run, **SAVING).train()
    assert files(run) == before


def test_overwriting_deletes_that_run_and_nothing_else(base, run, caplog):
    (run / "notes.txt").write_text("mine")
    (run / "checkpoint-500").mkdir()
    (run / "checkpoint-500" / "model.safetensors").write_text("of a language model")
    trainer = make_trainer(base, run, overwrite=True, **SAVING)
    trainer.train()
    trainer.save_model()
    assert "held layers.1, layers.1.again and checkpoint-6, which the new run overwrites" in caplog.text
    assert isinstance(TranscoderModel.from_pretrained(run), TranscoderModel)
    with pytest.raises(TranscoderError, match="not a set"):
        TranscoderSet.from_pretrained(run)
    assert not (run / "layers.1").exists() and not (run / "layers.1.again").exists()
    # The rotation with a limit of one does not count what this trainer has not written.
    assert (run / "checkpoint-500" / "model.safetensors").exists() and (run / "checkpoint-6").is_dir()
    assert (run / "notes.txt").read_text() == "mine"


def test_the_same_trainer_trains_again(base, tmp_path):
    trainer = make_trainer(base, tmp_path, **SAVING)
    trainer.train()
    trainer.save_model()
    trainer.train()


def test_resuming_elsewhere_does_not_write_over_a_run(base, run, finished):
    with pytest.raises(TranscoderError, match="a folder is for one run"):
        make_trainer(base, run, pair(base), **SAVING).train(resume_from_checkpoint=str(finished / "checkpoint-6"))
    make_trainer(base, run, pair(base), **SAVING).train(resume_from_checkpoint=str(run / "checkpoint-6"))


def test_resuming_with_other_dictionaries_names_both(base, run):
    with pytest.raises(TranscoderError, match="dictionaries layers.1, layers.1.again and this run has layers.1.mlp"):
        make_trainer(base, run, **SAVING).train(resume_from_checkpoint=True)


def test_resuming_and_overwriting_exclude_each_other(run):
    with pytest.raises(TranscoderError, match="give one of them"):
        check_run_folder(run, resume=True, overwrite=True)


def test_the_folder_of_a_language_model_is_never_overwritten(base, tmp_path):
    base.save_pretrained(tmp_path)
    before = files(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(TranscoderError, match="holds a model of type 'llama'"):
            make_trainer(base, tmp_path, overwrite=overwrite).train()
    assert files(tmp_path) == before


def test_a_link_in_an_index_deletes_nothing_outside(base, run, tmp_path):
    outside = tmp_path / "outside"
    make_model(base).save_pretrained(outside)
    (run / "linked").symlink_to(outside)
    index = json.loads((run / "transcoder_set.json").read_text())
    index["dictionaries"]["linked"] = {"subfolder": "linked"}
    (run / "transcoder_set.json").write_text(json.dumps(index))
    before = files(outside)
    make_trainer(base, run, overwrite=True, **SAVING).train()
    assert files(outside) == before


class TestSaving:
    def test_a_single_dictionary_replaces_a_set(self, base, tmp_path):
        pair(base).save_pretrained(tmp_path)
        make_model(base, seed=2).save_pretrained(tmp_path)
        assert sorted(files(tmp_path)) == ["config.json", "model.safetensors"]

    def test_a_set_replaces_a_single_dictionary_and_other_members(self, base, tmp_path):
        make_model(base).save_pretrained(tmp_path)
        pair(base).save_pretrained(tmp_path)
        (tmp_path / "layers.1.again" / "notes.txt").write_text("mine")
        TranscoderSet({"layers.1": make_model(base)}).save_pretrained(tmp_path)
        assert sorted(files(tmp_path)) == [
            "layers.1.again/notes.txt", "layers.1/config.json", "layers.1/model.safetensors", "transcoder_set.json",
        ]  # fmt: skip

    def test_a_language_model_beside_it_stays(self, base, tmp_path):
        base.save_pretrained(tmp_path)
        before = files(tmp_path)
        pair(base).save_pretrained(tmp_path)
        assert before.items() <= files(tmp_path).items()
