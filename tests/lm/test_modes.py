"""Evaluation mode during measurements, and the mode of each module afterwards."""

import pytest
import torch

from hf_transcoders import TranscoderError, capture, edit_attention
from hf_transcoders.circuits import FeatureEdit, intervene
from hf_transcoders.lm.modes import in_eval_mode
from hf_transcoders.tasks import end_logits, measure
from tests.circuits.interventions.setups import random_dictionary
from tests.circuits.patching.brute_force import tiny_task
from tests.tiny_models import tiny_model, tiny_tokens


@pytest.fixture
def model():
    """With dropout, in training mode, but for a part that is held in evaluation mode (as frozen layers are)."""
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_each_module_is_as_before_whatever_the_order(model):
    before = modes(model)
    first, second = in_eval_mode(model), in_eval_mode(model.transformer, model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(modes(model))
    second.__exit__(None, None, None)
    assert modes(model) == before


def test_changes_of_mode_inside(model):
    before = modes(model)
    with pytest.raises(ValueError), in_eval_mode(model):
        model.train()
        with in_eval_mode(model):
            assert not any(modes(model))
        # What was found here, not what the outer block had set.
        assert all(modes(model))
        raise ValueError
    assert modes(model) == before


@torch.no_grad()
def test_a_task_is_measured_without_dropout(model):
    task, before = tiny_task(), modes(model)
    found = [measure(model, task)["clean"]["logit_difference"].mean, end_logits(model, task)]
    assert modes(model) == before
    with pytest.raises(TranscoderError):
        measure(model, task, batch_size=0)
    assert modes(model) == before
    model.eval()
    assert found[0] == measure(model, task)["clean"]["logit_difference"].mean
    assert torch.equal(found[1], end_logits(model, task))


@torch.no_grad()
def test_interventions_are_without_dropout_and_plain_blocks_leave_the_mode(model):
    dictionary = random_dictionary(model, "layers.1.mlp.in", "layers.1.mlp.branch").train()
    edits = [FeatureEdit("layers.1.mlp.branch", 1, "all", "steer", 3.0)]
    ids, before = tiny_tokens(), modes(model)
    with intervene(model, dictionary, edits):
        assert not any(modes(model))
        one, other = model(ids).logits, model(ids).logits
    assert torch.equal(one, other) and modes(model) == before and dictionary.training
    with capture(model, "layers.1.mlp.in", stop=False), edit_attention(model):
        assert modes(model) == before
        assert not torch.equal(model(ids).logits, model(ids).logits)
