"""Checks of rows of tokens, and groups of rows that can share a forward pass."""

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, GPTBigCodeConfig, GPTJConfig, GPTNeoConfig

from hf_transcoders import TranscoderError
from hf_transcoders.lm.inputs import check_tokens, forget_lengths_, has_position_table, length_groups, same_positions
from tests.texts import SWITCH, alone, make_model, make_texts
from tests.tiny_models import TINY_CONFIGS, tiny_model


SIZES = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
OTHERS = {
    "gptj": GPTJConfig(n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=16, **SIZES),
    "gpt_neo": GPTNeoConfig(hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]], max_position_embeddings=16, **SIZES),
    "gpt_bigcode": GPTBigCodeConfig(n_embd=32, n_layer=1, n_head=4, n_positions=16, **SIZES),
    "bloom": BloomConfig(hidden_size=32, n_layer=1, n_head=4, **SIZES),
    "falcon": FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True, max_position_embeddings=16, **SIZES),
}  # fmt: skip


@pytest.mark.parametrize("family", [*TINY_CONFIGS, *OTHERS])
def test_a_row_beyond_the_context_is_refused_where_it_cannot_be_run(family):
    model = tiny_model(family) if family in TINY_CONFIGS else AutoModelForCausalLM.from_config(OTHERS[family]).eval()
    context = getattr(model.config, "max_position_embeddings", 16)
    ids = torch.full((context + 1,), 5)
    check_tokens(model, [ids[:-1]])
    try:
        with torch.no_grad():
            model(ids[None])
        runs = True
    except (IndexError, RuntimeError):
        runs = False
    assert has_position_table(model) is not runs
    if runs:
        check_tokens(model, [ids])
    else:
        with pytest.raises(TranscoderError, match=f"Row 8 has {context + 1} tokens and the model's context {context}"):
            check_tokens(model, [ids[:3], ids], "Row", [4, 8])


def test_a_longer_row_is_announced_once(caplog):
    model = tiny_model("llama")
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        for length in (66, 67):
            check_tokens(model, [torch.full((length,), 5)])
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text.count("more than the 64 tokens") <= 1
    with pytest.raises(TranscoderError, match="The prompt has 66 tokens and the model's context 64"):
        check_tokens(model, [torch.full((66,), 5)], extrapolate=False)
    check_tokens(make_model("dynamic"), [torch.full((66,), 5)], extrapolate=False)


def test_unknown_tokens_are_named():
    model = tiny_model("llama")
    check_tokens(model, [])
    check_tokens(model, [torch.tensor([], dtype=torch.long)])
    for ids, wrong in (([5, 128, 300], 128), ([-2, 5], -2)):
        with pytest.raises(TranscoderError, match=f"Row 3 has token {wrong}, which the model does not know"):
            check_tokens(model, [torch.tensor([5, 6]), torch.tensor(ids)], "Row", [2, 3])


def test_lengths_that_can_share_a_forward_pass():
    lengths = [5, 12, SWITCH, 20, 12, SWITCH + 1]
    assert list(length_groups(tiny_model("gpt2"), lengths)) == [[0, 1, 2, 3, 4, 5]]
    assert list(length_groups(make_model("longrope"), lengths)) == [[0, 2], [1, 3, 4, 5]]
    assert list(length_groups(make_model("dynamic"), lengths)) == [[0, 2], [1, 4], [3], [5]]
    assert same_positions(make_model("longrope"), SWITCH + 1, SWITCH + 2)
    assert not same_positions(make_model("longrope"), SWITCH, SWITCH + 1)
    assert not same_positions(make_model("dynamic"), SWITCH + 1, SWITCH + 2)


def test_a_longer_input_leaves_nothing_behind():
    model = make_model("dynamic")
    long, short = make_texts(20, SWITCH + 2)
    expected = alone("dynamic", short)[0]
    alone(model, long)
    assert not torch.allclose(alone(model, short)[0], expected, atol=1e-2)  # What the model does by itself.
    forget_lengths_(model)
    assert torch.equal(alone(model, short)[0], expected)
    for _ in length_groups(model, [20]):
        alone(model, long)
    assert torch.equal(alone(model, short)[0], expected)
