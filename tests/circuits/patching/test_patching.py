"""Activation patching against one hooked forward pass per patch."""

import pytest
import torch
from datasets import Dataset

from hf_transcoders import TranscoderError
from hf_transcoders.circuits.patching import (
    Patching,
    PatchPlan,
)
from hf_transcoders.lm.architectures import has_parallel_residual
from hf_transcoders.lm.attention import num_heads
from hf_transcoders.tasks import Task, end_logits, row_metrics
from tests.circuits.patching.brute_force import activations, at, patched, prompt, tiny_task
from tests.tiny_models import TINY_CONFIGS, tiny_model


FAMILIES = sorted(TINY_CONFIGS)
LAYERS = 3


def positions_of(task, name):
    return [None if name == "all" else row["positions"][name] for row in task.dataset]


def by_brute_force(model, task, component, heads, name, which=("clean", "corrupted")):
    values = torch.empty(LAYERS, heads, len(task))
    for row, position in enumerate(positions_of(task, name)):
        source = activations(model, prompt(task, row, which[1]))
        for layer in range(LAYERS):
            for head in range(heads):
                value = at(source[component, layer], component, head, position)
                values[layer, head, row] = patched(
                    model, task, row, [(component, layer, head, position, value)], which[0]
                )
    return values


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["END", "S", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_equal_one_forward_pass_per_head(family, name):
    model, task = tiny_model(family), tiny_task()
    result = Patching(model, task).heads(position=name)
    expected = by_brute_force(model, task, "z", 4, name)
    close(result.values, expected)
    assert (result.values - result.base).abs().max() > 1e-2


@pytest.mark.parametrize("component", ["query", "key", "value", "pattern"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "gemma3_text", "phi"])
def test_parts_of_heads_equal_one_forward_pass_per_head(family, component):
    model, task = tiny_model(family), tiny_task()
    heads = num_heads(model)[component in ("key", "value")]
    for name in ("S", "all"):
        result = Patching(model, task).heads(position=name, component=component)
        assert result.shape == (LAYERS, heads)
        close(result.values, by_brute_force(model, task, component, heads, name))


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_stream_equals_one_forward_pass_per_point(family):
    model, task = tiny_model(family), tiny_task(lengths=(8, 8))
    result = Patching(model, task).residual(layers=range(LAYERS + 1))
    expected = torch.empty(LAYERS + 1, 8, 2)
    for row in range(2):
        source = activations(model, prompt(task, row, "corrupted"))
        for layer in range(LAYERS + 1):
            stream = source["resid_post", LAYERS - 1] if layer == LAYERS else source["resid_pre", layer]
            for position in range(8):
                patch = ("resid_pre", layer, None, position, stream[position])
                expected[layer, position, row] = patched(model, task, row, [patch])
    close(result.values, expected)


@pytest.mark.parametrize("component", ["key", "value"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gemma2", "gemma3_text", "phi3"])
def test_keys_and_values_of_single_heads_equal_one_forward_pass_each(family, component):
    model, task = tiny_model(family), tiny_task()
    groups = 4 // num_heads(model)[1]
    for name in ("S", "all"):
        result = Patching(model, task).heads(position=name, component=component, per_query_head=True)
        expected = torch.empty(LAYERS, 4, len(task))
        for row, position in enumerate(positions_of(task, name)):
            source = activations(model, prompt(task, row, "corrupted"))
            for layer in range(LAYERS):
                for head in range(4):
                    patch = f"head_{component}"
                    value = at(source[component, layer], patch, head, position, groups)
                    expected[layer, head, row] = patched(model, task, row, [(patch, layer, head, position, value)])
        close(result.values, expected)
        together = Patching(model, task).heads(position=name, component=component)
        # Heads that share a value each have a part of its effect; without sharing, a head has the whole effect.
        assert (groups == 1) == torch.allclose(result.values[:, ::groups], together.values, rtol=1e-4, atol=1e-4)
    zeroed = Patching(model, task, ablation="zero").heads("S", component, per_query_head=True, layers=[1])
    for row, position in enumerate(positions_of(task, "S")):
        patch = (f"head_{component}", 1, 3, position, torch.zeros(8))
        assert zeroed.values[0, 3, row] == pytest.approx(patched(model, task, row, [patch]), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gpt_neox", "phi")])
def test_the_stream_between_attention_and_mlp_equals_one_forward_pass_per_point(family):
    model, task = tiny_model(family), tiny_task()
    names = ["S", "END", "all"]
    result = Patching(model, task).residual(names, "resid_mid")
    expected = torch.empty(LAYERS, len(names), len(task))
    for column, name in enumerate(names):
        for row, position in enumerate(positions_of(task, name)):
            source = activations(model, prompt(task, row, "corrupted"))
            for layer in range(LAYERS):
                value = at(source["resid_mid", layer], "resid_mid", None, position)
                expected[layer, column, row] = patched(model, task, row, [("resid_mid", layer, None, position, value)])
    close(result.values, expected)
    # At all positions, the result is the corrupted run.
    close(result.values[:, 2], result.source.expand(LAYERS, -1))
    assert result.protocol["component"] == "resid_mid"


@pytest.mark.parametrize("family", FAMILIES)
def test_mlps_and_attention_layers_equal_one_forward_pass_each(family):
    model, task = tiny_model(family), tiny_task()
    names = ["S", "END", "all"]
    patching = Patching(model, task)
    for sweep, component in ((patching.mlps, "mlp.out"), (patching.attention, "attn.out")):
        result = sweep(names)
        expected = torch.empty(LAYERS, len(names), len(task))
        for column, name in enumerate(names):
            for row, position in enumerate(positions_of(task, name)):
                source = activations(model, prompt(task, row, "corrupted"))
                for layer in range(LAYERS):
                    value = at(source[component, layer], component, None, position)
                    expected[layer, column, row] = patched(
                        model, task, row, [(component, layer, None, position, value)]
                    )
        close(result.values, expected)


def test_chosen_layers_are_those_of_all_layers():
    patching = Patching(tiny_model("llama"), tiny_task())
    for sweep in (patching.heads, patching.residual, patching.mlps, patching.attention):
        chosen, whole = sweep("END", layers=[2, 0]), sweep("END")
        assert chosen.axes["layer"] == ["2", "0"]
        close(chosen.values, whole.values[[2, 0]])
        assert not torch.allclose(whole.values[0], whole.values[2], atol=1e-3)


def test_a_progress_bar_is_shown_on_request(capsys):
    model, task = tiny_model("llama"), tiny_task()
    Patching(model, task).heads()
    assert not capsys.readouterr().err
    Patching(model, task, progress=True).heads()
    Patching(model, task, progress=True).paths()
    bars = capsys.readouterr().err
    # Each call runs 3 x 4 heads on 3 prompts; a slow machine draws the end of a bar more than once.
    assert bars.count("patching tiny:   0%") == 2 and bars.count("patching tiny: 100%") >= 2 and "36/36" in bars


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_clean_and_everything_is_corrupted(family):
    model, task = tiny_model(family), tiny_task()
    patching = Patching(model, task)
    plan = PatchPlan.from_sites([[], "layers.0.resid_pre", "layers.2.resid_post"], patching.position("all"))
    found = patching.run(plan)
    clean = torch.tensor([patched(model, task, row, []) for row in range(3)])
    corrupted = torch.tensor([patched(model, task, row, [], "corrupted") for row in range(3)])
    close(found.base, clean)
    close(found.source, corrupted)
    assert torch.equal(found.values[0], found.base)
    close(found.values[1], corrupted)
    close(found.values[2], corrupted)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma3_text", "opt"])
def test_rows_of_several_patches_equal_one_forward_pass_per_row(family):
    model, task = tiny_model(family), tiny_task()
    patching = Patching(model, task)
    rows = [
        ["layers.0.attn.head.1.z", "layers.1.attn.head.0.query", "layers.1.mlp.out", "layers.2.attn.head.3.z"],
        ["layers.1.mlp.out", "layers.2.attn.out", "layers.2.resid_pre"],
        ["layers.0.attn.head.3.pattern", "layers.1.attn.head.1.value", "layers.2.attn.head.2.pattern"],
        ["layers.0.attn.out", "layers.1.attn.head.0.key", "layers.2.mlp.out", "layers.2.resid_post"],
    ]
    if not has_parallel_residual(model):
        rows += [
            ["layers.1.resid_mid", "layers.1.mlp.out", "layers.2.attn.head.1.z", "layers.2.resid_mid"],
            ["layers.0.attn.head.1.z", "layers.1.attn.head.2.query", "layers.1.resid_mid"],
        ]
    for name in ("S", "END", "all"):
        found = patching.run(PatchPlan.from_sites(rows, patching.position(name)))
        expected = torch.empty(len(rows), len(task))
        for number, sites in enumerate(rows):
            for row, position in enumerate(positions_of(task, name)):
                source = activations(model, prompt(task, row, "corrupted"))
                patches = []
                for text in sites:
                    _, layer, point = text.split(".", 2)
                    layer, head = int(layer), None
                    if "head" in point:
                        head, component = point.removeprefix("attn.head.").split(".")
                        head = int(head)
                    else:
                        component = point
                    value = at(source[component, layer], component, head, position)
                    if component == "resid_post":
                        component, layer = "resid_pre", layer + 1
                    patches.append((component, layer, head, position, value))
                expected[number, row] = patched(model, task, row, patches)
        close(found.values, expected)


def test_denoising_puts_clean_activations_into_the_corrupted_run():
    model, task = tiny_model("llama"), tiny_task()
    result = Patching(model, task, direction="denoising").heads(position="S")
    close(result.values, by_brute_force(model, task, "z", 4, "S", ("corrupted", "clean")))


def test_given_values_are_written():
    model, task = tiny_model("llama"), tiny_task()
    patching = Patching(model, task)
    values = torch.randn(2, 3, 32)
    sites = ["layers.1.attn.head.1.query", "layers.0.mlp.out"]
    found = patching.run(PatchPlan.from_sites(sites, patching.position("S"), values))
    expected = torch.empty(2, len(task))
    for row, position in enumerate(positions_of(task, "S")):
        for number, patch in enumerate([("query", 1, 1), ("mlp.out", 0, None)]):
            value = values[number, row, : 8 if number == 0 else 32]
            expected[number, row] = patched(model, task, row, [(*patch, position, value)])
    close(found.values, expected)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_batches_do_not_matter(family):
    model, task = tiny_model(family), tiny_task()
    for name in ("END", "S", "all"):
        whole = Patching(model, task).heads(name)
        for batch_size in (1, 2, 7):
            close(Patching(model, task, batch_size=batch_size).heads(name).values, whole.values)
        alone = Patching(model, task.select([1])).heads(name)
        close(alone.values[..., 0], whole.values[..., 1])
        close(Patching(model, task, max_memory=100_000).heads(name).values, whole.values)


def test_metrics_of_all_logits_equal_those_of_whole_forward_passes():
    model, task = tiny_model("gemma2"), tiny_task()
    expected = row_metrics(end_logits(model, task), task.answers())
    for name in ("logit_difference", "probability_difference", "accuracy", "candidate_accuracy", "rank"):
        close(Patching(model, task, metric=name).heads(layers=[2]).base, expected[name])

    def first_logit(logits, answers):
        return logits[:, 0]

    result = Patching(model, task, metric=first_logit).heads(layers=[2])
    close(result.base, end_logits(model, task)[:, 0])
    assert result.metric == "first_logit"
    assert Patching(model, task, metric="kl_divergence").heads(layers=[2]).values.min() >= -1e-6


def test_bf16_stays_near_fp32():
    task = tiny_task()
    exact = Patching(tiny_model("llama"), task).heads().values
    rounded = Patching(tiny_model("llama").to(torch.bfloat16), task).heads().values
    assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_model_is_left_as_it_was():
    model, task = tiny_model("opt"), tiny_task()
    ids = prompt(task, 0)
    with torch.no_grad():
        before = model(ids).logits
        Patching(model, task).heads("all")
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model, task: Patching(model, task).heads("S9"), "no position 'S9'"),
        (lambda model, task: Patching(model, task).heads(11), "token 11"),
        (lambda model, task: Patching(model, task).heads(component="zz"), "no component 'zz'"),
        (lambda model, task: Patching(model, task).heads(per_query_head=True), "Every head has its own z"),
        (lambda model, task: Patching(model, task).residual(["S"], "mlp.in"), "resid_pre or resid_mid"),
        (
            lambda model, task: Patching(tiny_model("phi"), task).residual(["S"], "resid_mid"),
            "no residual stream between",
        ),
        (
            lambda model, task: Patching(model, task).run(
                PatchPlan.from_sites(["layers.0.attn.head.4.key"], torch.tensor([3, 3, 3]), None, True)
            ),
            "the heads 0 to 3",
        ),
        (lambda model, task: Patching(model, task).heads(layers=[3]), "layers 0 to 2"),
        (lambda model, task: Patching(model, task, ablation="noise").heads(), "no ablation 'noise'"),
        (lambda model, task: Patching(model, task, direction="up").heads(), "no direction 'up'"),
        (lambda model, task: Patching(model, task, metric="loss").heads(), "no metric 'loss'"),
        (lambda model, task: Patching(model, task, ablation="resample").heads(), "the only prompt of 9 tokens"),
        (lambda model, task: Patching(model, task).residual(), "differ in length"),
        (
            lambda model, task: Patching(model, task).run(
                PatchPlan.from_sites(["layers.0.attn.head.2.key"], torch.tensor([3, 3, 3]))
            ),
            "key-value heads 0 to 1",
        ),
        (lambda model, task: PatchPlan.from_sites(["layers.0.mlp.in"], torch.tensor([3])), "cannot be patched"),
    ],
)
def test_wrong_input_is_refused_with_a_sentence(call, message):
    with pytest.raises(TranscoderError, match=message):
        call(tiny_model("llama"), tiny_task())


def test_attention_that_cannot_be_edited_is_refused():
    model = tiny_model("gpt2")
    model.config.reorder_and_upcast_attn = True
    for sweep in (Patching.heads, Patching.mlps):
        with pytest.raises(TranscoderError, match="AttentionInterface"):
            sweep(Patching(model, tiny_task()))


def test_pairs_of_unequal_length_are_refused():
    task = tiny_task()
    rows = task.dataset.to_list()
    rows[1]["corrupted_ids"].append(5)
    with pytest.raises(TranscoderError, match="row 1 have 12 and 13"):
        Patching(tiny_model("llama"), Task(Dataset.from_list(rows), "tiny")).heads()
