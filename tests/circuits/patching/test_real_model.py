"""Patching on SmolLM2-135M, which has grouped queries, against hooked forward passes, and its results on IOI."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_transcoders import Site, offline_model
from hf_transcoders.circuits import (
    AttentionEdit,
    Patching,
    edited_attention,
    logit_attribution,
)
from hf_transcoders.tasks import end_logits, indirect_object_identification, row_metrics
from tests.circuits.patching.brute_force import activations, at, patched, path_patched, prompt
from tests.circuits.patching.test_patching import close


pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module", autouse=True)
def all_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.stash.get("threads", before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(offline_model("smollm2-135m-instruct"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def task():
    tokenizer = AutoTokenizer.from_pretrained(offline_model("smollm2-135m-instruct"))
    return indirect_object_identification(tokenizer, size=4, corruption="s2_io_flip")


@pytest.fixture(scope="module")
def engine(base, task):
    return Patching(base, task)


def test_heads_and_paths_equal_hooked_forward_passes(base, task, engine):
    found = engine.heads("END")
    assert found.shape == (30, 9)
    values = engine.heads("S2", "value")
    assert values.shape == (30, 3)
    single = engine.heads("S2", "value", per_query_head=True, layers=[11, 19])
    between = engine.residual(["S2", "END"], "resid_mid", layers=[11, 19])
    receiver = Site.parse("layers.20.attn.head.4.query")
    paths = engine.paths([receiver])
    pairs = []
    for row in (0, 3):
        source = activations(base, prompt(task, row, "corrupted"))
        end, second = (task[row]["positions"][name] for name in ("END", "S2"))
        for layer, head in ((0, 0), (11, 5), (19, 8), (29, 2)):
            patch = ("z", layer, head, end, at(source["z", layer], "z", head, end))
            pairs.append((found.values[layer, head, row], patched(base, task, row, [patch])))
            patch = ("value", layer, head % 3, second, at(source["value", layer], "value", head % 3, second))
            pairs.append((values.values[layer, head % 3, row], patched(base, task, row, [patch])))
        for number, layer in enumerate((11, 19)):
            value = at(source["value", layer], "head_value", 5, second, 3)
            patch = ("head_value", layer, 5, second, value)
            pairs.append((single.values[number, 5, row], patched(base, task, row, [patch])))
            patch = ("resid_mid", layer, None, second, source["resid_mid", layer][second])
            pairs.append((between.values[number, 0, row], patched(base, task, row, [patch])))
        for sender in ((5, 1), (19, 8)):
            expected = path_patched(base, task, row, sender, [receiver], end, False)
            pairs.append((paths.values[*sender, row], expected))
    close(*(torch.tensor(each) for each in zip(*pairs, strict=True)))


def test_base_and_source_are_the_two_prompts(base, task, engine):
    found = engine.heads(layers=[29])
    for values, which in ((found.base, "clean"), (found.source, "corrupted")):
        close(values, row_metrics(end_logits(base, task, which), task.answers())["logit_difference"])


def test_attribution_sums_to_the_logit_difference(base, task):
    result = logit_attribution(base, task)
    expected = row_metrics(end_logits(base, task), task.answers())["logit_difference"].mean().item()
    total = result.values.sum((0, 1)).mean().item() + result.protocol["rest"]
    assert total == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_forcing_a_head_changes_the_prediction(base, task):
    tokens = task.tokens("clean")
    head = [(layer, head) for layer in range(20, 30) for head in range(9)]
    edit = AttentionEdit(head, "force", tokens.positions["S2"][:, None], tokens.positions["END"])
    before = row_metrics(end_logits(base, task), task.answers())["logit_difference"]
    with edited_attention(base, edit):
        after = row_metrics(end_logits(base, task), task.answers())["logit_difference"]
    assert (after < before).all()
