"""Scores of weights against their definitions, one head at a time, and on constructed heads."""

from contextlib import ExitStack

import pytest
import torch

from hf_transcoders import TranscoderError, edit_attention
from hf_transcoders.circuits.patching import (
    composition_scores,
    copying_scores,
    duplicate_token_scores,
    previous_token_scores,
)
from hf_transcoders.lm.architectures import architecture_of, locate
from hf_transcoders.lm.attention import num_heads
from hf_transcoders.lm.heads import key_weight, output_weight, query_weight, value_weight
from hf_transcoders.lm.hooks import write_at
from hf_transcoders.lm.norms import frozen_norm, norm_gain
from tests.tiny_models import TINY_CONFIGS, tiny_model


FAMILIES = sorted(TINY_CONFIGS)
TOKENS = [5, 9, 23, 70, 31]


def first_outputs(model, token):
    """The input of each block for a single token: its embedding, then the output of the first block."""
    found = []
    block = locate(model, "layers.0.resid_pre").module
    before = block.register_forward_pre_hook(
        lambda module, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    after = block.register_forward_hook(
        lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    model(torch.tensor([[token]]))
    before.remove()
    after.remove()
    return [found[0], found[1], found[1]]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_copying_scores_equal_one_head_at_a_time(family):
    model = tiny_model(family)
    scores = copying_scores(model, TOKENS, top=9)
    norm = model.base_model.get_submodule(architecture_of(model).final_norm)
    expected = {name: torch.zeros(3, 4) for name in scores}
    for token in TOKENS:
        streams = first_outputs(model, token)
        for layer in range(3):
            outputs = {}

            def only(z, at, head=None, layer=layer):
                if at != layer:
                    return None
                alone = torch.zeros_like(z)
                if head is not None:
                    alone[:, head] = z[:, head]
                return alone

            for head in (None, 0, 1, 2, 3):
                with ExitStack() as stack:
                    stack.enter_context(edit_attention(model, z=lambda z, at, head=head: only(z, at, head)))
                    write_at(stack, locate(model, f"layers.{layer}.resid_pre"), lambda _, x=streams[layer]: x)
                    module = locate(model, f"layers.{layer}.attn.out").module
                    handle = module.register_forward_hook(
                        lambda module, args, out, head=head, outputs=outputs: outputs.update({head: out[0][0, 0]})
                    )
                    model(torch.tensor([[token]]))
                    handle.remove()
            for head in range(4):
                added = outputs[head] - outputs[None]
                name = architecture_of(model).attention_post_norm
                if name is not None:
                    added = locate(model, f"layers.{layer}.resid_pre").module.get_submodule(name)(added)
                for score, sign in (("copying", 1), ("negative_copying", -1)):
                    logits = model.get_output_embeddings()(norm(sign * added))
                    expected[score][layer, head] += (logits > logits[token]).sum() < 9
    for name, each in expected.items():
        torch.testing.assert_close(scores[name], each / len(TOKENS))
    assert 0 < scores["copying"].mean() < 1


@torch.no_grad()
def test_copying_scores_find_a_head_that_copies():
    model = tiny_model("gpt2")
    tokens = [5, 9, 23, 70]
    z, attention = {}, model.transformer.h[1].attn
    # The output projection of the head maps the value of each token to its unembedding.
    stream = torch.cat([first_outputs(model, token)[1] for token in tokens])
    attention.c_attn.register_forward_hook(lambda module, args, out: z.update(v=out[..., 64 + 8 : 64 + 16]))
    attention(model.transformer.h[1].ln_1(stream))
    directions = model.lm_head.weight[tokens] * 50
    for sign, name in ((1, "copying"), (-1, "negative_copying")):
        attention.c_proj.weight[8:16] = torch.linalg.pinv(z["v"][:, 0]) @ (sign * directions)
        scores = copying_scores(model, tokens, top=1)
        norm, head = model.transformer.ln_f, model.lm_head
        logits = head(norm(directions))
        assert scores[name][1, 1] == (logits.argmax(1) == torch.tensor(tokens)).float().mean() >= 0.5
        assert scores[name].shape == (3, 4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "gemma3_text", "opt", "phi3"])
def test_duplicate_token_scores_equal_prompts_of_two_tokens_apart(family):
    """Scores of a key at position 0 and a query 4 tokens later, with arbitrary tokens between them."""
    model, distance = tiny_model(family), 4
    scores = duplicate_token_scores(model, TOKENS, distance=distance)
    groups = 4 // num_heads(model)[1]
    parts = {}

    def keep(part):
        return lambda value, layer: parts.__setitem__((part, layer), value[0].clone())

    def itself(pattern, layer):
        return torch.eye(pattern.shape[-1])[None, None].expand_as(pattern)

    matches = torch.zeros(3, 4, len(TOKENS), len(TOKENS))
    for row, query in enumerate(TOKENS):
        for column, key in enumerate(TOKENS):
            # Each token attends only to itself, as a single token at its position does.
            first = {}
            ids = torch.tensor([[key, 3, 4, 6, query]])
            with edit_attention(model, pattern=itself):
                handle = locate(model, "layers.0.resid_post").module.register_forward_hook(
                    lambda module, args, out, first=first: first.update(x=out[0] if isinstance(out, tuple) else out)
                )
                model(ids)
                handle.remove()
            with ExitStack() as stack:
                stack.enter_context(edit_attention(model, query=keep("query"), key=keep("key"), pattern=itself))
                for layer in (1, 2):
                    write_at(stack, locate(model, f"layers.{layer}.resid_pre"), lambda _, x=first["x"]: x)
                model(ids)
            for layer in range(3):
                for head in range(4):
                    matches[layer, head, row, column] = (
                        parts["query", layer][head, distance] @ parts["key", layer][head // groups, 0]
                    )
    expected = (matches.argmax(-1) == torch.arange(len(TOKENS))).float().mean(-1)
    torch.testing.assert_close(scores, expected)
    assert torch.equal(duplicate_token_scores(model, TOKENS, top=len(TOKENS)), torch.ones(3, 4))
    with pytest.raises(TranscoderError, match="at least two, all different"):
        duplicate_token_scores(model, [4, 4])


@torch.no_grad()
def test_duplicate_token_scores_find_a_head_that_matches_tokens():
    model = tiny_model("gpt2")
    attention = model.transformer.h[1].attn
    # Keys and queries are the same linear map without bias, so that a token matches itself.
    attention.c_attn.weight[:, 32 + 16 : 32 + 24] = attention.c_attn.weight[:, 16:24]
    attention.c_attn.bias[16:24] = attention.c_attn.bias[48:56] = 0
    model.transformer.wpe.weight.zero_()
    tokens = list(range(10, 30))
    scores = duplicate_token_scores(model, tokens, top=3)
    assert scores[1, 2] >= 0.75 and scores[1, [0, 1, 3]].max() <= 0.4


@torch.no_grad()
def test_previous_token_scores_find_a_head_of_positions():
    model = tiny_model("gpt2")
    plain = previous_token_scores(model, length=8)
    assert plain.shape == (3, 4) and plain.max() < 0.9
    # Positions are one-hot in eight directions; the queries of the head match the previous position.
    model.transformer.wte.weight.zero_()
    model.transformer.wpe.weight.zero_()
    model.transformer.wpe.weight[:8, :8] = 30 * torch.eye(8)
    attention = model.transformer.h[0].attn
    attention.c_attn.bias.zero_()
    attention.c_attn.weight[:, 8:16] = 0
    attention.c_attn.weight[:, 32 + 8 : 32 + 16] = 0
    attention.c_attn.weight[:8, 8:16] = 5 * torch.eye(8).roll(-1, dims=1)
    attention.c_attn.weight[:8, 32 + 8 : 32 + 16] = 5 * torch.eye(8)
    model.transformer.h[0].ln_1.weight.fill_(1)
    model.transformer.h[0].ln_1.bias.zero_()
    # The first position, whose query matches the last, is not counted.
    assert previous_token_scores(model, length=8)[0, 1] > 0.95
    with pytest.raises(TranscoderError, match="at least two positions"):
        previous_token_scores(model, length=1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "opt"])
def test_previous_token_scores_are_of_a_prompt_of_one_token_repeated(family):
    """With one token in the vocabulary, the mean token is that token."""
    model = tiny_model(family)
    table = model.get_input_embeddings().weight
    table[:] = table[7]
    seen = {}

    def keep(pattern, layer):
        seen[layer] = pattern[0].clone()
        return torch.eye(pattern.shape[-1])[None, None].expand_as(pattern) if layer == 0 else None

    first = {}
    handle = locate(model, "layers.0.resid_post").module.register_forward_hook(
        lambda module, args, out: first.update(x=out[0] if isinstance(out, tuple) else out)
    )
    ids = torch.full((1, 6), 9)
    with ExitStack() as stack:
        stack.enter_context(edit_attention(model, pattern=keep))
        for layer in (1, 2):
            write_at(stack, locate(model, f"layers.{layer}.resid_pre"), lambda _: first["x"])
        model(ids)
    handle.remove()
    expected = torch.stack([seen[layer].diagonal(-1, 1, 2).mean(-1) for layer in range(3)])
    torch.testing.assert_close(previous_token_scores(model, length=6), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("into", ["query", "key", "value"])
@pytest.mark.parametrize("family", FAMILIES)
def test_composition_scores_equal_whole_matrices(family, into):
    model = tiny_model(family)
    groups = 4 // num_heads(model)[1]
    senders = [(0, 1), (1, 3)]
    scores = composition_scores(model, senders, into)

    def norms(layer):
        block, architecture = locate(model, f"layers.{layer}.resid_pre").module, architecture_of(model)
        # A norm as a matrix, with the same scale for all tokens.
        matrices = []
        for name in (architecture.attention_norm, architecture.attention_post_norm):
            if name is None:
                matrices.append(torch.eye(32))
                continue
            at = torch.randn(32, generator=torch.Generator().manual_seed(0))
            matrices.append(frozen_norm(block.get_submodule(name), at)(torch.eye(32)).T)
        return matrices

    def head(layer, number):
        before, after = norms(layer)
        query = query_weight(model, layer)[0][number] @ before
        key, value = (each(model, layer)[0][number // groups] @ before for each in (key_weight, value_weight))
        return query.T @ key, after @ output_weight(model, layer)[number].T @ value

    for row, (layer, number) in enumerate(senders):
        wrote = head(layer, number)[1]
        for at in range(3):
            for other in range(4):
                qk, ov = head(at, other)
                reads = {"query": qk.T, "key": qk, "value": ov}[into]
                expected = (reads @ wrote).norm() / (reads.norm() * wrote.norm()) if at > layer else torch.tensor(0.0)
                torch.testing.assert_close(scores[row, at, other], expected, rtol=1e-3, atol=1e-5)
    assert composition_scores(model, [], into).shape == (0, 3, 4)


def test_composition_of_wrong_heads_is_refused():
    model = tiny_model("llama")
    with pytest.raises(TranscoderError, match="Head 4 of layer 0 does not exist"):
        composition_scores(model, [(0, 4)])
    with pytest.raises(TranscoderError, match="choose query, key or value"):
        composition_scores(model, [(0, 0)], "z")


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_folded_norms_read_and_write_as_the_norm_does(family):
    model = tiny_model(family)
    norm = model.base_model.get_submodule(architecture_of(model).final_norm)
    at, weight, x = torch.randn(32), torch.randn(5, 32), torch.randn(3, 32)
    frozen = frozen_norm(norm, at)
    # Up to the scale, which is frozen at `at` and not folded.
    for expected, found in (
        (frozen(x) @ weight.T, x @ norm_gain(norm, 32).pull(weight).T),
        (frozen(weight), norm_gain(norm, 32).push(weight)),
    ):
        ratio = expected / found
        torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio), rtol=1e-3, atol=1e-3)
