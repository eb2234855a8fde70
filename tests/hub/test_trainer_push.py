"""The trainer on the Hub: at the end, and during training by `hub_strategy`."""

import json
import logging

import pytest
import torch
from huggingface_hub import snapshot_download

from hf_transcoders import TranscoderError, TranscoderModel, TranscoderSet
from hf_transcoders.hub.cards import is_generated
from hf_transcoders.testing.local_hub import Fault
from hf_transcoders.tracking import AlertThresholds, LocalTracker
from tests.data.test_harvest import token_rows
from tests.tiny_models import tiny_model
from tests.training.test_trainer import make_model, make_trainer

from .conftest import READER, assert_same_function


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama")


def during(strategy, **changes):
    return {
        "push_to_hub": True, "hub_model_id": "me/run", "hub_strategy": strategy, "hub_always_push": True,
        "save_strategy": "steps", "save_steps": 4, "save_total_limit": 1, **changes,
    }  # fmt: skip


def test_push_at_the_end_carries_the_numbers(hub, base, tmp_path):
    model = make_model(base)
    trainer = make_trainer(base, tmp_path, model, max_steps=4, eval_tokens=64, eval_loss_tokens=32)
    trainer.eval_dataset = token_rows(16)
    trainer.train()
    trainer.push_to_hub("me/trained", private=True)
    assert hub.repos["me/trained"].private and hub.log("me/trained")[0] == "End of training"
    card = hub.files("me/trained")["README.md"].decode()
    assert is_generated(card) and '"me/trained"' in card and "model-index" in card
    fvu = model.config.evaluation["metrics"]["fvu"]
    assert f"{fvu:.3f}" in card
    assert is_generated((tmp_path / "README.md").read_text())
    assert_same_function(model.eval(), TranscoderModel.from_pretrained("me/trained"))
    # The same evaluation serves a second push, in which nothing has changed.
    commits = hub.log("me/trained")
    evaluation = model.config.evaluation
    trainer.push_to_hub("trained")
    assert model.config.evaluation is evaluation and hub.log("me/trained") == commits
    assert json.loads(hub.files("me/trained")["training_args.json"])["max_steps"] == 4
    assert not list(tmp_path.glob(".*"))


def test_every_save_pushes_dictionaries_and_no_optimizer_state(hub, base, tmp_path):
    models = TranscoderSet([make_model(base), make_model(base, read="layers.1.mlp.branch")])
    trainer = make_trainer(base, tmp_path, models, **during("every_save"))
    tracker = LocalTracker(tmp_path)
    tracker.start({"name": "run"})
    tracker.scalars(1, {"train/loss": 1.0})
    trainer.train()
    assert hub.log("me/run") == [*(f"Training in progress, step {step}" for step in (12, 8, 4)), "initial commit"]
    names = {path.rpartition("/")[2] for path in hub.files("me/run")}
    assert not any("optimizer" in name or "rng_state" in name or "monitors" in name for name in names)
    assert "tracking/scalars.jsonl" in hub.files("me/run")
    for revision, step in zip(_commits(hub, "me/run"), (12, 8, 4), strict=True):
        loaded = TranscoderSet.from_pretrained("me/run", revision=revision)
        assert {d.config.training_summary["steps"] for d in loaded.values()} == {step}
    for name, loaded in TranscoderSet.from_pretrained("me/run").items():
        assert_same_function(models[name].eval(), loaded)
    assert is_generated(hub.files("me/run")["README.md"].decode())
    assert not list(tmp_path.glob(".*"))


def test_a_run_continues_from_the_checkpoint_on_the_hub(hub, base, tmp_path):
    trainer = make_trainer(base, tmp_path / "whole")
    trainer.train()
    expected = trainer.model.state_dict()
    make_trainer(base, tmp_path / "first", **during("checkpoint", max_steps=12)).train()
    assert any(path.startswith("last-checkpoint/optimizer") for path in hub.files("me/run"))
    eighth = _commits(hub, "me/run")[1]
    snapshot_download("me/run", revision=eighth, local_dir=tmp_path / "fetched")
    resumed = make_trainer(base, tmp_path / "second")
    resumed.train(resume_from_checkpoint=str(tmp_path / "fetched" / "last-checkpoint"))
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_all_checkpoints_keeps_each(hub, base, tmp_path):
    make_trainer(base, tmp_path, **during("all_checkpoints")).train()
    folders = {path.split("/")[0] for path in hub.files("me/run") if path.endswith("trainer_state.json")}
    assert folders == {"checkpoint-4", "checkpoint-8", "checkpoint-12"}


def test_end_pushes_when_the_model_is_saved(hub, base, tmp_path):
    trainer = make_trainer(base, tmp_path, **during("end", hub_revision="runs/1", hub_private_repo=True))
    trainer.train()
    assert hub.log("me/run", "runs/1") == ["initial commit"]
    trainer.save_model()
    assert hub.log("me/run", "runs/1") == ["Model save", "initial commit"] and hub.log("me/run") == ["initial commit"]
    assert hub.repos["me/run"].private


def test_a_push_that_fails_is_a_warning_and_the_run_goes_on(hub, base, tmp_path, caplog, monkeypatch):
    logger = logging.getLogger("hf_transcoders.training.trainer_push")
    logger.addHandler(caplog.handler)
    hub.faults.append(Fault("POST", "/commit/", status=500))
    trainer = make_trainer(base, tmp_path, **during("every_save"))
    trainer.train()
    logger.removeHandler(caplog.handler)
    assert trainer.state.global_step == 12
    assert "The push of step 4 failed, and the run continues: The Hub failed in the middle of the push" in caplog.text
    assert hub.log("me/run")[:2] == ["Training in progress, step 12", "Training in progress, step 8"]


def test_the_card_beside_the_run_is_the_one_on_the_hub_and_names_its_alerts(hub, base, tmp_path):
    trainer = make_trainer(base, tmp_path, hub_model_id="me/run")
    trainer.tracking.thresholds = AlertThresholds(spike_factor=0.0, window=2)
    trainer.train()
    trainer.push_to_hub()
    card = (tmp_path / "README.md").read_text()
    assert "Alerts raised during the run: Loss spike (1)." in card
    assert hub.files("me/run")["README.md"].decode() == card


def test_a_card_written_by_hand_beside_the_run_is_the_one_that_is_pushed(hub, base, tmp_path):
    trainer = make_trainer(base, tmp_path, max_steps=1)
    trainer.train()
    trainer.push_to_hub("me/x")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# By hand\n")
    trainer.push_to_hub("me/x")
    assert hub.files("me/x")["README.md"].decode().startswith("---\nlicense: mit\n---\n# By hand\n")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# By hand, better\n")
    trainer.push_to_hub("me/x")
    assert "better" in hub.files("me/x")["README.md"].decode()
    assert (tmp_path / "README.md").read_text() == "---\nlicense: mit\n---\n# By hand, better\n"


def test_a_token_that_may_not_write_is_said_before_training(hub, base, tmp_path):
    with pytest.raises(TranscoderError, match="may not write to me/run"):
        make_trainer(base, tmp_path, **during("every_save", hub_token=READER))
    with pytest.raises(TranscoderError, match="does not accept the token"):
        make_trainer(base, tmp_path, **during("every_save", hub_token="hf_wrong"))


def test_push_in_the_background_and_without_a_token_in_its_files(hub, base, tmp_path):
    trainer = make_trainer(base, tmp_path, max_steps=1, hub_token="hf_writer")
    trainer.train()
    future = trainer.push_to_hub("me/x", blocking=False, remote_code=True)
    assert future.result().oid == hub.repos["me/x"].refs["main"]
    files = hub.files("me/x")
    assert "modeling_transcoder.py" in files and "auto_map" in json.loads(files["config.json"])
    assert not any(b"hf_writer" in content for content in files.values())


def _commits(hub, repo_id):
    """Commits with content, newest first."""
    repo = hub.repos[repo_id]
    commit, found = repo.refs["main"], []
    while repo.commits[commit]["parent"] is not None:
        found.append(commit)
        commit = repo.commits[commit]["parent"]
    return found
