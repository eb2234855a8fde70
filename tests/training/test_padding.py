"""A run on padded rows is the run on their texts, and several datasets are several."""

import pytest
import torch
from datasets import Dataset, DatasetDict

from hf_transcoders import TranscoderError, TranscoderEvaluator
from hf_transcoders.training import TranscoderTrainer, TranscoderTrainingArguments
from tests.texts import make_texts, padded
from tests.tiny_models import tiny_model
from tests.training.test_trainer import make_model, same_weights, weights


TEXTS = make_texts(*[12, 9, 6, 12, 7, 10] * 8)
HELD_OUT = make_texts(12, 5, 9, 10, seed=1)


@pytest.fixture(scope="module")
def base():
    return tiny_model("gpt2")


def make_trainer(base, folder, train, held_out=None, **changes):
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 16, "harvest_batch_size": 8, "buffer_tokens": 64, "learning_rate": 3e-3,
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip
    args = TranscoderTrainingArguments(str(folder), **{**settings, **changes})
    return TranscoderTrainer(make_model(base), base, args, train_dataset=train, eval_dataset=held_out)


def test_training_on_padded_rows_ends_in_the_same_bits(base, tmp_path):
    ends, metrics = [], []
    for how in ("ragged", "left", "holes"):
        rows, held_out = (Dataset.from_list(padded(texts, how)) for texts in (TEXTS, HELD_OUT))
        trainer = make_trainer(base, tmp_path / how, rows, held_out)
        trainer.train()
        ends.append(weights(trainer.model))
        metrics.append({name: value for name, value in trainer.evaluate().items() if name != "eval_runtime"})
    assert all(same_weights(ends[0], other) for other in ends[1:])
    assert all(other == metrics[0] for other in metrics[1:])
    report = TranscoderEvaluator(base, padded(HELD_OUT, "mixed"), batch_size=8, progress=False).evaluate(
        [trainer.model]
    )
    assert metrics[0]["eval_loss"] == pytest.approx(next(iter(report.columns().values()))["fvu"], rel=1e-6)


def test_the_splits_of_a_dataset(base, tmp_path):
    splits = DatasetDict(
        {"test": Dataset.from_list(padded(HELD_OUT, "left")), "train": Dataset.from_list(padded(TEXTS, "left"))}
    )
    trainer = make_trainer(base, tmp_path, splits)
    assert trainer.train_dataset is splits["train"]
    with pytest.raises(TranscoderError, match="not one dataset but a DatasetDict of test: choose one"):
        make_trainer(base, tmp_path, DatasetDict({"test": splits["test"]}))


def test_several_datasets_are_evaluated_under_their_names(base, tmp_path):
    other = make_texts(8, 8, seed=2)
    held_out = {"near": Dataset.from_list(padded(HELD_OUT, "left")), "far": Dataset.from_list(padded(other, "right"))}
    trainer = make_trainer(
        base, tmp_path, Dataset.from_list(padded(TEXTS, "left")), held_out, eval_strategy="steps", eval_steps=6
    )
    trainer.train()
    metrics = trainer.evaluate()
    names = {name.split("/")[0] for name in metrics if "/" in name}
    assert names == {"eval_near_layers.1.mlp.transcoder", "eval_far_layers.1.mlp.transcoder"}
    assert metrics["eval_near_loss"] != metrics["eval_far_loss"]
    assert any("eval_far_loss" in log for log in trainer.state.log_history)
    for name, texts in (("near", HELD_OUT), ("far", other)):
        alone = trainer.evaluate(Dataset.from_list(padded(texts, "right")), metric_key_prefix="own")
        assert alone["own_loss"] == metrics[f"eval_{name}_loss"]
    # The dictionary keeps the numbers of the first.
    trainer.evaluate()
    kept = trainer.model.config.evaluation["metrics"]["fvu"]
    assert kept == metrics["eval_near_loss"]
    trainer.evaluation_report()
    assert trainer.model.config.evaluation["metrics"]["fvu"] == kept


def test_what_a_tokenizer_returned_is_trained_on(base, tmp_path):
    rows = padded(TEXTS, "left")
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}
    first = make_trainer(base, tmp_path / "a", batch)
    second = make_trainer(base, tmp_path / "b", Dataset.from_list(padded(TEXTS, "right")))
    for trainer in (first, second):
        trainer.train()
    assert same_weights(weights(first.model), weights(second.model))
