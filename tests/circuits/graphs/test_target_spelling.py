"""Targets that were meant with a leading space, or without."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_transcoders.circuits.graphs import attribution_graph, targets
from hf_transcoders.errors import TranscoderError
from hf_transcoders.lm.offline_models import offline_model
from tests.studies.test_circuit_reuse import TOKENIZER, model_for_tasks


def graph_of(model, tokenizer, prompt, *wanted):
    return attribution_graph(model, {}, prompt, tokenizer=tokenizer, targets=list(wanted), progress=False)


def test_a_text_of_several_tokens_that_is_one_with_a_space():
    with pytest.raises(TranscoderError, match=r"^'Mary' is not one token .*: did you mean ' Mary'\?$"):
        graph_of(model_for_tasks(), TOKENIZER, "John gave a drink to", "Mary")
    with pytest.raises(TranscoderError, match="give a single token, often one with a leading space"):
        graph_of(model_for_tasks(), TOKENIZER, "John gave a drink to", "qqq zzz")


def test_the_difference_of_a_token_and_itself():
    with pytest.raises(TranscoderError, match="' Mary' minus ' Mary' is always 0: give two different tokens"):
        graph_of(model_for_tasks(), TOKENIZER, "John gave a drink to", (" Mary", " Mary"))


@pytest.mark.parametrize("factor, warned", [(0.0, True), (1e9, False)])
def test_the_more_likely_spelling_is_asked_for(monkeypatch, caplog, factor, warned):
    monkeypatch.setattr(targets, "_MUCH_MORE_LIKELY", factor)
    graph_of(model_for_tasks(), TOKENIZER, "John gave a drink to", "a")
    assert ("did you mean ' a'?" in caplog.text) == warned


def test_a_real_model(caplog):
    path = offline_model("smollm2-135m-instruct")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    with caplog.at_level(logging.WARNING):
        graph_of(model, tokenizer, "The keys to the cabinet", "are", " is")
    said = [record.getMessage() for record in caplog.records if "did you mean" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith("The target 'are' has a probability of")
    assert said[0].endswith("and ' are' one of 0.16: did you mean ' are'?")
