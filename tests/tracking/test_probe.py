"""The probe in other people's Trainers: it records, names what changed, and leaves training alone."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from hf_transcoders import TranscoderConfig, TranscoderError, TranscoderEvaluator, TranscoderModel
from hf_transcoders.tracking import Run, TranscoderProbeCallback
from tests.tiny_models import NUM_LAYERS, VOCAB_SIZE, tiny_model, tiny_tokens


@pytest.fixture
def tokenizer():
    """One word a token, the first of them hostile."""
    words = {f"<script>alert({i})</script>": i for i in range(VOCAB_SIZE)}
    backend = Tokenizer(WordLevel(words, unk_token="<script>alert(0)</script>"))
    backend.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<script>alert(0)</script>", "eos_token": "<script>alert(2)</script>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture
def rows():
    return [{"input_ids": row} for row in tiny_tokens(32, 64, seed=1)]


def model_and_transcoders(**changes):
    """A tiny model with a dropout that draws random numbers, and a dictionary of each layer."""
    model = tiny_model("llama")
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    transcoders = {}
    for i in range(NUM_LAYERS):
        torch.manual_seed(i)
        sites = f"layers.{i}.mlp.in", f"layers.{i}.mlp.branch"
        config = TranscoderConfig.for_model(model, *sites, num_features=64, k=4, decoder_init="random", **changes)
        transcoders[f"l{i}"] = TranscoderModel(config).eval()
    return model, transcoders


def arguments(tmp_path, **changes):
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return {"output_dir": str(tmp_path), **settings, **changes}


def training_rows(count=32):
    return [{"input_ids": row, "labels": row} for row in tiny_tokens(count, 16, seed=2)]


def make_trainer(tmp_path, model, *callbacks, **changes):
    return Trainer(
        model,
        TrainingArguments(**arguments(tmp_path, **changes)),
        train_dataset=training_rows(),
        eval_dataset=training_rows(4),
        callbacks=list(callbacks),
    )


def steps_of(run, metric):
    return [step for step, _ in run.history(metric)]


def test_records_of_a_plain_trainer_are_the_evaluators(tmp_path, rows, tokenizer, capsys):
    model, transcoders = model_and_transcoders()
    before = copy.deepcopy(model)
    callback = TranscoderProbeCallback(
        transcoders, rows, tokenizer, task_metrics=lambda m: {"width": m.config.hidden_size}, max_kl_tokens=64
    )
    trainer = make_trainer(tmp_path, model, callback, max_steps=5, disable_tqdm=False)
    trainer.train()
    run = Run.load(tmp_path)
    assert run.facts["status"] == "finished" and set(run.facts["dictionaries"]) == set(transcoders)
    for step, version in ((0, before), (5, model)):
        report = TranscoderEvaluator(version, rows, progress=False).evaluate(transcoders, together=True)
        scalars = next(line for line in run.scalars if line["step"] == step)
        for name, metrics in report.metrics.items():
            for metric in ("fvu", "normalized_mse", "l0", "ce_spliced"):
                assert scalars[f"probe/{name}/{metric}"] == pytest.approx(metrics[metric], rel=1e-6)
        assert scalars["probe/ce"] == pytest.approx(report.metrics["l0"]["ce_original"], rel=1e-9)
        assert scalars["probe/together/ce_spliced"] == pytest.approx(report.together["ce_spliced"], rel=1e-9)
        assert scalars["probe/task/width"] == 32
    # Step 0, both evaluations, and the last step, at which there is none.
    assert steps_of(run, "probe/kl") == [0, 2, 4, 5]
    kl = [value for _, value in run.history("probe/kl")]
    assert kl[0] == 0 and kl[-1] > 0.01
    # The numbers are in the Trainer's own log, too, and its bar ends with the place of the page.
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "probe/kl" in entry}
    assert [logged[step]["probe/kl"] for step in (0, 2, 4, 5)] == kl and "probe/l0/fvu" in logged[5]
    page = tmp_path / "tracking" / "pages" / "probe_drift.html"
    assert page.is_file() and f"The page of the drift is {page}." in capsys.readouterr().err
    table = run.table("probe/changed_features")
    assert table and not any(row["step"] == 0 for row in table)
    assert {"dictionary", "feature", "label", "rate_before", "rate_after", "log_odds_change"} <= table[0].keys()
    assert [row for row in table if row["step"] == 5][0]["feature"] == callback.report.changed[0].feature


def test_text_of_tokens_is_escaped_in_the_page(tmp_path, rows, tokenizer):
    model, transcoders = model_and_transcoders()
    make_trainer(tmp_path, model, TranscoderProbeCallback(transcoders, rows, tokenizer)).train()
    page = (tmp_path / "tracking" / "pages" / "probe_drift.html").read_text()
    assert "<script" not in page
    assert "[[&lt;script&gt;alert(" in page
    assert page.count("<svg") == 4 and "polyline" in page


def test_nothing_changes_without_learning(tmp_path, rows):
    model, transcoders = model_and_transcoders()
    callback = TranscoderProbeCallback(transcoders, rows)
    make_trainer(tmp_path, model, callback, learning_rate=0.0).train()
    first, *others = callback.history
    assert len(others) == 3
    for entry in others:
        assert {**entry, "step": 0} == first
    assert callback.report.changed == []
    assert not (tmp_path / "tracking" / "tables").exists()


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_training_is_bit_identical_with_and_without(tmp_path, rows, tokenizer, precision):
    def draw(model):
        return {"random": torch.rand(()).item() + random.random() + np.random.rand()}

    ends = []
    for watched in (False, True):
        model, transcoders = model_and_transcoders()
        callbacks = [TranscoderProbeCallback(transcoders, rows, tokenizer, task_metrics=draw)] if watched else []
        random.seed(0), np.random.seed(0)
        make_trainer(tmp_path / str(watched), model, *callbacks, **precision).train()
        ends.append((model.state_dict(), torch.rand(4), random.random(), np.random.rand()))
    (plain, *plain_draws), (watched, *watched_draws) = ends
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert not torch.equal(plain["lm_head.weight"], tiny_model("llama").lm_head.weight)
    assert torch.equal(plain_draws[0], watched_draws[0]) and plain_draws[1:] == watched_draws[1:]


def test_autocast_of_the_trainer_does_not_reach_the_probe(tmp_path, rows):
    """Under bf16 autocast the probe still measures in the precision of the weights."""
    model, transcoders = model_and_transcoders()
    expected = TranscoderEvaluator(model, rows, progress=False).evaluate(transcoders["l1"])
    callback = TranscoderProbeCallback({"l1": transcoders["l1"]}, rows)
    make_trainer(tmp_path, model, callback, learning_rate=0.0, bf16=True).train()
    (metrics,) = expected.metrics.values()
    for entry in callback.history:
        assert entry["l1/fvu"] == pytest.approx(metrics["fvu"], rel=1e-6)
        assert entry["ce"] == pytest.approx(metrics["ce_original"], rel=1e-9)


def test_a_bf16_model(tmp_path, rows):
    model, transcoders = model_and_transcoders()
    callback = TranscoderProbeCallback(transcoders, rows)
    make_trainer(tmp_path, model.bfloat16(), callback).train()
    assert callback.report.protocol["dtype"] == "bfloat16"
    assert callback.history[-1]["kl"] > 0 and np.isfinite(list(callback.history[-1].values())).all()


def test_lora(tmp_path, rows, tokenizer):
    peft = pytest.importorskip("peft")
    model, transcoders = model_and_transcoders()
    before = copy.deepcopy(model)
    config = peft.LoraConfig(
        r=4, target_modules=["down_proj"], layers_to_transform=[1], task_type="CAUSAL_LM", init_lora_weights=True
    )
    wrapped = peft.get_peft_model(model, config)
    callback = TranscoderProbeCallback(transcoders, rows, tokenizer)
    make_trainer(tmp_path, wrapped, callback, learning_rate=0.1).train()
    expected = TranscoderEvaluator(before, rows, progress=False).evaluate(transcoders)
    first, last = callback.history[0], callback.history[-1]
    merged = TranscoderEvaluator(wrapped.merge_and_unload(), rows, progress=False).evaluate(transcoders)
    for name in transcoders:
        assert first[f"{name}/fvu"] == pytest.approx(expected.metrics[name]["fvu"], rel=1e-6)
        assert last[f"{name}/fvu"] == pytest.approx(merged.metrics[name]["fvu"], rel=1e-4)
    # The adapter sits in the MLP of layer 1.
    assert last["l0/fvu"] == first["l0/fvu"]
    assert abs(last["l1/fvu"] - first["l1/fvu"]) > 1e-3 and last["l1/features_changed"] == 0
    assert last["l2/features_changed"] > 0


def test_learned_prompts_are_refused(tmp_path, rows):
    peft = pytest.importorskip("peft")
    model, transcoders = model_and_transcoders()
    wrapped = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(TranscoderError, match="learned prompt"):
        make_trainer(tmp_path, wrapped, TranscoderProbeCallback(transcoders, rows)).train()


def test_sft_trainer(tmp_path, rows, tokenizer):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    texts = [" ".join(tokenizer.convert_ids_to_tokens(row.tolist())) for row in tiny_tokens(32, 16, seed=2)]
    ends = []
    for watched in (False, True):
        model, transcoders = model_and_transcoders()
        settings = arguments(tmp_path / str(watched), bf16=False, max_length=32, packing=False)
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(**settings),
            train_dataset=Dataset.from_dict({"text": texts}),
            eval_dataset=Dataset.from_dict({"text": texts[:4]}),
            processing_class=tokenizer,
        )
        if watched:
            # Texts, packed with the Trainer's own tokenizer.
            callback = TranscoderProbeCallback(transcoders, texts, sequence_length=16)
            trainer.add_callback(callback)
        trainer.train()
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert [entry["step"] for entry in callback.history] == [0, 2, 4, 6]
    assert callback.history[-1]["kl"] > 0
    assert any("script" in (change.label or "") for change in callback.report.changed)


def test_a_resumed_run_is_compared_with_the_first_baseline(tmp_path, rows, tokenizer):
    histories = []
    for interrupted in (False, True):
        folder = tmp_path / str(interrupted)
        model, transcoders = model_and_transcoders()
        callback = TranscoderProbeCallback(transcoders, rows, tokenizer)
        settings = {"save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(folder, model, callback, **settings)
        trainer.train()
        if interrupted:
            model, transcoders = model_and_transcoders()
            callback = TranscoderProbeCallback(transcoders, rows, tokenizer)
            trainer = make_trainer(folder, model, callback, **settings)
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        histories.append((callback.history, callback.report.to_dict(), steps_of(Run.load(folder), "probe/ce")))
    whole, resumed = histories
    assert resumed[0] == whole[0]
    assert json.dumps(resumed[1]) == json.dumps(whole[1])
    assert resumed[2] == whole[2] == [0, 2, 4, 6]


def test_stock_trackers_get_the_same_names_once(tmp_path, rows):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model, transcoders = model_and_transcoders()
    callback = TranscoderProbeCallback(transcoders, rows)
    make_trainer(tmp_path, model, callback, report_to="tensorboard").train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "probe" in tag]
    assert sorted(tags) == sorted(f"probe/{name}" for name in callback.history[0] if name != "step")
    assert [event.step for event in events.Scalars("probe/l1/fvu")] == [0, 2, 4, 6]
    values = [event.value for event in events.Scalars("probe/l1/fvu")]
    assert values == pytest.approx([entry["l1/fvu"] for entry in callback.history], rel=1e-6)


def test_beside_the_tracking_callback_nothing_is_written_twice(tmp_path, rows):
    model, transcoders = model_and_transcoders()
    callback = TranscoderProbeCallback(transcoders, rows)
    make_trainer(tmp_path, model, callback, report_to="hf_transcoders", logging_steps=2, max_steps=4).train()
    run = Run.load(tmp_path)
    assert run.facts["status"] == "finished"
    assert steps_of(run, "train/loss") == steps_of(run, "eval/loss") == [2, 4]
    assert steps_of(run, "probe/ce") == [0, 2, 4]


def test_data_parallel_wrappers_and_other_processes(tmp_path, rows):
    """What a distributed Trainer hands its callbacks: the wrapped model, and in other processes a state that says so."""
    from transformers import TrainerControl, TrainerState

    model, transcoders = model_and_transcoders()
    args = TrainingArguments(**arguments(tmp_path))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        histories = []
        for handed in (wrapped, model):
            callback = TranscoderProbeCallback(transcoders, rows)
            state = TrainerState(max_steps=6)
            callback.on_train_begin(args, state, TrainerControl(), model=handed)
            histories.append(callback.history)
        assert histories[0] == histories[1] and len(histories[0]) == 1
        state = TrainerState(is_world_process_zero=False, max_steps=6)
        other = TranscoderProbeCallback(transcoders, rows)
        other.on_train_begin(
            TrainingArguments(**arguments(tmp_path / "other")), state, TrainerControl(), model=wrapped
        )
        other.on_evaluate(args, state, TrainerControl(), model=wrapped)
        assert other.history == [] and other.report is None and not (tmp_path / "other" / "tracking").exists()
    finally:
        torch.distributed.destroy_process_group()


def test_a_wrong_pairing_ends_training_before_it_begins(tmp_path, rows):
    model, transcoders = model_and_transcoders(base_model_type="gpt2")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TranscoderError, match="for a model of type 'gpt2', and this is one of type 'llama'"):
        make_trainer(tmp_path, model, TranscoderProbeCallback(transcoders, rows)).train()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not (tmp_path / "tracking").exists()


def test_texts_need_a_tokenizer(tmp_path):
    model, transcoders = model_and_transcoders()
    with pytest.raises(TranscoderError, match="give the tokenizer of the model"):
        make_trainer(tmp_path, model, TranscoderProbeCallback(transcoders, ["some text"])).train()
