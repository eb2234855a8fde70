"""A model with adapters says what it says once they are merged, in every function that looks inside."""

import pytest
import torch

from hf_transcoders.circuits import Patching, PatchPlan
from hf_transcoders.lm import site_width
from hf_transcoders.studies import greater_than_study
from tests.circuits.interventions.setups import random_dictionary
from tests.same_model import (
    EVERYTHING,
    PROMPT,
    READING,
    TASK,
    adapted,
    assert_same,
    dense,
    graph_of,
    linear_projections,
    numbers,
    untied,
)
from tests.studies.test_circuit_reuse import TOKENIZER
from tests.tiny_models import TINY_CONFIGS, tiny_model


peft = pytest.importorskip("peft")
FAMILIES = sorted(TINY_CONFIGS)
# Random models are deep in their softmaxes: rounding to 1e-7 grows a few hundred times.
TOLERANCE = 1e-3


def name_of(model, wanted):
    return next(name for name, module in model.named_modules() if module is wanted)


def ends(model):
    return [name_of(model, model.get_input_embeddings()), name_of(model, model.get_output_embeddings())]


def norms(model):
    return [name for name, part in model.named_modules() if "norm" in name or name.split(".")[-1].startswith("ln_")]


def attention(model):
    return [name for name in linear_projections(model) if "attn" in name or "attention" in name]


def lora(model, targets=None, **settings):
    targets = [*linear_projections(model), *ends(model)] if targets is None else targets
    return peft.LoraConfig(
        **{"r": 3, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False, **settings}
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_in_every_module_is_what_it_is_merged(family):
    model, merged = adapted(family, lora)
    parts = EVERYTHING if family in ("gpt2", "gemma3_text") else f"patching {READING}"
    assert_same(numbers(model, parts), numbers(merged, parts), TOLERANCE)


OTHERS = {
    "DoRA": lambda model: lora(model, linear_projections(model), use_dora=True),
    "IA3": lambda model: peft.IA3Config(
        target_modules=linear_projections(model), feedforward_modules=[], init_ia3_weights=False
    ),
    "OFT": lambda model: peft.OFTConfig(r=0, oft_block_size=8, target_modules=attention(model), init_weights=False),
    "two at once": lambda model: [lora(model), lora(model, attention(model), r=2, lora_alpha=5)],
    "modules to save": lambda model: lora(model, attention(model), modules_to_save=[*norms(model), *ends(model)]),
    "norms": lambda model: peft.LNTuningConfig(target_modules=norms(model)),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("family", ["gemma3_text", "opt"])
def test_other_adapters_are_what_they_are_merged(family, kind):
    model, merged = adapted(family, OTHERS[kind])
    assert_same(numbers(model, READING), numbers(merged, READING), TOLERANCE)


@pytest.mark.parametrize("kind", ["LoRA", "norms"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_autograd_agrees(family, kind):
    model, _ = adapted(family, lora if kind == "LoRA" else OTHERS["norms"])
    graph = graph_of(model, method="autograd")
    assert float(graph.row_residuals()[graph.expanded].max()) < 1e-4
    torch.testing.assert_close(dense(graph), dense(graph_of(model)), rtol=1e-3, atol=1e-4)


def targets_of(model):
    graph = graph_of(model)
    return graph.total[graph.is_kind("target")]


@torch.no_grad()
@pytest.mark.parametrize("place", ["embedding", "head"])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_tied_weights_may_have_an_adapter_on_one_side(family, place):
    # Merging would change both sides, so the model's own logits are what must come out.
    model = tiny_model(family)
    wrapped = peft.get_peft_model(model, lora(model, [ends(model)[place == "head"]]))
    model = wrapped.get_base_model().eval()
    logits = model(torch.tensor([PROMPT])).logits[0, -1]
    expected = torch.stack([logits[5] - logits[6], logits[9] - logits.mean()])
    torch.testing.assert_close(targets_of(model), expected, rtol=1e-4, atol=1e-4)
    engine = Patching(model, TASK)
    base = engine.run(PatchPlan.grid([1], "z", 4, engine.position("END")[None])).base
    ids = [TASK[row]["clean_ids"] for row in range(len(TASK))]
    ends_of = [model(torch.tensor([each])).logits[0, -1] for each in ids]
    wanted = [each[3 + row] - each[[30 + row, 40 + row]].mean() for row, each in enumerate(ends_of)]
    torch.testing.assert_close(base, torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_a_resized_vocabulary():
    model = tiny_model("gpt2")
    model.resize_token_embeddings(150, pad_to_multiple_of=64, mean_resizing=False)
    assert model.get_output_embeddings().weight.shape[0] == 192
    logits = model(torch.tensor([PROMPT])).logits[0, -1]
    expected = torch.stack([logits[5] - logits[6], logits[9] - logits.mean()]).detach()
    torch.testing.assert_close(targets_of(model), expected, rtol=1e-4, atol=1e-4)


def test_an_engine_forgets_its_runs_when_an_adapter_is_switched():
    model = untied("llama")
    plain = Patching(model, TASK).heads("END").values
    wrapped = peft.get_peft_model(model, lora(model))
    base = wrapped.get_base_model().eval()
    for settings in ({}, {"ablation": "mean"}):
        engine = Patching(base, TASK, **settings)
        on = engine.heads("END")
        with wrapped.disable_adapter():
            off = engine.heads("END")
            torch.testing.assert_close(off.values, Patching(untied("llama"), TASK, **settings).heads("END").values)
        assert not torch.allclose(on.values, off.values, atol=0.1) and not torch.allclose(on.base, off.base, atol=0.1)
        torch.testing.assert_close(engine.heads("END").values, on.values)
    assert len(plain)


def test_sites_of_modules_with_adapters_are_as_wide_as_without():
    model = untied("gpt2")
    paths = [*linear_projections(model), *ends(model), *norms(model)]
    sites = [f"module:{path}:{side}" for path in paths for side in ("in", "out")]
    widths = [site_width(model, site) for site in sites]
    for make in (lora, OTHERS["modules to save"], OTHERS["norms"]):
        wrapped = peft.get_peft_model(untied("gpt2"), make(model))
        assert [site_width(wrapped.get_base_model(), site) for site in sites] == widths


def test_the_study_of_greater_than():
    found = []
    for model in adapted("llama", lora, vocab_size=len(TOKENIZER)):
        transcoder = random_dictionary(model, "layers.1.mlp.in", "layers.1.mlp.branch", num_features=12)
        found.append(greater_than_study(model, transcoder, TOKENIZER, max_k=3, num_features=2, progress=False))
    study, merged = found
    for name in ("original", "transcoder", "feature_curve", "neuron_curve"):
        assert getattr(study, name) == pytest.approx(getattr(merged, name), abs=1e-3), name
    for feature, other in zip(study.features, merged.features, strict=True):
        assert (feature.index, feature.tokens) == (other.index, other.tokens)
        assert [feature.effect, *feature.by_ending] == pytest.approx(
            [other.effect, *other.by_ending], rel=1e-3, abs=1e-3
        )
