"""Scores against their definitions, and attributions against their sum."""

import pytest
import torch

from hf_transcoders import TranscoderError, edit_attention
from hf_transcoders.circuits.patching import (
    attention_between,
    component_outputs,
    logit_attribution,
    pattern_scores,
)
from hf_transcoders.lm.architectures import architecture_of, locate
from hf_transcoders.lm.norms import frozen_norm, norm_bias
from hf_transcoders.tasks import end_logits, row_metrics
from tests.circuits.patching.brute_force import activations, prompt, tiny_task
from tests.tiny_models import TINY_CONFIGS, tiny_model


FAMILIES = sorted(TINY_CONFIGS)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_norms_are_the_norm_and_linear(family):
    model = tiny_model(family)
    norm = model.base_model.get_submodule(architecture_of(model).final_norm)
    x, y = torch.randn(2, 3, 5, 32)
    frozen = frozen_norm(norm, x + y)
    torch.testing.assert_close(frozen(x + y) + norm_bias(norm), norm(x + y))
    torch.testing.assert_close(frozen(x) + frozen(y), frozen(x + y))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_of_components_are_what_the_stream_gains(family):
    model, task = tiny_model(family), tiny_task()
    outputs = component_outputs(model, task, position="S", batch_size=2)
    for row in range(3):
        at = task[row]["positions"]["S"]
        seen = activations(model, prompt(task, row))
        torch.testing.assert_close(outputs.final[row], seen["resid_post", 2][at], rtol=1e-4, atol=1e-4)
        for layer in range(3):
            for head in range(4):
                with edit_attention(model, z=lambda z, at, layer=layer, head=head: _only(z, at, layer, head)):
                    alone = activations(model, prompt(task, row))["attn.out", layer][at]
                with edit_attention(model, z=lambda z, at, layer=layer: z * 0 if at == layer else None):
                    bias = activations(model, prompt(task, row))["attn.out", layer][at]
                added = alone - bias
                post_norm = architecture_of(model).attention_post_norm
                if post_norm is not None:
                    norm = locate(model, f"layers.{layer}.resid_pre").module.get_submodule(post_norm)
                    added = frozen_norm(norm, seen["attn.out", layer][at][None])(added[None])[0]
                torch.testing.assert_close(outputs.heads[row, layer, head], added, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(outputs.norms[row, layer, head], added.norm(), rtol=1e-4, atol=1e-4)


def _only(z, at, layer, head):
    if at != layer:
        return None
    alone = torch.zeros_like(z)
    alone[:, head] = z[:, head]
    return alone


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_attributions_sum_to_the_logit_difference(family):
    model, task = tiny_model(family), tiny_task()
    if family == "gemma2":
        model.config.final_logit_softcapping = None
    result = logit_attribution(model, task, batch_size=2)
    expected = row_metrics(end_logits(model, task), task.answers())["logit_difference"]
    found = result.values.sum((0, 1)).mean().item() + result.protocol["rest"]
    assert found == pytest.approx(expected.mean().item(), rel=1e-4, abs=1e-4)
    assert result.shape == (3, 5) and result.axes["head"][-1] == "mlp"


@torch.no_grad()
def test_attention_between_named_tokens():
    model, task = tiny_model("llama"), tiny_task()
    found = attention_between(model, task, "END", ["S", "END"], batch_size=2)
    for row in range(3):
        end, other = task[row]["positions"]["END"], task[row]["positions"]["S"]
        seen = activations(model, prompt(task, row))
        for layer in range(3):
            torch.testing.assert_close(found[layer, :, 0, row], seen["pattern", layer][:, end, other])
            torch.testing.assert_close(found[layer, :, 1, row], seen["pattern", layer][:, end, end])
    with pytest.raises(TranscoderError, match="no position 'S9'"):
        attention_between(model, task, "S9", ["END"])


def test_pattern_scores_find_heads_that_were_made_to_look_there():
    model, length = tiny_model("gpt2"), 6

    def make(pattern, layer):
        pattern = pattern.clone()
        size = pattern.shape[-1]
        for head, back in ((0, 1), (1, length), (2, length - 1)):
            pattern[:, head] = torch.eye(size).roll(-back, dims=1).tril() if layer == 1 else pattern[:, head]
        return pattern

    plain = pattern_scores(model, length)
    with edit_attention(model, pattern=make):
        scores = pattern_scores(model, length)
    for head, name in enumerate(("previous_token", "duplicate_token", "induction")):
        assert scores[name][1, head] == 1.0
        assert torch.equal(scores[name][0], plain[name][0]) and plain[name].max() < 1.0
    assert scores["induction"][1, 1] == 0.0
    shifted = pattern_scores(model, length, bos_token_id=1)
    assert shifted["induction"].shape == (3, 4)
