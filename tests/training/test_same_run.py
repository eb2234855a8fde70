"""A resumed run is made with what the checkpoint was made with, or says what differs; nothing in a checkpoint is unpickled."""

import copy
import json
import os
import shutil

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_transcoders import (
    TranscoderError,
    TranscoderSet,
    TranscoderTrainer,
    TranscoderTrainingArguments,
)
from hf_transcoders.training import checkpoints
from hf_transcoders.training.checkpoint_files import MANIFEST, commit, find_checkpoint, why_unusable
from hf_transcoders.training.state_files import load_state, save_state
from tests.data.test_harvest import token_rows
from tests.tiny_models import tiny_model
from tests.training.test_trainer import WRITE, make_model, make_trainer, same_weights, weights


SAVING = {"save_strategy": "steps", "save_steps": 6, "max_steps": 12}


@pytest.fixture
def run(straight, tmp_path):
    """A folder that holds the checkpoint in the middle of that run."""
    shutil.copytree(straight[0] / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
    return tmp_path / "run"


def resume(base, run, **changes):
    trainer = make_trainer(base, run, **{**SAVING, **changes})
    trainer.train(resume_from_checkpoint=True)
    return trainer


def altered(base):
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.layers[0].mlp.gate_proj.weight[1, 2] += 1e-3
    return other


def eager(base):
    other = copy.deepcopy(base)
    other.set_attn_implementation("eager")
    return other


class TestWhatDiffersIsNamed:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"base": altered}, "other base_model.weights"),
            ({"base": eager}, "base_model.config.attn_implementation sdpa and this run has eager"),
            ({"base": lambda base: tiny_model("gpt2")}, "base_model.model_type llama and this run has gpt2"),
            ({"rows": 32}, "data.rows 64 and this run has 32"),
            ({"model": {"k": 8}}, "transcoder.k 4 and this run has 8"),
            ({"model": {"activation": "batchtopk"}}, "transcoder.activation topk and this run has batchtopk"),
            ({"model": {"loss_reduction": "mean"}}, "transcoder.loss_reduction normalized and this run has mean"),
            ({"model": {"auxk_coefficient": 0.5}}, "transcoder.auxk_coefficient 0.03125 and this run has 0.5"),
            ({"model": {"decoder_init": "random"}}, "transcoder.decoder_init zero and this run has random"),
            ({"model": {"matryoshka_sizes": [16, 64]}}, "no dictionaries.*matryoshka_sizes and this run has .16, 64."),
            ({"model": {"read": WRITE}}, "transcoder.input_site layers.1.mlp.in|dictionaries layers.1"),
            ({"skip_first": 3}, "skip_first 1 and this run has 3"),
            ({"harvest_batch_size": 4}, "harvest_batch_size 8 and this run has 4"),
            ({"outlier_factor": 3.0}, "outlier_factor 10.0 and this run has 3.0"),
            ({"buffer_tokens": 64}, "block tokens 128 and this run has 64"),
            (
                {"seed": 1, "learning_rate": 1e-2},
                "seed 42 and this run has 1; learning_rate 0.003 and this run has 0.01",
            ),
            ({"data_seed": 1}, "data_seed"),
            ({"optim": "sgd"}, "optim adamw_torch_fused and this run has sgd"),
            ({"weight_decay": 0.1}, "weight_decay 0.0 and this run has 0.1"),
            ({"adam_beta2": 0.9}, "adam_beta2 0.999 and this run has 0.9"),
            ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type linear and this run has cosine"),
            ({"warmup_steps": 5}, "warmup_steps 0.02 and this run has 5"),
            ({"max_grad_norm": 0.1}, "max_grad_norm 1.0 and this run has 0.1"),
            ({"sparsity_warmup": 0.5}, "sparsity_warmup 0.1 and this run has 0.5"),
            ({"dead_after_tokens": 9}, "no dead_after_tokens and this run has 9"),
            ({"bf16": True}, "mixed_precision no and this run has bf16"),
            ({"data_shards": 2}, "it has 1 data shards and this run has 2"),
        ],
    )
    def test_and_refused(self, base, run, changes, message):
        changes = dict(changes)
        other = changes.pop("base", lambda base: base)(base)
        if "model" in changes:
            changes["model"] = make_model(base, **changes["model"])
        with pytest.raises(TranscoderError, match=message) as error:
            resume(other, run, **changes)
        assert "resume with the same" in str(error.value) and "\n" not in str(error.value)

    def test_all_of_it(self, base, run):
        with pytest.raises(TranscoderError, match="rows.*k 4.*max_grad_norm.*16 tokens per step|32 tokens per step"):
            resume(base, run, rows=32, model=make_model(base, k=8), max_grad_norm=2.0, per_device_train_batch_size=16)

    def test_the_number_and_names_of_dictionaries(self, base, run):
        with pytest.raises(TranscoderError, match="dictionaries layers.1.mlp.transcoder and this run has a, b"):
            resume(base, run, model=TranscoderSet({"a": make_model(base), "b": make_model(base)}))

    def test_other_rows_of_the_same_number(self, base, run):
        trainer = make_trainer(base, run, **SAVING)
        trainer.train_dataset = token_rows(64, seed=9)
        with pytest.raises(TranscoderError, match="made with other data.digest"):
            trainer.train(resume_from_checkpoint=True)

    def test_an_optimizer_of_the_users(self, base, tmp_path):
        def make(output, **options):
            model = make_model(base)
            args = TranscoderTrainingArguments(
                str(output), **SAVING, per_device_train_batch_size=32, harvest_batch_size=8, buffer_tokens=128,
                use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=4,
            )  # fmt: skip
            kind = options.pop("kind", torch.optim.AdamW)
            optimizer = kind(model.parameters(), lr=1e-3, **options)
            return TranscoderTrainer(model, base, args, token_rows(64), optimizers=(optimizer, None))

        whole = make(tmp_path)
        whole.train()
        same = make(tmp_path)
        same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert same_weights(weights(whole.model), weights(same.model))
        with pytest.raises(
            TranscoderError, match=r"optimizer.weight_decay 0.01 and this run has 0.5: resume with the same"
        ):
            make(tmp_path, weight_decay=0.5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        with pytest.raises(TranscoderError, match="made with AdamW and this run has SGD"):
            make(tmp_path, kind=torch.optim.SGD).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))

    def test_rows_of_a_stream(self, base, tmp_path):
        def make(rows, output):
            trainer = make_trainer(base, output, **SAVING)
            trainer.train_dataset = datasets.Dataset.from_list(rows).to_iterable_dataset()
            return trainer

        whole = make(token_rows(64), tmp_path / "a")
        whole.train()
        checkpoint = tmp_path / "a" / "checkpoint-6"
        same = make(token_rows(64), tmp_path / "b")
        same.train(resume_from_checkpoint=str(checkpoint))
        assert same_weights(weights(whole.model), weights(same.model))
        # An early row, a late one that was read, and one that is still to come.
        for row, refused in ((0, True), (25, True), (63, False)):
            rows = token_rows(64)
            rows[row] = {"input_ids": [9] * 10}
            other = make(rows, tmp_path / f"c{row}")
            if not refused:
                other.train(resume_from_checkpoint=str(checkpoint))
                continue
            with pytest.raises(TranscoderError, match="has other rows than those of the checkpoint"):
                other.train(resume_from_checkpoint=str(checkpoint))
            # The state of the checkpoint is not saved again as one of these rows.
            assert not list((tmp_path / f"c{row}").glob("checkpoint-*"))


class TestWhatHasNotChangedIsAccepted:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"base": copy.deepcopy},
            {"base": lambda base: copy.deepcopy(base).train()},
            {"logging_steps": 1, "save_steps": 2, "save_total_limit": 1, "run_name": "other"},
            {"activation_cache_gb": 0.0, "eval_tokens": 7},
        ],
    )
    def test_and_continues_exactly(self, base, run, straight, changes):
        changes = dict(changes)
        trainer = resume(changes.pop("base", lambda base: base)(base), run, **changes)
        assert same_weights(weights(trainer.model), straight[1])

    def test_a_base_model_that_was_saved_and_loaded(self, base, run, straight, tmp_path):
        base.save_pretrained(tmp_path / "base")
        trainer = resume(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), run)
        assert same_weights(weights(trainer.model), straight[1])

    def test_rows_as_a_dataset(self, base, run, straight):
        trainer = make_trainer(base, run, **SAVING)
        trainer.train_dataset = datasets.Dataset.from_list(token_rows(64))
        trainer.train(resume_from_checkpoint=True)
        assert same_weights(weights(trainer.model), straight[1])

    def test_another_length_with_a_warning(self, base, run, caplog):
        assert resume(base, run, max_steps=18).state.global_step == 18
        assert "is of a run of 12 steps and this run has 18" in caplog.text


class TestChecksums:
    def test_one_bit_of_any_file_is_noticed(self, run):
        checkpoint = run / "checkpoint-6"
        files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]
        assert len(files) >= 9
        for path in files:
            content = path.read_bytes()
            for place in {0, len(content) // 2, len(content) - 1}:
                flipped = bytearray(content)
                flipped[place] ^= 0x10
                path.write_bytes(flipped)
                assert why_unusable(checkpoint) == (
                    f"{path.name} is damaged: its SHA-256 is not that of checkpoint.json"
                ), path
            path.write_bytes(content)
        assert why_unusable(checkpoint) is None

    @pytest.mark.parametrize(
        "manifest",
        ["[" * 100_000, "[]", "{}", '{"files": 3, "sha256": 3}', '{"files": {}, "sha256": {}}', "\ud800",
         '{"format_version": 2, "files": {"../x": 1}, "sha256": {"../x": "0"}}', "9" * 5000],
    )  # fmt: skip
    def test_a_damaged_manifest_leaves_the_checkpoint_before(self, run, manifest):
        shutil.copytree(run / "checkpoint-6", run / "checkpoint-7")
        (run / "checkpoint-7" / MANIFEST).write_bytes(manifest.encode("utf-8", "surrogatepass"))
        assert why_unusable(run / "checkpoint-7")
        assert find_checkpoint(run) == run / "checkpoint-6"

    def test_of_an_early_version(self, run):
        manifest = json.loads((run / "checkpoint-6" / MANIFEST).read_text())
        (run / "checkpoint-6" / MANIFEST).write_text(json.dumps({"format_version": 1, "files": manifest["files"]}))
        assert "early version of hf_transcoders" in why_unusable(run / "checkpoint-6")

    def test_of_a_later_version(self, run):
        manifest = json.loads((run / "checkpoint-6" / MANIFEST).read_text())
        (run / "checkpoint-6" / MANIFEST).write_text(json.dumps({**manifest, "format_version": 3}))
        assert why_unusable(run / "checkpoint-6") == "it has format 3, and this version reads 2"


def resign(checkpoint):
    """Make a changed checkpoint look whole, as a stranger would."""
    (checkpoint / MANIFEST).unlink()
    final = checkpoint.with_name("resigned")
    commit(checkpoint, final)
    os.replace(final, checkpoint)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def first(state):
    """The state of the first parameter."""
    return state["state"]["state"][0]


FIRED = "layers.1.mlp.transcoder/fired"


class TestStrangers:
    @pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "optimizer.bin"])
    @pytest.mark.parametrize("listed", [True, False])
    def test_no_pickle_is_loaded(self, base, run, straight, tmp_path, name, listed):
        torch.save({"bomb": Bomb(tmp_path / "exploded")}, run / "checkpoint-6" / name)
        if listed:
            resign(run / "checkpoint-6")
            with pytest.raises(TranscoderError, match=f"{name} is a pickle, which is never loaded"):
                resume(base, run)
        else:
            assert same_weights(weights(resume(base, run).model), straight[1])
        assert not (tmp_path / "exploded").exists()

    def test_no_pickle_is_written(self, straight):
        for path in (straight[0] / "checkpoint-6").rglob("*"):
            assert path.suffix in (".json", ".safetensors", ".md"), path

    def change_state(name, change):
        def apply(checkpoint):
            state = load_state(checkpoint / name)
            result = change(state)
            save_state(state if result is None else result, checkpoint / name)

        return apply

    def change_json(name, change):
        def apply(checkpoint):
            content = json.loads((checkpoint / name).read_text())
            result = change(content)
            (checkpoint / name).write_text(json.dumps(content if result is None else result))

        return apply

    def change_tensors(name, change):
        def apply(checkpoint):
            tensors = load_file(checkpoint / name)
            change(tensors)
            save_file(tensors, checkpoint / name)

        return apply

    OPTIMIZER, SCHEDULER, RANDOM = "optimizer.safetensors", "scheduler.safetensors", "rng_state_0.safetensors"
    STREAM, MONITORS, STATE = "activation_stream_0.json", "monitors_0.safetensors", "trainer_state.json"

    @pytest.mark.parametrize(
        "damage",
        [
            change_state(OPTIMIZER, lambda state: []),
            change_state(OPTIMIZER, lambda state: {"class": "AdamW"}),
            change_state(OPTIMIZER, lambda state: {**state, "state": None}),
            change_state(OPTIMIZER, lambda state: state["state"].update(state=3)),
            change_state(OPTIMIZER, lambda state: state["state"].update(param_groups=[])),
            change_state(OPTIMIZER, lambda state: state["state"]["param_groups"][0].update(lr="high")),
            change_state(OPTIMIZER, lambda state: state["state"]["param_groups"][0].update(params=[0, 0, 0, 0])),
            change_state(OPTIMIZER, lambda state: first(state).pop("exp_avg")),
            change_state(OPTIMIZER, lambda state: first(state).update(exp_avg=torch.zeros(2))),
            change_state(OPTIMIZER, lambda state: first(state).update(exp_avg="x")),
            change_state(SCHEDULER, lambda state: state["state"].update(step=5)),
            change_state(SCHEDULER, lambda state: state["state"].update(last_epoch="x")),
            change_state(SCHEDULER, lambda state: state["state"].update(base_lrs=3)),
            change_state(SCHEDULER, lambda state: 7),
            change_state(RANDOM, lambda state: state.update(python=(1, 2))),
            change_state(RANDOM, lambda state: state.update(cpu=torch.zeros(3))),
            change_state(RANDOM, lambda state: state.pop("numpy")),
            change_state(RANDOM, lambda state: None or 5),
            change_json(STREAM, lambda state: []),
            change_json(STREAM, lambda state: state.update(offset="x")),
            change_json(STREAM, lambda state: state.update(block_start=[0, 1])),
            change_json(STREAM, lambda state: state.pop("seed") and None),
            change_json(STREAM, lambda state: state.update(offset=-32)),
            change_json(STATE, lambda state: []),
            change_json(STATE, lambda state: state.update(global_step="six")),
            change_json(STATE, lambda state: state.update(unknown=1)),
            change_json(STATE, lambda state: state.update(log_history=[{"loss": "x", "step": 1}])),
            change_json(STATE, lambda state: state.update(epoch=[])),
            change_json("fingerprint.json", lambda state: {}),
            change_json("fingerprint.json", lambda state: state.update(base_model=3, dictionaries=[1])),
            change_tensors(MONITORS, lambda tensors: tensors.clear()),
            change_tensors(MONITORS, lambda tensors: tensors.update({FIRED: torch.zeros(3)})),
            change_tensors(MONITORS, lambda tensors: tensors.update({f"{FIRED}.x": torch.zeros(3)})),
            lambda checkpoint: (checkpoint / TestStrangers.MONITORS).unlink(),
            lambda checkpoint: (checkpoint / TestStrangers.STATE).write_text("[" * 100_000),
            lambda checkpoint: (checkpoint / TestStrangers.STREAM).write_text("9" * 5000),
        ],
    )  # fmt: skip
    def test_what_is_not_what_it_must_be_is_one_sentence(self, base, run, damage):
        damage(run / "checkpoint-6")
        resign(run / "checkpoint-6")
        with pytest.raises(TranscoderError) as error:
            resume(base, run)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_an_optimizer_that_no_checkpoint_can_hold_is_refused_after_its_first_step(base, tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["odd"] = object()

    def make(**changes):
        trainer = make_trainer(base, tmp_path, **{**SAVING, **changes})
        trainer.optimizer = Odd(trainer.model.parameters(), lr=1e-3)
        return trainer

    trainer = make()
    with pytest.raises(TranscoderError, match="checkpoint cannot hold a builtins.object"):
        trainer.train()
    assert trainer.state.global_step == 1
    make(save_strategy="no").train()


class TestLength:
    def steps(self, base, tmp_path, rows, args=None, tokenizer=None, **changes):
        args = args or TranscoderTrainingArguments(
            str(tmp_path), per_device_train_batch_size=8, num_train_epochs=1, use_cpu=True, report_to="none", **changes
        )
        return TranscoderTrainer(make_model(base), base, args, rows, processing_class=tokenizer).args.max_steps

    def test_of_an_epoch_is_that_of_all_rows(self, base, tmp_path):
        rows = [{"input_ids": [5] * length} for length in (2, 9, 30, 1, 17)]
        kept = 1 + 8 + 29 + 0 + 16
        assert self.steps(base, tmp_path, rows) == kept // 8
        assert self.steps(base, tmp_path, datasets.Dataset.from_list(rows[::-1])) == kept // 8
        assert self.steps(base, tmp_path, rows, skip_first=3) == (6 + 27 + 14) // 8

    def test_counts_no_padding(self, base, tmp_path):
        rows = [
            {"input_ids": [5] * 30, "attention_mask": [int(place < length) for place in range(30)]}
            for length in (2, 9, 30, 17)
        ]
        assert self.steps(base, tmp_path, rows) == (1 + 8 + 29 + 16) // 8

    def test_counts_no_special_tokens(self, base, tmp_path):
        class Tokenizer:
            all_special_ids = [2]

        rows = [{"input_ids": [2, 5, 2, 5, 5, 5, 5, 5, 2, 2]}] * 4
        assert self.steps(base, tmp_path, rows, tokenizer=Tokenizer()) == 6 * 4 // 8
        assert self.steps(base, tmp_path, rows, tokenizer=Tokenizer(), skip_special_tokens=False) == 9 * 4 // 8

    def test_of_a_stream_must_be_given(self, base, tmp_path):
        rows = datasets.Dataset.from_list(token_rows(64)).to_iterable_dataset()
        with pytest.raises(TranscoderError, match="set `max_tokens` or `max_steps`"):
            self.steps(base, tmp_path, rows)
        assert self.steps(base, tmp_path, rows, max_tokens=100) == 12

    def test_arguments_serve_several_trainers(self, base, tmp_path):
        args = TranscoderTrainingArguments(
            str(tmp_path), per_device_train_batch_size=8, num_train_epochs=1, use_cpu=True, report_to="none",
            disable_tqdm=True, buffer_tokens=16,
        )  # fmt: skip
        before = copy.deepcopy(args.to_dict())
        found = [self.steps(base, tmp_path, token_rows(count), args) for count in (64, 16, 32)]
        assert found == [64 * 9 // 8, 16 * 9 // 8, 32 * 9 // 8]
        TranscoderTrainer(make_model(base), base, args, token_rows(16)).train()
        assert args.to_dict() == before

    def test_a_short_first_row_does_not_shorten_the_blocks(self, base, tmp_path):
        rows = [{"input_ids": [5, 6]}, *token_rows(63)]
        trainer = make_trainer(base, tmp_path)
        trainer.train_dataset = rows
        assert trainer.get_train_dataloader().shards[0].block_tokens == 128


def test_one_checkpoint_too_many_after_a_kill_is_removed(base, tmp_path, monkeypatch):
    settings = {**SAVING, "save_steps": 4, "save_total_limit": 2}
    calls = []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt

    rotate = checkpoints.rotate
    monkeypatch.setattr(checkpoints, "rotate", lambda *args, **kwargs: killed() or rotate(*args, **kwargs))
    with pytest.raises(KeyboardInterrupt):
        make_trainer(base, tmp_path, **settings).train()
    monkeypatch.undo()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 3
    make_trainer(base, tmp_path, **settings).train(resume_from_checkpoint=True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
