"""Training a cross-layer transcoder: it learns, resumes bit for bit, and is evaluated as it stands in the model."""

import json

import pytest
import torch

from hf_transcoders import (
    CrossLayerTranscoder,
    CrossLayerTranscoderConfig,
    TranscoderConfig,
    TranscoderError,
    TranscoderEvaluator,
    TranscoderModel,
    TranscoderSet,
    TranscoderTrainer,
    TranscoderTrainingArguments,
    splice,
)
from hf_transcoders.training.memory_plan import plan_run
from tests.data.test_harvest import token_rows
from tests.models.cross_layer.setups import ACTIVATIONS, KINDS
from tests.tiny_models import NUM_LAYERS, tiny_model
from tests.training.test_trainer import same_weights, weights


NAME = "layers.1.mlp.cross_layer_transcoder"


def make_trainer(base, folder, model, **changes):
    arguments = {
        "per_device_train_batch_size": 256, "max_steps": 40, "harvest_batch_size": 4, "buffer_tokens": 512, "use_cpu": True,
        "learning_rate": 1e-3, "logging_steps": 5, "save_strategy": "steps", "save_steps": 20, "dead_after_tokens": 640,
        "disable_tqdm": True, "report_to": "none", **changes,
    }  # fmt: skip
    args = TranscoderTrainingArguments(str(folder), **arguments)
    return TranscoderTrainer(model, base, args, token_rows(128), eval_dataset=token_rows(16, seed=5))


def new_model(base, kind, **changes):
    torch.manual_seed(0)
    options = {"num_features": 48, **ACTIVATIONS[kind], **changes}
    return CrossLayerTranscoder(CrossLayerTranscoderConfig.for_model(base, **options))


def metrics(report):
    return [entry["metrics"] for entry in report.dictionaries.values()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_resumes_bit_for_bit(kind, tmp_path):
    base = tiny_model("llama")
    changes = {"normalization": "standardize"} if kind == "topk" else {}
    straight = make_trainer(base, tmp_path / "run", new_model(base, kind, **changes))
    straight.train()
    logs = [entry for entry in straight.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"] and f"{NAME}/fvu" in logs[0]
    assert all(source.W_dec[:, 1:].abs().sum() > 0 for source in straight.model.sources[:-1])
    again = make_trainer(base, tmp_path / "run", new_model(base, kind, **changes))
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-20"))
    assert same_weights(weights(again.model), weights(straight.model))
    if kind == "batchtopk over all":
        assert len({float(source.threshold) for source in again.model.sources}) == 1
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path / "run" / "checkpoint-40")
    assert same_weights(weights(loaded), weights(straight.model))
    assert loaded.config.target_variances and loaded.config.training_summary["steps"] == 40


def test_low_precision(tmp_path):
    base = tiny_model("llama")
    trainer = make_trainer(base, tmp_path, new_model(base, "topk"), bf16=True)
    trainer.train()
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1] < logs[0] and trainer.model.sources[0].W_dec.dtype == torch.float32


def test_a_window_of_zero_trains_as_a_set_does(tmp_path):
    base = tiny_model("llama")
    model = new_model(base, "topk", window=0)
    transcoders = {}
    for number, source in enumerate(model.sources):
        config = TranscoderConfig.for_model(
            base, source.config.input_site, source.config.output_site, num_features=48, k=3
        )
        transcoders[f"layer_{number}"] = TranscoderModel(config)
        state = {**source.state_dict(), "W_dec": source.W_dec[:, 0]}
        transcoders[f"layer_{number}"].load_state_dict(state)
    one = make_trainer(base, tmp_path / "one", model, max_steps=10)
    other = make_trainer(base, tmp_path / "other", TranscoderSet(transcoders), max_steps=10)
    one.train()
    other.train()
    for mine, theirs in zip(model.sources, transcoders.values(), strict=True):
        assert torch.equal(mine.W_enc, theirs.W_enc) and torch.equal(mine.W_dec[:, 0], theirs.W_dec)


def test_training_goes_on_from_a_trained_set(tmp_path):
    base = tiny_model("llama")
    configs = [
        TranscoderConfig.for_model(base, f"layers.{i}.mlp.in", f"layers.{i}.mlp.branch", num_features=48, k=4)
        for i in range(NUM_LAYERS)
    ]
    first = make_trainer(base, tmp_path / "set", [TranscoderModel(config) for config in configs])
    first.train()
    model = CrossLayerTranscoder.from_set(first.model)
    evaluator = TranscoderEvaluator(base, token_rows(16, seed=5), progress=False)
    before, padded = (evaluator.evaluate(each, together=True) for each in (first.model, model))
    for one, other in zip(metrics(before), metrics(padded), strict=True):
        for metric in ("fvu", "l0", "ce_spliced", "ce_recovered_zero"):
            assert one[metric] == pytest.approx(other[metric], rel=1e-4)
    assert before.together["ce_spliced"] == pytest.approx(padded.together["ce_spliced"], rel=1e-5)
    start = weights(model)
    second = make_trainer(base, tmp_path / "clt", model, max_steps=20)
    second._initialize_dictionaries()
    assert same_weights(weights(model), start)
    second.train()
    after = evaluator.evaluate(model)
    assert sum(c["fvu"] for c in metrics(after)) < sum(c["fvu"] for c in metrics(padded))


def test_evaluation_is_of_the_sum_of_all_layers(tmp_path):
    base = tiny_model("llama")
    trainer = make_trainer(base, tmp_path, new_model(base, "relu"))
    trainer.train()
    report = TranscoderEvaluator(base, token_rows(16, seed=5), progress=False, skip_first=0).evaluate(
        trainer.model, together=True
    )
    logged = trainer.state.log_history[-2]
    assert 0 < report.dictionaries[NAME]["metrics"]["fvu"] == pytest.approx(logged[f"{NAME}/fvu"], rel=0.5)
    rows = token_rows(16, seed=5)
    ids = torch.tensor([row["input_ids"] for row in rows])
    with torch.no_grad(), splice(base, trainer.model.eval(), error="drop"):
        logits = base(ids).logits[:, :-1]
    ce = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
    assert report.together["ce_spliced"] == pytest.approx(float(ce), rel=1e-4)


def test_what_cannot_be_trained_is_refused(tmp_path):
    base = tiny_model("llama")
    model = new_model(base, "topk")
    with pytest.raises(TranscoderError, match="cannot be trained alone"):
        make_trainer(base, tmp_path, model.sources[0])
    with pytest.raises(TranscoderError, match="are not sharded"):
        make_trainer(base, tmp_path, model, fsdp=True)
    trainer = make_trainer(base, tmp_path / "run", model, max_steps=10)
    trainer.train()
    with pytest.raises(TranscoderError, match="num_features"):
        make_trainer(base, tmp_path / "run", new_model(base, "topk", num_features=40), max_steps=20).train(
            resume_from_checkpoint=True
        )


def test_the_plan_counts_all_decoders():
    base = tiny_model("llama")
    model = new_model(base, "topk")
    args = TranscoderTrainingArguments("unused", use_cpu=True, report_to="none", max_tokens=20_000)
    plan = plan_run(base.to("meta"), [model.config], args)
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    narrow = plan_run(base, [new_model(tiny_model("llama"), "topk", window=0).config], args)
    assert narrow.parameters < plan.parameters and narrow.peak() < plan.peak()
    assert json.dumps(plan.to_dict())
