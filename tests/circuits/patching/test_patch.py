"""Activation patching against one hooked forward per patch."""

import pytest
import torch
from datasets import Dataset

from hf_transcoders import TranscoderError
from hf_transcoders.circuits.patching import (
    PatchEngine,
    PatchPlan,
    patch_attention,
    patch_heads,
    patch_mlps,
    patch_residual,
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
def test_heads_equal_one_forward_per_head(family, name):
    model, task = tiny_model(family), tiny_task()
    result = patch_heads(model, task, position=name)
    expected = by_brute_force(model, task, "z", 4, name)
    close(result.values, expected)
    assert (result.values - result.base).abs().max() > 1e-2


@pytest.mark.parametrize("component", ["query", "key", "value", "pattern"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "gemma3_text", "phi"])
def test_parts_of_heads_equal_one_forward_per_head(family, component):
    model, task = tiny_model(family), tiny_task()
    heads = num_heads(model)[component in ("key", "value")]
    for name in ("S", "all"):
        result = patch_heads(model, task, position=name, component=component)
        assert result.shape == (LAYERS, heads)
        close(result.values, by_brute_force(model, task, component, heads, name))


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_stream_equals_one_forward_per_point(family):
    model, task = tiny_model(family), tiny_task(lengths=(8, 8))
    result = patch_residual(model, task, layers=range(LAYERS + 1))
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
def test_keys_and_values_of_single_heads_equal_one_forward_each(family, component):
    model, task = tiny_model(family), tiny_task()
    groups = 4 // num_heads(model)[1]
    for name in ("S", "all"):
        result = patch_heads(model, task, position=name, component=component, per_query_head=True)
        expected = torch.empty(LAYERS, 4, len(task))
        for row, position in enumerate(positions_of(task, name)):
            source = activations(model, prompt(task, row, "corrupted"))
            for layer in range(LAYERS):
                for head in range(4):
                    patch = f"head_{component}"
                    value = at(source[component, layer], patch, head, position, groups)
                    expected[layer, head, row] = patched(model, task, row, [(patch, layer, head, position, value)])
        close(result.values, expected)
        together = patch_heads(model, task, position=name, component=component)
        # Heads that share a value each have a part of its effect; with one each, that is all of it.
        assert (groups == 1) == torch.allclose(result.values[:, ::groups], together.values, rtol=1e-4, atol=1e-4)
    zeroed = patch_heads(model, task, "S", component, per_query_head=True, ablation="zero", layers=[1])
    for row, position in enumerate(positions_of(task, "S")):
        patch = (f"head_{component}", 1, 3, position, torch.zeros(8))
        assert zeroed.values[0, 3, row] == pytest.approx(patched(model, task, row, [patch]), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gpt_neox", "phi")])
def test_the_stream_between_attention_and_mlp_equals_one_forward_per_point(family):
    model, task = tiny_model(family), tiny_task()
    names = ["S", "END", "all"]
    result = patch_residual(model, task, names, "resid_mid")
    expected = torch.empty(LAYERS, len(names), len(task))
    for column, name in enumerate(names):
        for row, position in enumerate(positions_of(task, name)):
            source = activations(model, prompt(task, row, "corrupted"))
            for layer in range(LAYERS):
                value = at(source["resid_mid", layer], "resid_mid", None, position)
                expected[layer, column, row] = patched(model, task, row, [("resid_mid", layer, None, position, value)])
    close(result.values, expected)
    # At all positions it is the corrupted run.
    close(result.values[:, 2], result.source.expand(LAYERS, -1))
    assert result.protocol["component"] == "resid_mid"


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
def test_the_stream_between_attention_and_mlp_can_be_ablated(ablation):
    model, task = tiny_model("gemma2"), tiny_task(lengths=(9, 9), templates=[0, 0])
    found = patch_residual(model, task, ["S"], "resid_mid", ablation=ablation, layers=[1]).values[0, 0]
    for row, position in enumerate(positions_of(task, "S")):
        corrupted = [activations(model, prompt(task, each, "corrupted"))["resid_mid", 1] for each in (0, 1)]
        value = {
            "zero": torch.zeros_like(corrupted[0]),
            "mean": (corrupted[0] + corrupted[1]) / 2,
            "resample": activations(model, prompt(task, 1 - row))["resid_mid", 1],
        }[ablation][position]
        patch = ("resid_mid", 1, None, position, value)
        assert found[row].item() == pytest.approx(patched(model, task, row, [patch]), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_mlps_and_attention_layers_equal_one_forward_each(family):
    model, task = tiny_model(family), tiny_task()
    names = ["S", "END", "all"]
    for sweep, component in ((patch_mlps, "mlp.out"), (patch_attention, "attn.out")):
        result = sweep(model, task, names)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_clean_and_everything_is_corrupted(family):
    model, task = tiny_model(family), tiny_task()
    engine = PatchEngine(model, task)
    plan = PatchPlan.from_sites([[], "layers.0.resid_pre", "layers.2.resid_post"], engine.position("all"))
    found = engine.run(plan)
    clean = torch.tensor([patched(model, task, row, []) for row in range(3)])
    corrupted = torch.tensor([patched(model, task, row, [], "corrupted") for row in range(3)])
    close(found.base, clean)
    close(found.source, corrupted)
    assert torch.equal(found.values[0], found.base)
    close(found.values[1], corrupted)
    close(found.values[2], corrupted)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma3_text", "opt"])
def test_rows_of_several_patches_equal_one_forward_per_row(family):
    model, task = tiny_model(family), tiny_task()
    engine = PatchEngine(model, task)
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
        found = engine.run(PatchPlan.from_sites(rows, engine.position(name)))
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
    result = patch_heads(model, task, position="S", direction="denoising")
    close(result.values, by_brute_force(model, task, "z", 4, "S", ("corrupted", "clean")))


@pytest.mark.parametrize("component", ["z", "key", "pattern"])
def test_ablations_write_what_they_say(component):
    model, task = tiny_model("gpt2"), tiny_task(lengths=(9, 9, 9, 10, 10), templates=[0, 0, 1, 1, 1])
    clean = [activations(model, prompt(task, row)) for row in range(5)]
    corrupted = [activations(model, prompt(task, row, "corrupted")) for row in range(5)]
    groups = {0: [0, 1], 1: [0, 1], 2: [2], 3: [3, 4], 4: [3, 4]}
    for name in ("END", "all"):
        found = {
            kind: patch_heads(model, task, name, component, ablation=kind, layers=[1])
            for kind in ("zero", "mean", "resample")
        }
        assert found["zero"].source is None
        expected = {"zero": torch.empty(1, 4, 5), "mean": torch.empty(1, 4, 5)}
        for row, position in enumerate(positions_of(task, name)):

            def run(head, written, row=row, position=position):
                return patched(model, task, row, [(component, 1, head, position, written)])

            for head in range(4):
                mean = torch.stack([corrupted[other][component, 1] for other in groups[row]]).mean(0)
                value = at(mean, component, head, position)
                expected["zero"][0, head, row] = run(head, torch.zeros_like(value))
                expected["mean"][0, head, row] = run(head, value)
                others = [each for each in range(5) if each != row and (each < 3) == (row < 3)]
                results = [run(head, at(clean[each][component, 1], component, head, position)) for each in others]
                assert min(abs(found["resample"].values[0, head, row] - result) for result in results) < 1e-5
        close(found["zero"].values, expected["zero"])
        close(found["mean"].values, expected["mean"])


def test_given_values_are_written():
    model, task = tiny_model("llama"), tiny_task()
    engine = PatchEngine(model, task)
    values = torch.randn(2, 3, 32)
    sites = ["layers.1.attn.head.1.query", "layers.0.mlp.out"]
    found = engine.run(PatchPlan.from_sites(sites, engine.position("S"), values))
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
        whole = patch_heads(model, task, name)
        for batch_size in (1, 2, 7):
            close(patch_heads(model, task, name, batch_size=batch_size).values, whole.values)
        alone = patch_heads(model, task.select([1]), name)
        close(alone.values[..., 0], whole.values[..., 1])
        close(patch_heads(model, task, name, max_memory=100_000).values, whole.values)


def test_metrics_of_all_logits_equal_those_of_whole_forwards():
    model, task = tiny_model("gemma2"), tiny_task()
    expected = row_metrics(end_logits(model, task), task.answers())
    for name in ("logit_difference", "probability_difference", "accuracy", "candidate_accuracy", "rank"):
        close(patch_heads(model, task, metric=name, layers=[2]).base, expected[name])

    def first_logit(logits, answers):
        return logits[:, 0]

    result = patch_heads(model, task, metric=first_logit, layers=[2])
    close(result.base, end_logits(model, task)[:, 0])
    assert result.metric == "first_logit"
    assert patch_heads(model, task, metric="kl_divergence", layers=[2]).values.min() >= -1e-6


def test_bf16_stays_near_fp32():
    task = tiny_task()
    exact = patch_heads(tiny_model("llama"), task).values
    rounded = patch_heads(tiny_model("llama").to(torch.bfloat16), task).values
    assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_model_is_left_as_it_was():
    model, task = tiny_model("opt"), tiny_task()
    ids = prompt(task, 0)
    with torch.no_grad():
        before = model(ids).logits
        patch_heads(model, task, "all")
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model, task: patch_heads(model, task, "S9"), "no position 'S9'"),
        (lambda model, task: patch_heads(model, task, 11), "token 11"),
        (lambda model, task: patch_heads(model, task, component="zz"), "no component 'zz'"),
        (lambda model, task: patch_heads(model, task, per_query_head=True), "Every head has its own z"),
        (lambda model, task: patch_residual(model, task, ["S"], "mlp.in"), "resid_pre or resid_mid"),
        (
            lambda model, task: patch_residual(tiny_model("phi"), task, ["S"], "resid_mid"),
            "no residual stream between",
        ),
        (
            lambda model, task: PatchEngine(model, task).run(
                PatchPlan.from_sites(["layers.0.attn.head.4.key"], torch.tensor([3, 3, 3]), None, True)
            ),
            "the heads 0 to 3",
        ),
        (lambda model, task: patch_heads(model, task, layers=[3]), "layers 0 to 2"),
        (lambda model, task: patch_heads(model, task, ablation="noise"), "no ablation 'noise'"),
        (lambda model, task: patch_heads(model, task, direction="up"), "no direction 'up'"),
        (lambda model, task: patch_heads(model, task, metric="loss"), "no metric 'loss'"),
        (lambda model, task: patch_heads(model, task, ablation="resample"), "only one of 9 tokens"),
        (lambda model, task: patch_residual(model, task), "differ in length"),
        (
            lambda model, task: PatchEngine(model, task).run(
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
    for sweep in (patch_heads, patch_mlps):
        with pytest.raises(TranscoderError, match="AttentionInterface"):
            sweep(model, tiny_task())


def test_pairs_of_unequal_length_are_refused():
    task = tiny_task()
    rows = task.dataset.to_list()
    rows[1]["corrupted_ids"].append(5)
    with pytest.raises(TranscoderError, match="row 1 have 12 and 13"):
        patch_heads(tiny_model("llama"), Task(Dataset.from_list(rows), "tiny"))
