"""Attention edits: without functions nothing changes, and each changed part has the effect that its definition implies."""

import pytest
import torch
from transformers import DynamicCache

from hf_transcoders import TranscoderError, edit_attention
from hf_transcoders.lm.architectures import architecture_of, locate
from hf_transcoders.lm.attention import attention_modules, num_heads
from tests.tiny_models import TINY_CONFIGS, tiny_model, tiny_tokens


FAMILIES = sorted(TINY_CONFIGS)


def eager(family):
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_idle_is_bit_equal_to_eager(family):
    model, tokens = eager(family), tiny_tokens()
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    for inputs in ({"input_ids": tokens}, {"input_ids": tokens, "attention_mask": mask}):
        plain = model(**inputs).logits
        with edit_attention(model):
            assert torch.equal(model(**inputs).logits, plain)
        with edit_attention(model, pattern=lambda pattern, layer: pattern, z=lambda z, layer: z):
            assert torch.equal(model(**inputs).logits, plain)
        assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen2"])
def test_idle_is_bit_equal_in_bf16(family):
    model, tokens = eager(family).to(torch.bfloat16), tiny_tokens()
    plain = model(tokens).logits
    with edit_attention(model, pattern=lambda pattern, layer: pattern):
        assert torch.equal(model(tokens).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_what_they_are_called(family):
    model, tokens = eager(family), tiny_tokens(length=10)
    heads, kv_heads = num_heads(model)
    seen = {}

    def keep(part):
        return lambda tensor, layer: seen.__setitem__((part, layer), tensor.clone())

    read = {}
    name = architecture_of(model).attention_output
    handles = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda module, args, layer=layer: read.__setitem__(layer, args[0])
        )
        for layer, module in enumerate(attention_modules(model))
    ]
    reference = model(tokens, output_attentions=True, use_cache=True)
    for handle in handles:
        handle.remove()
    with edit_attention(model, **{part: keep(part) for part in ("query", "key", "value", "pattern", "z")}):
        model(tokens)
    for layer in range(3):
        assert torch.equal(seen["pattern", layer], reference.attentions[layer])
        z = seen["z", layer].transpose(1, 2)
        assert torch.equal(z.flatten(2), read[layer])
        groups = heads // kv_heads
        for head in range(heads):
            rebuilt = seen["pattern", layer][:, head] @ seen["value", layer][:, head // groups]
            torch.testing.assert_close(rebuilt, z[:, :, head])
        if isinstance(reference.past_key_values, DynamicCache) and "sliding" not in str(model.config):
            assert torch.equal(seen["key", layer], reference.past_key_values.layers[layer].keys)
        assert seen["query", layer].shape[1] == heads and seen["key", layer].shape[1] == kv_heads


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_changing_a_part_is_the_same_as_running_with_it(family):
    """Queries, keys and values of another prompt in one layer make that layer attend as it does there."""
    model, tokens, others = eager(family), tiny_tokens(), tiny_tokens(seed=1)
    layer, store = 1, {}

    def keep(part):
        return lambda tensor, at: store.__setitem__(part, tensor.clone()) if at == layer else None

    def put(part):
        return lambda tensor, at: store[part] if at == layer else None

    parts = ("query", "key", "value")
    with edit_attention(model, **{part: keep(part) for part in (*parts, "pattern", "z")}):
        model(others)
    results = []
    for changed in (parts, ("pattern", "value"), ("z",)):
        with edit_attention(model, **{part: put(part) for part in changed}):
            results.append(model(tokens).logits)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    # A plain hook on the attention module does the same.
    module, output = locate(model, f"layers.{layer}.attn.out").module, []
    handle = module.register_forward_hook(lambda module, args, out: output.append(out[0]))
    model(others)
    handle.remove()
    handle = module.register_forward_hook(lambda module, args, out: (output[0], *out[1:]))
    expected = model(tokens).logits
    handle.remove()
    torch.testing.assert_close(results[2], expected)
    assert not torch.allclose(expected, model(tokens).logits)


def test_frozen_patterns_let_gradients_through_values_only():
    model, tokens = eager("llama"), tiny_tokens(batch=1, length=6)
    with edit_attention(model, pattern=lambda pattern, layer: pattern.detach()):
        model(tokens).logits[0, -1, 5].backward()
    for module in attention_modules(model):
        assert module.q_proj.weight.grad is None and module.k_proj.weight.grad is None
        assert module.v_proj.weight.grad.abs().max() > 0


@torch.no_grad()
def test_blocks_nest_and_the_inner_one_sees_the_outer():
    model, tokens = eager("gpt2"), tiny_tokens()
    seen = []
    with edit_attention(model, z=lambda z, layer: z * 0), edit_attention(model, z=lambda z, layer: seen.append(z)):
        model(tokens)
    assert len(seen) == 3 and not any(z.any() for z in seen)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "llama"])
def test_generate_under_an_edit(family):
    model, tokens = eager(family), tiny_tokens(batch=1, length=5)
    plain = model.generate(tokens, max_new_tokens=4, do_sample=False)
    with edit_attention(model):
        assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), plain)

    def silence(z, layer):
        return z * 0

    with edit_attention(model, z=silence):
        generated = model.generate(tokens, max_new_tokens=4, do_sample=False)
        ids = tokens
        for _ in range(4):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids[:, : generated.shape[1]])


@torch.no_grad()
def test_settings_come_back_after_an_error():
    model, tokens = tiny_model("gemma2"), tiny_tokens()
    before, plain = model.config._attn_implementation, model(tokens).logits
    with pytest.raises(RuntimeError, match="stop"), edit_attention(model, z=_fail):
        model(tokens)
    assert model.config._attn_implementation == before
    assert torch.equal(model(tokens).logits, plain)


def _fail(tensor, layer):
    raise RuntimeError("stop")


def test_attention_that_cannot_be_edited_is_refused():
    model = tiny_model("gpt2")
    model.config.reorder_and_upcast_attn = True
    with pytest.raises(TranscoderError, match="AttentionInterface"), edit_attention(model):
        pass


def test_functions_that_would_not_be_called_are_refused():
    model = tiny_model("llama")

    def compute(call):
        return call.run()[0]

    def same(value, layer):
        return value

    for other in ({"pattern": same}, {"z": same}):
        with (
            pytest.raises(TranscoderError, match="would not be called"),
            edit_attention(model, compute=compute, **other),
        ):
            pass
        for blocks in ([{"compute": compute}, other], [other, {"compute": compute}]):
            with edit_attention(model, **blocks[0]), edit_attention(model, **blocks[1]):
                with pytest.raises(TranscoderError, match="leaves out the patterns and outputs"):
                    model(tiny_tokens())
    with edit_attention(model, compute=compute, query=same):
        model(tiny_tokens())


def test_a_model_that_shares_the_config_of_an_edited_one():
    edited = tiny_model("llama")
    other = type(edited)(edited.config).eval()
    other.set_attn_implementation("eager")
    expected = other(tiny_tokens()).logits
    with edit_attention(edited, z=lambda z, layer: 0 * z):
        assert torch.equal(other(tiny_tokens()).logits, expected)
