"""Models whose weights are elsewhere until they are needed, or in double precision: the same numbers."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from hf_transcoders import TranscoderTrainer, TranscoderTrainingArguments
from tests.same_model import BLOCKS, EVERYTHING, READING, assert_same, dense, graph_of, numbers, transcoders
from tests.tiny_models import tiny_model


CPU = torch.device("cpu")


def on_cpu(family, tmp_path):
    return cpu_offload(tiny_model(family), execution_device=CPU)


def on_disk(family, tmp_path):
    return disk_offload(tiny_model(family), tmp_path, execution_device=CPU)


def one_layer(family, tmp_path):
    """As `device_map="auto"` leaves a model of which the last layer but one did not fit."""
    model = tiny_model(family)
    places = {name: "cpu" for name, part in model.named_modules() if not list(part.children())}
    for name in places:
        if ".1." in name:
            places[name] = "disk"
    # Tied heads are not listed by their parameters.
    return dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)


@pytest.mark.parametrize(
    ("offload", "family", "parts"),
    [
        (on_cpu, "llama", EVERYTHING),
        (on_cpu, "gpt2", READING),
        (on_cpu, "gemma3_text", READING),
        (on_disk, "opt", f"patching {READING}"),
        (one_layer, "llama", f"patching {READING}"),
        (one_layer, "gpt2", f"patching {READING}"),
    ],
)
def test_an_offloaded_model_is_the_model(offload, family, parts, tmp_path):
    model = offload(family, tmp_path)
    kept_elsewhere = [parameter.is_meta for parameter in model.parameters()]
    assert any(kept_elsewhere)
    assert_same(numbers(model, parts), numbers(tiny_model(family), parts), 1e-4)
    assert [parameter.is_meta for parameter in model.parameters()] == kept_elsewhere


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_autograd_of_an_offloaded_model(family, tmp_path):
    model = on_cpu(family, tmp_path)
    torch.testing.assert_close(
        dense(graph_of(model, method="autograd")), dense(graph_of(tiny_model(family))), rtol=1e-3, atol=1e-4
    )
    assert all(parameter.is_meta for parameter in model.parameters())


def test_training_on_an_offloaded_model_is_training_on_the_model(tmp_path):
    weights = []
    for number, model in enumerate((on_cpu("llama", tmp_path), tiny_model("llama"))):
        arguments = TranscoderTrainingArguments(
            tmp_path / str(number), max_tokens=64, per_device_train_batch_size=32, report_to="none", disable_tqdm=True,
            save_strategy="no",
        )  # fmt: skip
        trainer = TranscoderTrainer(
            transcoders(model)["t1"], model, arguments, train_dataset=BLOCKS, eval_dataset=BLOCKS
        )
        trainer.train()
        trainer.evaluate()
        weights.append(trainer.model.W_enc.detach())
    assert torch.equal(*weights)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3"])
def test_a_model_in_double_precision(family):
    parts = EVERYTHING if family == "gpt2" else f"patching {READING}"
    model = tiny_model(family).double()
    assert_same(numbers(model, parts), numbers(tiny_model(family), parts), 1e-3)
    torch.testing.assert_close(dense(graph_of(model, method="autograd")), dense(graph_of(model)), rtol=1e-3, atol=1e-4)
