"""Circuits of padded prompts, and of prompts of several lengths, are those of each prompt alone."""

import pytest
import torch
from datasets import Dataset
from transformers import BatchEncoding

from hf_transcoders import TranscoderError
from hf_transcoders.circuits import (
    FeatureEdit,
    Patching,
    PatchPlan,
    attribution_graph,
    intervene,
    intervention_losses,
    measure_effect,
)
from hf_transcoders.circuits.patching import attention_between, component_outputs
from hf_transcoders.circuits.weights import FeatureWeights
from hf_transcoders.lm import Site, capture
from hf_transcoders.lm.norms import norm_scale
from hf_transcoders.lm.stream import norm_before, stream_before
from hf_transcoders.studies import blind_study
from hf_transcoders.studies.circuit_reuse.end_runs import predict_at_end
from hf_transcoders.tasks import Task, end_logits, measure
from tests.circuits.interventions.setups import transcoder_set
from tests.texts import SWITCH, alone, make_model, make_texts, padded
from tests.tiny_models import tiny_model


TEXTS = make_texts(12, 5, SWITCH, 12, 7, 10)
LOW, HIGH = "layers.0.mlp.transcoder", "layers.2.mlp.transcoder"
NAMES = ["gpt2", "opt", "longrope", "dynamic"]


def batch_of(how, texts=TEXTS):
    """What a tokenizer returns for several texts."""
    rows = padded(texts, how)
    return BatchEncoding({key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "attention_mask")})


def make_task(texts=TEXTS):
    """Pairs of the texts and of others, with one token changed."""
    return Task(
        Dataset.from_list(
            [
                {
                    "clean": str(number), "clean_ids": text, "corrupted": str(number), "corrupted_ids": [text[0], 99, *text[2:]],
                    "answer_ids": [5], "wrong_ids": [6], "candidate_ids": [5, 6], "template": 0,
                    "positions": {"START": 1, "END": len(text) - 1},
                }
                for number, text in enumerate(texts)
            ]
        ),
        "own",
        settings={"seed": 0},
    )  # fmt: skip


def difference(name, ids):
    logits = alone(name, ids)[0][-1]
    return (logits[5] - logits[6]).item()


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_measured_prompt_by_prompt(name):
    model, task = make_model(name), make_task()
    expected = [difference(name, text) for text in TEXTS]
    found = end_logits(model, task)
    assert (found[:, 5] - found[:, 6]).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    # In any order, and in batches that span lengths.
    rows = [5, 0, 1, 2]
    torch.testing.assert_close(end_logits(model, task, rows=rows), found[rows], rtol=1e-3, atol=1e-3)
    for batch_size in (2, 32):
        estimate = measure(model, task, batch_size)["clean"]["logit_difference"]
        assert estimate.mean == pytest.approx(sum(expected) / len(expected), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "ablation"),
    [
        ("gpt2", "mean"),
        ("opt", "counterfactual"),
        ("longrope", "mean"),
        ("longrope", "zero"),
        ("dynamic", "counterfactual"),
    ],
)
def test_patches_are_those_of_each_prompt_alone(name, ablation):
    model, task = make_model(name), make_task()
    plan = PatchPlan.grid(range(3), "z", 4, torch.tensor([[1] * len(TEXTS)]))
    found = Patching(model, task, ablation=ablation).run(plan)
    assert found.base.tolist() == pytest.approx([difference(name, text) for text in TEXTS], rel=1e-3, abs=1e-4)
    for row in range(len(TEXTS)):
        # Only prompts of one length share a mean.
        rows = (
            [other for other in range(len(TEXTS)) if len(TEXTS[other]) == len(TEXTS[row])]
            if ablation == "mean"
            else [row]
        )
        plan = PatchPlan.grid(range(3), "z", 4, torch.tensor([[1] * len(rows)]))
        own = Patching(make_model(name), task.select(rows), ablation=ablation).run(plan)
        torch.testing.assert_close(found.values[:, row], own.values[:, rows.index(row)], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["opt", "longrope", "dynamic"])
def test_scores_of_heads_are_those_of_each_prompt_alone(name):
    model, task = make_model(name), make_task()
    outputs = component_outputs(model, task)
    attention = attention_between(model, task, "END", ["START"])
    for row in range(len(TEXTS)):
        fresh, own = make_model(name), task.select([row])
        torch.testing.assert_close(outputs.heads[row], component_outputs(fresh, own).heads[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(attention[..., row], attention_between(fresh, own, "END", ["START"])[..., 0])


@pytest.mark.parametrize("name", ["gpt2", "longrope", "dynamic"])
def test_a_prediction_with_a_cached_prompt_is_that_of_the_whole_prompt(name):
    """One token more than the switch: a cache of the tokens before has other positions."""
    texts = make_texts(SWITCH + 1, SWITCH, SWITCH + 1, 12, 5)
    found = predict_at_end(make_model(name), make_task(texts), {"plain": ()}, batch_size=2)["plain"]
    assert found.tokens.tolist() == [int(alone(name, text)[0][-1].argmax()) for text in texts]


@pytest.mark.parametrize("name", ["opt", "longrope", "dynamic"])
def test_graphs_of_several_prompts_are_those_of_each_alone(name):
    model = make_model(name)
    transcoders = transcoder_set(model)
    texts, settings = TEXTS[:3], {"targets": [(5, 6)], "max_features": 10, "progress": False}
    own_graphs = [attribution_graph(make_model(name), transcoders, text, **settings) for text in texts]
    for prompts in (texts, batch_of("left", texts), padded(texts, "holes")):
        graphs = attribution_graph(model, transcoders, prompts, **settings)
        for graph, own, text in zip(graphs, own_graphs, texts, strict=True):
            assert graph.input_ids == text
            target = graph.is_kind("target")
            assert graph.total[target].tolist() == pytest.approx(own.total[own.is_kind("target")].tolist(), rel=1e-3)
            assert graph.total[target].item() == pytest.approx(difference(name, text), rel=1e-3, abs=1e-3)
            assert graph.row_residuals()[graph.expanded].max() < 1e-4


@pytest.mark.parametrize(
    ("name", "how"), [("gpt2", "left"), ("mistral", "right"), ("longrope", "mixed"), ("opt", "holes")]
)
def test_losses_under_an_intervention_are_those_of_each_text_alone(name, how):
    model = make_model(name)
    transcoders = transcoder_set(model)
    edits = [
        FeatureEdit(LOW, 1, 1, "set", 4.0),
        FeatureEdit(HIGH, 2, -2, "set", 5.0),
        FeatureEdit(HIGH, 3, slice(-3, None), "steer", 2.0),
    ]
    expected = []
    for text in TEXTS:
        fresh = make_model(name)
        with intervene(fresh, transcoders, edits):
            logits = alone(fresh, text)[0]
        picked = logits[1:-1].log_softmax(-1)
        expected.append(-picked.gather(-1, torch.tensor(text[2:])[:, None])[:, 0])
    found = intervention_losses(model, padded(TEXTS, how), transcoders, edits, batch_size=4, progress=False)
    assert found["ce_edited"] == pytest.approx(torch.cat(expected).mean().item(), rel=1e-4)
    assert found["tokens"] == sum(len(text) - 2 for text in TEXTS)


@torch.no_grad()
@pytest.mark.parametrize(("name", "per_row"), [("gpt2", False), ("mistral", True), ("llama", True)])
def test_edits_of_a_padded_batch_count_the_tokens_of_each_row(name, per_row):
    """Also while generating, where new tokens follow the prompt of each row."""
    model = tiny_model(name)
    transcoders = transcoder_set(model)
    lists = [
        [FeatureEdit(LOW, 1, 0, "set", 4.0), FeatureEdit(HIGH, 2, -1, "set", 5.0), FeatureEdit(HIGH, row, "all", "steer", 2.0)]
        for row in range(3, 3 + len(TEXTS))
    ]  # fmt: skip
    lists = lists if per_row else lists[:1]
    generate = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    new = []
    for row, text in enumerate(TEXTS):
        with intervene(model, transcoders, lists[row % len(lists)]):
            new.append(model.generate(torch.tensor([text]), **generate)[0, len(text) :].tolist())
    batch = batch_of("left")
    for how in ({"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}):
        with intervene(model, transcoders, lists):
            output = model.generate(**batch, **generate, **how)
        assert output[:, batch["input_ids"].shape[1] :].tolist() == new
    with pytest.raises(TranscoderError, match="the prompt has the positions 0 to 4"):
        with intervene(model, transcoders, [FeatureEdit(LOW, 1, 6)]):
            model(**batch)


@torch.no_grad()
def test_several_answers_to_padded_prompts():
    model = tiny_model("gpt2")
    transcoders = transcoder_set(model)
    lists = [[FeatureEdit(LOW, 1, 1, "set", 6.0)], [FeatureEdit(HIGH, 2, slice(-2, None), "set", 5.0)]]
    generate = {
        "max_new_tokens": 3,
        "eos_token_id": None,
        "pad_token_id": 0,
        "num_beams": 2,
        "num_return_sequences": 2,
    }
    generate["do_sample"] = False
    new = []
    for row, text in enumerate(TEXTS[:2]):
        with intervene(model, transcoders, lists[row]):
            new += model.generate(torch.tensor([text]), **generate)[:, len(text) :].tolist()
    batch = batch_of("left", TEXTS[:2])
    with intervene(model, transcoders, lists):
        assert model.generate(**batch, **generate)[:, batch["input_ids"].shape[1] :].tolist() == new


def test_a_frozen_run_has_no_padding():
    model = tiny_model("llama")
    transcoders = transcoder_set(model)
    ids = torch.tensor([TEXTS[0], TEXTS[3]])
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with intervene(model, transcoders, [], mode="frozen", frozen_at=ids):
        model(ids)
        with pytest.raises(TranscoderError, match="The frozen run has no padding"):
            model(ids, attention_mask=mask)


@torch.no_grad()
def test_effects_of_what_a_tokenizer_returned():
    model = tiny_model("gpt2")
    transcoders = transcoder_set(model)
    edits = [FeatureEdit(LOW, 1, 2, "set", 4.0)]
    expected = measure_effect(model, transcoders, torch.tensor([TEXTS[0], TEXTS[3]]), edits, mode="direct")
    rows = batch_of("left", [TEXTS[0], TEXTS[3]])
    found = measure_effect(model, transcoders, rows, edits, mode="direct")
    assert torch.equal(found.logits_after, expected.logits_after)
    with intervene(model, transcoders, [], mode="frozen", frozen_at=rows):
        model(torch.tensor([TEXTS[0], TEXTS[3]]))
    with pytest.raises(TranscoderError, match="The prompts have 5 to 12 tokens"):
        measure_effect(model, transcoders, batch_of("left"), edits)
    with pytest.raises(TranscoderError, match="has token 128, which the model does not know"):
        measure_effect(model, transcoders, torch.tensor([5, 128]), edits)


@torch.no_grad()
@pytest.mark.parametrize(("name", "how"), [("gpt2", "left"), ("dynamic", "mixed")])
def test_mean_contributions_are_over_the_tokens_of_texts(name, how):
    model = make_model(name)
    transcoders = transcoder_set(model)
    weights = FeatureWeights(model, transcoders)
    found = weights.mean_contributions(HIGH, [0, 4], padded(TEXTS, how), sources=[LOW], batch_size=4)
    low, high = transcoders[LOW], transcoders[HIGH].config.input_site
    stream, norm = stream_before(model, Site.parse(high)), norm_before(model, Site.parse(high))
    products = []
    for text in TEXTS:
        fresh = make_model(name)
        with capture(fresh, [stream, low.config.input_site]) as seen:
            fresh(torch.tensor([text]))
            scale = norm_scale(norm, seen[stream][0, 1:])
            products.append(low.encode(seen[low.config.input_site][0, 1:]) * scale)
    mean = torch.cat(products).mean(0)
    source = found.sources[LOW]
    torch.testing.assert_close(source.contributions, source.strengths * mean[:, None], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["left", "mixed"])
def test_a_blind_study_of_padded_rows_is_that_of_the_texts(how):
    model = tiny_model("opt")
    transcoders = transcoder_set(model)
    studies = [
        blind_study(
            model, transcoders, HIGH, rows, _Words(), features=[0, 1, 2], num_heads=2, window=3, null_features=2,
            bootstrap_samples=20, batch_size=4, progress=False,
        ).to_dict()
        for rows in ([{"input_ids": text} for text in TEXTS], padded(TEXTS, how))
    ]  # fmt: skip
    assert studies[0] == studies[1]
    # The firings of each text by itself.
    for feature in studies[0]["features"]:
        firings = 0
        for text in TEXTS:
            (inputs,) = alone(model, text, transcoders[HIGH].config.input_site)[1:]
            with torch.no_grad():
                firings += int((transcoders[HIGH].encode(inputs[1:])[:, feature["index"]] > 0).sum())
        assert feature["firings"] == firings


class _Words:
    """A tokenizer as far as labels need one."""

    def convert_ids_to_tokens(self, ids):
        return [f"w{id_}" for id_ in ids]

    def batch_decode(self, rows, **kwargs):
        return [f"w{id_}" for (id_,) in rows]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"input_ids": []}, "The prompt is empty"),
        ({"input_ids": [5, 6], "attention_mask": [0, 0]}, "The prompt is empty"),
        ([{"input_ids": [[5, 6], [7, 8]]}], r"whole numbers in a list, but the prompt has others of shape \(2, 2\)"),
        ({"attention_mask": [1]}, "The prompt has no column `input_ids`"),
        ([5, 1.5], "the prompt has others"),
        ([5] * 65, "The prompt has 65 tokens and the model's context 64"),
    ],
)
def test_prompts_that_are_none(prompt, message):
    model = tiny_model("gpt2")
    with pytest.raises(TranscoderError, match=message):
        attribution_graph(model, transcoder_set(model), prompt, progress=False)


def test_a_task_beyond_the_context_is_refused():
    model, task = tiny_model("gpt2"), make_task(make_texts(65, 5))
    for call in (
        lambda: measure(model, task),
        lambda: Patching(model, task),
        lambda: component_outputs(model, task),
    ):
        with pytest.raises(TranscoderError, match="Prompt 0 has 65 tokens and the model's context 64: shorten it"):
            call()
    with pytest.raises(TranscoderError, match="Prompt 1 has token 200, which the model does not know"):
        measure(model, make_task([[5, 6, 7], [5, 200, 7]]))
