"""The trainer: it learns, resumes bit for bit, trains several as it would each alone, and says what is wrong."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_transcoders import TranscoderConfig, TranscoderError, TranscoderModel, TranscoderSet
from hf_transcoders.training import TranscoderTrainer, TranscoderTrainingArguments
from hf_transcoders.training.state_files import load_state
from tests.data.test_harvest import token_rows
from tests.tiny_models import tiny_model


READ, WRITE = "layers.1.mlp.in", "layers.1.mlp.branch"


def make_model(base, seed=0, read=READ, **changes):
    torch.manual_seed(seed)
    changes = {"num_features": 64, "k": 4, **changes}
    return TranscoderModel(TranscoderConfig.for_model(base, read, WRITE, **changes))


def make_trainer(base, tmp_path, model=None, rows=64, **changes):
    changes = {
        "max_steps": 12,
        "per_device_train_batch_size": 32,
        "harvest_batch_size": 8,
        "buffer_tokens": 128,
        "learning_rate": 3e-3,
        "logging_steps": 4,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **changes,
    }
    return TranscoderTrainer(
        model=model if model is not None else make_model(base),
        base_model=base,
        args=TranscoderTrainingArguments(str(tmp_path), **changes),
        train_dataset=token_rows(rows),
    )


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "jumprelu", "gated"])
def test_training_learns(base, tmp_path, activation):
    changes = {
        "topk": {},
        "batchtopk": {},
        "relu": {"k": None, "l1_coefficient": 1e-3},
        "jumprelu": {"k": None, "l0_coefficient": 1e-3, "threshold_init": 0.01},
        "gated": {"k": None, "l1_coefficient": 1e-3},
    }[activation]
    model = make_model(base, activation=activation, **changes)
    trainer = make_trainer(base, tmp_path, model, max_steps=150, learning_rate=1e-2)
    trainer.train()
    fvus = [log[key] for log in trainer.state.log_history for key in log if key.endswith("/fvu")]
    assert fvus[-1] < 0.6 * fvus[0]
    assert all(math.isfinite(v) for log in trainer.state.log_history for v in log.values() if isinstance(v, float))
    if activation == "batchtopk":
        # The threshold learned in training lets through k features per token afterwards.
        harvester = trainer.make_harvester(trainer.train_dataset)
        active = (model.eval()(harvester.chunk(0)[READ]).features > 0).sum(-1).float().mean()
        assert 2 < active < 8


def test_logged_metrics_are_those_of_the_batches(base, tmp_path):
    """At learning rate zero every batch meets the same dictionary, so the log can be computed by hand."""
    model = make_model(base, decoder_init="random")
    trainer = make_trainer(base, tmp_path, model, learning_rate=0.0, warmup_steps=0, max_steps=4, logging_steps=4)
    seen = []
    original = trainer.compute_loss

    def spy(wrapped, inputs, *args, **kwargs):
        seen.append({site: value.clone() for site, value in inputs.items()})
        return original(wrapped, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    name = next(iter(trainer.dictionaries))
    log = next(entry for entry in trainer.state.log_history if f"{name}/fvu" in entry)
    inputs = torch.cat([batch[READ] for batch in seen])
    targets = torch.cat([batch[WRITE] for batch in seen]).double()
    output = model(inputs)
    error = (targets - output.reconstruction.double()).square().sum()
    total = (targets - targets.mean(0)).square().sum()
    assert log[f"{name}/fvu"] == pytest.approx((error / total).item(), rel=1e-5)
    assert log[f"{name}/mse"] == pytest.approx((error / targets.numel()).item(), rel=1e-5)
    assert log[f"{name}/l0"] == pytest.approx((output.features > 0).sum(-1).float().mean().item(), rel=1e-6)
    expected = (error / len(targets) / model.config.target_variance).item()
    assert log[f"{name}/reconstruction_loss"] == pytest.approx(expected, rel=1e-4)
    assert log["tokens"] == 4 * 32


def test_gradient_accumulation_equals_one_large_batch(base, tmp_path):
    results = []
    for batch, accumulation in ((32, 1), (8, 4)):
        trainer = make_trainer(
            base,
            tmp_path,
            make_model(base),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=8,
            # Adam turns rounding noise in a gradient near zero into a step of full size.
            optim="sgd",
            learning_rate=0.5,
        )
        trainer.train()
        results.append((weights(trainer.model), [e["loss"] for e in trainer.state.log_history if "loss" in e]))
    (a, loss_a), (b, loss_b) = results
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-5), name
    assert loss_a == pytest.approx(loss_b, rel=1e-4)


def test_training_together_is_training_alone(base, tmp_path):
    """Two dictionaries on the same forwards end in the bits that each reaches by itself."""
    makers = {"wide": lambda: make_model(base, 1), "sae": lambda: make_model(base, 2, read=WRITE, num_features=48)}
    together = make_trainer(base, tmp_path / "both", TranscoderSet({name: make() for name, make in makers.items()}))
    together.train()
    for name, make in makers.items():
        alone = make_trainer(base, tmp_path / name, make())
        alone.train()
        assert same_weights(weights(alone.model), weights(together.model[name])), name


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "set"])
@pytest.mark.parametrize("stop", [4, 7])
def test_resume_is_bit_exact(base, tmp_path, kind, stop):
    def make():
        if kind == "set":
            return TranscoderSet({"a.b": make_model(base, 1), "c": make_model(base, 2, read=WRITE)})
        changes = {"k": None, "l0_coefficient": 1e-3} if kind == "jumprelu" else {}
        return make_model(base, activation=kind, **changes)

    # A window so short that AuxK takes part, and checkpoints in the middle of a block of four batches.
    settings = {
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 3,
        "dead_after_tokens": 64,
        "max_steps": 40,
    }
    straight = make_trainer(base, tmp_path / "straight", make(), **settings)
    straight.train()
    resumed = make_trainer(base, tmp_path / "resumed", make(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{16 + stop}"))
    assert same_weights(weights(straight.model), weights(resumed.model))
    final = [
        load_state(tmp_path / run / "checkpoint-40" / "optimizer.safetensors")["state"]
        for run in ("straight", "resumed")
    ]
    assert str(final[0]["param_groups"]) == str(final[1]["param_groups"])
    for key, state in final[0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, final[1]["state"][key][name])
    timed = {"tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
    logs = [
        [{k: v for k, v in log.items() if k not in timed} for log in t.state.log_history[:-1]]
        for t in (straight, resumed)
    ]
    assert logs[0] == logs[1]
    monitors = [
        load_file(tmp_path / run / "checkpoint-40" / "monitors_0.safetensors") for run in ("straight", "resumed")
    ]
    for name, value in monitors[0].items():
        assert torch.equal(value, monitors[1][name]), name


def test_dead_features_are_revived(base, tmp_path):
    def dead_share(coefficient):
        model = make_model(base, auxk_coefficient=coefficient)
        with torch.no_grad():
            model.W_enc[32:] *= 1e-3  # Half of the dictionary cannot win.
        trainer = make_trainer(base, tmp_path, model, max_steps=400, dead_after_tokens=320, learning_rate=1e-2)
        trainer.train()
        (name,) = trainer.dictionaries
        return [log[f"{name}/dead_fraction"] for log in trainer.state.log_history if f"{name}/dead_fraction" in log][
            -1
        ]

    without, revived = dead_share(0.0), dead_share(1.0)
    assert without > 0.3
    assert revived < 0.6 * without


def test_dead_features_are_counted_in_tokens(base, tmp_path):
    model = make_model(base)
    trainer = make_trainer(base, tmp_path, model, max_steps=32, learning_rate=0.0, dead_after_tokens=16 * 32)
    fired = torch.zeros(64, dtype=torch.bool)
    original = trainer.compute_loss

    def spy(wrapped, inputs, *args, **kwargs):
        if trainer.state.global_step >= 16:
            nonlocal fired
            fired |= (model(inputs[READ]).features > 0).any(0)
        return original(wrapped, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    (monitor,) = trainer.monitors.values()
    assert torch.equal(monitor.dead_features, (~fired).nonzero().squeeze(-1))


def test_unit_norm_decoder_stays_at_unit_norm(base, tmp_path):
    model = make_model(base, read=WRITE, decoder_norm="unit")
    trainer = make_trainer(base, tmp_path, model)
    along = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            direction = torch.nn.functional.normalize(model.W_dec, dim=-1)
            along.append((model.W_dec.grad * direction).sum(-1).abs().max().item())

    trainer.add_callback(Watch())
    trainer.train()
    assert torch.allclose(model.W_dec.norm(dim=-1), torch.ones(64), atol=1e-6)
    assert max(along) < 1e-6


def test_sparsity_penalty_warms_up(base, tmp_path):
    model = make_model(base, k=None, activation="relu", l1_coefficient=1.0)
    trainer = make_trainer(
        base, tmp_path, model, max_steps=10, sparsity_warmup=0.5, learning_rate=0.0, logging_steps=1
    )
    trainer.train()
    (name,) = trainer.dictionaries
    share = [
        log[f"{name}/l1_loss"] / log[f"{name}/l1"] for log in trainer.state.log_history if f"{name}/l1_loss" in log
    ]
    # With a decoder at zero the norm-weighted penalty would vanish; compare against the plain one.
    assert model.config.l1_weighting == "decoder_norm"
    assert share[4:] == pytest.approx([share[-1]] * 6)


def test_bf16_trains_fp32_weights_to_nearly_the_same(base, tmp_path):
    plain, mixed = (make_trainer(base, tmp_path, make_model(base), bf16=flag, max_steps=40) for flag in (False, True))
    for trainer in (plain, mixed):
        trainer.train()
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())
    (name,) = plain.dictionaries
    fvu = [[log[f"{name}/fvu"] for log in t.state.log_history if f"{name}/fvu" in log][-1] for t in (plain, mixed)]
    assert fvu[0] == pytest.approx(fvu[1], rel=0.05)
    assert not same_weights(weights(plain.model), weights(mixed.model))


def test_base_model_is_untouched(base, tmp_path):
    before = weights(base)
    requires_grad = [p.requires_grad for p in base.parameters()]
    make_trainer(base, tmp_path).train()
    assert same_weights(before, weights(base))
    assert [p.requires_grad for p in base.parameters()] == requires_grad
    assert all(p.grad is None for p in base.parameters())


def test_several_epochs_run_the_base_model_once(base, tmp_path):
    calls = []
    handle = base.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    trainer = make_trainer(base, tmp_path, rows=32, max_steps=-1, num_train_epochs=3)
    trainer.train()
    handle.remove()
    assert trainer.state.max_steps == 3 * 32 * 9 // 32
    assert len(calls) == 4  # 32 rows in chunks of 8.


def test_saved_model_loads_and_tells_its_history(base, tmp_path):
    trainer = make_trainer(base, tmp_path)
    trainer.train()
    trainer.save_model()
    loaded = TranscoderModel.from_pretrained(tmp_path)
    assert same_weights(weights(loaded), weights(trainer.model))
    assert loaded.config.training_summary["tokens"] == 12 * 32
    assert loaded.config.input_site == READ
    assert not list(tmp_path.glob("*.bin"))
    assert json.loads((tmp_path / "training_args.json").read_text())["max_steps"] == 12


def test_evaluate_logs_every_dictionary(base, tmp_path):
    trainer = make_trainer(base, tmp_path, TranscoderSet({"one": make_model(base)}))
    trainer.eval_dataset = token_rows(20, seed=5)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_one/fvu"])
    assert {"eval_one/ce_recovered_mean", "eval_one/l0", "eval_one/kl"} <= metrics.keys()
    assert trainer.state.log_history[-1]["eval_one/fvu"] == metrics["eval_one/fvu"]


class TestMistakes:
    def test_site_that_does_not_exist(self, base, tmp_path):
        with pytest.raises(TranscoderError, match="layer"):
            make_trainer(base, tmp_path, TranscoderModel(TranscoderConfig.for_model(base, "layers.9.mlp.in", k=4)))

    def test_width_of_another_model(self, base, tmp_path):
        model = TranscoderModel(TranscoderConfig(d_in=16, num_features=64, k=4, input_site=READ, output_site=WRITE))
        with pytest.raises(TranscoderError, match=r"has width 16.*`d_in=32`"):
            make_trainer(base, tmp_path, model)

    def test_no_sites(self, base, tmp_path):
        with pytest.raises(TranscoderError, match="does not say where"):
            make_trainer(base, tmp_path, TranscoderModel(TranscoderConfig(d_in=32, num_features=64, k=4)))

    def test_too_little_text(self, base, tmp_path):
        with pytest.raises(TranscoderError, match="too short"):
            make_trainer(base, tmp_path, rows=2).train()

    def test_no_text(self, base, tmp_path):
        with pytest.raises(TranscoderError, match="no rows"):
            make_trainer(base, tmp_path, rows=0, max_steps=-1)

    def test_resume_from_a_folder_that_is_none(self, base, tmp_path):
        with pytest.raises(TranscoderError, match="is not a checkpoint"):
            make_trainer(base, tmp_path).train(resume_from_checkpoint=str(tmp_path))

    def test_resume_with_other_sizes(self, base, tmp_path):
        make_trainer(base, tmp_path, save_strategy="steps", save_steps=6).train()
        with pytest.raises(TranscoderError, match="other sizes|does not fit|size"):
            make_trainer(base, tmp_path, make_model(base, num_features=96)).train(resume_from_checkpoint=True)

    def test_resume_with_other_data_settings(self, base, tmp_path):
        make_trainer(base, tmp_path, save_strategy="steps", save_steps=6).train()
        with pytest.raises(TranscoderError, match="32 tokens per step and this run has 16"):
            make_trainer(base, tmp_path, per_device_train_batch_size=16, max_steps=20).train(
                resume_from_checkpoint=True
            )

    def test_nan_activations_stop_the_run(self, tmp_path):
        broken = tiny_model("llama")
        with torch.no_grad():
            broken.model.layers[0].mlp.down_proj.weight[0, 0] = math.inf
        with pytest.raises(TranscoderError, match="NaN or infinity"):
            make_trainer(broken, tmp_path).train()

    def test_budget_below_one_step(self, base, tmp_path):
        with pytest.raises(TranscoderError, match="less than one step"):
            make_trainer(base, tmp_path, max_steps=-1, max_tokens=10)

    def test_text_without_tokenizer(self, base, tmp_path):
        datasets = pytest.importorskip("datasets")
        with pytest.raises(TranscoderError, match="processing_class"):
            TranscoderTrainer(
                make_model(base),
                base,
                TranscoderTrainingArguments(str(tmp_path), use_cpu=True),
                datasets.Dataset.from_dict({"text": ["one", "two"]}),
            )
