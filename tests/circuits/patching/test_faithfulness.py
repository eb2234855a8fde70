"""Faithfulness of all heads, of none, and of one."""

import pytest

from hf_transcoders.circuits.patching import circuit_faithfulness
from hf_transcoders.tasks import colored_objects, end_logits, logit_difference
from tests.studies.test_circuit_reuse import TOKENIZER, model_for_tasks


def test_faithfulness_of_all_heads_and_none():
    model, colors = model_for_tasks(), colored_objects(TOKENIZER, 5)
    everything = [(layer, head) for layer in range(3) for head in range(4)]
    found = circuit_faithfulness(model, colors, {"all": everything, "none": [], "one": [(1, 2)]})
    values = {each.circuit: each for each in found}
    assert values["all"].value == values["whole model"].value == 1
    assert values["none"].value == values["no head"].value == 0
    logits = end_logits(model, colors)
    answers = colors.answers()
    expected = logit_difference(logits, answers.right, answers.wrong).mean().item()
    assert values["all"].difference == pytest.approx(expected, rel=1e-4)
    assert values["one"].heads == 1
    for each in found:
        assert each.difference_low <= each.difference <= each.difference_high
