"""Whole-model replacement: each group of layers against plain forward passes, and what is printed beside them."""

import json

import pytest
import torch

from hf_transcoders import TranscoderError, TranscoderEvaluator, TranscoderSet
from hf_transcoders.studies import published_study, replacement_study, save_replacement
from hf_transcoders.studies.published import REPLACEMENT
from hf_transcoders.studies.replacement import study as replacement_module
from tests.evaluation.conftest import random_dictionary
from tests.evaluation.test_evaluator import LOSS_METRICS, loss_reference
from tests.tiny_models import tiny_tokens


@pytest.fixture(scope="module")
def four_layers():
    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        initializer_range=0.5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    blocks = [{"input_ids": row.tolist()} for row in tiny_tokens(7, 12) % 50]
    return base, blocks, {layer: random_dictionary(base, layer, seed=layer, k=8) for layer in range(4)}


def evaluator_of(base, blocks):
    return TranscoderEvaluator(base, blocks, batch_size=3, progress=False, dataset_name="random <tokens>")


@torch.no_grad()
def test_replacement_equals_plain_forwards_of_each_group(four_layers):
    base, blocks, dictionaries = four_layers
    # Given in another order than that of the layers.
    study = replacement_study(evaluator_of(base, blocks), TranscoderSet(reversed(list(dictionaries.values()))))
    assert [row.layers for row in study.dictionaries] == [[0], [1], [2], [3]]
    groups = {
        "all layers": [0, 1, 2, 3],
        "all but the last layer": [0, 1, 2],
        "all but the first and last layer": [1, 2],
    }
    assert {row.name: row.layers for row in study.groups} == groups
    report = evaluator_of(base, blocks).evaluate(TranscoderSet(dictionaries.values()), together=True)
    for row in [*study.dictionaries, *study.groups]:
        expected = loss_reference(base, blocks, {layer: dictionaries[layer] for layer in row.layers}, skip_first=1)
        changes = {"": row.replaced, "_zero_ablated": row.zero, "_mean_ablated": row.mean}
        ours = {"ce_original": study.ce_original}
        for ending, change in changes.items():
            ours |= {f"ce{ending or '_spliced'}": change.ce, f"kl{ending}": change.kl}
            ours[f"top1_agreement{ending}"] = change.top1_agreement
        assert ours == pytest.approx({name: expected[name] for name in LOSS_METRICS}, abs=1e-4)
        share = (row.zero.ce - row.replaced.ce) / (row.zero.ce - study.ce_original)
        assert row.recovered_zero == pytest.approx(share)
        if len(row.layers) == 1:
            assert row.fvu == pytest.approx(report.metrics[row.name]["fvu"]) and row.l0 == 8
    assert study.groups[0].replaced.kl == pytest.approx(report.together["kl"], abs=1e-6)


def test_a_part_of_a_set_has_only_the_groups_that_differ(four_layers, tmp_path):
    base, blocks, dictionaries = four_layers
    inner = replacement_study(evaluator_of(base, blocks), [dictionaries[1], dictionaries[2]])
    assert [(row.name, row.layers) for row in inner.groups] == [("all layers", [1, 2])]
    alone = replacement_study(evaluator_of(base, blocks), dictionaries[3])
    assert alone.groups == [] and len(alone.dictionaries) == 1
    text = inner.to_text()
    assert "all layers (2 of 4)" in text and "random <tokens>" in text and "paper" not in text
    page = save_replacement(inner, tmp_path).read_text()
    assert "random &lt;tokens&gt;" in page and "<tokens>" not in page
    assert json.loads((tmp_path / "results.json").read_text())["groups"][0]["layers"] == [1, 2]
    assert (tmp_path / "recovered.png").stat().st_size > 5000
    # One layer has no curve.
    save_replacement(alone, tmp_path / "alone")
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"report.html", "results.json"}
    with pytest.raises(TranscoderError, match="both write to"):
        replacement_study(evaluator_of(base, blocks), [dictionaries[1], random_dictionary(base, 1, seed=9, k=8)])


def test_published_losses_stand_beside_those_of_gpt2_only(four_layers, monkeypatch):
    base, blocks, dictionaries = four_layers
    names = []
    monkeypatch.setattr(
        replacement_module,
        "published_study",
        lambda study, *given: names.append(given) or published_study(study, "gpt2", given[1]),
    )
    study = replacement_study(
        evaluator_of(base, blocks), TranscoderSet(dictionaries.values()), transcoders_name="pchlenski/gpt2-transcoders"
    )
    assert study.published is REPLACEMENT and names == [(base.config.name_or_path, "pchlenski/gpt2-transcoders")]
    lines = study.to_text().splitlines()
    for start, figures in (
        ("unchanged", "3.5928"),
        ("all layers", "CE 4.2337, KL 0.6684"),
        ("all but the last", "CE 4.2337, KL 0.6684"),
        ("all but the first", "CE 4.0624, CE zero 10.9406"),
    ):
        assert next(line for line in lines if line.startswith(start)).endswith(figures)
