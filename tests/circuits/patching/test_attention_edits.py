"""Edits of attention against rows written by hand, in forward passes and during generation."""

import pytest
import torch

from hf_transcoders import TranscoderError, edit_attention
from hf_transcoders.circuits.patching import AttentionEdit, edited_attention
from tests.tiny_models import TINY_CONFIGS, tiny_model, tiny_tokens


# Inside the sliding windows, which end 5 tokens before the query.
KEYS = torch.tensor([[4, 5], [3, -1]])
QUERY = torch.tensor([9, 7])


def patterns(model, tokens, *edits):
    found = {}
    with torch.no_grad(), edited_attention(model, edits):
        with edit_attention(model, pattern=lambda pattern, layer: found.__setitem__(layer, pattern.clone())):
            logits = model(tokens).logits
    return found, logits


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_forced_rows_are_written_and_nothing_else(family):
    model, tokens = tiny_model(family), tiny_tokens(length=10)
    edit = AttentionEdit([(1, 2), (1, 3)], "force", KEYS, QUERY)
    plain, before = patterns(model, tokens)
    changed, after = patterns(model, tokens, edit)
    expected = plain[1].clone()
    expected[0, 2:, 9] = torch.eye(10)[[4, 5]].sum(0) / 2
    expected[1, 2:, 7] = torch.eye(10)[3]
    assert torch.equal(changed[1], expected)
    assert torch.equal(changed[0], plain[0])
    assert not torch.allclose(after, before)
    # The prompts do not affect each other.
    _, alone = patterns(model, tokens[1:], AttentionEdit([(1, 2), (1, 3)], "force", KEYS[1:], QUERY[1:]))
    torch.testing.assert_close(alone, after[1:])


def test_blocked_and_reweighed_rows():
    model, tokens = tiny_model("llama"), tiny_tokens(length=10)
    plain, _ = patterns(model, tokens)
    for kind, weights, factor in (("block", None, 0.0), ("reweigh", 3.0, 3.0)):
        changed, _ = patterns(model, tokens, AttentionEdit([(0, 1)], kind, KEYS, QUERY, weights))
        expected = plain[0].clone()
        expected[0, 1, 9, [4, 5]] *= factor
        expected[1, 1, 7, 3] *= factor
        torch.testing.assert_close(changed[0], expected)
        changed, _ = patterns(model, tokens, AttentionEdit([(0, 1)], kind, KEYS, QUERY, weights, renormalize=True))
        expected[0, 1, 9] /= expected[0, 1, 9].sum()
        expected[1, 1, 7] /= expected[1, 1, 7].sum()
        torch.testing.assert_close(changed[0], expected)


def test_no_token_attends_to_later_tokens():
    model, tokens = tiny_model("gpt2"), tiny_tokens(length=10)
    changed, _ = patterns(model, tokens, AttentionEdit([(0, 0)], "force", torch.tensor([[6], [6]])))
    assert not changed[0][:, 0, :6].any()
    assert torch.equal(changed[0][:, 0, 6:, 6], torch.ones(2, 4))


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma3_text", "gemma2"])
def test_generate_with_a_cache_equals_whole_forward_passes(family):
    model, tokens = tiny_model(family), tiny_tokens(length=8)
    edits = [
        AttentionEdit([(1, 2)], "force", torch.tensor([[6], [5]]), torch.tensor([7, 7]), onwards=True),
        AttentionEdit([(2, 0)], "block", torch.tensor([[7, 3], [6, 4]])),
        AttentionEdit([(0, 1)], "reweigh", torch.tensor([[2], [6]]), torch.tensor([7, 7]), 4.0),
    ]
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(tokens, output_logits=True, **settings)
    with edited_attention(model, edits):
        generated = model.generate(tokens, output_logits=True, **settings)
        whole = model(generated.sequences, use_cache=False).logits
    logits = torch.stack(generated.logits, dim=1)
    torch.testing.assert_close(logits, whole[:, 7:-1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[:, 0], plain.logits[0], atol=1e-2)


@torch.no_grad()
def test_samples_of_one_prompt_share_its_edit():
    model, tokens = tiny_model("gpt2"), tiny_tokens(length=8)
    edit = AttentionEdit([(1, 2)], "force", torch.tensor([[6], [5]]), torch.tensor([7, 7]))
    with edited_attention(model, edit):
        one = model(tokens).logits
        three = model(tokens.repeat_interleave(3, 0)).logits
    torch.testing.assert_close(three, one.repeat_interleave(3, 0))


@pytest.mark.parametrize(
    "edit, message",
    [
        (AttentionEdit([(0, 4)], "force", KEYS), "Head 4 of layer 0 does not exist"),
        (AttentionEdit([(3, 0)], "force", KEYS), "layers 0 to 2"),
        (AttentionEdit([(0, 0)], "turn", KEYS), "no edit 'turn'"),
        (AttentionEdit([(0, 0)], "reweigh", KEYS), "takes weights"),
        (AttentionEdit([(0, 0)], "force", KEYS, torch.tensor([1])), "shape"),
        (AttentionEdit([(0, 0)], "force", KEYS.repeat(2, 1)), "for 4 prompts"),
        (AttentionEdit([(0, 0)], "block", KEYS, weights=0.5), "takes no weights"),
        (AttentionEdit([(0, 0)], "force", KEYS, renormalize=True), "leave out renormalize"),
        (AttentionEdit([(0, 0)], "reweigh", KEYS, weights=2.0, onwards=True), "leave out onwards"),
    ],
)
def test_wrong_input_is_refused_with_a_sentence(edit, message):
    model = tiny_model("gpt2")
    with pytest.raises(TranscoderError, match=message), edited_attention(model, edit):
        model(tiny_tokens())
