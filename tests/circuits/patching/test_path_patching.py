"""Path patching against two hooked forward passes per sender."""

import pytest
import torch

from hf_transcoders import Site, TranscoderError
from hf_transcoders.circuits.patching import (
    Patching,
)
from tests.circuits.patching.brute_force import path_patched, tiny_task
from tests.circuits.patching.test_patching import FAMILIES, LAYERS, close, positions_of
from tests.tiny_models import tiny_model


def by_brute_force(model, task, receivers, name, freeze_mlps, which=("clean", "corrupted"), per_query_head=False):
    sites = None if receivers == "logits" else [Site.parse(site) for site in receivers]
    values = torch.empty(LAYERS, 5, len(task))
    for row, position in enumerate(positions_of(task, name)):
        for layer in range(LAYERS):
            for head in range(5):
                values[layer, head, row] = path_patched(
                    model, task, row, (layer, head), sites, position, freeze_mlps, which, per_query_head
                )
    return values


def check(model, task, receivers, name, freeze_mlps, direction="noising", **options):
    which = ("corrupted", "clean") if direction == "denoising" else ("clean", "corrupted")
    patching = Patching(model, task, direction=direction)
    result = patching.paths(receivers, name, sender_mlps=True, freeze_mlps=freeze_mlps, **options)
    expected = by_brute_force(model, task, receivers, name, freeze_mlps, which, options.get("per_query_head", False))
    close(result.values, expected)
    assert (result.values - result.base).abs().max() > 1e-3
    assert result.axes["head"] == ["0", "1", "2", "3", "mlp"]
    without = patching.paths(receivers, name, freeze_mlps=freeze_mlps, **options)
    close(without.values, expected[:, :4])


@pytest.mark.parametrize("freeze_mlps", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_head_to_query(family, freeze_mlps):
    check(tiny_model(family), tiny_task(), ["layers.2.attn.head.1.query"], "END", freeze_mlps)


@pytest.mark.parametrize("freeze_mlps", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_head_to_logits(family, freeze_mlps):
    check(tiny_model(family), tiny_task(), "logits", "END", freeze_mlps)


@pytest.mark.parametrize("name", ["S", "all"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma3_text", "phi", "opt"])
def test_keys_and_values_of_several_layers(family, name):
    receivers = ["layers.1.attn.head.1.value", "layers.2.attn.head.0.key", "layers.2.attn.head.1.query"]
    check(tiny_model(family), tiny_task(lengths=(9, 11)), receivers, name, False)


@pytest.mark.parametrize("name", ["S", "all"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma3_text"])
def test_keys_and_values_of_single_heads(family, name):
    receivers = ["layers.1.attn.head.3.value", "layers.2.attn.head.0.key", "layers.2.attn.head.1.query"]
    model, task = tiny_model(family), tiny_task(lengths=(9, 11))
    check(model, task, receivers, name, False, per_query_head=True)
    # All heads that share a value together are the receivers of the key-value head.
    if family == "llama":
        whole = Patching(model, task).paths(["layers.1.attn.head.1.value"], name)
        each = ["layers.1.attn.head.2.value", "layers.1.attn.head.3.value"]
        close(Patching(model, task).paths(each, name, per_query_head=True).values, whole.values)


@pytest.mark.parametrize("freeze_mlps", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "opt"])
def test_mlps_as_receivers(family, freeze_mlps):
    receivers = ["layers.1.mlp.in", "layers.2.mlp.in", "layers.2.attn.head.3.query"]
    check(tiny_model(family), tiny_task(lengths=(9, 11)), receivers, "S", freeze_mlps)


def test_logits_of_all_positions_and_denoising():
    check(tiny_model("gpt2"), tiny_task(), "logits", "all", False)
    check(tiny_model("llama"), tiny_task(), ["layers.2.attn.head.1.value"], "S", False, direction="denoising")


def test_batches_do_not_matter():
    model, task = tiny_model("llama"), tiny_task()
    receivers = ["layers.1.attn.head.1.value", "layers.2.attn.head.0.query"]
    whole = Patching(model, task).paths(receivers, "S")
    for batch_size in (1, 5):
        close(Patching(model, task, batch_size=batch_size).paths(receivers, "S").values, whole.values)


@pytest.mark.parametrize(
    "receivers, position, message",
    [
        (["layers.2.attn.head.7.query"], "END", "heads 0 to 3"),
        (["layers.2.attn.head.3.value"], "END", "key-value heads 0 to 1"),
        (["layers.1.attn.head.0.z"], "END", "cannot be a receiver"),
        (["logits", "layers.1.mlp.in"], "END", "either 'logits', or heads"),
        (["layers.7.mlp.in"], "END", "layers 0 to 2"),
        ("logits", "S", "read at END"),
    ],
)
def test_wrong_input_is_refused_with_a_sentence(receivers, position, message):
    with pytest.raises(TranscoderError, match=message):
        Patching(tiny_model("llama"), tiny_task()).paths(receivers, position)


def test_an_object_used_again_gives_the_same():
    model, task = tiny_model("llama"), tiny_task()
    receivers = ["layers.2.attn.head.1.query"]
    alone = [
        Patching(model, task).heads("END"),
        Patching(model, task).paths(receivers),
        Patching(model, task).heads("S"),
        Patching(model, task).residual(["S", "END"]),
        Patching(model, task).heads("all", "pattern"),
        Patching(model, task).paths(receivers, "all"),
        Patching(model, task).paths("logits", sender_mlps=True),
    ]
    forwards = []
    patching = Patching(model, task)
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: forwards.append(kwargs.get("input_ids") is not None), with_kwargs=True
    )
    again = [
        patching.heads("END"),
        patching.paths(receivers),
        patching.heads("S"),
        patching.residual(["S", "END"]),
        patching.heads("all", "pattern"),
        patching.paths(receivers, "all"),
        patching.paths("logits", sender_mlps=True),
    ]
    for first, second in zip(alone, again, strict=True):
        close(second.values, first.values)
    before = sum(forwards)
    patching.heads("S")
    patching.paths(receivers)
    assert sum(forwards) == before and before < 14


@pytest.mark.parametrize("receivers", ["logits", ["layers.2.attn.head.1.query", "layers.1.mlp.in"]])
def test_per_query_head_without_keys_and_values_is_refused(receivers):
    patching = Patching(tiny_model("llama"), tiny_task())
    with pytest.raises(TranscoderError, match="for key and value receivers, and there are none"):
        patching.paths(receivers, per_query_head=True)
    mixed = ["layers.2.attn.head.1.query", "layers.2.attn.head.1.value"]
    assert patching.paths(mixed, per_query_head=True).protocol["per_query_head"]


def test_a_model_in_training_is_patched_without_dropout():
    model, task = tiny_model("gpt2"), tiny_task()
    expected = [Patching(model, task).heads().values, Patching(model, task).paths().values]
    model.train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    patching = Patching(model, task)
    found = [patching.heads().values, Patching(model, task).paths().values]
    close(torch.cat([each.flatten() for each in found]), torch.cat([each.flatten() for each in expected]))
    assert [module.training for module in model.modules()] == before
