"""Every run is recorded: what it was, its numbers, histograms, features, and how it ended."""

import math
from html.parser import HTMLParser

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK

import hf_transcoders
from hf_transcoders import (
    TranscoderConfig,
    TranscoderError,
    TranscoderModel,
    TranscoderTrackingCallback,
    TranscoderTrainingArguments,
    explain_features,
)
from hf_transcoders.tracking import AlertThresholds, Run, callback
from hf_transcoders.tracking.callback import changed_arguments
from hf_transcoders.tracking.names import DICTIONARY_METRICS, RICH_RECORDS, RUN_METRICS

from .conftest import EVIL, NAME, READ, WRITE


@pytest.fixture(scope="module")
def recorded(base, tokenizer, tmp_path_factory):
    """One whole run, with its trainer."""
    from .conftest import make_trainer

    make = make_trainer.__wrapped__(base, tokenizer, tmp_path_factory.mktemp("recorded"))
    trainer = make(callbacks=[TranscoderTrackingCallback(histogram_logs=5, num_features=4)], seed=7)
    trainer.train()
    return trainer, Run.load(trainer.args.output_dir)


def test_run_json_says_what_the_run_is(recorded):
    trainer, run = recorded
    assert run.name == "run" and run.facts["status"] == "finished"
    assert run.facts["dictionaries"] == {
        NAME: {
            "input_site": READ, "output_site": WRITE, "d_in": 32, "d_out": 32, "num_features": 64, "activation": "topk",
            "k": 4,
        }
    }  # fmt: skip
    assert run.facts["base_model"] == "llama" and run.facts["processes"] == 1 and run.facts["max_steps"] == 12
    assert run.facts["versions"]["hf_transcoders"] == hf_transcoders.__version__
    assert run.facts["arguments"]["seed"] == 7
    assert "adam_beta1" not in run.facts["arguments"]


def test_scalars_are_those_the_trainer_logs(recorded):
    trainer, run = recorded
    history = trainer.state.log_history
    for metric in ("fvu", "l0", "mse", "dead_fraction"):
        expected = [(log["step"], log[f"{NAME}/{metric}"]) for log in history if f"{NAME}/{metric}" in log]
        assert len(expected) == 12 and run.history(f"train/{NAME}/{metric}") == expected
    evaluated = [(log["step"], log[f"eval_{NAME}/fvu"]) for log in history if f"eval_{NAME}/fvu" in log]
    assert [step for step, _ in evaluated] == [6, 12] and run.history(f"eval/{NAME}/fvu") == evaluated


def test_every_name_of_the_table_is_recorded_and_no_other(recorded):
    _, run = recorded
    in_training = {name for line in run.scalars if "train/learning_rate" in line for name in line}
    dictionary = {f"train/{NAME}/{metric.name}" for metric in DICTIONARY_METRICS}
    of_run = {f"train/{metric.name}" for metric in RUN_METRICS}
    assert in_training - {"step", "time"} <= dictionary | of_run
    penalties = {f"train/{NAME}/{loss}_loss" for loss in ("l1", "l0", "gate", "auxk")}
    assert (dictionary | of_run) - penalties <= in_training
    assert len(RICH_RECORDS) == 5


def test_histograms_come_on_their_cadence_and_count_everything(recorded):
    _, run = recorded
    by_name = {}
    for histogram in run.histograms:
        by_name.setdefault(histogram["name"], []).append(histogram)
    assert set(by_name) == {f"train/{NAME}/log10_feature_density", f"train/{NAME}/pre_activations"}
    for histograms in by_name.values():
        assert [h["step"] for h in histograms] == [1, 6, 11]
        assert all(len(h["edges"]) == len(h["counts"]) + 1 for h in histograms)
    # 32 tokens of the batch, 64 features.
    assert all(sum(h["counts"]) == 32 * 64 for h in by_name[f"train/{NAME}/pre_activations"])
    # At step 1, L0 = 4 over 32 tokens: what fired at all is at most 64 features, and what fired least did so once in 32.
    density = by_name[f"train/{NAME}/log10_feature_density"][0]
    assert 4 <= sum(density["counts"]) <= 64
    rarest = next(i for i, count in enumerate(density["counts"]) if count)
    assert density["edges"][rarest + 1] > math.log10(1 / 32) - 1e-6


def test_pre_activations_are_those_of_the_encoder(recorded):
    trainer, run = recorded
    last = [h for h in run.histograms if h["name"].endswith("pre_activations")][-1]
    assert last["step"] == 11
    # One step later the encoder has moved a little: same tokens cannot be had again, but range and centre stay.
    sample = trainer.activation_sample[READ]
    values = torch.nn.functional.linear(sample, trainer.model.W_enc, trainer.model.b_enc)
    assert last["edges"][0] == pytest.approx(values.min().item(), rel=0.35)
    assert last["edges"][-1] == pytest.approx(values.max().item(), rel=0.35)


def test_feature_table_and_page_hold_the_hostile_token_as_text(recorded):
    trainer, run = recorded
    rows = run.table(f"features/{NAME}")
    assert [row["step"] for row in rows] == [6] * 4 + [12] * 4
    assert all(0 < row["density"] <= 1 and "[[" in row["context_1"] for row in rows)
    assert any(EVIL in row["context_1"] for row in rows)
    page = (run.folder / "tracking" / "pages" / "report.html").read_text()
    tags, texts = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.handle_data = texts.append
    parser.feed(page)
    assert "script" not in tags and "<script" not in page
    assert EVIL in "".join(texts)
    assert f"Feature {rows[-1]['feature']}" in "".join(texts)
    assert (run.folder / "tracking" / "images" / "sparsity_fidelity.png").read_bytes().startswith(b"\x89PNG")


def test_the_callback_changes_nothing_about_the_training(make_trainer, tmp_path):
    weights = []
    for folder, callbacks in (("a", None), ("b", [TranscoderTrackingCallback(histogram_logs=1)])):
        trainer = make_trainer(callbacks=callbacks, output_dir=tmp_path / folder)
        trainer.train()
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_without_held_out_text_the_page_still_has_the_curves(make_trainer):
    trainer = make_trainer(eval_strategy="no")
    trainer.eval_dataset = None
    trainer.train()
    run = Run.load(trainer.args.output_dir)
    assert run.table(f"features/{NAME}") == []
    assert "Reconstruction error" in (run.folder / "tracking" / "pages" / "report.html").read_text()


# ------------------------------------------------------------------------------------------------------ how it ends


class _Stop(TrainerCallback):
    def __init__(self, error, step):
        self.error, self.step = error, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), "interrupted"), (RuntimeError("no"), "failed")])
def test_a_run_that_stops_early_says_how(make_trainer, error, status):
    trainer = make_trainer(callbacks=[_Stop(error, 3)])
    with pytest.raises(type(error)):
        trainer.train()
    run = Run.load(trainer.args.output_dir)
    assert run.facts["status"] == status
    assert [step for step, _ in run.history(f"train/{NAME}/fvu")] == [1, 2]


def test_resuming_continues_the_records(make_trainer, tmp_path):
    whole = make_trainer(output_dir=tmp_path / "whole")
    whole.train()
    changes = {"save_strategy": "steps", "save_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(callbacks=[_Stop(KeyboardInterrupt(), 7)], **changes).train()
    assert Run.load(tmp_path / "run").history(f"train/{NAME}/fvu")[-1][0] == 6
    make_trainer(**changes).train(resume_from_checkpoint=True)
    resumed, unbroken = Run.load(tmp_path / "run"), Run.load(tmp_path / "whole")
    for metric in (f"train/{NAME}/fvu", f"train/{NAME}/l0", f"eval/{NAME}/fvu", "train/loss"):
        assert resumed.history(metric) == unbroken.history(metric)
    assert [h["step"] for h in resumed.histograms] == [h["step"] for h in unbroken.histograms] == [1, 1, 11, 11]
    assert [r["step"] for r in resumed.table(f"features/{NAME}")] == [
        r["step"] for r in unbroken.table(f"features/{NAME}")
    ]
    assert resumed.facts["status"] == "finished" and resumed.facts["resumed"]["step"] == 4


# ---------------------------------------------------------------------------------------------------------- alerts


class _Plant(TrainerCallback):
    """Damages the dictionary before one step."""

    def __init__(self, step, damage):
        self.step, self.damage = step, damage

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.damage(model)


def _titles(trainer):
    return [(alert["title"], alert["level"], alert["step"]) for alert in Run.load(trainer.args.output_dir).alerts]


def test_a_healthy_run_raises_no_alert(make_trainer):
    trainer = make_trainer(max_steps=40, eval_strategy="no")
    trainer.train()
    assert _titles(trainer) == []


def test_a_planted_nan_alerts_once(make_trainer):
    trainer = make_trainer(callbacks=[_Plant(5, lambda model: model.W_dec.fill_(math.nan))], eval_strategy="no")
    with pytest.raises(TranscoderError, match="diverged at step 6"):
        trainer.train()
    # Alerts of the dictionary and of the sum over dictionaries, recorded before the run is stopped.
    assert _titles(trainer) == [("Not a finite number", "error", 6)] * 2


def test_a_planted_spike_alerts_once(make_trainer):
    # One log of one step: the decoder bias is far off, and the next step finds it repaired.
    plant = _Plant(20, lambda model: model.b_dec.add_(10))
    repair = _Plant(21, lambda model: model.b_dec.sub_(10))
    trainer = make_trainer(callbacks=[plant, repair], max_steps=30, eval_strategy="no", sparsity_warmup=0.0)
    trainer.train()
    assert _titles(trainer) == [("Loss spike", "warn", 21)]


def test_a_planted_death_of_features_alerts_once(make_trainer):
    # Most features get a bias that silences them; the window is two looks (of 16 steps) long.
    plant = _Plant(34, lambda model: model.b_enc[:40].fill_(-1e3))
    thresholds = AlertThresholds(dead_rise=0.3, window=40, spike_factor=1e9)
    trainer = make_trainer(
        callbacks=[plant, TranscoderTrackingCallback(alerts=thresholds)],
        max_steps=100, dead_after_tokens=32 * 32, eval_strategy="no",
    )  # fmt: skip
    trainer.train()
    ((title, level, step),) = _titles(trainer)
    assert (title, level) == ("Dead features", "warn") and 34 + 32 <= step <= 34 + 48


# ----------------------------------------------------------------------------------------------------- around it


def test_aliases_are_logged_beside_our_names(make_trainer):
    trainer = make_trainer(callbacks=[TranscoderTrackingCallback(aliases="saelens")], max_steps=3)
    trainer.train()
    run = Run.load(trainer.args.output_dir)
    for alias, ours in (
        ("metrics/l0", f"train/{NAME}/l0"),
        ("metrics/explained_variance", f"train/{NAME}/explained_variance"),
        ("details/n_training_samples", "train/tokens"),
        ("details/current_learning_rate", "train/learning_rate"),
    ):
        assert run.history(alias) == run.history(ours) and len(run.history(alias)) == 3
    with pytest.raises(TranscoderError, match="saelens, sparsify, dictionary_learning"):
        TranscoderTrackingCallback(aliases="keras")


def test_any_trainer_takes_it_through_report_to(tmp_path):
    assert INTEGRATION_TO_CALLBACK["hf_transcoders"] is TranscoderTrackingCallback
    model = torch.nn.Linear(2, 1)
    model.config = None

    class Plain(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            return model(inputs["x"]).square().mean()

    args = TrainingArguments(
        str(tmp_path), max_steps=3, logging_steps=1, report_to="hf_transcoders", use_cpu=True, disable_tqdm=True,
        save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    Plain(model, args, train_dataset=[{"x": torch.ones(2)}] * 8).train()
    run = Run.load(tmp_path)
    assert [step for step, _ in run.history("train/loss")] == [1, 2, 3]
    assert run.facts["status"] == "finished" and run.facts["base_model"] == "Linear"


def test_report_to_falls_on_trackio_and_never_makes_a_space(tmp_path):
    args = TranscoderTrainingArguments(str(tmp_path), use_cpu=True)
    assert args.report_to == ["trackio"] and args.trackio_static_space_id is False
    assert TranscoderTrainingArguments(str(tmp_path), use_cpu=True, report_to="none").report_to == []


def test_contexts_of_all_dictionaries_come_from_one_search_and_of_none_without_trackers(
    make_trainer, base, monkeypatch
):
    searched = []

    def search(base_model, dictionaries, *args, **options):
        searched.append(list(dictionaries))
        return explain_features(base_model, dictionaries, *args, **options)

    monkeypatch.setattr(callback, "explain_features", search)
    models = [
        TranscoderModel(
            TranscoderConfig.for_model(base, f"layers.{i}.mlp.in", f"layers.{i}.mlp.branch", num_features=32, k=4)
        )
        for i in range(3)
    ]
    for report_to, searches in (("hf_transcoders", 1), ("none", 0)):
        searched.clear()
        trainer = make_trainer(model=models, report_to=report_to, max_steps=3, eval_strategy="no", overwrite=True)
        trainer.train()
        assert searched == [[f"layers.{i}.mlp.transcoder" for i in range(3)]] * searches


def test_tokens_do_not_get_into_the_records(tmp_path):
    args = TranscoderTrainingArguments(str(tmp_path), use_cpu=True, hub_token="hf_secret", learning_rate=0.5)
    changed = changed_arguments(args)
    assert changed["learning_rate"] == 0.5 and "hf_secret" not in str(changed)
